"""GLB and glTF files as models: poses against closed forms, looks, and what is refused at the door."""

from __future__ import annotations

import base64
import importlib.util
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from gltf_files import ASSETS, HALF, SQUARE, TWO, Builder, arm, clip, png

from dream4d_engine.mesh import MeshError, face_normals
from dream4d_engine.meshes import gltf, moving_glb, read_model


def test_nodes_are_applied_from_the_root_down(tmp_path) -> None:
    b = Builder()
    turn = {"rotation": [0, 0, 2**-0.5, 2**-0.5], "children": [1]}  # a quarter around z
    moved = {"translation": [1, 0, 0], "scale": [2, 2, 2], "mesh": 0}
    b.scene(turn, moved, meshes=[{"primitives": [b.mesh()]}])
    model = read_model(b.save(tmp_path / "a.glb"))
    x, y, z = torch.from_numpy(SQUARE).unbind(-1)
    assert torch.allclose(model.mesh.vertices, torch.stack((-2 * y, 2 * x + 1, 2 * z), -1), atol=1e-6)
    assert model.source.format == "glb" and model.parts[0].node == 1 and len(model.source.sha256) == 64


def test_a_matrix_is_stored_by_columns(tmp_path) -> None:
    b = Builder()
    matrix = [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 5, 6, 7, 1]
    model = read_model(
        b.scene({"matrix": matrix, "mesh": 0}, meshes=[{"primitives": [b.mesh()]}]).save(tmp_path / "a.glb")
    )
    assert torch.equal(model.mesh.vertices, torch.from_numpy(SQUARE) + torch.tensor([5.0, 6, 7]))


def test_a_mirrored_node_turns_its_faces(tmp_path) -> None:
    b = Builder()
    nodes = ({"mesh": 0}, {"mesh": 0, "scale": [-1, 1, 1]})
    model = read_model(b.scene(*nodes, meshes=[{"primitives": [b.mesh()]}]).save(tmp_path / "a.glb"))
    assert len(model.mesh.vertices) == 8 and len(model.parts) == 2  # instanced: each has its own
    assert (face_normals(model.mesh.vertices, model.mesh.faces)[:, 2] > 0).all()


@pytest.mark.parametrize(
    ("mode", "indices", "faces"),
    [
        (5, [0, 1, 3, 2], [[0, 1, 3], [1, 2, 3]]),
        (6, [0, 1, 2, 3], [[1, 2, 0], [2, 3, 0]]),
        (4, [0, 1, 2, 0, 2, 3, 1], [[0, 1, 2], [0, 2, 3]]),
    ],
)
def test_strips_and_fans(tmp_path, mode: int, indices: list[int], faces: list[list[int]]) -> None:
    b = Builder()
    primitive = b.mesh(faces=indices) | {"mode": mode}
    lines = b.mesh() | {"mode": 1}
    model = read_model(b.scene({"mesh": 0}, meshes=[{"primitives": [primitive, lines]}]).save(tmp_path / "a.glb"))
    assert model.mesh.faces.tolist() == faces
    assert (face_normals(model.mesh.vertices, model.mesh.faces)[:, 2] > 0).all()
    assert model.notes == ("points and lines were left out",)


@pytest.mark.parametrize("time", [0.0, 0.5, 1.0, 7.0])
def test_a_skin_follows_its_joints(tmp_path, time: float) -> None:
    model = read_model(arm(Builder()).save(tmp_path / "a.glb"), "go", time)
    angle = np.radians(90 * min(time, 1.0))
    tip = (
        [1 + np.cos(angle), np.sin(angle), 0.0],
        [1 + np.cos(angle) - np.sin(angle), np.sin(angle) + np.cos(angle), 0.0],
    )
    assert np.allclose(model.mesh.vertices[4:], tip, atol=1e-6)
    assert np.allclose(model.mesh.vertices[:2], [[0, 0, 0], [0, 1, 0]], atol=1e-6)
    middle = [1 - np.sin(angle) / 2, (1 + np.cos(angle)) / 2, 0]
    assert np.allclose(model.mesh.vertices[3], middle, atol=1e-6)
    assert model.source.clip == "go" and "its skin was posed" in model.notes[0]


