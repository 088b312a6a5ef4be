"""Files of tensors that others made: .safetensors, and torch's own .pt, .ckpt, .bin without trusting them.

What a file is, its first bytes say and not its name. A torch file is a pickle, which can run any program when it is
read; here it is only ever read as data (see pickled.py), and all sizes in it are compared with the file's own before
anything is taken from it. What trainings keep beside the weights (the classes of PyTorch Lightning, omegaconf, numpy)
is passed over; a file that names anything else is refused.
"""

from __future__ import annotations

import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ...documents import disguise, first_line, printable, shortened
from ..errors import PriorError
from .pickled import Made, Named, PickleError, Said, Stored, item_sizes, plain_of, read_pickle, stored_tensors, table_of

Shapes = Mapping[str, tuple[int, ...]]

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)

MOST_TENSORS = 50_000  # in one file; the largest models that are used here have some thousand
_MOST_HEADER = 2**25  # bytes of a header or a pickle, which hold a few hundred for each tensor
_MOST_REPEATED = 2**20  # numbers of a tensor that repeats stored ones; some buffers of transformers do
# torch's own old format: the number that its first pickle is, and how many pickles come before the storages
_MAGIC, _LEGACY_PARTS = 0x1950A86A20F9469CFC6C, 5

# what torch writes for tensors and what python writes for plain values
_OWN_NAMES = re.compile(
    r"torch\.(cuda\.|storage\.)?\w+Storage|torch\.(Size|device|Tensor|strided|b?float\w*|half|double|u?int\d+|long|bool)"
    r"|torch\.complex\d+|torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_from_type_v2|torch\.nn\.parameter\.\w+"
    r"|torch\.serialization\._get_layout|collections\.(OrderedDict|defaultdict|Counter)|_codecs\.encode"
    r"|(builtins|__builtin__)\.(set|frozenset|bytearray|bytes|complex|int|float|str|bool|list|dict|tuple|slice|range|object)"
    r"|copy_?reg\._reconstructor"
)
# what trainings keep beside the weights
_PASSED_OVER = re.compile(
    r"(pytorch_lightning|lightning|lightning_fabric|omegaconf|easydict|addict|yacs|ml_collections)\.[\w.]+"
    r"|numpy\.(\w+|dtypes\.\w+|_?core\.(multiarray|numeric)\.\w+|random\.[\w.]+)"
    r"|typing\.\w+|argparse\.Namespace|pathlib\.\w*Path|datetime\.\w+|enum\.\w+"
)
_READ = re.compile(r"numpy\.(dtype|_?core\.multiarray\.scalar)")  # see plain_of
_OTHER_FORMATS = {
    b"GGUF": "holds quantized weights (GGUF), which can't be used",
    b"\x89HDF": "is an HDF5 file, not one of torch or safetensors",
    b"\x1f\x8b": "is compressed (gzip): unpack it first",
    b"7z\xbc\xaf": "is an archive (7z): unpack it first",
    b"Rar!": "is an archive (rar): unpack it first",
    b"\x28\xb5\x2f\xfd": "is compressed (zstd): unpack it first",
}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The named tensors of a file; each is read when it is asked for."""

    path: Path
    shapes: Shapes  # of every tensor
    read: Callable[[str], Tensor]  # what reads one; `tensor` names the file in its errors
    extra: Mapping[str, Any] = field(default_factory=dict)  # what else the file says: a header's text, a step count
    passed_over: tuple[str, ...] = ()  # names of what it holds beside weights and was not read

    def tensor(self, name: str) -> Tensor:
        """Return one tensor, on the CPU. PriorError where it can't be read."""
        try:
            return self.read(name)
        except PriorError:
            raise
        except Exception as error:  # whatever torch and safetensors raise
            raise PriorError(f"{self.path}: {shown(name)} can't be read ({first_line(error)})") from error

    def under(self, prefix: str) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors whose names begin so, without that beginning."""
        return {name.removeprefix(prefix): shape for name, shape in self.shapes.items() if name.startswith(prefix)}


def shown(name: str) -> str:
    """A tensor's name as a message shows it."""
    return shortened(printable(name), 120)


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open a file of tensors. PriorError says what is wrong with one that can't be read, or mustn't be."""
    path = Path(path)
    first_bytes(path)  # what a pointer or a page really is matters more than what its name ends in
    if path.suffix.lower() not in SUFFIXES:
        raise PriorError(f"{path}: a file of weights ends in one of {', '.join(SUFFIXES)}")
    return open_tensors(path)


def first_bytes(path: Path) -> bytes:
    """The beginning of a file of weights. PriorError where it is a Git LFS pointer, a web page, empty or missing."""
    if not path.is_file():
        raise PriorError(f"there is no file {path}" if not path.exists() else f"{path} is a folder, not a file")
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise PriorError(f"{path} can't be read: {error.strerror or error}") from error
    strange = disguise(head) or next((what for magic, what in _OTHER_FORMATS.items() if head.startswith(magic)), None)
    if strange is not None:
        raise PriorError(f"{path} {strange}")
    return head


def open_tensors(path: Path | str) -> Checkpoint:
    """Open a file of tensors, whatever its name ends in."""
    path = Path(path)
    head = first_bytes(path)
    is_zip, is_pickle = head.startswith(b"PK\x03\x04"), head.startswith(b"\x80")
    # eight bytes of length, then JSON; what is neither is refused by the reader that its name promises
    if head[8:9] == b"{" or (path.suffix.lower() == ".safetensors" and not (is_zip or is_pickle)):
        return _open_safetensors(path, head)
    if not (is_zip or is_pickle):
        raise PriorError(f"{path} can't be read (it is neither of torch nor of safetensors): is the download complete?")
    try:
        return _open_zip(path) if is_zip else _open_legacy(path)
    except PickleError as error:
        raise PriorError(f"{path} can't be read ({error}): is the download complete?") from error
    except OSError as error:
        raise PriorError(f"{path} can't be read: {error.strerror or error}") from error


# ---- .safetensors ------------------------------------------------------------------------------------------------


def _open_safetensors(path: Path, head: bytes) -> Checkpoint:
    from safetensors import safe_open

    length = int.from_bytes(head[:8], "little")
    if _MOST_HEADER < length < path.stat().st_size:
        raise PriorError(f"{path} has a header of {length:,} bytes, more than {_MOST_HEADER:,}: it can't be meant")
    try:
        file = safe_open(str(path), "pt")  # stays open as long as it is used
        names = list(file.keys())
        if len(names) <= MOST_TENSORS:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            return Checkpoint(path, shapes, file.get_tensor, file.metadata() or {})
    except Exception as error:  # its library's own error, and those of names and numbers that python can't take
        said = shortened(first_line(error), 200)
        raise PriorError(f"{path} is not a readable .safetensors file ({said}): is it complete?") from error
    raise _too_many(path, len(names))


def _too_many(path: Path, count: int) -> PriorError:
    return PriorError(f"{path} holds {count:,} tensors, more than {MOST_TENSORS:,}: it can't be meant")


# ---- Torch's files -----------------------------------------------------------------------------------------------

Places = Mapping[str, tuple[int, int]]  # of every storage: its first byte in the file, and how many it has


def _open_zip(path: Path) -> Checkpoint:
    """Open what torch writes since 1.6: an archive of one pickle and, not compressed, every storage."""
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            # TorchScript's archives have a data.pkl as well
            if any(re.fullmatch(r"[^/]+/constants\.pkl", name) for name in archive.namelist()):
                raise PriorError(f"{path} is a program (TorchScript), not a file of weights")
            members = _members(path, archive, file)
            pickles = [name for name in members if re.fullmatch(r"[^/]+/data\.pkl", name)]
            if not pickles:
                raise PriorError(f"{path} is a zip archive without weights of torch's: if it holds a model, unpack it")
            root = pickles[0].removesuffix("data.pkl")
            offset, length = members[pickles[0]]
            if length > _MOST_HEADER:
                raise PriorError(f"{path} describes its weights in {length:,} bytes: it can't be meant")
            file.seek(offset)
            text = BytesIO(file.read(length))
            # older versions don't say it, and nearly all machines are of this order
            order = archive.read(f"{root}byteorder") if f"{root}byteorder" in members else b"little"
    except (PriorError, OSError):
        raise
    except Exception as error:  # whatever zipfile raises for what is damaged
        raise PriorError(f"{path} can't be read ({first_line(error)}): is the download complete?") from error
    if order != b"little":
        raise PriorError(f"{path} was written by a machine of another byte order: save it anew as .safetensors")
    begin = f"{root}data/"
    places = {name.removeprefix(begin): place for name, place in members.items() if name.startswith(begin)}
    return _checkpoint(path, read_pickle(text), places)


def _members(path: Path, archive: zipfile.ZipFile, file: BinaryIO) -> dict[str, tuple[int, int]]:
    """Where each file of an archive lies, (first byte, bytes); none is compressed, and together they are no larger
    than the archive."""
    found, size = {}, path.stat().st_size
    entries = archive.infolist()
    if len(entries) > MOST_TENSORS:
        raise _too_many(path, len(entries))
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise PriorError(
                f"{path} is a zip archive with compressed parts ({shown(entry.filename)}: {entry.file_size:,} bytes "
                f"from {entry.compress_size:,}), which torch never writes: {_GET_ANOTHER}"
            )
        # The list at the archive's end says where a part's own header is, not how long it is: 30 bytes, the name, and
        # an extra field, by which torch begins each storage at a multiple of 64.
        file.seek(entry.header_offset)
        header = file.read(30)
        if len(header) < 30:
            raise PickleError("its list of contents is damaged")
        begin = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if begin + entry.file_size > size:
            raise PickleError(f"{shown(entry.filename)} reaches beyond its end")
        found[entry.filename] = (begin, entry.file_size)
    if sum(length for _, length in found.values()) > size:
        raise PickleError("its parts lie over one another")
    return found


def _open_legacy(path: Path) -> Checkpoint:
    """Open what torch wrote before 1.6: five pickles, then every storage with its length before it."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        parts: list[Said] = []
        for _ in range(_LEGACY_PARTS):
            parts.append(read_pickle(file))
            _refuse_foreign(path, parts[-1].names)
            if parts[0].content != _MAGIC:
                raise PriorError(f"{path} is a pickle, but not of torch's weights: {_GET_ANOTHER}")
        # magic number, version, the writer's sizes of numbers, the content, the keys of the storages in their order
        said, keys = parts[3], parts[4].content
        sizes = item_sizes(said)
        places = {}
        for key in keys if isinstance(keys, list) else []:
            n_stored = int.from_bytes(file.read(8), "little")  # numbers, not bytes
            if not isinstance(key, str) or key not in sizes:
                raise PickleError("its list of contents is damaged")
            places[key] = (file.tell(), n_stored * sizes[key])
            if sum(places[key]) > size:
                raise PickleError("it ends too early")
            file.seek(places[key][1], 1)
    return _checkpoint(path, said, places)


