"""A scene as a mesh's file: GLB, moving if the scene does, or one of its moments as OBJ, PLY or STL."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from ..cameras import film_times
from ..fields.encodings import require_range
from ..machine import write_atomically
from ..mesh import Mesh, MeshError, face_normals, vertex_normals
from ..scene import Scene
from ..surface import (
    Surface,
    SurfaceOptions,
    Tracks,
    bake_texture,
    check_libraries,
    extract_surface,
    folds_note,
    outside_note,
    outside_share,
    track_vertices,
)
from .gltf import GltfOptions, glb_bytes, y_up
from .images import save_image, to_bytes

MeshFormat = Literal["glb", "obj", "ply", "stl"]
MESH_FORMATS: tuple[MeshFormat, ...] = get_args(MeshFormat)
ROOM = 2**26
"""Bytes on the disk that there should be before a file is made: how large it becomes is known at the end."""


def mesh_format(path: Path) -> MeshFormat | None:
    """The format that a path's suffix names, or None."""
    return next((known for known in MESH_FORMATS if path.suffix.lower() == f".{known}"), None)


@dataclass(frozen=True)
class ExportOptions:
    """What of a scene goes into a mesh's file, and how."""

    n_times: int = 24
    """Moments that the surface is followed through; a GLB of 1 is still."""
    time: float = 0.0
    """The moment that a still file shows."""
    texture: int = 0
    """Side of a texture to bake, in texels; 0: colours at the vertices."""
    surface: SurfaceOptions = field(default_factory=SurfaceOptions)
    """How the surface is made."""
    gltf: GltfOptions = field(default_factory=GltfOptions)
    """How a GLB is written."""

    def __post_init__(self) -> None:
        require_range("n_times", self.n_times, 1, 1000)
        require_range("time", self.time, 0.0, 1.0)
        if self.texture:
            require_range("texture", self.texture, 16, 8192)


@dataclass(frozen=True)
class SceneMesh:
    """A scene's mesh, and how far it may be trusted."""

    mesh: Mesh
    surface: Surface
    tracks: Tracks | None
    """None where nothing was followed."""
    outside: float = 0.0
    """The share of vertices' places in time outside of the scene's box (see `outside_share`)."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for people."""
        folds = "" if self.tracks is None else folds_note(self.tracks.unconverged)
        return tuple(filter(None, (*self.surface.notes, folds, outside_note(self.outside, "the vertices'"))))


@dataclass(frozen=True)
class ExportReport:
    """What was written."""

    path: Path
    n_bytes: int
    n_keys: int
    """Key frames of the animation, 0 without one."""
    made: SceneMesh


def clip_times(scene: Scene, n_times: int) -> Tensor:
    """The moments [n_times] of an animated mesh: 0 and 1 among them, which of a loop are one. MeshError for too few."""
    if scene.loops and n_times < 3:
        raise MeshError(
            f"the motion is a loop, whose first and last moment are one, so {n_times} moments show nothing of it: "
            "follow it through 3 or more"
        )
    return film_times(n_times, device=scene.device)


def scene_mesh(
    scene: Scene, options: ExportOptions, moving: bool = True, on_progress: Callable[[float], None] | None = None
) -> SceneMesh:
    """Make a scene's mesh: with `moving` (if it moves at all) as one topology over all times, else at one moment."""
    report = on_progress or (lambda share: None)
    check_libraries(options.surface.n_faces, options.texture)
    moving = moving and scene.deformation is not None and options.n_times > 1
    times = clip_times(scene, options.n_times) if moving else None  # refuses before the work
    frame = None if moving else options.time
    work = (1.0, 3.0 if moving else 0.0, 2.0 if options.texture else 0.0)  # what the parts take, about
    first, second = work[0] / sum(work), (work[0] + work[1]) / sum(work)
    surface = extract_surface(scene, frame, options.surface, partial(_between, report, 0.0, first))
    mesh, tracks = surface.mesh, None
    if times is not None:
        on_track = partial(_between, report, first, second)
        tracks = track_vertices(scene, mesh.vertices, mesh.faces, times, on_track)
    order = torch.arange(len(mesh.vertices), device=mesh.vertices.device)
    if options.texture:
        mesh, order = bake_texture(scene, frame, mesh, options.texture, partial(_between, report, second, 1.0))
    if tracks is not None:
        over_time = tracks.positions[:, order]
        mesh = replace(mesh, vertices=over_time[0], normals=None, tracks=over_time, times=times)
    report(1.0)
    outside = 0.0 if tracks is None else outside_share(tracks.positions, scene.config.radius)
    return SceneMesh(mesh, surface, tracks, outside)


def _between(report: Callable[[float], None], start: float, end: float, share: float) -> None:
    report(start + (end - start) * share)


