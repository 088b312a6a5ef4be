"""CUDA C++ on the CPU: the same text compiled by g++, every thread of a block a fibre.

Threads run one after the other up to the next place where they wait for each other. Threads of a warp that don't all
come to such a place are an error, as they are on a GPU.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from dream4d_engine.kernels import nvrtc
from dream4d_engine.kernels.nvrtc_source import INSTRUCTIONS

AROUND = r"""
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>
#include <ucontext.h>

#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __align__(n) alignas(n)

struct Place { unsigned x, y, z; };
static Place threadIdx, blockIdx, blockDim, gridDim;

struct Fibre { ucontext_t context; std::vector<char> stack; bool done; int met_warp, met_block; };
static std::vector<Fibre> fibres;
static ucontext_t scheduler;
static unsigned current;
static bool failed;
static std::vector<uint32_t> slots;  // [2, threads]: what a thread gives to its warp

static void wait_for_others() { swapcontext(&fibres[current].context, &scheduler); }

template <class Met> static void meet(unsigned begin, unsigned end, Met met) {
    const int mine = ++met(fibres[current]);
    for (unsigned other = begin; other < end; ++other)
        while (met(fibres[other]) < mine) {
            if (fibres[other].done || failed) { failed = true; return; }
            wait_for_others();
        }
}

static void __syncthreads() { meet(0, fibres.size(), [](Fibre& f) -> int& { return f.met_block; }); }

template <class T> static T from_lane(T x, unsigned lane, bool there) {
    static_assert(sizeof(T) == 4);
    const unsigned first = current / 32 * 32, turn = fibres[current].met_warp % 2 * fibres.size();
    std::memcpy(&slots[turn + current], &x, 4);
    meet(first, first + 32, [](Fibre& f) -> int& { return f.met_warp; });
    if (there) std::memcpy(&x, &slots[turn + first + lane], 4);
    return x;
}
template <class T> static T __shfl_sync(unsigned, T x, int lane) { return from_lane(x, lane % 32, true); }
template <class T> static T __shfl_xor_sync(unsigned, T x, int mask) { return from_lane(x, current % 32 ^ mask, true); }
template <class T> static T __shfl_up_sync(unsigned, T x, unsigned by) {
    return from_lane(x, current % 32 - by, current % 32 >= by);
}
template <class T> static T __shfl_down_sync(unsigned, T x, unsigned by) {
    return from_lane(x, current % 32 + by, current % 32 + by < 32);
}
static unsigned __ballot_sync(unsigned, bool keep) {
    const unsigned first = current / 32 * 32, turn = fibres[current].met_warp % 2 * fibres.size();
    from_lane<unsigned>(keep, 0, true);
    unsigned found = 0;
    for (unsigned lane = 0; lane < 32; ++lane) found |= slots[turn + first + lane] << lane;
    return found;
}

static int __popc(unsigned x) { return __builtin_popcount(x); }
static float __uint_as_float(unsigned x) { float y; std::memcpy(&y, &x, 4); return y; }
static unsigned __float_as_uint(float x) { unsigned y; std::memcpy(&y, &x, 4); return y; }
static float __fadd_rd(float a, float b) {  // exact in double for what it is used for
    const float nearest = a + b;
    return (double)nearest > (double)a + (double)b ? std::nextafterf(nearest, -INFINITY) : nearest;
}
#define __expf expf
static float rsqrtf(float x) { return 1 / std::sqrt(x); }
static float __fdividef(float a, float b) { return a / b; }
static void atomicAdd(float* to, float x) { *to += x; }

template <class... A, std::size_t... I>
static void call(void (*kernel)(A...), void** given, std::index_sequence<I...>) { kernel(*(A*)given[I]...); }

