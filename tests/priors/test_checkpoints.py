"""Files of tensors: what they are is told by their content, and nothing in them costs more than they are large."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import resource
import shutil
import struct
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import ldm_layout as layout
import numpy as np
import pytest
import torch
from ldm_layout import small_checkpoint
from places import DATA
from safetensors.torch import save_file

from dream4d_engine.assets import AssetError, load_scene, read_info
from dream4d_engine.dream_in_4d import import_checkpoint
from dream4d_engine.priors.errors import PriorError
from dream4d_engine.priors.formats.checkpoints import open_checkpoint
from dream4d_engine.priors.formats.convert import convert
from dream4d_engine.priors.formats.identify import identify
from dream4d_engine.priors.formats.lora_files import read_lora
from dream4d_engine.priors.formats.tiny_vae import load_tiny_vae
from dream4d_engine.priors.loading import load_prior

CASES = DATA / "cases"
FORMATS = pytest.mark.parametrize("new_format", [True, False])


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return layout.random_state(small_checkpoint("sd15"), 7)


# --- Every kind of tensor ----------------------------------------------------------------------------------------


TENSORS = {
    "plain": torch.randn(3, 4),
    "turned": torch.randn(6, 8).T[2:5, 1:],
    "half": torch.randn(5).half(),
    "bfloat16": torch.randn(7).bfloat16(),
    "float8": torch.randn(4).to(torch.float8_e4m3fn),
    "double": torch.randn(2, dtype=torch.float64),
    "whole": torch.arange(5),
    "byte": torch.arange(5, dtype=torch.uint8),
    "mask": torch.tensor([True, False]),
    "complex": torch.randn(2, dtype=torch.complex64),
    "scalar": torch.tensor(3),
    "none": torch.zeros(0, 3),
    "repeated": torch.arange(3.0).expand(2, 3),
    "parameter": torch.nn.Parameter(torch.randn(2)),
    "buffer": torch.nn.Buffer(torch.randn(2)),
}


@FORMATS
def test_every_kind_of_tensor_is_read_as_torch_reads_it(tmp_path, new_format):
    path = tmp_path / "t.ckpt"
    shared = torch.randn(100)
    tensors = TENSORS | {"first": shared[:10], "last": shared[90:].view(2, 5)}
    if not new_format:
        del tensors["float8"]  # torch itself can't write it so
    torch.save(OrderedDict(tensors), path, _use_new_zipfile_serialization=new_format)
    file, theirs = open_checkpoint(path), torch.load(path, weights_only=True)
    assert file.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name, expected in theirs.items():
        ours = file.tensor(name)
        assert ours.dtype == expected.dtype and ours.shape == expected.shape, name
        assert torch.equal(
            ours.contiguous().reshape(-1).view(torch.uint8), expected.contiguous().reshape(-1).view(torch.uint8)
        )


@FORMATS
def test_modules_states_are_read(tmp_path, new_format):
    network = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    torch.save(
        {"model": 1, "state_dict": network.state_dict()}, tmp_path / "m.pt", _use_new_zipfile_serialization=new_format
    )
    file = open_checkpoint(tmp_path / "m.pt")
    for name, tensor in network.state_dict().items():
        assert torch.equal(file.tensor(name), tensor)
    assert file.extra == {"model": 1} and file.passed_over == ()


@FORMATS
def test_what_is_not_needed_is_passed_over_and_named(tmp_path, new_format):
    """Numpy's scalars are read, what else trainings keep is not."""
    content = {
        "state_dict": {"a": torch.ones(2), "b": np.zeros(3)},
        "global_step": np.int64(7),
        "loss": np.float32(0.5),
        "best": np.float64(0.25),
        "random": np.random.RandomState(0).get_state(),
        "hyper_parameters": {"path": Path("x")},
    }
    torch.save(content, tmp_path / "n.ckpt", _use_new_zipfile_serialization=new_format)
    file = open_checkpoint(tmp_path / "n.ckpt")
    assert file.shapes == {"a": (2,)} and file.extra == {"global_step": 7, "loss": 0.5, "best": 0.25}
    assert "numpy.ndarray" in file.passed_over and not any("scalar" in name for name in file.passed_over)
    assert any(name.startswith("b (numpy") for name in file.passed_over)


