"""What is changed of a trained motion: how strong it is, what keeps still, and when what of it is shown.

A trained motion is a backward warp: what is seen at the place p and time t lies at x = p + d(p, t) at rest. An edit
moves x only by the share s(x) of its way, to y = x + s(x) (p - x): 0 is still, 1 as trained. Scaling d at y would ask
the motion where the object never was; so p is sought with y = p + (1 - s(x)) d(p, t), and y is looked up at its x.
Places u are in the [0, 1] box, points in the world's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..documents import describe
from .encodings import require_range
from .stencil import Stencil, smooth_step

MOST_STRENGTH = 2.0
_MOST_PARTS = 64  # boxes, masks, changes of time: more are a slip, and each costs at every point
_PARTS = (
    ("frozen boxes", "freeze one large box instead of several small ones"),
    ("masks", "paint them into one"),
    ("changes of time", "say them in one remap of the trained scene"),
)
"""What there may be several of in an edit: frozen, masks, times; and the way to fewer."""
_MOST_KEYS = 1000
_ROUNDS = 12  # of the search for p; trained motions need 3 to 8
_CLOSE = 1e-4  # of the box's side: a residual that need not get smaller, a hundredth of what normals are taken over
_LONGEST = 0.2  # of the box's side, the longest step of a round

Corner = tuple[float, float, float]
Displacement = Callable[[Tensor, Tensor], Tensor]
"""(places [S, 3] in [0, 1], times [S]) -> displacements [S, 3], as trained."""


@dataclass(frozen=True)
class Box:
    """What lies in it at rest keeps still; within `border` outside of it the motion sets in. World units."""

    low: Corner
    high: Corner
    border: float = 0.3

    def __post_init__(self) -> None:
        for axis, low, high in zip("xyz", self.low, self.high, strict=True):
            require_range(f"a box's {axis}", low, -1e3, 1e3)
            require_range(f"a box's {axis}", high, -1e3, 1e3)
            if not low < high:
                raise ValueError(f"a box must have its lower corner first, got {axis} from {low:g} to {high:g}")
        require_range("border", self.border, 0.001, 1e3)

    def moves(self, points: Tensor) -> Tensor:
        """[S, 3] -> the share [S] of its way that each goes: 0 in the box, 1 beyond the border."""
        low, high = points.new_tensor(self.low), points.new_tensor(self.high)
        outside = torch.maximum(low - points, points - high).clamp_min(0).norm(dim=-1)
        return smooth_step(outside / self.border)


@dataclass(frozen=True)
class TimeMap:
    """Which moment of the animation is shown when: `keys` of where in a play one is, by speed and there-and-back."""

    speed: float = 1.0  # plays in the time of one
    ping_pong: bool = False  # a play goes there and back
    keys: tuple[tuple[float, float], ...] = ()  # (place in the play, moment shown), linear between; none: the same

    def __post_init__(self) -> None:
        require_range("speed", self.speed, 0.01, 100.0)
        if not self.keys:
            return
        require_range("the number of a remap's keys", len(self.keys), 2, _MOST_KEYS)
        for out, shown in self.keys:
            require_range("a remap's times", out, 0.0, 1.0)
            require_range("a remap's times", shown, 0.0, 1.0)
        for (before, _), (after, _) in zip(self.keys, self.keys[1:], strict=False):
            if not before < after:
                raise ValueError(f"a remap's first numbers must grow from key to key, got {before:g} before {after:g}")

    def __call__(self, times: Tensor) -> Tensor:
        """Times [S] of what is shown -> moments [S] of the animation, both in [0, 1]."""
        plays = times * self.speed
        # 1, and not 0, at the end of a play: the last frame of a take is the animation's last
        place = torch.where(plays > 0, plays - plays.ceil() + 1, plays)
        if self.ping_pong:
            place = 1 - (1 - 2 * place).abs()
        if not self.keys:
            return place.clamp(0, 1)
        outs, shown = place.new_tensor(self.keys).T.contiguous()
        after = torch.searchsorted(outs, place.contiguous()).clamp(1, len(outs) - 1)
        share = ((place - outs[after - 1]) / (outs[after] - outs[after - 1])).clamp(0, 1)
        return torch.lerp(shown[after - 1], shown[after], share)


@dataclass(frozen=True)
class MotionEdit:
    """What is changed of a trained motion. The default is nothing."""

    strength: float = 1.0  # 0 is still, 1 as trained
    frozen: tuple[Box, ...] = ()
    masks: tuple[Stencil, ...] = ()  # what lies behind their white at rest keeps still, too
    times: tuple[TimeMap, ...] = ()  # the first is asked last: later edits look at what earlier ones show

    def __post_init__(self) -> None:
        require_range("the motion's strength", self.strength, 0.0, MOST_STRENGTH)
        for parts, (what, way) in zip((self.frozen, self.masks, self.times), _PARTS, strict=True):
            if len(parts) > _MOST_PARTS:
                raise ValueError(f"{len(parts)} {what} are more than {_MOST_PARTS}: {way}")

    @property
    def keeps_places(self) -> bool:
        """Whether things go as they were trained to, though perhaps at other times."""
        return self.strength == 1 and not self.frozen and not self.masks

    @property
    def is_nothing(self) -> bool:
        """Whether nothing is changed at all."""
        return self.keeps_places and all(one == TimeMap() for one in self.times)

    def then(self, later: MotionEdit) -> MotionEdit:
        """Return one edit that does what both do, one after the other. ValueError where that is too strong."""
        strength = self.strength * later.strength
        if strength > MOST_STRENGTH:
            most = MOST_STRENGTH / self.strength
            raise ValueError(
                f"the motion already has {self.strength:g} times its strength, and {later.strength:g} times that is "
                f"{strength:g}: more than {MOST_STRENGTH:g} tears it, so ask for {most:g} at most"
            )
        times, more = (tuple(one for one in edit.times if one != TimeMap()) for edit in (self, later))
        both = (self.frozen, later.frozen), (self.masks, later.masks), (times, more)
        for (ours, theirs), (what, way) in zip(both, _PARTS, strict=True):
            n = len(ours) + len(theirs)
            if n > _MOST_PARTS:
                raise ValueError(
                    f"the motion already has {len(ours)} {what}, and with {len(theirs)} it would have {n}, more than "
                    f"{_MOST_PARTS}: {way}"
                )
        return MotionEdit(strength, self.frozen + later.frozen, self.masks + later.masks, times + more)

    def moments(self, times: Tensor) -> Tensor:
        """Times [S] of what is shown -> moments [S] of the trained motion."""
        for one in reversed(self.times):
            times = one(times)
        return times

    def share(self, points: Tensor) -> Tensor:
        """Points [S, 3] of the world, at rest -> the share [S] of its way that each goes."""
        share = points.new_full(points.shape[:-1], self.strength)
        for box in self.frozen:
            share = share * box.moves(points)
        for mask in self.masks:
            share = share * mask.moves(points)
        return share

    def places(self, rest: Tensor, moved: Tensor, radius: float) -> Tensor:
        """Where things [..., 3] at rest are, if the trained motion has them at `moved`; both in the [0, 1] box."""
        if self.keeps_places:
            return moved
        return rest + self.share((2 * rest - 1) * radius)[..., None] * (moved - rest)

    def displacement(self, trained: Displacement, u: Tensor, moments: Tensor, radius: float) -> Tensor:
        """Places u [S, 3] as they are seen, moments [S] -> displacements [S, 3] to where they lie at rest.

        Where the motion tears something lies at no place or at several: the nearest one found is taken. Gradients reach
        the trained displacement, not the search.
        """
        if self.keeps_places:
            return trained(u, moments)
        if self.strength == 0:
            return torch.zeros_like(u)

        def share(rest: Tensor) -> Tensor:
            return self.share((2 * rest - 1) * radius)[:, None]

        def seen(p: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            """Where what the trained motion has at p is seen now, and how far that is from where it lies at rest."""
            d = trained(p.clamp(0, 1), moments[rows])
            way = share(p + d) * d
            return p + d - way, way

        with torch.no_grad():
            p, way = _inverse(seen, u)
        if torch.is_grad_enabled():
            _, way = seen(p, torch.arange(len(p), device=p.device))
        # the way, not x - u: the same where p was found, and less far off where not; what is frozen stays exactly
        return torch.where(share(u) > 0, way, torch.zeros_like(way))

    def in_words(self) -> str:
        """In words, for people."""
        parts = [f"motion x {self.strength:g}"] if self.strength != 1 else []
        for box in self.frozen:
            corners = (",".join(f"{c:g}" for c in corner) for corner in (box.low, box.high))
            parts.append(f"frozen from {' to '.join(corners)} (border {box.border:g})")
        parts += [f"frozen by a mask (border {mask.border:g})" for mask in self.masks]
        for one in self.times:
            parts += [f"speed {one.speed:g}"] if one.speed != 1 else []
            parts += ["there and back"] if one.ping_pong else []
            parts += [f"time {','.join(f'{a:g}:{b:g}' for a, b in one.keys)}"] if one.keys else []
        return "; ".join(parts) or "nothing"


def parse_box(text: str, border: float = Box.border) -> Box:
    """A box from "x0,y0,z0,x1,y1,z1", its lower and its upper corner."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 6:
        raise ValueError(f"a box is six numbers x0,y0,z0,x1,y1,z1, got {describe(text)}")
    try:
        return Box((numbers[0], numbers[1], numbers[2]), (numbers[3], numbers[4], numbers[5]), border)
    except ValueError as error:
        raise ValueError(f"{error} in {describe(text)}") from None