template <class... A>
static int run(void (*kernel)(A...), const unsigned* sizes, unsigned threads, void** given) {
    static void (*body)();
    static void (*the_kernel)(A...);
    static void** the_given;
    the_kernel = kernel, the_given = given;
    body = [] {
        call(the_kernel, the_given, std::index_sequence_for<A...>{});
        fibres[current].done = true;
    };
    gridDim = {sizes[0], sizes[1], sizes[2]};
    blockDim = {threads, 1, 1};
    fibres.resize(threads);
    slots.assign(2 * threads, 0);
    failed = false;
    for (unsigned block = 0; block < sizes[0] * sizes[1] * sizes[2] && !failed; ++block) {
        blockIdx = {block % sizes[0], block / sizes[0] % sizes[1], block / sizes[0] / sizes[1]};
        for (auto& fibre : fibres) {
            fibre.stack.resize(64 * 1024);
            fibre.done = false, fibre.met_warp = fibre.met_block = 0;
            getcontext(&fibre.context);
            fibre.context.uc_stack.ss_sp = fibre.stack.data();
            fibre.context.uc_stack.ss_size = fibre.stack.size();
            fibre.context.uc_link = &scheduler;
            makecontext(&fibre.context, body, 0);
        }
        for (bool left = true; left;) {
            left = false;
            for (current = 0; current < threads; ++current) {
                if (fibres[current].done) continue;
                threadIdx = {current, 0, 0};
                swapcontext(&scheduler, &fibres[current].context);
                left |= !fibres[current].done;
            }
        }
    }
    return failed;
}
"""

HALVES = r"""
struct f16 { unsigned short bits; };
struct b16 { unsigned short bits; };
static float wide(float x) { return x; }
static float wide(f16 x) {
    const int exponent = x.bits >> 10 & 31, rest = x.bits & 1023;
    const float size = exponent == 31 ? (rest ? NAN : INFINITY)
                       : exponent     ? std::ldexp(1024.0f + rest, exponent - 25)
                                      : std::ldexp((float)rest, -24);
    return x.bits >> 15 ? -size : size;
}
static float wide(b16 x) { return __uint_as_float((unsigned)x.bits << 16); }
static void narrow(float x, float& y) { y = x; }
static void narrow(float x, f16& y) {
    const float size = std::fabs(x);
    int exponent = 0;
    const float part = std::frexp(size, &exponent);
    unsigned bits;
    if (!(size < INFINITY)) bits = size > 0 ? 0x7c00 : 0x7e00;
    else if (size < 0x1p-14f) bits = (unsigned)std::nearbyint(std::ldexp(size, 24));
    else bits = (exponent + 14) * 1024 + (unsigned)std::nearbyint(std::ldexp(part, 11)) - 1024;  // may carry
    y.bits = (bits < 0x7c00 || bits == 0x7e00 ? bits : 0x7c00) | (std::signbit(x) ? 0x8000 : 0);
}
static void narrow(float x, b16& y) {
    unsigned bits = __float_as_uint(x);
    y.bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
static void add(float* to, const float (&x)[1]) { *to += x[0]; }
static void add(float* to, const float (&x)[2]) { to[0] += x[0], to[1] += x[1]; }
#define ALL 0xffffffffu
"""

COMPILER = shutil.which("g++")


def kernels_of(source: str, names: tuple[str, ...], device) -> tuple[Callable, ...]:
    """What `nvrtc.kernels_of` returns, on the CPU."""
    library = compiled(source, names)
    return tuple(functools.partial(launch, library, name) for name in names)


@functools.cache
def compiled(source: str, names: tuple[str, ...]) -> ctypes.CDLL:
    assert source.startswith(INSTRUCTIONS), "these are the GPU's own"
    entries = "".join(
        f'extern "C" int run_{name}(const unsigned* sizes, unsigned threads, void** given)'
        f" {{ return run({name}, sizes, threads, given); }}\n"
        for name in names
    )
    text = AROUND + HALVES + source.removeprefix(INSTRUCTIONS) + entries
    folder = Path(tempfile.mkdtemp(prefix="emulated_"))
    (folder / "kernels.cpp").write_text(text)
    found = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
    options = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-o", str(found)]
    done = subprocess.run([COMPILER, str(folder / "kernels.cpp"), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(found))
    shutil.rmtree(folder)  # what is loaded stays
    return library


def launch(library: ctypes.CDLL, name: str, grid: tuple[int, ...], threads: int, *arguments) -> None:
    values = [nvrtc._as_c(argument) for argument in arguments]
    places = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    sizes = (ctypes.c_uint * 3)(*(*grid, 1, 1)[:3])
    assert not getattr(library, f"run_{name}")(sizes, threads, places), f"threads of {name} wait for others in vain"
