"""CUDA C++ compiled while the program runs, by the NVRTC that comes with every CUDA build of PyTorch.

No compiler, no headers and no CUDA toolkit are needed. PyTorch's own way there (`torch.cuda._compile_kernel`) is not
public, and wants a toolkit's folder even where nothing is included from it; NVRTC's and the driver's C interfaces are.
"""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

_INVALID_CONTEXT = 201
"""What the driver says where a thread has not met the device yet."""


class Kernel:
    """A compiled function on one device: an `extern "C" __global__` one that takes pointers, and numbers as `long long`
    (whole ones and bools) or `float`."""

    def __init__(self, function: ctypes.c_void_p, context: ctypes.c_void_p, device: torch.device) -> None:
        self._function, self._context, self._device = function, context, device

    def __call__(self, grid: tuple[int, ...], threads: int, *arguments: Tensor | float) -> None:
        """Launch blocks of so many threads on the device's current stream; tensors are given as pointers."""
        values = [_as_c(argument) for argument in arguments]
        places = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        x, y, z = (*grid, 1, 1)[:3]
        stream = ctypes.c_void_p(torch.cuda.current_stream(self._device).cuda_stream)
        given = (self._function, x, y, z, threads, 1, 1, 0, stream, places, None)
        if torch.cuda.current_device() == self._device.index:
            self._launch(given)
        else:
            with torch.cuda.device(self._device):
                self._launch(given)

    def _launch(self, given: tuple) -> None:
        said = _driver().cuLaunchKernel(*given)
        if said == _INVALID_CONTEXT:  # a new thread of autograd's
            _must(_driver().cuCtxSetCurrent(self._context))
            said = _driver().cuLaunchKernel(*given)
        _must(said)


def _as_c(argument: Tensor | float) -> ctypes._SimpleCData:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_longlong(argument)


@lru_cache(maxsize=256)
def kernels_of(source: str, names: tuple[str, ...], device: torch.device) -> tuple[Kernel, ...]:
    """Compile a source for a device and return these functions of it; once a process.

    Raises RuntimeError, with what the compiler said, where it can't be compiled or loaded.
    """
    code = compiled(source, "sm_{}{}".format(*capability(device)))
    with torch.cuda.device(device):
        torch.zeros((), device=device)  # PyTorch's context on the device is there from now on
        module, context = ctypes.c_void_p(), ctypes.c_void_p()
        _must(_driver().cuCtxGetCurrent(ctypes.byref(context)))
        _must(_driver().cuModuleLoadData(ctypes.byref(module), code))
        found = []
        for name in names:
            function = ctypes.c_void_p()
            _must(_driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
            found.append(Kernel(function, context, device))
    return tuple(found)


def capability(device: torch.device) -> tuple[int, int]:
    """What the device's processors can do, as (9, 0)."""
    return torch.cuda.get_device_capability(device)


def compiled(source: str, architecture: str) -> bytes:
    """Machine code of a source for an architecture such as sm_90; RuntimeError with what the compiler said."""
    library, program, size = _compiler(), ctypes.c_void_p(), ctypes.c_size_t()
    _can(library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None))
    try:
        options = (ctypes.c_char_p * 2)(f"--gpu-architecture={architecture}".encode(), b"--std=c++17")
        if said := library.nvrtcCompileProgram(program, len(options), options):
            _can(library.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
            log = ctypes.create_string_buffer(size.value)
            _can(library.nvrtcGetProgramLog(program, log))
            raise RuntimeError(f"NVRTC: {log.value.decode(errors='replace').strip() or _name_of(said)}")
        _can(library.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        code = ctypes.create_string_buffer(size.value)
        _can(library.nvrtcGetCUBIN(program, code))
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
    return code.raw


def _name_of(said: int) -> str:
    name = _compiler().nvrtcGetErrorString
    name.restype = ctypes.c_char_p
    return name(said).decode()


def _can(said: int) -> None:
    if said:
        raise RuntimeError(f"NVRTC: {_name_of(said)}")


def _must(said: int) -> None:
    if said:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(said, ctypes.byref(text))
        raise RuntimeError(f"CUDA driver: {(text.value or b'unknown error').decode()} ({said})")


@lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    """The CUDA driver, which PyTorch uses, too."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError as error:
        raise RuntimeError(f"the CUDA driver cannot be loaded: {error}") from error
    sizes, pointer = [ctypes.c_uint] * 7, ctypes.c_void_p
    library.cuLaunchKernel.argtypes = [pointer, *sizes, pointer, pointer, pointer]
    return library


@lru_cache(maxsize=1)
def _compiler() -> ctypes.CDLL:
    """NVRTC, of the CUDA version that PyTorch was built with."""
    major = (torch.version.cuda or "").partition(".")[0]
    if not major:
        raise RuntimeError("this PyTorch was not built with CUDA")
    windows = sys.platform == "win32"
    name, helper, by_name = (
        (f"nvrtc64_{major}*_0.dll", f"nvrtc-builtins64_{major}*.dll", f"nvrtc64_{major}0_0.dll")
        if windows
        else (f"libnvrtc.so.{major}*", f"libnvrtc-builtins.so.{major}*", f"libnvrtc.so.{major}")
    )
    of_torch = Path(torch.__file__).parent
    # PyTorch's wheels have it in their own folder (Windows), or in a package beside (Linux)
    for folder in (of_torch / "lib", *sorted((of_torch.parent / "nvidia").glob("*/lib"))):
        for path in sorted(folder.glob(name)):
            try:
                for beside in folder.glob(helper):  # NVRTC asks for it by its bare name, which is known from now on
                    ctypes.CDLL(str(beside))
                return ctypes.CDLL(str(path))
            except OSError:
                continue
    try:
        return ctypes.CDLL(by_name)
    except OSError as error:
        raise RuntimeError(f"NVRTC cannot be loaded: {error}") from error