_GET_ANOTHER = "get the model as .safetensors, or have it converted by someone you trust"


def _refuse_foreign(path: Path, names: tuple[str, ...]) -> None:
    foreign = [name for name in names if not (_OWN_NAMES.fullmatch(name) or _PASSED_OVER.fullmatch(name))]
    if foreign:
        what = ", ".join(shown(name) for name in sorted(set(foreign))[:3])
        raise PriorError(
            f"{path} was not opened: it is a pickle that holds more than weights (it wants to run {what}), which could "
            f"be any program. Nothing in it is ever executed here: {_GET_ANOTHER}"
        )


def _checkpoint(path: Path, said: Said, places: Places) -> Checkpoint:
    _refuse_foreign(path, said.names)
    content = said.content
    table = table_of(content)
    # trainings keep the weights under this name, beside steps and settings
    inner = None if table is None else table_of(table.get("state_dict", table))
    if table is None or inner is None:
        held = content.name if isinstance(content, Made | Named) else type(content).__name__
        raise PriorError(f"{path} holds no table of weights but {shown(held)}")
    found = dict(stored_tensors(inner))
    if len(found) > MOST_TENSORS:
        raise _too_many(path, len(found))
    tensors = {name: stored for name, stored in found.items() if isinstance(stored, Stored)}
    for name, stored in found.items():
        _check_stored(path, name, stored, places)
    if not tensors:
        raise PriorError(f"{path} holds no weights")
    extra = {key: plain for key, value in table.items() if (plain := plain_of(value)) is not None}
    left = [name for name in said.names if not (_OWN_NAMES.fullmatch(name) or _READ.fullmatch(name))]
    left += [f"{shown(name)} ({kind})" for name, kind in found.items() if isinstance(kind, str)]
    shapes = {name: stored.shape for name, stored in tensors.items()}
    return Checkpoint(path, shapes, _reader(path, tensors, places), extra, tuple(dict.fromkeys(left)))


