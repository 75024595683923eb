"""Models: role tables of architectures, and how models are built."""
