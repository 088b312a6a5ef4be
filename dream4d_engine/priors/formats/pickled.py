"""What a pickle says, as plain data: no class is looked up, no function called, no tensor made.

A pickle is a program for a stack machine that may call anything. Here its instructions are followed as far as they
build numbers, text, lists and tables; whatever it wants called stays a `Made`, a note of the name and the arguments.
So a file can neither run code nor ask for more memory than its own text is long.
"""

from __future__ import annotations

import math
import pickletools
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import torch

MOST_STEPS = 2_000_000  # of one pickle; the largest published, optimizers and all, have some hundred thousand
_MOST_DIMS = 16

# storages by their classes' names ("FloatStorage" and so on)
_DTYPES = {
    "Float": torch.float32,
    "Half": torch.float16,
    "Double": torch.float64,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
    "Untyped": torch.uint8,
}
_REBUILD = {f"torch._utils._rebuild_tensor{version}" for version in ("", "_v2", "_v3")}
# numpy's names of types, and struct's
_NUMBERS = {
    "f4": "f",
    "f8": "d",
    "i1": "b",
    "i2": "h",
    "i4": "i",
    "i8": "q",
    "u1": "B",
    "u2": "H",
    "u4": "I",
    "b1": "?",
}


class PickleError(ValueError):
    """A pickle, or a tensor in one, that makes no sense; the message says why and does not name the file."""


@dataclass(frozen=True, eq=False)
class Named:
    """A class or a function that the pickle names, as "module.name"."""

    name: str


@dataclass(frozen=True, eq=False)
class Made:
    """What a call would have made."""

    name: str  # of what was to be called
    arguments: tuple[Any, ...]
    items: dict[Any, Any] = field(default_factory=dict)  # what the pickle put into it afterwards


@dataclass(frozen=True, eq=False)
class Kept:
    """A reference to what lies outside the pickle, a tensor's storage."""

    identity: Any  # as torch writes it, see _storage


@dataclass(frozen=True, eq=False)
class Said:
    """What a pickle says."""

    content: Any
    names: tuple[str, ...]  # of all classes and functions in it, whether called or not
    kept: tuple[Kept, ...]  # the storages outside that it refers to


