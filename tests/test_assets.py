"""Assets: what is written is read again, and what is damaged is refused in one line."""

from __future__ import annotations

import json
import random
import shutil
import struct
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from scene_cases import CONFIG, PROVENANCE, tiny_scene

from dream4d_engine.assets import AssetError, Provenance, config_from_dict, load_scene, read_info, save_scene
from dream4d_engine.cameras import orbit
from dream4d_engine.dream_in_4d import ImportOptions, import_checkpoint
from dream4d_engine.fields.background import BackgroundConfig
from dream4d_engine.fields.encodings import HashGridConfig
from dream4d_engine.meshes import MeshOrigin, Placement, Source
from dream4d_engine.rendering import RenderOptions, render
from dream4d_engine.scene import SceneConfig

GOLDEN = Path(__file__).parent / "data" / "golden"


@pytest.fixture(scope="module")
def asset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_scene(tmp_path_factory.mktemp("asset") / "scene.safetensors", tiny_scene(), PROVENANCE)


def split(content: bytes) -> tuple[dict, bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(header: dict, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def with_metadata(asset: Path, target: Path, **changes: str | None) -> Path:
    header, body = split(asset.read_bytes())
    header["__metadata__"].update(changes)
    header["__metadata__"] = {k: v for k, v in header["__metadata__"].items() if v is not None}
    target.write_bytes(join(header, body))
    return target


@pytest.mark.parametrize(
    "config", [CONFIG, replace(CONFIG, deformation=None, background=BackgroundConfig(color=(1.0, 0.5, 0.0)))]
)
def test_round_trip_renders_the_same(tmp_path: Path, config: SceneConfig) -> None:
    scene = tiny_scene(config)
    again, provenance = load_scene(save_scene(tmp_path / "s.safetensors", scene, PROVENANCE))
    assert provenance == PROVENANCE and again.config == config
    for (name, a), b in zip(scene.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    cameras = orbit(2, 8, 8, time=0.5)
    for options in (RenderOptions(), RenderOptions(prune=False)):
        assert torch.equal(render(scene, cameras, options).rgb, render(again, cameras, options).rgb)
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


def test_an_asset_knows_whether_it_loops_and_one_of_before_does_not(asset: Path, tmp_path: Path) -> None:
    assert CONFIG.deformation is not None
    looped = tiny_scene(replace(CONFIG, deformation=replace(CONFIG.deformation, loop=True)))
    again, _ = load_scene(save_scene(tmp_path / "looped.safetensors", looped))
    assert again.loops
    config = asdict(CONFIG)
    del config["deformation"]["loop"]
    of_before, _ = load_scene(with_metadata(asset, tmp_path / "before.safetensors", config=json.dumps(config)))
    now, _ = load_scene(asset)
    assert not of_before.loops and of_before.config == now.config
    points, times = torch.rand(30, 3) * 2 - 1, torch.rand(30)
    assert torch.equal(of_before.density(points, times), now.density(points, times))


def test_an_asset_keeps_the_motion_as_a_whole_and_one_of_before_has_none(asset: Path, tmp_path: Path) -> None:
    assert CONFIG.deformation is not None
    scene = tiny_scene(replace(CONFIG, deformation=replace(CONFIG.deformation, body_knots=5)))
    with torch.no_grad():
        scene.deformation.body.knots.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    again, _ = load_scene(save_scene(tmp_path / "body.safetensors", scene))
    points, times = torch.rand(30, 3) * 2 - 1, torch.rand(30)
    assert torch.equal(again.density(points, times), scene.density(points, times))
    config = asdict(CONFIG)
    del config["deformation"]["body_knots"]
    of_before, _ = load_scene(with_metadata(asset, tmp_path / "before.safetensors", config=json.dumps(config)))
    now, _ = load_scene(asset)
    assert of_before.deformation.body is None and of_before.config == now.config
    assert torch.equal(of_before.density(points, times), now.density(points, times))


def test_of_many_edits_the_latest_are_told() -> None:
    told = Provenance("a cube", edits=tuple(f"strength {i}" for i in range(5000))).lines
    assert len(told) < 15 and told[-1] == "motion changed: strength 4999"
    assert told[2:4] == ["motion changed: 4,992 times, then", "motion changed: strength 4992"]
    assert "times" not in " ".join(Provenance("a cube", edits=("strength 1",)).lines)


def test_info_reads_the_header_alone(asset: Path) -> None:
    info = read_info(asset)
    assert info.format_version == 1 and info.config == CONFIG and info.provenance == PROVENANCE
    assert info.shapes["deformation.active_levels"] == ()
    assert info.shapes["occupancy.occupied"] == (4, 4, 4)


def test_a_moving_scene_knows_the_mesh_that_it_began_as(tmp_path: Path) -> None:
    rows = ((0.0, 0.0, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
    mesh = MeshOrigin(Source("fox.glb", "glb", "ab" * 32, "run", 0.25), Placement(rows, (0.5, -2.0, 0.0), 1.75))
    save_scene(tmp_path / "s.safetensors", tiny_scene(), replace(PROVENANCE, parent=Provenance("still", mesh=mesh)))
    found = read_info(tmp_path / "s.safetensors").provenance
    assert found.mesh is None and found.first_mesh == mesh and PROVENANCE.first_mesh is None


def test_saving_replaces_whole_files_only(asset: Path, tmp_path: Path) -> None:
    target = tmp_path / "s.safetensors"
    shutil.copy(asset, target)
    scene = tiny_scene()
    with torch.no_grad():
        scene.canonical.grid.table[0] = float("nan")
    with pytest.raises(AssetError, match="not finite in canonical.grid.table"):
        save_scene(target, scene)
    assert target.read_bytes() == asset.read_bytes()
    with pytest.raises(AssetError, match="can't be written"):
        save_scene(tmp_path / "no" / "folder.safetensors", tiny_scene())
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


def edited_config(**changes) -> str:
    return json.dumps(asdict(CONFIG) | changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "other"}, "not a dream4d scene"),
        ({"format": None}, "not a dream4d scene"),
        ({"format_version": "2"}, "newer than 1: update dream4d"),
        ({"format_version": "one"}, "does not say the version"),
        ({"config": None}, "cannot be understood"),
        ({"config": "{"}, "cannot be understood"),
        ({"config": "[" * 100_000}, "cannot be understood"),
        ({"config": edited_config(colour=1)}, "unknown key 'colour'"),
        ({"config": edited_config(radius="1")}, "config.radius must be of type float, got '1'"),
        ({"config": edited_config(n_samples=32.5)}, "config.n_samples must be of type int"),
        ({"config": edited_config(n_samples=True)}, "config.n_samples must be of type int"),
        ({"config": edited_config(radius=float("nan"))}, "config.radius must be a finite number"),
        ({"config": edited_config(radius=10**400)}, "config.radius is out of range"),
        ({"config": edited_config(radiance=None)}, "config.radiance must be an object"),
        ({"config": edited_config(occupancy_resolution=200)}, r"has shape \(4, 4, 4\), its configuration needs"),
        ({"config": edited_config(deformation=None)}, "which its configuration does not know"),
        ({"config": edited_config(background={"color": [1, 1]})}, "config.background.color must have 3 entries"),
        ({"provenance": '{"prompt": 3}'}, "provenance.prompt must be of type str"),
    ],
)
def test_wrong_headers_are_refused_in_one_line(asset: Path, tmp_path: Path, changes: dict, said: str) -> None:
    with pytest.raises(AssetError, match=said) as error:
        load_scene(with_metadata(asset, tmp_path / "s.safetensors", **changes))
    assert "\n" not in str(error.value)


def test_absurd_sizes_are_refused_before_memory_is_taken(asset: Path, tmp_path: Path) -> None:
    config = asdict(CONFIG)
    for value, said in ((60, "log2_entries must lie in"), (24, "its configuration needs")):
        config["radiance"]["grid"] |= {"log2_entries": value, "n_levels": 32, "growth": 1.3, "base_resolution": 64}
        with pytest.raises(AssetError, match=said):
            load_scene(with_metadata(asset, tmp_path / "s.safetensors", config=json.dumps(config)))


def test_foreign_and_damaged_files_are_refused(asset: Path, tmp_path: Path) -> None:
    target, content = tmp_path / "s.safetensors", asset.read_bytes()
    target.write_bytes(b"")
    with pytest.raises(AssetError, match="is empty: is the download complete"):
        load_scene(target)
    for damaged, said in (
        (b"PK\x03\x04 no tensors", "one of torch's, or an archive"),
        *((cut, "is it complete[?]$") for cut in (content[:100], content[:-1], content + b"more")),
    ):
        target.write_bytes(damaged)
        with pytest.raises(AssetError, match=f"not a readable .safetensors file.*{said}"):
            load_scene(target)
    save_file({"x": torch.zeros(3)}, target)
    with pytest.raises(AssetError, match="not a dream4d scene"):
        load_scene(target)
    for name, mesh in (("cube.glb", b"glTF\2\0\0\0" + bytes(20)), ("cube.OBJ", b"v 0 0 0\nv 1 0 0\nv 0 1 0\n")):
        (tmp_path / name).write_bytes(mesh)
        with pytest.raises(AssetError, match="is a mesh, not a scene: dream4d import makes a scene of it"):
            load_scene(tmp_path / name)
    (tmp_path / "scene.ply").write_bytes(content)
    assert read_info(tmp_path / "scene.ply") == read_info(asset), "a scene under a mesh's name"
    with pytest.raises(AssetError, match="does not exist"):
        load_scene(tmp_path / "nothing.safetensors")
    with pytest.raises(AssetError, match="not a file"):
        read_info(tmp_path)


def test_wrong_tensors_are_refused(asset: Path, tmp_path: Path) -> None:
    target, scene = tmp_path / "s.safetensors", tiny_scene()
    metadata = split(asset.read_bytes())[0]["__metadata__"]
    whole = {name: value.clone() for name, value in scene.state_dict().items()}
    for changes, said in (
        ({"canonical.grid.table": None}, "lacks the tensor canonical.grid.table"),
        ({"surprise": torch.zeros(1)}, "has the tensor surprise"),
        ({"background.mlp.layers.0": torch.zeros(4, 8)}, "has shape"),
        ({"background.mlp.layers.0": torch.full((4, 9), float("inf"))}, "not finite"),
        ({"background.mlp.layers.0": torch.zeros(4, 9).half()}, "has type torch.float16"),
        ({"deformation.active_levels": torch.tensor(77)}, r"active_levels must lie in \[0, 2\]"),
    ):
        save_file({n: v for n, v in (whole | changes).items() if v is not None}, target, metadata)
        with pytest.raises(AssetError, match=said):
            load_scene(target)
        if said.startswith(("lacks", "has the tensor", "has shape")):  # the header says as much
            with pytest.raises(AssetError, match=said):
                read_info(target)


def mutated(content: bytes, chance: random.Random) -> bytes:
    """One random mutation: bytes flipped, cut short, stretched, or the header's text edited."""
    kind = chance.randrange(5)
    data = bytearray(content)
    (length,) = struct.unpack("<Q", content[:8])
    if kind == 0:
        for _ in range(chance.randint(1, 8)):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif kind == 1:
        del data[chance.randrange(len(data)) :]
    elif kind == 2:  # in the header, where it tells
        for _ in range(chance.randint(1, 3)):
            data[chance.randrange(8 + length)] = chance.choice(b'0123456789{}[]",:-.eE truefalsn\\\x00\xff')
    elif kind == 3:
        place = chance.randrange(len(data))
        data[place:place] = bytes(chance.randrange(256) for _ in range(chance.randint(1, 16)))
    else:
        header, body = split(content)
        values = [None, -1, 0, 3, 10**30, 1e308, "", "x", [], {}, True, [1, 2, 3], float("nan")]
        config = json.loads(header["__metadata__"]["config"])
        node = config
        while True:
            key = chance.choice(list(node))
            if not isinstance(node[key], dict) or chance.random() < 0.2:
                break
            node = node[key]
        if chance.random() < 0.2:
            del node[key]
        else:
            node[key] = chance.choice(values)
        header["__metadata__"]["config"] = json.dumps(config)
        data = bytearray(join(header, body))
    return bytes(data)


def test_a_thousand_mutations_give_a_clear_error_or_a_scene(asset: Path, tmp_path: Path) -> None:
    chance, content, target = random.Random(0), asset.read_bytes(), tmp_path / "s.safetensors"
    outcomes = {"loaded": 0, "refused": 0}
    for _ in range(1000):
        target.write_bytes(mutated(content, chance))
        try:
            scene, _ = load_scene(target)
        except AssetError as error:
            assert "\n" not in str(error) and len(str(error)) < 600
            outcomes["refused"] += 1
        else:
            assert all(p.isfinite().all() for p in scene.parameters())
            outcomes["loaded"] += 1
    assert outcomes["refused"] > 300 and outcomes["loaded"] > 10, outcomes


def test_config_from_dict_is_the_inverse_of_asdict() -> None:
    for config in (CONFIG, SceneConfig(), replace(CONFIG, background=BackgroundConfig(color=(0.0, 0.5, 1.0)))):
        assert config_from_dict(SceneConfig, json.loads(json.dumps(asdict(config)))) == config
    assert config_from_dict(SceneConfig, {}) == SceneConfig()
    with pytest.raises(ValueError, match=r"config.radiance.blob must be one of magic3d, dreamfusion, got 'ball'"):
        config_from_dict(SceneConfig, {"radiance": {"blob": "ball"}})


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_import_keeps_every_number(stage: str) -> None:
    scene, provenance = import_checkpoint(GOLDEN / f"{stage}.ckpt")
    state = torch.load(GOLDEN / f"{stage}.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(scene.canonical.grid.table, state["geometry.encoding.encoding.encoding.params"])
    assert torch.equal(scene.canonical.color_mlp.layers[1], state["geometry.feature_network.layers.2.weight"])
    assert scene.config.radiance.grid == HashGridConfig(log2_entries=14)
    assert provenance.steps == 10_000 and provenance.prompt
    if stage == "stage1":
        assert scene.deformation is None and scene.config.background == BackgroundConfig()
    else:
        assert scene.config.deformation.scale == 1.25 and int(scene.deformation.active_levels) == 12
        assert scene.config.background == BackgroundConfig(hidden_width=64, hidden_layers=3)


def test_import_without_settings_and_with_options(tmp_path: Path) -> None:
    alone = tmp_path / "last.ckpt"
    shutil.copy(GOLDEN / "stage2.ckpt", alone)
    assert import_checkpoint(alone)[0].config.deformation.scale == 1.0
    assert import_checkpoint(alone, ImportOptions(deformation_scale=1.5))[0].config.deformation.scale == 1.5
    said = ImportOptions(settings=GOLDEN / "stage2.json")
    assert import_checkpoint(alone, said)[0].config.deformation.scale == 1.25
    with pytest.raises(AssetError, match="no grid of 16 levels with base resolution 30"):
        import_checkpoint(alone, ImportOptions(base_resolution=30))
    with pytest.raises(AssetError, match="nowhere.json does not exist"):
        import_checkpoint(alone, ImportOptions(settings=tmp_path / "nowhere.json"))


def test_import_of_an_unfinished_run_wakes_some_levels_and_reads_occupancy(tmp_path: Path) -> None:
    content = torch.load(GOLDEN / "stage2.ckpt", weights_only=True)
    values = torch.arange(32.0**3)
    content["global_step"] = 1200
    content["state_dict"] |= {
        "renderer.estimator.occs": values,
        "renderer.estimator.binaries": (values > 1000).view(1, 32, 32, 32),
    }
    torch.save(content, tmp_path / "last.ckpt")
    scene, _ = import_checkpoint(tmp_path / "last.ckpt")
    assert int(scene.deformation.active_levels) == 6
    assert float(scene.occupancy.values[1, 2, 3]) == 32 * 32 + 2 * 32 + 3
    assert torch.equal(scene.occupancy.occupied, scene.occupancy.values > 1000)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "x.ckpt"
    with pytest.raises(AssetError, match="does not exist"):
        import_checkpoint(target)
    target.write_bytes((GOLDEN / "stage1.ckpt").read_bytes()[:5000])
    with pytest.raises(AssetError, match="not a readable checkpoint"):
        import_checkpoint(target)
    torch.save({"weights": torch.zeros(2)}, target)
    with pytest.raises(AssetError, match="is not a checkpoint of Dream-in-4D"):
        import_checkpoint(target)
    torch.save(Path, target)  # anything that would run code
    with pytest.raises(AssetError, match="not a readable checkpoint"):
        import_checkpoint(target)
    content = torch.load(GOLDEN / "stage1.ckpt", weights_only=True)
    content["state_dict"]["geometry.feature_network.layers.2.weight"] = torch.zeros(4, 64)
    torch.save(content, target)
    with pytest.raises(AssetError, match="canonical.color_mlp.layers.1 has shape"):
        import_checkpoint(target)
    del content["state_dict"]["geometry.feature_network.layers.0.weight"]
    torch.save(content, target)
    with pytest.raises(AssetError, match="lacks the network geometry.feature_network"):
        import_checkpoint(target)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("geometry.density_network.layers.0.weight", None, "lacks the network"),
        ("geometry.density_network.layers.0.weight", torch.zeros(3), "cannot be imported"),
        ("renderer.estimator.binaries", torch.ones(2, 2, dtype=torch.bool), "cannot be imported"),
        ("background.network.layers.0.weight", None, "lacks the network background.network"),
    ],
)
def test_checkpoints_with_missing_or_misshapen_tensors_are_refused(tmp_path: Path, name: str, value, said: str) -> None:
    content = torch.load(GOLDEN / "stage1.ckpt", weights_only=True)
    content["state_dict"].pop(name)
    if value is not None:
        content["state_dict"][name] = value
    torch.save(content, tmp_path / "bad.ckpt")
    shutil.copy(GOLDEN / "stage1.json", tmp_path / "bad.json")
    with pytest.raises(AssetError, match=said):
        import_checkpoint(tmp_path / "bad.ckpt")


class _Code:
    """Something that runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_code_in_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    torch.save({"state_dict": {"weight": _Code(tmp_path / "ran")}}, tmp_path / "bad.ckpt")
    with pytest.raises(AssetError, match="ever executed"):
        import_checkpoint(tmp_path / "bad.ckpt")
    assert not (tmp_path / "ran").exists()