# --- What a file is ----------------------------------------------------------------------------------------------


DISGUISES = {
    "lfs.ckpt": "is a Git LFS pointer, not the file itself: fetch the contents",
    "lfs.safetensors": "is a Git LFS pointer, not the file itself: fetch the contents",
    "page.ckpt": "is a web page saved under this name: download the file itself",
    "page.safetensors": "is a web page saved under this name: download the file itself",
}
OTHERS = {
    b"\n\n <HTML><head>": "is a web page",
    b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>': "is a web page",
    b"\xef\xbb\xbfversion https://git-lfs.github.com/spec/v1\r\n": "is a Git LFS pointer",
    b"": "is empty",
    b"GGUF\x03\x00\x00\x00": "quantized weights",
    b"\x1f\x8b\x08\x00": "is compressed",
    b"7z\xbc\xaf\x27\x1c": "is an archive",
    b"\x89HDF\r\n\x1a\n": "is an HDF5 file",
    b'{"error": "Invalid username or password."}': "can't be read|not a readable .safetensors",
    b"\x00" * 5000: "can't be read|not a readable .safetensors",
}


def ways_in(path: Path, folder: Path):
    """Everything that opens a file of weights."""
    tiny, lora = folder / "tiny", folder / "lora"
    for place, name, target in ((tiny, "diffusion_pytorch_model", tiny), (lora, "pytorch_lora_weights", lora)):
        place.mkdir(exist_ok=True)
        suffix = ".bin" if path.suffix == ".ckpt" else ".safetensors"
        shutil.copy(path, target / f"{name}{suffix}")
    (tiny / "config.json").write_text('{"_class_name": "AutoencoderTiny"}')
    yield lambda: open_checkpoint(path)
    yield lambda: load_prior(path)
    yield lambda: identify(path)
    yield lambda: convert(path, folder / "out")
    yield lambda: read_lora(path)
    yield lambda: read_lora(lora)
    yield lambda: load_tiny_vae(tiny, 0.18215, torch.float32, "cpu")
    yield lambda: load_scene(path)
    yield lambda: read_info(path)
    yield lambda: import_checkpoint(path)


def refused(attempt, said: str) -> None:
    with pytest.raises((PriorError, AssetError), match=said) as error:
        attempt()
    text = str(error.value)
    assert "\n" not in text and "weights_only" not in text and "defect" not in text, text


@pytest.mark.parametrize("name", DISGUISES)
def test_pointers_and_web_pages_are_named_wherever_weights_are_read(tmp_path, name):
    shutil.copy(CASES / name, tmp_path / name)
    for attempt in ways_in(tmp_path / name, tmp_path):
        refused(attempt, DISGUISES[name])


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("content", OTHERS)
def test_other_files_are_named(tmp_path, content, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    refused(lambda: load_prior(path), OTHERS[content])
    refused(lambda: load_scene(path), "x.*(is|can't be)")


def test_files_are_known_by_their_content(state, tmp_path):
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "b.ckpt")
    torch.save(state, tmp_path / "c.ckpt", _use_new_zipfile_serialization=False)
    for name in ("a.safetensors", "b.ckpt", "c.ckpt"):
        for other in (".safetensors", ".ckpt", ".pt", ".bin", ".CKPT", ".SafeTensors"):
            path = tmp_path / f"renamed{other}"
            shutil.copy(tmp_path / name, path)
            file = open_checkpoint(path)
            assert file.shapes.keys() == state.keys() and identify(path).kind == "image"
            key = "model.diffusion_model.out.2.bias"
            assert torch.equal(file.tensor(key), state[key])
    with pytest.raises(PriorError, match="a file of weights ends in one of"):
        open_checkpoint(shutil.copy(tmp_path / "b.ckpt", tmp_path / "b.txt"))


def test_headers_that_begin_like_a_pickle_are_headers(tmp_path):
    """The first byte is a length's, and may be 128."""
    seen = set()
    for length in range(1, 300):
        save_file({"a": torch.ones(1)}, tmp_path / "a.ckpt", {"note": "x" * length})
        seen.add((tmp_path / "a.ckpt").read_bytes()[0])
        assert torch.equal(open_checkpoint(tmp_path / "a.ckpt").tensor("a"), torch.ones(1))
    assert 0x80 in seen