def export_scene(
    scene: Scene,
    path: Path | str,
    options: ExportOptions | None = None,
    form: MeshFormat | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> ExportReport:
    """Write a scene as a mesh; `form` None: as the path's suffix says.

    Raises MeshError where there is no mesh to be had, and WriteError where the file can't be written.
    """
    path, options = Path(path), options or ExportOptions()
    form = form or mesh_format(path)
    if form is None or form not in MESH_FORMATS:
        raise MeshError(f"{path.name} names no format for meshes: {', '.join(MESH_FORMATS)}")
    made = scene_mesh(scene, options, form == "glb", on_progress)
    if form == "glb":
        data, n_keys = glb_bytes(made.mesh, options.gltf)
        write_atomically(path, data)
    else:
        n_keys = 0
        save_mesh(path, made.mesh, form)
    return ExportReport(path, path.stat().st_size, n_keys, made)


def save_mesh(path: Path, mesh: Mesh, form: Literal["obj", "ply", "stl"]) -> None:
    """Write a mesh at its first moment. OBJ is y up as GLB is, PLY and STL are z up; all say colours but STL.

    An OBJ with a texture has its material and image beside it, as .mtl and .png.
    """
    {"obj": _save_obj, "ply": _save_ply, "stl": _save_stl}[form](path, mesh)


def _save_obj(path: Path, mesh: Mesh) -> None:
    import numpy as np

    places, normals = (y_up(x).cpu().numpy() for x in (mesh.vertices, _normals_of(mesh)))
    lines = [f"mtllib {path.stem}.mtl", "usemtl surface"] if mesh.texture is not None else []
    if mesh.colors is not None:  # as most programs read them: behind the place
        rows = np.concatenate((places, mesh.colors.cpu().numpy()), 1)
        lines += ["v {:.6g} {:.6g} {:.6g} {:.4f} {:.4f} {:.4f}".format(*row) for row in rows.tolist()]
    else:
        lines += ["v {:.6g} {:.6g} {:.6g}".format(*row) for row in places.tolist()]
    lines += ["vn {:.4f} {:.4f} {:.4f}".format(*row) for row in normals.tolist()]
    corner = "{0}//{0}"
    if mesh.uv is not None:
        corner = "{0}/{0}/{0}"
        lines += [f"vt {u:.6f} {1 - v:.6f}" for u, v in mesh.uv.tolist()]  # OBJ counts from the lower edge
    lines += ["f " + " ".join(corner.format(i) for i in face) for face in (mesh.faces + 1).tolist()]
    if mesh.texture is not None:
        save_image(path.with_suffix(".png"), mesh.texture)
        material = f"newmtl surface\nKd 1 1 1\nillum 0\nmap_Kd {path.stem}.png\n"
        write_atomically(path.with_suffix(".mtl"), material.encode())
    write_atomically(path, ("\n".join(lines) + "\n").encode())


def _save_ply(path: Path, mesh: Mesh) -> None:
    import numpy as np

    columns = [(f"property float {name}", "<f4") for name in ("x", "y", "z", "nx", "ny", "nz")]
    values = [*mesh.vertices.cpu().numpy().T, *_normals_of(mesh).cpu().numpy().T]
    if mesh.colors is not None:
        columns += [(f"property uchar {name}", "u1") for name in ("red", "green", "blue")]
        values += [*to_bytes(mesh.colors[None])[0].T]
    if mesh.uv is not None:
        columns += [(f"property float {name}", "<f4") for name in ("s", "t")]
        values += [mesh.uv[:, 0].cpu().numpy(), 1 - mesh.uv[:, 1].cpu().numpy()]
    vertices = np.empty(len(mesh.vertices), [(line.split()[-1], kind) for line, kind in columns])
    for (line, _), column in zip(columns, values, strict=True):
        vertices[line.split()[-1]] = column
    faces = np.empty(len(mesh.faces), [("n", "u1"), ("corners", "<i4", 3)])
    faces["n"], faces["corners"] = 3, mesh.faces.cpu().numpy()
    header = [
        "ply",
        "format binary_little_endian 1.0",
        f"element vertex {len(vertices)}",
        *(line for line, _ in columns),
    ]
    header += [f"element face {len(faces)}", "property list uchar int vertex_indices", "end_header"]
    write_atomically(path, ("\n".join(header) + "\n").encode() + vertices.tobytes() + faces.tobytes())


def _save_stl(path: Path, mesh: Mesh) -> None:
    import numpy as np

    rows = np.zeros(len(mesh.faces), [("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
    outward = torch.nn.functional.normalize(face_normals(mesh.vertices, mesh.faces), dim=-1)
    rows["normal"], rows["corners"] = outward.cpu().numpy(), mesh.vertices[mesh.faces].cpu().numpy()
    write_atomically(path, b"dream4d".ljust(80, b"\0") + np.uint32(len(rows)).astype("<u4").tobytes() + rows.tobytes())


def _normals_of(mesh: Mesh) -> Tensor:
    return vertex_normals(mesh.vertices, mesh.faces) if mesh.normals is None else mesh.normals
