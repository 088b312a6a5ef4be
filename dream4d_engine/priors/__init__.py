"""Diffusion models from folders and checkpoints, seen as Denoisers, and what each is told about a camera."""
