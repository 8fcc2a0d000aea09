"""The `musicscope` command: generate, find-concept, plan, studio."""
