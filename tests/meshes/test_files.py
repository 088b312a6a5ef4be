"""OBJ, PLY and STL as models, meshes from memory, and where models are put."""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from gltf_files import png

from dream4d_engine.assets import config_from_dict
from dream4d_engine.export import glb_bytes, save_mesh
from dream4d_engine.export.gltf import y_up
from dream4d_engine.mesh import Mesh, MeshError, vertex_normals
from dream4d_engine.meshes import Placement, files_beside, model_from_tensors, place, read_model

PLACES = torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 2, 0], [0, 2, 0], [0, 0, 3]])
FACES = torch.tensor([[0, 1, 2], [0, 2, 3], [0, 4, 1], [3, 4, 0], [1, 4, 2], [2, 4, 3]])


def box(textured: bool) -> Mesh:
    generator = torch.Generator().manual_seed(0)
    uv, colors = torch.rand(5, 2, generator=generator), torch.rand(5, 3, generator=generator)
    texture = torch.rand(4, 6, 3, generator=generator)
    normals = vertex_normals(PLACES, FACES)
    if textured:
        return Mesh(PLACES, FACES, normals, uv=uv, texture=texture)
    return Mesh(PLACES, FACES, normals, colors)


@pytest.mark.parametrize("textured", [False, True])
@pytest.mark.parametrize("form", ["obj", "ply", "stl"])
def test_what_we_write_is_read_again(tmp_path, form: str, textured: bool) -> None:
    mesh = box(textured)
    save_mesh(tmp_path / f"box.{form}", mesh, form)
    model = read_model(tmp_path / f"box.{form}")
    wanted = y_up(mesh.vertices) if form == "obj" else mesh.vertices
    assert model.source.format == form and model.source.name == f"box.{form}" and model.parts == ()
    if form == "stl":  # each face has its own
        assert torch.equal(model.mesh.vertices, wanted[FACES].reshape(-1, 3)) and len(model.mesh.faces) == 6
        return
    assert torch.allclose(model.mesh.vertices, wanted) and torch.equal(model.mesh.faces, FACES)
    assert torch.allclose(model.mesh.normals, y_up(mesh.normals) if form == "obj" else mesh.normals, atol=1e-4)
    if textured:
        assert torch.allclose(model.mesh.uv, mesh.uv, atol=1e-6)
    else:
        assert torch.allclose(model.mesh.colors, mesh.colors, atol=0.003)
    if textured and form == "obj":
        (used,) = model.face_material.unique().tolist()
        assert torch.equal(model.materials[used].image[..., :3], (mesh.texture * 255).round().byte())


def written(tmp_path: Path, name: str, content: str | bytes) -> Path:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return tmp_path / name


def test_obj_counts_from_the_end_of_what_there_is(tmp_path) -> None:
    lines = "v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nf -4 -3 -2 -1\nv 5 5 5\nv 6 5 5\nv 6 6 5\nf -3/ -2// -1\n"
    model = read_model(written(tmp_path, "a.obj", lines))
    assert model.mesh.faces.tolist() == [[0, 1, 2], [0, 2, 3], [4, 5, 6]] and len(model.mesh.vertices) == 7


def test_obj_keeps_its_order_where_coordinates_are_several(tmp_path) -> None:
    lines = "v 0 0 0\nv 1 0 0\nv 1 1 0\nv 9 9 9\nvt 0 0\nvt 1 0\nvt 1 1\nvt .5 .25\nf 3/3 1/1 2/2\nf 1/4 2/2 3/3\n"
    model = read_model(written(tmp_path, "a.obj", lines))
    assert model.mesh.vertices[:, 0].tolist() == [0, 0, 1, 1, 9]  # the first one twice, beside itself; none is dropped
    assert model.mesh.faces.tolist() == [[3, 0, 2], [1, 2, 3]] and model.mesh.uv[1].tolist() == [0.5, 0.75]


