"""dream4d: from a sentence to a moving object, by score distillation (after Dream-in-4D, arXiv 2311.16854)."""

__version__ = "0.1.0"