# --- Nothing is executed -----------------------------------------------------------------------------------------


class Call:
    """Calls something when it is unpickled."""

    def __init__(self, function, *arguments):
        self.called = function, arguments

    def __reduce__(self):
        return self.called


@FORMATS
def test_calls_are_refused_and_named(tmp_path, new_format):
    mark = tmp_path / "ran"
    for function, arguments, said in (
        (os.system, (f"touch {mark}",), r"(posix|nt)\.system"),
        (eval, (f"open({str(mark)!r}, 'w')",), r"__builtin__\.eval"),
        (Path.touch, (mark,), r"__builtin__\.getattr"),
        (torch.load, ("x",), r"torch\.serialization\.load"),
        (open, (str(mark), "w"), r"_?io\.open"),
    ):
        for content in (
            {"state_dict": {"a": torch.ones(1)}, "b": Call(function, *arguments)},
            {"a": torch.ones(1), "b": Call(function, *arguments)},
            {"state_dict": {"a": Call(function, *arguments)}},
            Call(function, *arguments),
        ):
            torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=new_format)
            refused(lambda: open_checkpoint(tmp_path / "x.ckpt"), f"was not opened.*wants to run.*{said}")
            refused(lambda: import_checkpoint(tmp_path / "x.ckpt"), said)
            assert not mark.exists()


def test_other_pickles_are_refused(tmp_path):
    path = tmp_path / "x.ckpt"
    for content in ({"a": [1.0]}, [1], "text", {"state_dict": {"a": 1}}):
        path.write_bytes(pickle.dumps(content, 2))
        refused(lambda: open_checkpoint(path), "is a pickle, but not of torch's weights")
    archive(path, b"\x80\x02c__torch__\nNet\n.", {"constants.pkl": b"\x80\x02).", "code/__torch__.py": b"pass"})
    refused(lambda: open_checkpoint(path), r"is a program \(TorchScript\)")


# --- Small files that ask for much -------------------------------------------------------------------------------


def archive(path: Path, text: bytes, parts: dict[str, bytes], compress=zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compress) as file:
        for name, content in {"data.pkl": text, "version": b"3\n", **parts}.items():
            file.writestr(f"archive/{name}", content)
    return path


def tensor_text(shape, stride, numel: int = 1, offset: int = 0) -> bytes:
    """The pickle of {"a": tensor}, written by hand."""

    class Kept:
        def __init__(self, identity):
            self.identity = identity

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing):
            return thing.identity if isinstance(thing, Kept) else None

    class Rebuilt:
        def __reduce__(self):
            kept = Kept(("storage", torch.FloatStorage, "0", "cpu", numel))
            return torch._utils._rebuild_tensor_v2, (kept, offset, shape, stride, False, OrderedDict())

    out = io.BytesIO()
    Pickler(out, 2).dump({"a": Rebuilt()})
    return out.getvalue()


@pytest.fixture
def bounded():
    """No more than 5 s and, above what is in use, 1 GB."""
    begin, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.process_time() - begin < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


@pytest.mark.parametrize(
    ("shape", "stride", "numel", "said"),
    [
        ((10**9,), (0,), 1, "a says that it is of 1,000,000,000 numbers, of which the file holds 1"),
        ((10**5, 10**5), (0, 0), 1, "says that it is of 10,000,000,000 numbers"),
        ((2**40, 2**40), (0, 0), 1, "of which the file holds 1"),
        ((10**9,), (1,), 1, "damaged: a reaches beyond the 1 numbers of its storage"),
        ((4,), (1,), 10**9, "the numbers of a are missing"),
        ((10**9,), (1,), 10**9, "the numbers of a are missing"),
        ((2,), (-1,), 1, "damaged: a has sizes that are no whole numbers"),
        ((2.5,), (1,), 4, "damaged: a has sizes that are no whole numbers"),
        ((True,), (1,), 4, "damaged: a has sizes that are no whole numbers"),
        ((2, 2), (1,), 4, "damaged: a has sizes that don't fit its strides"),
        ((1,) * 100, (1,) * 100, 4, "damaged: a has sizes that don't fit its strides"),
        ("22", (1,), 4, "damaged: a has sizes that are no whole numbers"),
    ],
)
def test_tensors_larger_than_their_file_are_refused(tmp_path, bounded, shape, stride, numel, said):
    path = archive(tmp_path / "x.ckpt", tensor_text(shape, stride, numel), {"data/0": b"\0" * 16})
    refused(lambda: open_checkpoint(path), said)


