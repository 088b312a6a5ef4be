"""How much a scene moves, measured once and told on a node."""

from __future__ import annotations

from dataclasses import replace

from ..dream4d_engine.mesh import MeshError
from ..dream4d_engine.surface import measure_motion
from .render import scene_on_device
from .session import interrupt_if_asked, say_on_node
from .sockets import SceneValue


def with_motion(value: SceneValue, node_id: str | None) -> tuple[SceneValue, str]:
    """Return the scene with what is known of its motion, and a line of that; measured where it wasn't, in seconds.

    How far that is stands on the node, and Cancel stops it.
    """

    def on_progress(share: float) -> None:
        interrupt_if_asked()
        say_on_node(f"looking how much it moves, {share:.0%}", node_id)

    if value.motion is None:
        try:
            with scene_on_device(value) as there:
                value = replace(value, motion=measure_motion(there, on_progress=on_progress))
        except MeshError as error:  # the scene itself is of use all the same
            return value, f"how much it moves can't be told: {error}"
    assert value.motion is not None  # it was measured just now
    return value, value.motion.line