def parse_boxes(text: str, border: float = Box.border) -> tuple[Box, ...]:
    """Boxes, one a line."""
    return tuple(parse_box(line, border) for line in text.splitlines() if line.strip())


def parse_keys(text: str) -> tuple[tuple[float, float], ...]:
    """A remap's keys from "0:0,0.5:0.2,1:1"; none from an empty text."""
    try:
        pairs = [tuple(float(part) for part in pair.split(":")) for pair in text.split(",")] if text.strip() else []
    except ValueError:
        pairs = [()]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"a remap is pairs of times out:in, as 0:0,0.5:0.2,1:1, got {describe(text)}")
    return tuple((pair[0], pair[1]) for pair in pairs)


UNCHANGED = MotionEdit()
"""The motion as it was trained."""


def _inverse(function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], goals: Tensor) -> tuple[Tensor, Tensor]:
    """Find p [S, 3] with function(p, rows)[0] = goals, from p = goals on, or as near to them as it comes.

    Broyden's first method (1965): a slope per point, learnt from the steps. Returns p, and function(p, rows)[1].
    """
    best, said, least = goals.clone(), goals.clone(), torch.full_like(goals[:, 0], math.inf)
    rows, p = torch.arange(len(goals), device=goals.device), goals
    found, also = function(p, rows)
    off = found - goals
    inverse = torch.eye(3, device=goals.device, dtype=goals.dtype).expand(len(goals), 3, 3)  # of the slope
    for round_ in range(_ROUNDS + 1):
        size = off.norm(dim=-1)
        better = ~(size >= least[rows])  # what is not a number is taken, too, and seen by all
        which = rows[better]
        best[which], said[which], least[which] = p[better], also[better], size[better]
        open_ = (size > _CLOSE).nonzero()[:, 0]
        if not len(open_) or round_ == _ROUNDS:
            break
        rows, p, off, inverse = rows[open_], p[open_], off[open_], inverse[open_]
        step = -_times(inverse, off)
        step = step * (_LONGEST / step.norm(dim=-1, keepdim=True).clamp_min(_LONGEST))
        p = p + step
        found, also = function(p, rows)
        now = found - goals[rows]
        change = _times(inverse, now - off)
        known = _times(inverse.mT, step)[:, None]
        scale = (step * change).sum(-1)
        safe = scale.abs() > 1e-3 * step.square().sum(-1)
        update = (step - change)[..., None] * known / torch.where(safe, scale, torch.ones_like(scale))[:, None, None]
        inverse = inverse + torch.where(safe[:, None, None], update, torch.zeros_like(update))
        off = now
    return best, said


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """[S, 3, 3] times [S, 3]; as a sum, since a matrix product would be in half precision where networks are."""
    return (matrices * vectors[:, None]).sum(-1)