@FORMATS
def test_expanded_tensors_of_torch_itself(tmp_path, bounded, new_format):
    torch.save({"a": torch.zeros(1).expand(10**9)}, tmp_path / "x.ckpt", _use_new_zipfile_serialization=new_format)
    refused(lambda: open_checkpoint(tmp_path / "x.ckpt"), "x.ckpt: a says that it is of 1,000,000,000 numbers")
    refused(lambda: load_prior(tmp_path / "x.ckpt"), "of which the file holds 1")


def test_offsets_and_keys_are_checked(tmp_path, bounded):
    path = archive(tmp_path / "x.ckpt", tensor_text((2,), (1,), 4, 3), {"data/0": b"\0" * 16})
    refused(lambda: open_checkpoint(path), "reaches beyond")
    path = archive(tmp_path / "x.ckpt", tensor_text((2,), (1,), 4), {"data/1": b"\0" * 16})
    refused(lambda: open_checkpoint(path), "the numbers of a are missing")
    path = archive(tmp_path / "x.ckpt", tensor_text((2,), (1,), 4), {"data/0": b"\0" * 15})
    refused(lambda: open_checkpoint(path), "the numbers of a are missing")
    path = archive(tmp_path / "x.ckpt", tensor_text((2,), (1,), 4), {"data/0": b"\0" * 16, "byteorder": b"big"})
    refused(lambda: open_checkpoint(path), "another byte order")
    path = archive(tmp_path / "x.ckpt", tensor_text((2,), (1,), 4), {"data/0": struct.pack("<4f", 1, 2, 3, 4)})
    assert open_checkpoint(path).tensor("a").tolist() == [1, 2]


def test_zip_bombs_are_refused(tmp_path, bounded):
    path = tmp_path / "x.ckpt"
    archive(path, b"\x80\x02" + b"N0" * 50_000_000, {}, zipfile.ZIP_DEFLATED)
    refused(lambda: open_checkpoint(path), r"compressed parts \(archive/data.pkl: 100,000,002 bytes from")
    archive(path, tensor_text((2,), (1,), 4), {"data/0": b"\0" * 10**8}, zipfile.ZIP_DEFLATED)
    refused(lambda: open_checkpoint(path), "compressed parts")
    archive(path, tensor_text((2,), (1,), 4), {"data/0": b"\0" * 16})
    whole = path.read_bytes()
    where = whole.index(b"PK\x01\x02", whole.index(b"PK\x01\x02") + 1)
    for size in (2**31, 2**32 - 2):  # what the list of contents says of a part's size
        claimed = whole[: where + 20] + struct.pack("<II", size, size) + whole[where + 28 :]
        path.write_bytes(claimed)
        refused(lambda: open_checkpoint(path), "reaches beyond its end")
    with zipfile.ZipFile(path, "w") as other:
        other.writestr("model/model_index.json", "{}")
    refused(lambda: open_checkpoint(path), "is a zip archive without weights of torch's")


def op(name: str) -> bytes:
    return next(code.code for code in pickletools.opcodes if code.name == name).encode("latin1")