@pytest.mark.parametrize(
    ("kind", "values", "time", "x"),
    [
        ("STEP", [[0, 0, 0], [4, 0, 0]], 0.9, 0.0),
        ("STEP", [[0, 0, 0], [4, 0, 0]], 1.0, 4.0),
        ("LINEAR", [[0, 0, 0], [4, 0, 0]], 0.25, 1.0),
        # tangents of 0: 3u^2 - 2u^3
        ("CUBICSPLINE", [[0] * 3, [0] * 3, [0] * 3, [0] * 3, [4, 0, 0], [0] * 3], 0.25, 4 * (3 / 16 - 2 / 64)),
        # leaving with a slope of 2: u^3 - 2u^2 + u of it more
        ("CUBICSPLINE", [[0] * 3, [0] * 3, [2, 0, 0], [0] * 3, [4, 0, 0], [0] * 3], 0.5, 2 + 2 * 0.125),
    ],
)
def test_interpolations(tmp_path, kind: str, values: list, time: float, x: float) -> None:
    b = Builder()
    b.scene({"mesh": 0}, meshes=[{"primitives": [b.mesh()]}])
    b.tree["animations"] = [clip(b, [(0, "translation", [0, 1], values, kind)])]
    model = read_model(b.save(tmp_path / "a.glb"), "go", time)
    assert float(model.mesh.vertices[0, 0]) == pytest.approx(x, abs=1e-6)


def test_sparse_targets_and_weights_over_time(tmp_path) -> None:
    b = Builder()
    primitive = b.mesh()
    sparse = {
        "count": 1,
        "indices": {"bufferView": b.view(np.array([2], "u2").tobytes()), "componentType": 5123},
        "values": {"bufferView": b.view(np.array([[0, 0, 3]], "f4").tobytes())},
    }
    b.tree["accessors"].append({"componentType": 5126, "count": 4, "type": "VEC3", "sparse": sparse})
    primitive["targets"] = [{"POSITION": len(b.tree["accessors"]) - 1}]
    b.scene({"mesh": 0}, meshes=[{"primitives": [primitive], "weights": [0.5]}])
    b.tree["animations"] = [clip(b, [(0, "weights", [0, 2], [0.0, 1.0], "LINEAR")])]
    path = b.save(tmp_path / "a.glb")
    assert read_model(path).mesh.vertices[:, 2].tolist() == [0, 0, 1.5, 0]
    assert read_model(path, "go", 0.5).mesh.vertices[:, 2].tolist() == [0, 0, 0.75, 0]


def test_quantised_numbers(tmp_path) -> None:
    b = Builder()
    rows = np.zeros((4, 4), "i2")  # rows of 8 bytes
    rows[:, :3] = SQUARE * 32767
    view = b.view(rows.tobytes(), byteStride=8)
    b.tree["accessors"].append(
        {
            "bufferView": view,
            "componentType": 5122,
            "normalized": True,
            "count": 4,
            "type": "VEC3",
            "min": [0] * 3,
            "max": [32767, 32767, 0],
        }
    )
    uv = b.add([[0, 0], [65535, 0], [65535, 65535], [0, 65535]], "u2", normalized=True)
    primitive = {"attributes": {"POSITION": 0, "TEXCOORD_0": uv}, "indices": b.add(TWO, "u2")}
    node = {"mesh": 0, "scale": [3, 3, 3]}
    b.scene(node, meshes=[{"primitives": [primitive]}], extensionsRequired=["KHR_mesh_quantization"])
    model = read_model(b.save(tmp_path / "a.glb"))
    assert torch.allclose(model.mesh.vertices, 3 * torch.from_numpy(SQUARE))
    assert model.mesh.uv.tolist() == [[0, 0], [1, 0], [1, 1], [0, 1]]


