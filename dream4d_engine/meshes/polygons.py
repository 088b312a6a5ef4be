"""Polygons that are not convex, cut into triangles that stay within them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

_MOST = 512  # corners of a polygon whose ears are looked for: the search is cubic at worst


def cut_concave(places: np.ndarray, faces: np.ndarray, polygons: np.ndarray) -> None:
    """Mend fans [M, 3] over places [V, 3] in place: polygons [P, 2] are runs of them (first face, how many).

    A fan is right for a convex polygon alone; of others its triangles reach outside and overlap.
    """
    import numpy as np

    for n in np.unique(polygons[:, 1]).tolist():
        if not 2 <= n <= _MOST - 2:
            continue
        first = polygons[polygons[:, 1] == n, 0]
        rows = first[:, None] + np.arange(n)
        corners = np.concatenate((faces[first, :2], faces[rows, 2]), 1)  # [P, n + 2]
        points = places[corners].astype("f8")
        points -= points.mean(1, keepdims=True)
        whole = np.cross(points, np.roll(points, -1, 1)).sum(1)  # twice the area (Newell)
        turn = np.cross(points - np.roll(points, 1, 1), np.roll(points, -1, 1) - points)
        bends = (turn * whole[:, None]).sum(-1)
        hollow = (bends < -1e-9 * (whole * whole).sum(-1, keepdims=True)).any(1)
        for polygon in np.flatnonzero(hollow):
            faces[rows[polygon]] = corners[polygon][_ears(points[polygon], whole[polygon])]


def _ears(points: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """Triangles [n - 2, 3] of a polygon's corners [n, 3], by clipping ears (Meisters 1975)."""
    import numpy as np

    axis = int(np.abs(normal).argmax())
    flat = points[:, [(axis + 1) % 3, (axis + 2) % 3]] * np.array([np.sign(normal[axis]), 1.0])
    left, found = list(range(len(points))), []

    def area(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        return (b[..., 0] - a[..., 0]) * (c[..., 1] - a[..., 1]) - (b[..., 1] - a[..., 1]) * (c[..., 0] - a[..., 0])

    # mirrored where the normal points away, so that all turns to the left are convex
    while len(left) > 3:
        for k in range(len(left)):
            a, b, c = left[k - 1], left[k], left[(k + 1) % len(left)]
            others = flat[[i for i in left if i not in (a, b, c)]]
            sides = [area(flat[p], flat[q], others) for p, q in ((a, b), (b, c), (c, a))]
            if area(flat[a], flat[b], flat[c]) > 0 and not (np.stack(sides) >= 0).all(0).any():
                break
        else:
            k = 1  # it crosses itself: any cut is as good
        found.append((left[k - 1], left[k], left[(k + 1) % len(left)]))
        del left[k]
    return np.array([*found, tuple(left)])
