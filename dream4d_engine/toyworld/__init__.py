"""A procedural world whose truth is known: captions, images, the score of a result, and an ideal denoiser."""
