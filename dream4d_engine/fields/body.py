"""The motion of an object as a whole: how it turns, is stretched and goes, as a smooth function of time.

What a local field has to learn at every point anew (that a spin goes round, that a jump is the same everywhere) is
nine numbers of a moment here, which every pixel of a frame tells of.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_MOMENTS = 256  # that means over time are taken of
_PARTS = (3, 6, 2, 1)  # of the twelve numbers: turn, stretch, shift to the sides, shift upwards
_DOUBT = (0.25, 0.4, 0.15, 0.15)
"""How large, as a root mean square over time, what a prior says of a part by chance may become."""
_LEAST = 0.03  # of a motion that is shown however small it is: of none that is shown there would be no gradient


class BodyMotion(nn.Module):
    """A backward affine map of each moment, (I + S) R (v - d) of offsets v from the box's middle.

    R turns by a vector (Rodrigues), S is symmetric, d is a shift; uniform cubic B-splines of time make them of `knots`
    [n_knots, 12] (turn in radians, S as xx yy zz xy xz yz, shift in half sides of the box). All but the shift upwards
    are less their mean over time, and that is less its value at time 0: a prior which is told no camera can't say
    which way an object faces, and what it would rather have it look like at all moments, or nearer or farther, is not
    motion. What rises begins on its ground. Of a loop the knots lie on a circle.

    Of each part, as large as q in its mean square over time, the share q / (q + doubt^2) is shown, as by a Wiener
    filter: what a prior's answers do to the knots by chance hardly moves anything, what they agree on is shown almost
    as it is, and is trained with the share in it, so that nothing of its size is lost.
    """

    taken: Tensor
    doubt: Tensor
    counted: Tensor
    seen: Tensor

    def __init__(self, n_knots: int, loop: bool = False) -> None:
        super().__init__()
        self.loop = loop
        self.doubted = 1.0  # share of the doubt, less while nothing is known yet
        self.knots = nn.Parameter(torch.zeros(n_knots, 12))
        moments = torch.linspace(0, 1, _MOMENTS + 1)[:_MOMENTS] if loop else torch.linspace(0, 1, _MOMENTS)
        mean, start = self._basis(moments).mean(0), self._basis(torch.zeros(1))[0]
        # [n_knots, 12], what of each knot is taken away; it follows from the rest, so it is in no file
        taken = torch.cat((mean[:, None].expand(-1, 11), start[:, None]), -1)
        self.register_buffer("taken", taken, persistent=False)
        part = torch.tensor([number for number, n in enumerate(_PARTS) for _ in range(n)])
        doubt = [value for value, n in zip(_DOUBT, _PARTS, strict=True) for _ in range(n)]
        self.register_buffer("doubt", torch.tensor(doubt), persistent=False)
        # [12, 12], which numbers' squares make a part's: of the stretch's nine, xy, xz and yz are there twice
        twice = torch.tensor([1.0] * 6 + [2.0] * 3 + [1.0] * 3)
        self.register_buffer("counted", (part[:, None] == part).float() * twice, persistent=False)
        # [32, n_knots], of the moments that a part's size is looked at
        self.register_buffer("seen", self._basis(moments[:: _MOMENTS // 32]), persistent=False)

    def reset(self) -> None:
        """Start afresh: nothing moves."""
        with torch.no_grad():
            self.knots.zero_()

    def at(self, times: Tensor) -> Tensor:
        """The twelve numbers [S, 12] of moments [S] in [0, 1], of a loop any."""
        still = (self.taken * self.knots).sum(0)
        # [12], the mean square of each number's part
        size = self.counted @ (self.seen @ self.knots - still).square().mean(0) + 1e-12
        doubt = (self.doubted * self.doubt).square()
        return (size + _LEAST * doubt) / (size + (1 + _LEAST) * doubt) * (self._basis(times) @ self.knots - still)

    def _basis(self, times: Tensor) -> Tensor:
        """What each knot has of moments [S]: [S, n_knots], in sum 1."""
        n = len(self.knots)
        place = times.remainder(1)[:, None] * n if self.loop else times[:, None] * (n - 3) + 1
        away = (place - torch.arange(n, device=times.device)).abs()
        if self.loop:
            away = torch.minimum(away, n - away)
        # the cubic B-spline: 2/3 in its middle, 1/6 a knot further, 0 from two on
        near = (4 - 6 * away**2 + 3 * away**3) / 6
        return torch.where(away < 1, near, (2 - away).clamp_min(0) ** 3 / 6)

    def forward(self, u: Tensor, times: Tensor, share: float = 1.0) -> Tensor:
        """Where u [S, 3] of the unit box come from at times [S], both in [0, 1]; it may lie outside.

        `share`: of the turn, the stretch and the shift, so that half a turn is a turn by half the angle.
        """
        turn, along, across, shift = (share * self.at(times)).split(3, -1)
        v = u - 0.5 - shift / 2
        angle = (turn.square().sum(-1, keepdim=True) + 1e-12).sqrt()
        sine, half = torch.sin(angle) / angle, torch.sin(angle / 2) / angle
        dot = (turn * v).sum(-1, keepdim=True)
        v = torch.cos(angle) * v + sine * torch.linalg.cross(turn, v) + 2 * half**2 * dot * turn
        x, y, z = v.unbind(-1)
        xy, xz, yz = across.unbind(-1)
        stretched = torch.stack((xy * y + xz * z, xy * x + yz * z, xz * x + yz * y), -1)
        return v + along * v + stretched + 0.5
