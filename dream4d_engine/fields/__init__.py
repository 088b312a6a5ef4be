"""The learned functions a scene is made of: encodings, radiance, deformation, background."""
