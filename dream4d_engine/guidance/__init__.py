"""Guidance: what a diffusion model thinks of a picture, as a loss."""