def test_materials_and_textures(tmp_path) -> None:
    b = Builder()
    uv = b.add([[0, 0], [1, 0], [1, 1], [0, 1]])
    colors = b.add([[0.2140, 1, 1, 0.5]] * 4)
    transform = {"offset": [0.5, 0], "scale": [2, 3], "rotation": np.pi / 2}
    texture = {"index": 0, "extensions": {"KHR_texture_transform": transform}}
    looks = [
        {
            "name": "cut",
            "alphaMode": "MASK",
            "doubleSided": True,
            "pbrMetallicRoughness": {"baseColorTexture": texture},
        },
        {"name": "glass", "alphaMode": "BLEND", "pbrMetallicRoughness": {"baseColorFactor": [0.1, 0.2, 0.3, 0.4]}},
    ]
    primitives = [b.mesh(TEXCOORD_0=uv, COLOR_0=colors) | {"material": 0}, b.mesh() | {"material": 1}, b.mesh()]
    image = b.view(png((10, 20, 30, 40)))
    b.scene(
        {"mesh": 0},
        meshes=[{"primitives": primitives}],
        materials=looks,
        images=[{"bufferView": image, "mimeType": "image/png"}],
        samplers=[{"wrapS": 33071, "wrapT": 33648}],
        textures=[{"source": 0, "sampler": 0}],
    )
    model = read_model(b.save(tmp_path / "a.glb"))
    cut, glass, plain = model.materials
    assert cut.image.shape == (2, 2, 4) and cut.image[0, 0].tolist() == [10, 20, 30, 40]
    assert cut.alpha_cutoff == 0.5 and cut.double_sided and cut.wrap == ("clamp", "mirror")
    assert glass.color == (0.1, 0.2, 0.3, 0.4) and glass.image is None and plain.color == (1, 1, 1, 1)
    assert model.face_material.tolist() == [0, 0, 1, 1, 2, 2]
    # turned against the clock as the image is seen, with v down: (u, v) -> (cos u + sin v, -sin u + cos v)
    assert torch.allclose(model.mesh.uv[:4], torch.tensor([[0.5, 0], [0.5, -2], [3.5, -2], [3.5, 0]]), atol=1e-6)
    assert torch.allclose(model.mesh.colors[:4, 0], torch.tensor(0.5), atol=1e-3) and torch.allclose(
        model.mesh.colors[4:], torch.tensor(1.0)
    )
    assert any("BLEND" in note for note in model.notes) and any("alpha" in note for note in model.notes)


