"""A procedural world whose truth is known: captions, pictures, the score of a result, and an ideal denoiser."""
