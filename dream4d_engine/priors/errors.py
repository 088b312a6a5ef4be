"""What goes wrong with models."""

from __future__ import annotations

from ..documents import first_line, shortened

_LONGEST = 200
_ADVICE = ("trust_remote_code", "weights_only", "http://", "https://", "token=")


class PriorError(ValueError):
    """A model that cannot be used or had, or a prompt that it does not know."""


def reason(error: BaseException) -> str:
    """What a library says of its error, short; its name alone where it would give advice that is bad or long here."""
    text = first_line(error)
    return type(error).__name__ if any(word in text for word in _ADVICE) else shortened(text, _LONGEST)
