"""Diffusion models from folders in diffusers' format, seen as Denoisers, and what each is told about a camera."""