def test_gltf_with_files_beside_it_and_data_in_it(tmp_path) -> None:
    b = Builder()
    b.scene({"mesh": 0}, meshes=[{"primitives": [b.mesh() | {"material": 0}]}])
    b.tree |= {"images": [{"uri": "a%20b.png"}], "textures": [{"source": 0}]}
    b.tree["materials"] = [{"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}}}]
    (tmp_path / "a b.png").write_bytes(png((1, 2, 3)))
    for embedded in (False, True):
        model = read_model(b.save_gltf(tmp_path / "a.gltf", embedded))
        assert torch.equal(model.mesh.vertices, torch.from_numpy(SQUARE)) and model.source.format == "gltf"
        assert model.materials[0].image[0, 0].tolist() == [1, 2, 3, 255]
    (tmp_path / "a b.png").unlink()
    model = read_model(tmp_path / "a.gltf")
    assert model.materials[0].image is None and "a%20b.png" in model.notes[0]


def test_what_is_left_out_is_said(tmp_path) -> None:
    b = Builder()
    glowing = {"name": "lamp", "emissiveFactor": [1, 1, 0]}
    b.scene({"mesh": 0}, meshes=[{"primitives": [b.mesh() | {"material": 0}]}], materials=[glowing])
    assert any("lamp gives off" in note for note in read_model(b.save(tmp_path / "a.glb")).notes)


def test_primitives_that_share_vertices_share_them(tmp_path) -> None:
    b = Builder()
    one = b.mesh()
    two = one | {"indices": b.add([0, 1, 2], "u1"), "material": 0}
    b.scene({"mesh": 0}, meshes=[{"primitives": [one, two]}], materials=[{}])
    model = read_model(b.save(tmp_path / "a.glb"))
    assert len(model.mesh.vertices) == 4 and [part.first for part in model.parts] == [0, 0]


@pytest.mark.parametrize("name", ["fox", "robot", "greenman"])
def test_all_clips_of_real_files_pose_as_the_specification_says(name: str) -> None:
    if not (ASSETS / "pose.py").is_file():
        pytest.skip("the animated test models are not here (DREAM4D_ASSETS)")
    spec = importlib.util.spec_from_file_location("pose", ASSETS / "pose.py")
    truth = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(truth)
    gltf = truth.Gltf(ASSETS / f"{name}.glb")
    clips = {entry["name"]: entry for entry in gltf.json["animations"]}
    for which in (None, *clips):
        end = 0 if which is None else max(float(gltf.accessor(s["input"]).max()) for s in clips[which]["samplers"])
        model = read_model(ASSETS / f"{name}.glb", which, 0.7 * end)
        wanted = truth.pose(gltf, clips.get(which), 0.7 * end)
        assert np.abs(model.mesh.vertices.numpy() - wanted).max() < 1e-6 * model.mesh.size, which


# ---- at the door -------------------------------------------------------------------------------------------------


def plain() -> Builder:
    b = Builder()
    return b.scene({"mesh": 0}, meshes=[{"primitives": [b.mesh()]}])


def change(path: str, value: object):
    """Set a place of the document, such as accessors/0/count."""

    def apply(b: Builder) -> None:
        *way, last = [int(word) if word.isdigit() else word for word in path.split("/")]
        tree = b.tree
        for word in way:
            tree = tree[word]
        tree[last] = value

    return apply


@pytest.mark.parametrize(
    ("apply", "said"),
    [
        (change("accessors/0/count", 4_000_000_000), r"accessors\[0\].count must lie in"),
        (change("accessors/0/count", 9), r"accessors\[0\] needs 108 bytes of a view of 48"),
        (change("accessors/0/count", -1), r"accessors\[0\].count"),
        (change("accessors/0/byteOffset", 2**40), r"accessors\[0\] needs"),
        (change("accessors/0/type", "VEC2"), r"accessors\[0\].type must be VEC3"),
        (change("accessors/0/componentType", 7), r"accessors\[0\].componentType"),
        (change("accessors/1/componentType", 5126), "must be whole numbers|needs"),
        (change("bufferViews/0/byteLength", 2**33), r"bufferViews\[0\] takes bytes 0 to 8,589,934,592"),
        (change("bufferViews/0/byteOffset", -4), r"bufferViews\[0\] takes bytes"),
        (change("bufferViews/0/byteStride", 1), r"byteStride must lie in"),
        (change("bufferViews/0/buffer", 3), r"buffers\[3\], there are 1"),
        (change("nodes/0/mesh", 5), r"meshes\[5\], there are 1"),
        (change("nodes/0/mesh", True), r"names meshes\[True\]"),
        (change("nodes/0/children", [0]), r"nodes\[0\] is among its own ancestors"),
        (change("nodes/0/translation", [1, 2]), r"nodes\[0\].translation must hold 3 numbers, got 2"),
        (change("nodes/0/translation", [1, 2, "x"]), r"translation must be a number, got 'x'"),
        (change("nodes/0/translation", [0, 0, 10**400]), r"translation must be a number"),
        (change("nodes/0/scale", [1e300, 1, 1]), "scale it down"),
        (change("scenes/0/nodes", [4]), r"nodes\[4\], there are 1"),
        (change("nodes", []), r"nodes\[0\], there are 0"),
        (change("meshes/0/primitives/0/mode", 1), "has no faces in its scene"),
        (change("meshes/0/primitives", []), "has no faces in its scene"),
        (change("meshes/0/primitives/0/attributes", {}), "has no POSITION"),
        (change("meshes/0/primitives/0/indices", 0), r"accessors\[0\].type must be SCALAR"),
        (change("asset/version", "1.0"), "asset.version is '1.0'"),
        (change("extensionsRequired", ["KHR_draco_mesh_compression"]), "compressed .KHR_draco.* without compression"),
        (change("extensionsRequired", ["EXT_meshopt_compression"]), "compressed .EXT_meshopt"),
        (change("extensionsRequired", ["EXT_odd"]), "needs the extension 'EXT_odd'"),
        (change("extensionsRequired", [[]]), r"extensionsRequired\[0\] must be a name"),
        (change("extensionsUsed", [{}]), r"extensionsUsed\[0\] must be a name"),
        (
            change("nodes/0/extensions", {"EXT_mesh_gpu_instancing": {"attributes": {"SCALE": 0, "TRANSLATION": 9}}}),
            "9",
        ),
        (change("nodes/0/extensions", {"EXT_mesh_gpu_instancing": []}), "must be an object|must hold an object"),
        (change("nodes", {"0": {}}), "nodes must be a list"),
    ],
)
def test_what_a_document_claims_is_checked(tmp_path, apply, said: str) -> None:
    b = plain()
    apply(b)
    with pytest.raises(MeshError, match=said) as error:
        read_model(b.save(tmp_path / "bad.glb"))
    assert str(error.value).startswith("bad.glb") and "\n" not in str(error.value)


def test_indices_outside_and_numbers_that_are_none(tmp_path) -> None:
    b = Builder()
    b.scene({"mesh": 0}, meshes=[{"primitives": [b.mesh(faces=[0, 1, 4])]}])
    with pytest.raises(MeshError, match="indices name vertex 4 of 4"):
        read_model(b.save(tmp_path / "a.glb"))
    b = Builder()
    b.scene({"mesh": 0}, meshes=[{"primitives": [b.mesh(np.where(SQUARE > 0, np.nan, SQUARE))]}])
    with pytest.raises(MeshError, match=r"accessors\[0\] .*not finite"):
        read_model(b.save(tmp_path / "a.glb"))


def test_containers_that_lie(tmp_path) -> None:
    path, data = tmp_path / "a.glb", plain().glb()
    for changed, said in (
        (data[:-8], "header says .* bytes, there are .*is the download complete"),
        (data[:15], "cut off after 15 bytes"),
        (data[:8] + struct.pack("<I", 2**32 - 1) + data[12:], "header says 4,294,967,295 bytes"),
        (data[:12] + struct.pack("<I", 2**32 - 1) + data[16:], "chunk 0 says 4,294,967,295 bytes"),
        (data[:4] + struct.pack("<I", 1) + data[8:], "version 1"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS"),
        (b"<html>", "web page"),
        (b"", "is empty"),
        (b"[" * 100_000, "nested too deep"),
        (b"PK\x03\x04" + bytes(60), "is an archive"),
    ):
        path.write_bytes(changed)
        with pytest.raises(MeshError, match=said):
            read_model(path)
    with pytest.raises(MeshError, match="does not exist"):
        read_model(tmp_path / "none.glb")
    with pytest.raises(MeshError, match="is a folder"):
        (tmp_path / "folder.glb").mkdir()
        read_model(tmp_path / "folder.glb")
    with pytest.raises(MeshError, match=r"no file of a format that is read \(\.glb"):
        read_model(tmp_path / "a.fbx")


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("http://example.com/a.bin", "nothing is fetched from elsewhere"),
        ("file:///etc/passwd", "nothing is fetched from elsewhere"),
        ("//server/a.bin", "nothing is fetched from elsewhere"),
        ("../outside.bin", "leads out of the model's folder"),
        ("..%2Foutside.bin", "leads out of the model's folder"),
        ("/etc/hostname", "leads out of the model's folder"),
        ("..\\outside.bin", "leads out of the model's folder"),
        ("link.bin", "leads out of the model's folder"),
        ("none.bin", "does not exist"),
        (".", "is a folder"),
        ("data:application/octet-stream;base64,AAAA", r"buffers\[0\] says .* bytes, there are 3"),
        ("data:application/octet-stream;base64,A!?=", "no base64"),
        ("data:text/plain,hello", "no data URI in base64"),
        ("data:;base64," + "A" * 10_000, "letters of base64 for"),
        ("short.bin", r"buffers\[0\] says .* bytes, there are 4"),
        (7, "uri must be text"),
    ],
)
def test_buffers_that_lead_astray(tmp_path, uri: object, said: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "outside.bin").write_bytes(bytes(1000))
    (folder / "short.bin").write_bytes(bytes(4))
    (folder / "link.bin").symlink_to(tmp_path / "outside.bin")
    b = plain()
    tree = b.tree | {"buffers": [{"byteLength": len(b.data), "uri": uri}]}
    (folder / "a.gltf").write_text(json.dumps(tree))
    with pytest.raises(MeshError, match=said):
        read_model(folder / "a.gltf")


def test_a_buffer_of_four_gigabytes_is_not_made(tmp_path) -> None:
    tree = plain().tree | {"buffers": [{"byteLength": 2**32, "uri": "data:;base64,AAAA"}]}
    (tmp_path / "a.gltf").write_text(json.dumps(tree))
    with pytest.raises(MeshError, match=r"buffers\[0\].byteLength says 4,294,967,296"):
        read_model(tmp_path / "a.gltf")


def test_vertices_that_are_only_claimed_are_not_made(tmp_path, monkeypatch) -> None:
    b = plain()
    del b.tree["accessors"][0]["bufferView"]  # zeros, as many as it likes
    b.tree["accessors"][0]["count"] = 2**25
    monkeypatch.setattr(gltf, "pose_vertices", None)
    with pytest.raises(MeshError, match="more than 16,777,216 vertices"):
        read_model(b.save(tmp_path / "a.glb"))


def test_lists_that_are_null_are_empty(tmp_path) -> None:
    b = plain()
    b.tree |= dict.fromkeys(("extensionsUsed", "animations", "materials", "skins"))
    b.tree["meshes"].append({"primitives": None})
    b.tree["extras"] = {"mine": None}
    model = read_model(b.save(tmp_path / "a.glb"))
    tracks = model.mesh.vertices + torch.tensor([0.0, 1.0])[:, None, None]
    assert moving_glb(model, tracks, torch.tensor([0.0, 1.0])).n_keys == 2
    assert model.file is not None and model.file.tree["extras"] == {"mine": None}  # nobody's but the user's


def test_images_that_are_none_or_too_large(tmp_path) -> None:
    def textured(data: bytes) -> Path:
        b = Builder()
        b.scene({"mesh": 0}, meshes=[{"primitives": [b.mesh() | {"material": 0}]}])
        uri = "data:image/png;base64," + base64.b64encode(data).decode()
        b.tree |= {"images": [{"uri": uri}], "textures": [{"source": 0}]}
        b.tree["materials"] = [{"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}}}]
        return b.save(tmp_path / "a.glb")

    model = read_model(textured(b"no image at all"))
    assert model.materials[0].image is None and "images[0] can't be read as an image" in model.notes[0]
    huge = bytearray(png((1, 2, 3)))
    huge[16:24] = struct.pack(">II", 9_000, 9_000)
    huge[29:33] = struct.pack(">I", zlib.crc32(huge[12:29]))
    with pytest.raises(MeshError, match=r"images\[0\] has more than 67,108,864 pixels"):
        read_model(textured(bytes(huge)))


def test_moments(tmp_path) -> None:
    path = arm(Builder()).save(tmp_path / "a.glb")
    with pytest.raises(MeshError, match="has no clip 'walk': it has go"):
        read_model(path, "walk")
    with pytest.raises(MeshError, match="needs the clip's name: it has go"):
        read_model(path, None, 1.0)
    with pytest.raises(MeshError, match="0 or more seconds"):
        read_model(path, "go", -1.0)
    (end,) = (note for note in read_model(path, "go", 99.0).notes if "ends at" in note)
    assert "its last moment was taken" in end and not any("ends" in note for note in read_model(path, "go", 0.5).notes)
    with pytest.raises(MeshError, match="has no clips"):
        read_model(plain().save(tmp_path / "b.glb"), "go")


@pytest.mark.parametrize(
    ("apply", "said"),
    [
        (change("skins/0/joints", [1, 77]), r"nodes\[77\]"),
        (change("skins/0/joints", [1]), "names joint 1, the skin has 1"),
        (change("skins/0/joints", []), "names no joints"),
        (change("animations/0/channels/0/sampler", 3), r"channels\[0\].sampler is 3, there are 1"),
        (change("animations/0/samplers/0/interpolation", "MAGIC"), "interpolation must be LINEAR"),
        (change("animations/0/samplers/0/output", 2), r"type must be VEC4"),
        (change("animations/0/channels/0/target/path", "weights"), "type must be SCALAR"),
    ],
)
def test_skins_and_clips_are_checked(tmp_path, apply, said: str) -> None:
    b = arm(Builder())
    apply(b)
    with pytest.raises(MeshError, match=said):
        read_model(b.save(tmp_path / "bad.glb"), "go", 0.5)


def test_a_million_faces(tmp_path) -> None:
    n = 708  # 2 (n - 1)^2 faces
    b = Builder()
    x, y = np.meshgrid(np.linspace(0, 1, n), np.linspace(0, 1, n))
    a = (np.arange(n - 1)[:, None] * n + np.arange(n - 1)).reshape(-1)
    faces = np.concatenate((np.stack((a, a + 1, a + n), 1), np.stack((a + 1, a + n + 1, a + n), 1)))
    points = np.stack((x, y, 0 * x), -1).reshape(-1, 3)
    primitive = {"attributes": {"POSITION": b.add(points, bounds=True)}, "indices": b.add(faces.reshape(-1), "u4")}
    model = read_model(b.scene({"mesh": 0}, meshes=[{"primitives": [primitive]}]).save(tmp_path / "a.glb"))
    assert len(model.mesh.faces) == 999_698 and (model.mesh.faces.numpy() == faces).all()


def test_instances_become_nodes(tmp_path) -> None:
    b = Builder()
    attributes = {
        "TRANSLATION": b.add([[5, 0, 0], [0, 5, 0], [0, 0, 5]]),
        "ROTATION": b.add([[0, 0, 0, 1], [0, 0, HALF, HALF], [0, 0, 0, 1]]),
        "SCALE": b.add([[1, 1, 1], [2, 2, 2], [1, 1, -1]]),
    }
    many = {"mesh": 0, "scale": [10, 10, 10], "extensions": {"EXT_mesh_gpu_instancing": {"attributes": attributes}}}
    names = {key: ["EXT_mesh_gpu_instancing"] for key in ("extensionsUsed", "extensionsRequired")}
    b.scene(many, meshes=[{"primitives": [b.mesh()]}], **names)
    model = read_model(b.save(tmp_path / "a.glb"))
    corners = model.mesh.vertices.view(3, 4, 3)[:, 1]  # [1, 0, 0] of the square
    assert torch.allclose(corners, torch.tensor([[60.0, 0, 0], [0, 70, 0], [10, 0, 50]]), atol=1e-5)
    assert [part.node for part in model.parts] == [1, 2, 3]
    assert model.file is not None and not names.keys() & model.file.tree.keys()  # as it is written back


def test_what_is_hidden_is_not_shown(tmp_path) -> None:
    b = Builder()
    hidden = {"children": [1], "extensions": {"KHR_node_visibility": {"visible": False}}}
    shown = {"mesh": 0, "extensions": {"KHR_node_visibility": {"visible": True}}}
    b.scene(hidden, {"mesh": 0}, shown, meshes=[{"primitives": [b.mesh()]}])
    assert [part.node for part in read_model(b.save(tmp_path / "a.glb")).parts] == [2]


def test_what_is_black_and_shines_has_its_lights_colors(tmp_path) -> None:
    b = Builder()
    uv = b.add([[0, 0], [1, 0], [1, 1], [0, 1]])
    image = b.view(png((0, 0, 255)))
    shines = {"emissiveFactor": [1, 0.5, 0.25], "emissiveTexture": {"index": 0}}
    materials = [
        {"name": "lamp", "pbrMetallicRoughness": {"baseColorFactor": [0, 0, 0, 1]}} | shines,
        {"name": "wall", "pbrMetallicRoughness": {"baseColorFactor": [0, 0.1, 0, 1]}} | shines,
    ]
    primitives = [b.mesh(TEXCOORD_0=uv) | {"material": k} for k in (0, 1)]
    more = {"images": [{"bufferView": image}], "textures": [{"source": 0}], "materials": materials}
    model = read_model(b.scene({"mesh": 0}, meshes=[{"primitives": primitives}], **more).save(tmp_path / "a.glb"))
    lamp, wall = model.materials
    assert lamp.color == (1, 0.5, 0.25, 1) and lamp.image is not None and lamp.image[0, 0].tolist() == [0, 0, 255, 255]
    assert wall.color == (0, 0.1, 0, 1) and wall.image is None
    assert "lamp is black and gives off light" in model.notes[0] and "wall gives off was left out" in model.notes[1]
