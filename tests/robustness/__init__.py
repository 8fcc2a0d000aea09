"""Bad and odd inputs."""
