"""The sentences of the toy world: "a red cube", "a red cube is jumping".

Grammar: [a | an | the] COLOR SHAPE [is MOTION], in upper or lower case, with an optional view suffix
(", front view") and an optional full stop, both of which say nothing about the object.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product

SHAPES = ("sphere", "cube", "cone", "cylinder", "torus", "snowman")

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.08, 0.08),
    "orange": (1.00, 0.52, 0.05),
    "yellow": (0.95, 0.90, 0.08),
    "green": (0.10, 0.72, 0.15),
    "cyan": (0.10, 0.85, 0.85),
    "blue": (0.12, 0.22, 0.95),
    "purple": (0.60, 0.12, 0.80),
    "white": (0.95, 0.95, 0.95),
}
"""RGB in [0, 1]. The hues of the seven coloured ones lie at least 28 degrees apart."""

MOTIONS = ("still", "jumping", "sliding", "stretching", "spinning", "swaying")

ARTICLES = ("a", "an", "the")
VIEW_WORDS = ("front", "side", "back", "overhead", "view")


def _check_word(kind: str, word: str, known: tuple[str, ...]) -> None:
    if word not in known:
        raise ValueError(f"the toy world knows no {kind} {word!r}; it knows {', '.join(known)}")


@dataclass(frozen=True)
class Caption:
    """One object and what it does. Unknown words are a ValueError."""

    color: str
    shape: str
    motion: str = "still"

    def __post_init__(self) -> None:
        _check_word("colour", self.color, tuple(COLORS))
        _check_word("shape", self.shape, SHAPES)
        _check_word("motion", self.motion, MOTIONS)

    @property
    def object_text(self) -> str:
        """The object alone: "a red cube"."""
        article = "an" if self.color[0] in "aeiou" else "a"
        return f"{article} {self.color} {self.shape}"

    @property
    def text(self) -> str:
        """The whole sentence: "a red cube is jumping", "a red cube is still"."""
        return f"{self.object_text} is {self.motion}"


def parse_caption(text: str) -> Caption:
    """Read a caption; without a motion it is still. A ValueError lists the words that are known."""
    body = re.sub(r",?\s+(front|side|back|overhead)\s+view\s*\.?\s*$", "", text.strip().lower())
    words = body.rstrip(".").split()
    if words and words[0] in ARTICLES:
        words = words[1:]
    if len(words) == 2 or (len(words) == 4 and words[2] == "is"):
        try:
            return Caption(words[0], words[1], words[3] if len(words) == 4 else "still")
        except ValueError as error:
            raise ValueError(f"cannot read the caption {text!r}: {error}") from None
    raise ValueError(
        f"cannot read the caption {text!r}: write 'a COLOR SHAPE' or 'a COLOR SHAPE is MOTION' with "
        f"COLOR = {', '.join(COLORS)}; SHAPE = {', '.join(SHAPES)}; MOTION = {', '.join(MOTIONS)}"
    )


def as_caption(caption: Caption | str) -> Caption:
    """Return the caption itself, or the one that the text says."""
    return parse_caption(caption) if isinstance(caption, str) else caption


def vocabulary() -> tuple[str, ...]:
    """Every word that a caption or its view suffix may hold, each once, in a fixed order."""
    return (*ARTICLES, "is", *COLORS, *SHAPES, *MOTIONS, *VIEW_WORDS)


def all_captions(motions: tuple[str, ...] = MOTIONS) -> list[Caption]:
    """Every caption with one of `motions`; `all_captions(("still",))` are the objects."""
    return [Caption(color, shape, motion) for color, shape, motion in product(COLORS, SHAPES, motions)]