def _check_stored(path: Path, name: str, stored: Stored | PickleError | str, places: Places) -> None:
    """Refuse tensors whose numbers are not in the file."""
    if isinstance(stored, PickleError):
        raise PriorError(f"{path} is damaged: {shown(name)} {stored}")
    if not isinstance(stored, Stored):
        return
    if stored.numel and (stored.key not in places or stored.n_bytes > places[stored.key][1]):
        raise PriorError(f"{path} is not complete: the numbers of {shown(name)} are missing")
    # strides of 0 let few numbers stand for many, which nobody stores by the million
    if stored.numel > max(stored.n_stored, _MOST_REPEATED):
        raise PriorError(
            f"{path}: {shown(name)} says that it is of {stored.numel:,} numbers, of which the file holds "
            f"{stored.n_stored:,}: such a tensor can't be meant"
        )


def _reader(path: Path, tensors: Mapping[str, Stored], places: Places) -> Callable[[str], Tensor]:
    """What reads one tensor; the file is mapped, so that only what is used is read."""

    @cache
    def whole() -> Tensor:
        return torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)

    def read(name: str) -> Tensor:
        stored = tensors[name]
        if not stored.numel:
            return torch.empty(stored.shape, dtype=stored.dtype)
        size = stored.dtype.itemsize
        begin = places[stored.key][0] + stored.offset * size
        span = 1 + sum((n - 1) * step for n, step in zip(stored.shape, stored.stride, strict=True))
        numbers = whole()[begin : begin + span * size]
        numbers = numbers.clone() if begin % size else numbers  # other types must begin at their own multiples
        return numbers.view(stored.dtype).as_strided(stored.shape, stored.stride)

    return read