@dataclass(frozen=True)
class Stored:
    """Where a tensor's numbers are."""

    key: str  # of its storage
    dtype: torch.dtype
    n_stored: int  # numbers of the storage
    offset: int  # in numbers, as the strides are
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Of the storage."""
        return self.n_stored * self.dtype.itemsize

    @property
    def numel(self) -> int:
        """How many numbers the tensor shows; more than are stored where some are repeated."""
        return math.prod(self.shape)  # whole numbers of any length: damaged sizes don't wrap around


def read_pickle(file: BinaryIO) -> Said:
    """Read one pickle. PickleError where it makes no sense."""
    machine = _Machine()
    try:
        for steps, (instruction, argument, _) in enumerate(pickletools.genops(file)):
            if steps > MOST_STEPS:
                raise PickleError(f"it has more than {MOST_STEPS:,} instructions: it can't be meant")
            machine.follow(instruction.name, argument)
    except PickleError:
        raise
    except Exception as error:  # whatever the parts of a damaged one lead to
        raise PickleError("its pickle is damaged") from error
    if machine.result is None:
        raise PickleError("its pickle has no end")
    return Said(machine.result[0], tuple(dict.fromkeys(machine.names)), tuple(machine.kept))


class _Machine:
    """The stack, the marks on it and the memory of a pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memory: dict[int, Any] = {}
        self.names: list[str] = []
        self.kept: list[Kept] = []
        self.result: tuple[Any] | None = None

    def follow(self, name: str, argument: Any) -> None:
        """Follow one instruction."""
        stack = self.stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self.memory[argument])
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self.memory[argument] = stack[-1]
        elif name == "MEMOIZE":  # protocol 4: numbered in order
            self.memory[len(self.memory)] = stack[-1]
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name in ("GLOBAL", "INST"):
            named = self._named(*argument.split(" ", 1))
            stack.append(named if name == "GLOBAL" else Made(named.name, self._after_mark()))
        elif name == "STACK_GLOBAL":
            module, plain = self._take(2)
            stack.append(self._named(module, plain))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(self._take(int(name[-1])))
        elif name in ("TUPLE", "FROZENSET"):
            stack.append(self._after_mark())
        elif name == "LIST":
            stack.append(list(self._after_mark()))
        elif name == "DICT":
            flat = self._after_mark()
            stack.append(_put({}, flat[::2], flat[1::2]))
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            values = self._take(1) if name == "APPEND" else self._after_mark()
            if isinstance(stack[-1], list):  # else one that was not made (a list's kind, a set)
                stack[-1].extend(values)
        elif name in ("SETITEM", "SETITEMS"):
            flat = self._take(2) if name == "SETITEM" else self._after_mark()
            _put(stack[-1], flat[::2], flat[1::2])
        elif name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):  # here pickle would call what the file names
            called, *arguments = self._take(3 if name == "NEWOBJ_EX" else 2)
            stack.append(_made(called, arguments[0]))
        elif name == "OBJ":
            called, *arguments = self._after_mark()
            stack.append(_made(called, tuple(arguments)))
        elif name == "BUILD":  # the state of what was not made
            self._take(1)
        elif name in ("BINPERSID", "PERSID"):
            self.kept.append(Kept(self._take(1)[0] if name == "BINPERSID" else argument))
            stack.append(self.kept[-1])
        elif name == "POP":
            self._take(1)
        elif name == "POP_MARK":
            self._after_mark()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "STOP":
            self.result = self._take(1)
        elif name not in ("PROTO", "FRAME"):
            raise PickleError(f"its pickle has an instruction that weights don't need ({name})")

    def _named(self, module: Any, plain: Any) -> Named:
        if not (isinstance(module, str) and isinstance(plain, str)):
            raise PickleError("its pickle is damaged")
        self.names.append(f"{module}.{plain}")
        return Named(self.names[-1])

    def _take(self, count: int) -> tuple[Any, ...]:
        # what lies below the last mark belongs to whoever set it
        if len(self.stack) - count < (self.marks[-1] if self.marks else 0):
            raise PickleError("its pickle is damaged")
        taken = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        return taken

    def _after_mark(self) -> tuple[Any, ...]:
        mark = self.marks.pop()
        taken = tuple(self.stack[mark:])
        del self.stack[mark:]
        return taken


_VALUES = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING"}
_VALUES |= {"SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "BINBYTES8"}
_VALUES |= {"SHORT_BINBYTES", "BYTEARRAY8"}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_SET": list,  # its members need not be fit for a set here
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
}


def _put(target: Any, keys: Sequence[Any], values: Sequence[Any]) -> Any:
    """Fill a table. Keys that are no plain values go: hashing deep ones could end the process."""
    table = target.items if isinstance(target, Made) else target
    if isinstance(table, dict):
        table.update((k, v) for k, v in zip(keys, values, strict=True) if isinstance(k, str | int | float | bytes))
    return target


def _made(called: Any, arguments: Any) -> Made:
    name = called.name if isinstance(called, Named) else "what another call gave"
    return Made(name, arguments if isinstance(arguments, tuple) else ())


# ---- What checkpoints are made of --------------------------------------------------------------------------------


def table_of(value: Any) -> Mapping[Any, Any] | None:
    """The content of a dict, or of what stands for one (OrderedDict and its kind); None for anything else."""
    if isinstance(value, dict):
        return value
    if not isinstance(value, Made) or not value.name.endswith((".OrderedDict", ".defaultdict", ".dict")):
        return None
    pairs = value.arguments[0] if value.arguments and isinstance(value.arguments[0], list) else []
    # what python 2 wrote of an OrderedDict: pairs as the call's argument
    plain = {p[0]: p[1] for p in pairs if isinstance(p, list | tuple) and len(p) == 2 and isinstance(p[0], str)}
    return plain | value.items


def plain_of(value: Any) -> int | float | str | None:
    """A number or text, be it one of numpy's scalars; None for anything else."""
    if isinstance(value, int | float | str):
        return value
    if not isinstance(value, Made) or not value.name.endswith("multiarray.scalar") or len(value.arguments) != 2:
        return None
    dtype, data = value.arguments
    # protocol 2 has no bytes: they are text, with a call that turns them into bytes
    if isinstance(data, Made) and data.name == "_codecs.encode" and data.arguments:
        data = data.arguments[0].encode("latin1", "replace") if isinstance(data.arguments[0], str) else None
    code = dtype.arguments[0] if isinstance(dtype, Made) and dtype.arguments else None
    if not isinstance(data, bytes) or not isinstance(code, str):
        return None
    letter = _NUMBERS.get(code.lstrip("<|="))  # not ">", the other byte order
    fits = letter is not None and struct.calcsize(f"<{letter}") == len(data)
    return struct.unpack(f"<{letter}", data)[0] if fits else None