def test_obj_materials(tmp_path) -> None:
    (tmp_path / "my paint.png").write_bytes(png((1, 2, 3)))
    mtl = (
        "newmtl a\nKd 0.5 0.25 0\nd 0.5\nnewmtl b c\nKd 0 0 0\nmap_Kd my paint.png\nnewmtl d\nmap_Kd -s 1 1 1 no.png\n"
    )
    written(tmp_path, "a.mtl", mtl)
    corners = "v 0 0 0\nv 1 0 0\nv 1 1 0\nvt 0 0\n"
    faces = "".join(f"usemtl {name}\nf 1/1 2/1 3/1\n" for name in ("b c", "a", "d", "e"))
    model = read_model(written(tmp_path, "a.obj", f"mtllib a.mtl\r\n{corners}{faces}l 1 2\n"))
    names = [model.materials[k].name for k in model.face_material.tolist()]
    assert names == ["b c", "a", "d", "e"]
    by_name = {material.name: material for material in model.materials}
    assert by_name["a"].color == (0.5, 0.25, 0, 1) and by_name["b c"].color == (1, 1, 1, 1)
    assert by_name["b c"].image[0, 0].tolist() == [1, 2, 3, 255] and by_name["d"].image is None
    notes = " | ".join(model.notes)
    assert all(
        part in notes
        for part in ("points and lines", "material a lets light", "'no.png' is not beside", "material e is not")
    )


@pytest.mark.parametrize(
    "line",
    [
        r"map_Kd C:\work\my paint.png",
        "map_Kd /Users/somebody/my paint.png",
        "map_Kd ../maps/my paint.png",
        "map_Kd MY Paint.PNG",
        "map_kd -s 1 1 1 -o 0 0 -clamp on my paint.png",
    ],
)
def test_obj_textures_that_name_the_makers_disk(tmp_path, line: str) -> None:
    (tmp_path / "my paint.png").write_bytes(png((1, 2, 3)))
    written(tmp_path, "a.mtl", f"newmtl a\n{line}\n")
    corners = "v 0 0 0\nv 1 0 0\nv 1 1 0\nvt 0 0\nusemtl a\nf 1/1 2/1 3/1\n"
    for library in ("a.mtl", "none.mtl a.mtl", "/Users/somebody/a.mtl"):
        material = read_model(written(tmp_path, "a.obj", f"\ufeffmtllib {library}\n{corners}")).materials[1]
        assert material.image is not None and material.image[0, 0].tolist() == [1, 2, 3, 255]


def test_obj_materials_that_are_none_leave_the_model(tmp_path) -> None:
    mtl = f"newmtl a\nKd spectral a.rfl\nTr x\nmap_Kd {'x' * 5000}.png\nnewmtl b\nKd 2 -1 nan\nmap_Kd http://x/y.png\n"
    written(tmp_path, "a.mtl", mtl)
    lines = "mtllib a.mtl\nv 0 0 0 # one\nv 1 0 0\nv 1 1 0\nvn nan nan nan\nusemtl b\nf 1//1 2//1 3//1 # a face\n"
    model = read_model(written(tmp_path, "a.obj", lines))
    assert model.materials[1].color == (1, 0, 0, 1) and model.mesh.normals is None
    notes = " | ".join(model.notes)
    assert all(part in notes for part in ("'Kd spectral a.rfl'", "'Tr x'", "'http://x/y.png' is not beside", "normals"))


def test_colors_of_255_are_known_by_their_size(tmp_path) -> None:
    rows = "0 0 0 255 0 0\n1 0 0 0 127.5 0\n1 1 0 0 0 51\n"
    ply = PLY.format("ascii", 3, 1).replace(
        "element face", "property float red\nproperty float green\nproperty float blue\nelement face"
    )
    obj = "".join(f"v {row}\n" for row in rows.splitlines())
    for name, text in (("a.obj", f"{obj}f 1 2 3\n"), ("a.ply", f"{ply}{rows}3 0 1 2\n")):
        model = read_model(written(tmp_path, name, text))
        assert np.allclose(model.mesh.colors, [[1, 0, 0], [0, 0.5, 0], [0, 0, 0.2]]) and "255" in model.notes[0]


