"""Find and control the features inside text-to-music models."""
