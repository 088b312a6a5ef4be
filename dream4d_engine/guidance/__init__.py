"""Guidance: what a diffusion model thinks of an image, as a loss."""