def stored_of(value: Any) -> Stored | None:
    """Where the numbers of a tensor are; None for what is none. PickleError where its sizes make no sense."""
    if not isinstance(value, Made):
        return None
    name, arguments = value.name, value.arguments
    # a parameter is made of a tensor, a tensor of a subclass of its class, a function and that function's arguments
    if name.startswith("torch._utils._rebuild_parameter"):
        return stored_of(arguments[0]) if arguments else None
    if name == "torch._tensor._rebuild_from_type_v2" and len(arguments) > 2 and isinstance(arguments[0], Named):
        return stored_of(_made(arguments[0], arguments[2]))
    if name not in _REBUILD:
        return None
    if len(arguments) < 4 or not isinstance(arguments[0], Kept):
        raise PickleError("has no storage")
    key, dtype, n_stored, shift = _storage(arguments[0].identity)
    if name.endswith("v3"):  # types that have no class of storage: bytes, and the type beside them
        wanted = arguments[6] if len(arguments) > 6 else None
        named = getattr(torch, wanted.name.removeprefix("torch."), None) if isinstance(wanted, Named) else None
        if not isinstance(named, torch.dtype):
            raise PickleError("has numbers of an unknown type")
        dtype, n_stored = named, n_stored // named.itemsize
    offset, shape, stride = arguments[1:4]
    shape = shape.arguments[0] if isinstance(shape, Made) and shape.name == "torch.Size" and shape.arguments else shape
    for sizes in ((offset,), shape, stride):
        if not isinstance(sizes, tuple | list) or not all(type(n) is int and 0 <= n < 2**62 for n in sizes):
            raise PickleError("has sizes that are no whole numbers")
    if len(shape) != len(stride) or len(shape) > _MOST_DIMS:
        raise PickleError("has sizes that don't fit its strides")
    found = Stored(key, dtype, n_stored, offset + shift, tuple(shape), tuple(stride))
    # the number that lies farthest behind, strides being 0 or more
    last = found.offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if found.numel and last >= n_stored:
        raise PickleError(f"reaches beyond the {n_stored:,} numbers of its storage")
    return found


def item_sizes(said: Said) -> dict[str, int]:
    """Bytes of one number of every storage, by its key."""
    return {key: dtype.itemsize for key, dtype, *_ in (_storage(kept.identity) for kept in said.kept)}


def _storage(identity: Any) -> tuple[str, torch.dtype, int, int]:
    """Key, type, count of a storage and where in it its part begins, from what torch writes of it."""
    if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage":
        raise PickleError("has no storage")
    _, kind, key, _, n_stored, *view = identity  # the fourth is the device; a view of a storage only in old files
    dtype = _DTYPES.get(kind.name.rpartition(".")[2].removesuffix("Storage")) if isinstance(kind, Named) else None
    if dtype is None:
        raise PickleError("has numbers of an unknown type")
    if not isinstance(key, str) or type(n_stored) is not int or n_stored < 0:
        raise PickleError("has no storage")
    # a view is (its own key, where it begins, its length)
    shift = view[0][1] if view and isinstance(view[0], tuple) and len(view[0]) == 3 else 0
    if type(shift) is not int or shift < 0:
        raise PickleError("has no storage")
    return key, dtype, n_stored, shift


def stored_tensors(table: Mapping[Any, Any]) -> Iterator[tuple[str, Stored | PickleError | str]]:
    """Of each named entry that is meant as a tensor: where it is, why it can't be read, or which kind it is of."""
    for name, value in table.items():
        if not isinstance(name, str) or not isinstance(value, Made):
            continue
        try:
            found = stored_of(value)
        except PickleError as error:
            yield name, error
            continue
        if found is not None:
            yield name, found
        elif value.name.startswith(("torch._utils._rebuild", "torch._tensor._rebuild", "numpy.")):
            yield name, value.name