@pytest.mark.parametrize("form", ["obj", "ascii", "binary_little_endian"])
def test_polygons_that_are_hollow_are_not_filled(tmp_path, form: str) -> None:
    angle = torch.arange(9, dtype=torch.float64) * (2 * torch.pi / 9)
    far = torch.tensor(
        [1.0, 0.2, 0.9, 1.0, 0.3, 0.15, 1.0, 0.4, 0.7], dtype=torch.float64
    )  # seen whole from its middle
    star = torch.stack((far * angle.cos(), far * angle.sin(), 0.5 * far * angle.cos()), 1)  # on a slope
    dart = torch.tensor([[4.0, 0, 9], [1, 1, 9], [0, 4, 9], [0, 0, 9]], dtype=torch.float64)
    places, polygons = torch.cat((star, dart)), [list(range(9)), [9, 10, 11, 12]]
    if form == "obj":
        lines = [*("v {} {} {}".format(*p) for p in places.tolist())]
        lines += ["f " + " ".join(str(i + 1) for i in polygon) for polygon in polygons]
        path = written(tmp_path, "a.obj", "\n".join(lines))
    else:
        rows = "".join("{} {} {}\n".format(*p) for p in places.tolist())
        faces = "".join(" ".join(map(str, (len(polygon), *polygon))) + "\n" for polygon in polygons)
        data = (rows + faces).encode()
        if form != "ascii":
            data = struct.pack("<39f", *places.flatten().tolist())
            data += b"".join(struct.pack(f"<B{len(polygon)}i", len(polygon), *polygon) for polygon in polygons)
        path = written(tmp_path, "a.ply", PLY.format(form, 13, 2).encode() + data)
    model = read_model(path)
    corners = model.mesh.vertices.double()[model.mesh.faces]
    area = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])[:, 2] / 2
    true = (far * far.roll(-1)).sum() * math.sin(2 * math.pi / 9) / 2
    assert len(area) == 9 and bool((area[:7] > 0).all()) and area[:7].sum() == pytest.approx(float(true), rel=1e-5)
    assert bool((area[7:] != 0).all()) and area[7:].abs().sum() == pytest.approx(4.0)


def test_ply_in_letters_with_polygons_and_a_texture(tmp_path) -> None:
    (tmp_path / "t.png").write_bytes(png((9, 9, 9)))
    text = (
        "ply\nformat ascii 1.0\ncomment TextureFile t.png\nelement vertex 4\nproperty double x\nproperty double y\n"
        "property double z\nproperty float s\nproperty float t\nelement face 1\nproperty list uchar int vertex_index\n"
        "end_header\n0 0 0 0 0\n1 0 0 1 0\n1 1 0 1 1\n0 1 0 0 1\n4 0 1 2 3\n"
    )
    model = read_model(written(tmp_path, "a.ply", text))
    assert model.mesh.faces.tolist() == [[0, 1, 2], [0, 2, 3]] and model.mesh.uv[0].tolist() == [0, 1]
    assert model.materials[0].image.shape == (2, 2, 4)


@pytest.mark.parametrize("order", ["little", "big"])
def test_ply_in_bytes_with_polygons_and_more(tmp_path, order: str) -> None:
    sign = "<" if order == "little" else ">"
    head = (
        f"ply\nformat binary_{order}_endian 1.0\nelement vertex 4\n"
        "property float x\nproperty float y\nproperty float z\n"
        "property uchar red\nproperty uchar green\nproperty uchar blue\nproperty uchar alpha\nelement face 2\n"
        "property list uchar uint vertex_indices\nproperty uchar flag\nend_header\n"
    ).encode()
    rows = b"".join(struct.pack(sign + "3f4B", *p, 255, 0, 51, 9) for p in ((0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0)))
    faces = struct.pack(sign + "B4IB", 4, 0, 1, 2, 3, 7) + struct.pack(sign + "B3IB", 3, 3, 2, 1, 7)
    model = read_model(written(tmp_path, "a.ply", head + rows + faces))
    assert model.mesh.faces.tolist() == [[0, 1, 2], [0, 2, 3], [3, 2, 1]]
    assert np.allclose(model.mesh.colors[0], [1, 0, 0.2])