PROGRAMS = {
    "endless": b"\x80\x02" + b"}" * 10**7 + b".",
    "large memo": b"\x80\x02}" + op("LONG_BINPUT") + b"\xff\xff\xff\xff.",
    "large bytes": b"\x80\x05" + op("BYTEARRAY8") + struct.pack("<Q", 10**10) + b".",
    "large text": b"\x80\x04" + op("BINUNICODE8") + struct.pack("<Q", 10**10) + b"x.",
    "large number": b"\x80\x02I" + b"9" * 10**6 + b"\n.",
    "allocation": b"\x80\x02cbuiltins\nbytearray\n" + op("BININT") + b"\x00\xca\x9a\x3b\x85R.",
    "storage": b"\x80\x02ctorch\nFloatStorage\n" + op("BININT") + b"\x00\xca\x9a\x3b\x85R.",
    "deep": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "deep key": b"\x80\x02}" + b")" + op("TUPLE1") * 100_000 + b"K\x01s.",
    "no end": b"\x80\x02}",
    "no stack": b"\x80\x02.",
    "pops": b"\x80\x02}000.",
    "extension": b"\x80\x02" + op("EXT1") + b"\x01.",
    "buffer": b"\x80\x05" + op("NEXT_BUFFER") + b".",
    "marks": b"\x80\x02" + b"(" * 100_000 + b"t.",
    "no function": b"\x80\x02K\x01)R.",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_in_pickles_cost_no_more_than_they_are_long(tmp_path, bounded, name):
    path = archive(tmp_path / "x.ckpt", PROGRAMS[name], {})
    refused(lambda: open_checkpoint(path), "x.ckpt (can't be read|holds no)")
    (tmp_path / "y.ckpt").write_bytes(PROGRAMS[name])
    refused(lambda: open_checkpoint(tmp_path / "y.ckpt"), "y.ckpt (can't be read|is a pickle, but not)")


def test_headers_of_safetensors_are_bounded(tmp_path, bounded):
    path = tmp_path / "x.safetensors"
    for length in (10**9, 2**63 - 1, 2**64 - 1, 0, 1):
        path.write_bytes(struct.pack("<Q", length) + b'{"a": 1}')
        refused(lambda: open_checkpoint(path), "x.safetensors is not a readable .safetensors file")
        refused(lambda: load_scene(path), "x.safetensors is not a readable .safetensors file")
    path.write_bytes(struct.pack("<Q", 2**26) + b"{" + b" " * 2**26)
    refused(lambda: open_checkpoint(path), "x.safetensors has a header of 67,108,864 bytes")
    refused(lambda: load_scene(path), "x.safetensors has a header too large to be meant")
    entry = b'{"dtype":"F32","shape":[%s],"data_offsets":[0,4]}'
    for shape in (b"1000000000", b"0,1000000000000000000000", b"-1", b"9223372036854775807,2", b"1.5"):
        header = b'{"a":' + entry % shape + b"}"
        path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
        refused(lambda: open_checkpoint(path), "x.safetensors is not a readable .safetensors file")
    header = b"[" * 10**6
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    refused(lambda: open_checkpoint(path), "x.safetensors is not a readable .safetensors file")


def test_files_of_very_many_tensors_are_refused(tmp_path):
    save_file({f"t{i}": torch.zeros(0) for i in range(60_000)}, tmp_path / "x.safetensors")
    refused(lambda: open_checkpoint(tmp_path / "x.safetensors"), "holds 60,000 tensors, more than 50,000")


def test_names_are_shown_without_what_moves_a_terminal(tmp_path):
    save_file({"\x1b[2J\x1b]0;owned\x07" + "x" * 10**5: torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(PriorError, match="no model of a known kind") as error:
        load_prior(tmp_path / "x.safetensors")
    assert str(error.value).isprintable() and len(str(error.value)) < 400


def test_cut_files_are_refused_at_any_length(state, tmp_path):
    for new_format in (True, False):
        torch.save(state, tmp_path / "whole.ckpt", _use_new_zipfile_serialization=new_format)
        whole = (tmp_path / "whole.ckpt").read_bytes()
        for share in (0.0001, 0.01, 0.5, 0.99, 0.99999):
            (tmp_path / "x.ckpt").write_bytes(whole[: max(int(len(whole) * share), 20)])
            refused(lambda: open_checkpoint(tmp_path / "x.ckpt"), "x.ckpt.*can't be read.*is the download complete")


# --- The original's checkpoints ----------------------------------------------------------------------------------


def test_import_passes_over_what_trainings_keep(tmp_path, caplog, monkeypatch):
    """Lightning's and omegaconf's classes are not here, numpy's scalars are understood."""
    import sys
    import types

    def foreign(name: str):
        module, _, plain = name.rpartition(".")
        for i in range(1, module.count(".") + 2):
            part = ".".join(module.split(".")[:i])
            if part not in sys.modules:
                monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
        kept = type(plain, (), {"__module__": module})
        monkeypatch.setattr(sys.modules[module], plain, kept, raising=False)
        return kept

    callback = foreign("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")()
    config = foreign("omegaconf.dictconfig.DictConfig")()
    callback.best, config._content = 3, {"a": 1}
    content = torch.load(DATA / "golden" / "stage1.ckpt", weights_only=True)
    content |= {"callbacks": {type(callback): callback}, "hyper_parameters": config, "global_step": np.int64(1200)}
    torch.save(content, tmp_path / "last.ckpt")
    monkeypatch.undo()
    scene, provenance = import_checkpoint(tmp_path / "last.ckpt")
    assert provenance.steps == 1200
    assert torch.equal(scene.canonical.grid.table, content["state_dict"]["geometry.encoding.encoding.encoding.params"])
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert "numpy" not in said
    assert "ModelCheckpoint" in said and "omegaconf.dictconfig.DictConfig" in said and "not read" in said


SETTINGS = {
    "empty": ("parsed.yaml", "", "parsed.yaml is empty"),
    "null": ("parsed.yaml", "null", "parsed.yaml must hold an object, got None"),
    "text": ("parsed.yaml", "a text", "parsed.yaml must hold an object, got 'a text'"),
    "list": ("parsed.yaml", "- 1", r"parsed.yaml must hold an object, got \[1\]"),
    "broken": ("parsed.yaml", "a: [", "parsed.yaml is not valid YAML"),
    "page": ("parsed.yaml", "<html>", "parsed.yaml is a web page"),
    "system": ("parsed.yaml", "system: text", "parsed.yaml: system must hold an object, got 'text'"),
    "geometry": ("parsed.yaml", "system: {geometry: 3}", "parsed.yaml: system.geometry must hold an object, got 3"),
    "grid": ("parsed.yaml", "geometry: {pos_encoding_config: [1]}", "geometry.pos_encoding_config must hold an object"),
    "levels": (
        "last.yaml",
        "geometry: {pos_encoding_config: {n_features_per_level: x}}",
        "must be a whole number, got 'x'",
    ),
    "zero": ("last.yaml", "geometry: {pos_encoding_config: {n_features_per_level: 0}}", "must be 1 or more, got 0"),
    "scale": ("last.json", '{"geometry": {"density_blob_scale": NaN}}', "density_blob_scale must be a number, got nan"),
    "samples": (
        "last.json",
        '{"renderer": {"num_samples_per_ray": "512"}}',
        "num_samples_per_ray must be a whole number",
    ),
    "many": ("last.json", '{"renderer": {"num_samples_per_ray": 1000000000}}', "n_samples must lie in"),
    "prompt": ("last.json", '{"prompt_processor": {"prompt": ["a"]}}', "prompt_processor: prompt must be text"),
    "prompts": ("last.json", '{"prompt_processor": 3}', "prompt_processor must hold an object, got 3"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_the_original_that_cannot_be_meant(tmp_path, name):
    shutil.copy(DATA / "golden" / "stage1.ckpt", tmp_path / "last.ckpt")
    file, text, said = SETTINGS[name]
    (tmp_path / file).write_text(text)
    refused(lambda: import_checkpoint(tmp_path / "last.ckpt"), said)


@pytest.mark.parametrize("text", ["null", '"text"', "[]", '{"model": null}', '{"image_size": "512x512"}', "{}"])
def test_foreign_settings_beside_a_checkpoint_are_passed_over(tmp_path, caplog, text):
    shutil.copy(DATA / "golden" / "stage2.ckpt", tmp_path / "last.ckpt")
    (tmp_path / "last.json").write_text(text)
    (tmp_path / "parsed.yaml").write_text("system: {geometry: {deformation_scale: 1.75}, prompt_processor: null}")
    scene, provenance = import_checkpoint(tmp_path / "last.ckpt")
    assert scene.config.deformation.scale == 1.75 and provenance.prompt == ""
    assert "last.json was passed over" in caplog.records[0].getMessage()


@pytest.mark.parametrize("step", ["ten", -1, True, 1.5, 2**63])
def test_steps_that_are_none_are_refused(tmp_path, step):
    content = torch.load(DATA / "golden" / "stage1.ckpt", weights_only=True) | {"global_step": step}
    torch.save(content, tmp_path / "last.ckpt")
    if step is True:
        assert import_checkpoint(tmp_path / "last.ckpt")[1].steps == 1
    else:
        refused(lambda: import_checkpoint(tmp_path / "last.ckpt"), "global_step is .*, not a step's number")
