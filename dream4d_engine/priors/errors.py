"""What goes wrong with models."""

from __future__ import annotations


class PriorError(ValueError):
    """A model that cannot be used or had, or a prompt that it does not know."""