def test_stl_in_letters(tmp_path) -> None:
    facet = "facet normal 0 0 1\nouter loop\nvertex 0 0 0\nvertex 1 0 0\nvertex 1e0 1 -0.5\nendloop\nendfacet\n"
    model = read_model(written(tmp_path, "a.stl", f"solid a\n{facet}{facet}endsolid a\n"))
    assert model.mesh.vertices[2].tolist() == [1, 1, -0.5] and model.mesh.faces.tolist() == [[0, 1, 2], [3, 4, 5]]


PLY = (
    "ply\nformat {} 1.0\nelement vertex {}\nproperty float x\nproperty float y\nproperty float z\n"
    "element face {}\nproperty list uchar int vertex_indices\nend_header\n"
)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.obj", "", "is empty"),
        ("a.obj", "v 0 0 0\n", "has no faces"),
        ("a.obj", "v 0 0\nf 1 1 1\n", "line 1 can't be understood: 'v 0 0'"),
        ("a.obj", "v 0 0 0\nf 1 2 3\n", "a face names v 3 of 1"),
        ("a.obj", "v 0 0 0\nf 1/2 1/1 1/1\n", "a face names vt 2 of 0"),
        ("a.obj", "v 0 0 0\nf -2 1 1\n", "line 2 can't be understood"),
        ("a.obj", "v 0 0 0\nf 0 1 1\n", "line 2 can't be understood"),
        ("a.obj", "v 0 0 0\nf 1 1\n", "line 2 can't be understood"),
        ("a.obj", "v nan 0 0\nf 1 1 1\n", "its vertices hold numbers that are not finite"),
        ("a.obj", "v 1e99 0 0\nf 1 1 1\n", "its vertices hold numbers that are not finite"),
        ("a.obj", "v 0 0 x\nf 1 1 1\n", "line 1 can't be understood"),
        ("a.ply", "no ply", "no PLY file"),
        ("a.ply", PLY.format("ascii", 4_000_000_000, 1), "its header says 4000000000 of vertex"),
        ("a.ply", PLY.format("binary_little_endian", 16_000_000, 1), "vertex need 192,000,000 bytes, 0 are left"),
        ("a.ply", PLY.format("binary_little_endian", 1, 1_000_000) + "\0" * 12, "faces need|face need"),
        ("a.ply", PLY.format("ascii", 5, 1) + "0 0 0\n", "has 1 rows of vertex, its header says 5"),
        ("a.ply", PLY.format("ascii", 1, 1) + "0 0 0\n3 0 0 7\n", "a face names vertex 7 of 1"),
        ("a.ply", PLY.format("ascii", 1, 1) + "0 0 0\n3 0 0 -1\n", "a face names vertex -1 of 1"),
        ("a.ply", PLY.format("ascii", 1, 1) + "0 0 0\n3 0 0\n", "says 3 corners and has 2"),
        ("a.ply", PLY.format("ascii", 1, 0) + "0 0 0\n", "has no faces"),
        ("a.ply", PLY.format("ascii", 1, 1) + "0 0 nan\n3 0 0 0\n", "not finite"),
        ("a.ply", PLY.format("ascii", 1, 1) + "0 0 nought\n3 0 0 0\n", "is damaged, or no PLY file"),
        ("a.ply", PLY.format("odd", 1, 1), "its format is 'odd'"),
        ("a.ply", PLY.format("ascii", 1, 1).replace("float x", "text x"), "property of an unknown type"),
        ("a.ply", PLY.format("ascii", 1, 1).replace("float x", "float w") + "0 0 0\n3 0 0 0\n", "no x, y and z"),
        ("a.stl", b"\0" * 80 + struct.pack("<I", 4_000_000_000), "its header says 4,000,000,000 faces"),
        ("a.stl", "solid a\nvertex 0 0 0\n", "corners, which are no triangles"),
        ("a.stl", "solid a\nendsolid\n", "has no faces"),
        ("a.stl", b"\0" * 40, "header says|has no faces"),
    ],
)
def test_files_that_are_none(tmp_path, name: str, content: str | bytes, said: str) -> None:
    with pytest.raises(MeshError, match=said) as error:
        read_model(written(tmp_path, name, content))
    assert "a." in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.glb", "a.gltf", "a.obj", "a.ply", "a.stl"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"Kaydara FBX Binary  \0\x1a\0" + bytes(200), "is an FBX file: .* export it as GLB"),
        (b"BLENDER-v402" + bytes(200), "is a file of Blender: open it there"),
        (b"PK\x03\x04" + bytes(200), "is an archive, as those of USDZ and 3MF are"),
        (b"PXR-USDC" + bytes(200), "is a USD file"),
        ("v 0 0 0\n".encode("utf-16"), "is text in UTF-16: save it in UTF-8"),
    ],
)
def test_other_formats_under_these_names_are_told(tmp_path, name: str, content: bytes, said: str) -> None:
    with pytest.raises(MeshError, match=said):
        read_model(written(tmp_path, name, content))


def test_formats_under_each_others_names_are_told(tmp_path) -> None:
    glb, ply = b"glTF\2\0\0\0" + bytes(80), PLY.format("ascii", 1, 1) + "0 0 0\n3 0 0 0\n"
    for content, form, others in ((glb, "glb", ("obj", "ply", "stl")), (ply, "ply", ("obj", "glb", "gltf", "stl"))):
        for other in others:
            said = f"is a file of {form.upper()} under another name: let its name end in .{form}"
            with pytest.raises(MeshError, match=said):
                read_model(written(tmp_path, f"a.{other}", content))


def test_a_binary_stl_may_begin_with_anything(tmp_path) -> None:
    triangle = struct.pack("<12fH", 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0)
    for start in (b"glTF", b"PK\x03\x04", b"BLENDER", b"\xff\xfe", b"<html>", b"solid"):
        data = start.ljust(80, b" ") + struct.pack("<I", 1) + triangle
        assert len(read_model(written(tmp_path, "a.stl", data)).mesh.faces) == 1


@pytest.mark.skipif(os.name != "posix", reason="names of files are text there")
@pytest.mark.parametrize("form", ["obj", "glb"])
def test_a_name_that_is_no_utf_8_is_kept_as_it_can_be_written(tmp_path, form: str) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9." + form.encode())
    path.write_bytes(glb_bytes(box(False))[0] if form == "glb" else b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    assert read_model(path).source.name == f"caf\ufffd.{form}"
    other = path.rename(tmp_path / f"a\u3000b.{form}")  # a space of Japanese, and text
    assert read_model(other).source.name == other.name, "or its scenes of before would be another's"


def test_clips_belong_to_gltf(tmp_path) -> None:
    path = written(tmp_path, "a.obj", "v 0 0 0\nf 1 1 1\n")
    with pytest.raises(MeshError, match="OBJ files have no clips"):
        read_model(path, "walk")


# ---- from memory, and into the box -------------------------------------------------------------------------------


def test_tensors_are_a_model() -> None:
    mesh = box(True)
    model = model_from_tensors(PLACES, FACES.int(), mesh.uv, torch.rand(5, 4), mesh.texture, "given")
    assert model.materials[0].image.dtype == torch.uint8 and model.mesh.colors.shape == (5, 3)
    again = model_from_tensors(PLACES.double(), FACES, mesh.uv, model.mesh.colors, mesh.texture)
    other = model_from_tensors(PLACES + 1, FACES, mesh.uv, model.mesh.colors, mesh.texture)
    assert again.source.sha256 != other.source.sha256 and again.source.format == "tensors"
    with pytest.raises(MeshError, match="needs uv"):
        model_from_tensors(PLACES, FACES, texture=mesh.texture)
    with pytest.raises(MeshError, match="has no faces"):
        model_from_tensors(PLACES, FACES[:0])
    with pytest.raises(MeshError, match="finite"):
        model_from_tensors(PLACES * torch.nan, FACES)


@pytest.mark.parametrize(
    ("up", "front", "ahead", "above"),
    [
        ("y", None, [0, 0, 1], [0, 1, 0]),
        ("z", None, [1, 0, 0], [0, 0, 1]),
        ("z", "-y", [0, -1, 0], [0, 0, 1]),
        ("y", "-x", [-1, 0, 0], [0, 1, 0]),
    ],
)
def test_up_and_front(up, front, ahead: list[float], above: list[float]) -> None:
    placement = place(model_from_tensors(PLACES, FACES), up, front)
    middle, away = torch.tensor(placement.center), 1 / placement.scale
    shown = placement.to_world(torch.stack((middle + away * torch.tensor(ahead), middle + away * torch.tensor(above))))
    assert torch.allclose(shown, torch.tensor([[1.0, 0, 0], [0, 0, 1]]), atol=1e-6)
    assert np.linalg.det(placement.rotation) == pytest.approx(1)
    points = torch.rand(7, 3)
    assert torch.allclose(placement.from_world(placement.to_world(points)), points, atol=1e-6)


def test_a_model_is_put_into_the_middle_and_sized() -> None:
    stray = torch.cat((PLACES, torch.tensor([[500.0, 0, 0]])))  # no face names it
    placement = place(model_from_tensors(stray, FACES), size=0.5, radius=2.0)
    world = placement.to_world(PLACES)
    extent = world.amax(0) - world.amin(0)
    assert torch.allclose(world.amax(0), -world.amin(0), atol=1e-6)
    assert max(float(extent.max()), float(extent.norm()) / 2**0.5) == pytest.approx(0.5 * 4)


def test_placements_that_are_none() -> None:
    model = model_from_tensors(PLACES, FACES)
    with pytest.raises(MeshError, match="are one axis"):
        place(model, "y", "-y")
    with pytest.raises(MeshError, match="up must be"):
        place(model, "x")
    with pytest.raises(MeshError, match="size must lie"):
        place(model, size=0)
    with pytest.raises(MeshError, match="no size"):
        place(model_from_tensors(PLACES * 0, FACES))
    for scale, said in ((1e-25, "long, which is too small: scale it"), (1e25, "long, which is too large: scale it")):
        with pytest.raises(MeshError, match=said):
            place(model_from_tensors(PLACES * scale, FACES))
    for scale in (1e-17, 1e17):
        placement = place(model_from_tensors(PLACES * scale, FACES))
        assert config_from_dict(Placement, asdict(placement)) == placement, "a scene's file can keep it"
    assert isinstance(place(model, "z", "-x"), Placement)


@pytest.mark.parametrize(("second", "color"), [("0.2 0.4 0.6", (1, 1, 1, 1)), ("1 1 1", (0.8, 0.5, 0.5, 1))])
def test_vertices_colors_stand_in_place_of_a_materials(tmp_path, second: str, color: tuple) -> None:
    written(tmp_path, "a.mtl", "newmtl a\nKd 0.8 0.5 0.5\n")
    lines = f"mtllib a.mtl\nusemtl a\nv 0 0 0 1 1 1\nv 1 0 0 1 1 1\nv 1 1 0 {second}\nf 1 2 3\n"
    model = read_model(written(tmp_path, "a.obj", lines))
    assert model.materials[1].color == color  # one white for all says nothing


# ---- what lies beside --------------------------------------------------------------------------------------------


def test_the_files_that_a_model_names_are_known(tmp_path) -> None:
    for name in ("maps/my paint.png", "data.bin", "other.png", "named.mtl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    obj = written(tmp_path, "a.obj", "mtllib named.mtl\r\nv 0 0 0\nmtllib missing.mtl\n")
    written(tmp_path, "named.mtl", "newmtl x\nmap_Kd -s 1 1 1 C:\\work\\other.png\nmap_Kd maps\\My Paint.PNG\n")
    assert [path.name for path in files_beside(obj)] == ["named.mtl", "other.png", "my paint.png"]
    tree = {"buffers": [{"uri": "data.bin"}, {"uri": "data:;base64,AA=="}, {"uri": "gone.bin"}, {"uri": "../up.bin"}]}
    tree["images"] = [{"uri": "maps/my%20paint.png"}, {"bufferView": 0}, 5]
    text = json.dumps(tree).encode()
    glb = b"glTF" + struct.pack("<III4s", 2, 20 + len(text), len(text), b"JSON") + text
    for name, content in (("a.gltf", text), ("a.glb", glb)):
        found = files_beside(written(tmp_path, name, content))
        assert [path.name for path in found] == ["data.bin", "my paint.png"]
    ply = written(tmp_path, "a.ply", "ply\nformat ascii 1.0\ncomment TextureFile other.png\nend_header\n")
    assert files_beside(ply) == [tmp_path / "other.png"]
    damaged = {"b.glb": b"glTF", "b.gltf": b"[1, 2", "b.stl": b"", "b.obj": b"\xff\xfe", "b.ply": b""}
    for name, content in damaged.items():
        assert files_beside(written(tmp_path, name, content)) == []
    assert files_beside(tmp_path / "none.glb") == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.obj", "\ufeffmtllib named.mtl\nv 0 0 0\n"),
        ("a.obj", "# made by hand\rmtllib named.mtl\rv 0 0 0\r"),
        ("a.ply", "ply\nformat ascii 1.0\n comment  TextureFile\tnamed.png\nend_header\n"),
        ("a.gltf", '\ufeff{"images": [{"uri": "http://[half/of.png"}, {"uri": "named.png"}], "buffers": 5}'),
    ],
)
def test_files_are_known_beside_models_however_these_are_written(tmp_path, name: str, content: str) -> None:
    (tmp_path / "named.mtl").write_text("newmtl x\nmap_Kd named.png\n")
    (tmp_path / "named.png").write_bytes(b"")
    assert tmp_path / "named.png" in files_beside(written(tmp_path, name, content.encode()))


def test_nothing_is_known_beside_a_document_without_an_end(tmp_path) -> None:
    assert files_beside(written(tmp_path, "a.gltf", "[" * 100_000)) == []


@pytest.mark.parametrize(
    "name", ["../Paint.PNG", "/Paint.PNG", "\\\\server\\maps\\Paint.PNG", "//server/maps/Paint.PNG"]
)
def test_names_that_lead_elsewhere_are_looked_for_beside_the_model_alone(tmp_path, monkeypatch, name: str) -> None:
    """Folders elsewhere may be large, and the name of a server is one that Windows signs in to."""
    (tmp_path / "paint.png").write_bytes(b"")
    listed, asked, listing, resolving = [], [], Path.iterdir, Path.resolve
    monkeypatch.setattr(Path, "iterdir", lambda path: listed.append(path) or listing(path))
    monkeypatch.setattr(Path, "resolve", lambda path: asked.append(path) or resolving(path))
    model = written(tmp_path, "a.ply", f"ply\ncomment TextureFile {name}\nend_header\n")
    assert files_beside(model) == [tmp_path / "paint.png"]
    assert set(listed) <= {tmp_path} and not any("server" in str(path) for path in asked)
