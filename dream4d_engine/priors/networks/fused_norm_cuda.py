"""The device code of the fused norm in CUDA C++, for NVRTC; formulas: `fused_norm`, launches: `fused_norm_nvrtc`.

Letters and numbers of channels (`found`, `line`, `partial`) as in `fused_norm_source`. A thread has PACK neighbouring
channels of a row, read and written at once; a block has `lanes` of these, a tile, and some rows beside each other. What
is written in capitals is put in front of the code as #define: NUMBER, WEIGHT and OFFSET are types.
"""

from __future__ import annotations

from ...kernels.nvrtc_source import SUM_ALL

PACKS = r"""
#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS)
struct __align__(PACK * sizeof(NUMBER)) Pack { NUMBER numbers[PACK]; };

// of `rows` rows beside each other this thread is in the one `slot`, at `channel` and those after it
#define PLACE                                                          \
    const int lane = threadIdx.x % (int)lanes;                         \
    const int slot = threadIdx.x / (int)lanes;                         \
    const int rows = blockDim.x / (int)lanes;                          \
    const long long channel = ((long long)blockIdx.z * lanes + lane) * PACK; \
    const long long row_packs = c / PACK;                              \
    const bool inside = channel < c;

__device__ __forceinline__ float sigmoid(float v) { return __fdividef(1.0f, 1.0f + __expf(-v)); }

// what becomes of a gradient on silu(v)
__device__ __forceinline__ float before_silu(float dy, float v) {
    const float s = sigmoid(v);
    return dy * s * (1.0f + v * (1.0f - s));
}

__device__ __forceinline__ void numbers_at(const float* from, float (&to)[PACK]) {
#pragma unroll
    for (int i = 0; i < PACK; ++i) to[i] = from[i];
}
"""

NORM = (
    PACKS
    + r"""
// sums a number of each thread over the block's rows, for all its channels
__device__ __forceinline__ void sum_rows(const float (&mine)[PACK], float* to, int lanes, int rows, long long n_left) {
    __shared__ float held[PACK * THREADS];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < PACK; ++i) held[i * blockDim.x + threadIdx.x] = mine[i];
    __syncthreads();
    for (int k = threadIdx.x; k < lanes * PACK && k < n_left; k += blockDim.x) {
        float all = 0.0f;
        for (int row = 0; row < rows; ++row) all += held[k % PACK * blockDim.x + row * lanes + k / PACK];
        to[k] = all;
    }
}

#define STORE_SUMS(first, second)                                                                     \
    const long long begin_c = (long long)blockIdx.z * lanes * PACK;                                   \
    float* to = out + ((long long)blockIdx.y * gridDim.x + blockIdx.x) * c + begin_c;                 \
    sum_rows(first, to, (int)lanes, rows, c - begin_c);                                               \
    sum_rows(second, to + images * gridDim.x * c, (int)lanes, rows, c - begin_c);

KERNEL sums(
    const Pack* __restrict__ x, float* __restrict__ out,
    long long images, long long r, long long c, long long per, long long lanes
) {
    PLACE
    float total[PACK] = {}, square[PACK] = {};
    const long long begin = blockIdx.x * per, end = begin + per < r ? begin + per : r;
    if (inside) {
        const Pack* from = x + (blockIdx.y * r * c + channel) / PACK;
#pragma unroll 4
        for (long long row = begin + slot; row < end; row += rows) {
            const Pack given = from[row * row_packs];
#pragma unroll
            for (int i = 0; i < PACK; ++i) {
                const float value = wide(given.numbers[i]);
                total[i] += value;
                square[i] = fmaf(value, value, square[i]);
            }
        }
    }
    STORE_SUMS(total, square)
}

KERNEL gradient_sums(
    const Pack* __restrict__ x, const Pack* __restrict__ grad, const float* __restrict__ found, float* __restrict__ out,
    long long images, long long r, long long c, long long per, long long lanes
) {
    PLACE
    float total[PACK] = {}, product[PACK] = {};
    const long long begin = blockIdx.x * per, end = begin + per < r ? begin + per : r;
    if (inside) {
        float a[PACK], b[PACK];
        numbers_at(found + blockIdx.y * c + channel, a);
        numbers_at(found + (images + blockIdx.y) * c + channel, b);
        const long long first = (blockIdx.y * r * c + channel) / PACK;
        const Pack *from = x + first, *from_grad = grad + first;
#pragma unroll 2
        for (long long row = begin + slot; row < end; row += rows) {
            const Pack given = from[row * row_packs], given_grad = from_grad[row * row_packs];
#pragma unroll
            for (int i = 0; i < PACK; ++i) {
                const float value = wide(given.numbers[i]);
                float dv = wide(given_grad.numbers[i]);
                if (SILU) dv = before_silu(dv, fmaf(value, a[i], b[i]));
                total[i] += dv;
                product[i] = fmaf(dv, value, product[i]);
            }
        }
    }
    STORE_SUMS(total, product)
}

KERNEL apply(
    const Pack* __restrict__ x, const float* __restrict__ found, Pack* __restrict__ out,
    long long images, long long r, long long c, long long lanes
) {
    PLACE
    if (!inside) return;
    float a[PACK], b[PACK];
    numbers_at(found + blockIdx.y * c + channel, a);
    numbers_at(found + (images + blockIdx.y) * c + channel, b);
    const long long first = (blockIdx.y * r * c + channel) / PACK;
    const long long begin = (long long)blockIdx.x * STEPS * rows + slot;
    Pack given[STEPS];
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
        if (begin + step * rows < r) given[step] = x[first + (begin + step * rows) * row_packs];
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        if (begin + step * rows >= r) return;
#pragma unroll
        for (int i = 0; i < PACK; ++i) {
            const float v = fmaf(wide(given[step].numbers[i]), a[i], b[i]);
            narrow(SILU ? v * sigmoid(v) : v, given[step].numbers[i]);
        }
        out[first + (begin + step * rows) * row_packs] = given[step];
    }
}

// MORE: `more` is added, a gradient that came another way. Asked at run time, all would take half as many registers
// again.
template <bool MORE>
__device__ __forceinline__ void gradient_with(
    const Pack* __restrict__ x, const Pack* __restrict__ grad, const float* __restrict__ found,
    const float* __restrict__ line, const Pack* __restrict__ more, Pack* __restrict__ out,
    long long images, long long r, long long c, long long lanes
) {
    PLACE
    if (!inside) return;
    float a[PACK], b[PACK], slope[PACK], constant[PACK];
    numbers_at(found + blockIdx.y * c + channel, a);
    numbers_at(found + (images + blockIdx.y) * c + channel, b);
    numbers_at(line + blockIdx.y * c + channel, slope);
    numbers_at(line + (images + blockIdx.y) * c + channel, constant);
    const long long first = (blockIdx.y * r * c + channel) / PACK;
    const long long begin = (long long)blockIdx.x * STEPS * rows + slot;
    Pack given[STEPS], given_grad[STEPS], added[STEPS];
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        if (begin + step * rows >= r) break;
        given[step] = x[first + (begin + step * rows) * row_packs];
        given_grad[step] = grad[first + (begin + step * rows) * row_packs];
        if (MORE) added[step] = more[first + (begin + step * rows) * row_packs];
    }
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        if (begin + step * rows >= r) return;
#pragma unroll
        for (int i = 0; i < PACK; ++i) {
            const float value = wide(given[step].numbers[i]);
            float dv = wide(given_grad[step].numbers[i]);
            if (SILU) dv = before_silu(dv, fmaf(value, a[i], b[i]));
            const float dx = fmaf(a[i], dv, fmaf(slope[i], value, constant[i]));
            narrow(MORE ? dx + wide(added[step].numbers[i]) : dx, given[step].numbers[i]);
        }
        out[first + (begin + step * rows) * row_packs] = given[step];
    }
}

#define GRADIENT(name, more_is_added)                                                                          \
    KERNEL name(                                                                                               \
        const Pack* __restrict__ x, const Pack* __restrict__ grad, const float* __restrict__ found,            \
        const float* __restrict__ line, const Pack* __restrict__ more, Pack* __restrict__ out,                 \
        long long images, long long r, long long c, long long lanes                                            \
    ) {                                                                                                        \
        gradient_with<more_is_added>(x, grad, found, line, more, out, images, r, c, lanes);                    \
    }
GRADIENT(gradient, false)
GRADIENT(gradient_and_more, true)
"""
)
"""NUMBER, PACK, THREADS; SILU, 0 or 1; STEPS, rows of a thread."""

STATISTICS = (
    SUM_ALL
    + r"""
// the sum over a whole block, for every thread of it
__device__ __forceinline__ float sum_block(float x) {
    __shared__ float held[THREADS / 32];
    x = sum_of<32>(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) held[threadIdx.x / 32] = x;
    __syncthreads();
    float all = 0.0f;
    for (int warp = 0; warp < THREADS / 32; ++warp) all += held[warp];
    return all;
}

// a block has a group of an image: both sums over the group are sums over its channels' partial ones
extern "C" __global__ void statistics(
    const float* __restrict__ partial, const WEIGHT* __restrict__ weight, const WEIGHT* __restrict__ bias,
    const OFFSET* __restrict__ offset, float* __restrict__ found,
    long long images, long long r, long long c, long long width, long long parts,
    long long offset_stride, long long has_offset, float eps
) {
    const long long n = blockIdx.y, first = blockIdx.x * width, all = images * c;
    const OFFSET* shifts = offset + n * offset_stride + first;
    const float* from = partial + n * parts * c + first;
    float s1 = 0.0f, s2 = 0.0f;
    for (int i = threadIdx.x; i < (int)(parts * width); i += THREADS) {
        const int channel = i % (int)width;
        const long long at = i / (int)width * c + channel;
        const float shift = has_offset ? wide(shifts[channel]) : 0.0f, sum = from[at];
        s1 += sum;  // of x + offset, from those of x
        s2 += from[at + images * parts * c] + 2.0f * shift * sum;
    }
    for (int channel = threadIdx.x; has_offset && channel < (int)width; channel += THREADS) {
        const float shift = wide(shifts[channel]);
        s1 += r * shift;
        s2 += r * shift * shift;
    }
    const float count = (float)(r * width);
    const float mean = sum_block(s1) / count;
    const float variance = fmaxf(sum_block(s2) / count - mean * mean, 0.0f);
    const float rstd = 1.0f / sqrtf(variance + eps);
    for (int channel = threadIdx.x; channel < (int)width; channel += THREADS) {
        const float shift = has_offset ? wide(shifts[channel]) : 0.0f;
        const float a = rstd * wide(weight[first + channel]);
        float* to = found + n * c + first + channel;
        to[0] = a;
        to[all] = wide(bias[first + channel]) + (shift - mean) * a;
        to[2 * all] = mean - shift;
        to[3 * all] = rstd;
    }
}

extern "C" __global__ void gradient_line(
    const float* __restrict__ partial, const WEIGHT* __restrict__ weight, const float* __restrict__ found,
    float* __restrict__ line, long long images, long long r, long long c, long long width, long long parts
) {
    const long long n = blockIdx.y, first = blockIdx.x * width, all = images * c;
    const float *from = partial + n * parts * c + first, *means = found + 2 * all + n * c + first;
    const float rstd = found[3 * all + n * c + first];
    float c1 = 0.0f, c2 = 0.0f;
    for (int i = threadIdx.x; i < (int)(parts * width); i += THREADS) {
        const int channel = i % (int)width;
        const long long at = i / (int)width * c + channel;
        const float w = wide(weight[first + channel]), sum = from[at];
        c1 += w * sum;
        c2 += w * (from[at + images * parts * c] - means[channel] * sum);
    }
    const float count = (float)(r * width);
    c1 = sum_block(c1) / count;
    c2 = sum_block(c2) / count * rstd;
    const float slope = -rstd * rstd * c2;
    for (int channel = threadIdx.x; channel < (int)width; channel += THREADS) {
        float* to = line + n * c + first + channel;
        to[0] = slope;
        to[all] = -rstd * c1 - means[channel] * slope;
    }
}
"""
)
"""WEIGHT, OFFSET, THREADS, a multiple of 32."""

RMS = (
    SUM_ALL
    + PACKS
    + r"""
// LANES threads have a row: v = x f w with f = 1 / sqrt(mean(x^2) + eps), y = silu(v)
KERNEL rms(
    const Pack* __restrict__ x, const WEIGHT* __restrict__ weight, const Pack* __restrict__ grad,
    Pack* __restrict__ out, long long r, long long c, float eps
) {
    const int lane = threadIdx.x % LANES, n_packs = (int)c / PACK;
    const long long row = ((long long)blockIdx.x * blockDim.x + threadIdx.x) / LANES;
    const bool there = row < r;
    float normed[PER][PACK] = {}, square = 0.0f;
#pragma unroll
    for (int k = 0; k < PER; ++k) {
        const int pack = k * LANES + lane;
        if (!there || pack >= n_packs) continue;
        const Pack given = x[row * n_packs + pack];
#pragma unroll
        for (int i = 0; i < PACK; ++i) {
            normed[k][i] = wide(given.numbers[i]);
            square = fmaf(normed[k][i], normed[k][i], square);
        }
    }
    const float factor = 1.0f / sqrtf(sum_of<LANES>(square) / c + eps);
    float du[PER][PACK] = {}, along = 0.0f;
#pragma unroll
    for (int k = 0; k < PER; ++k) {
        const int pack = k * LANES + lane;
        if (!there || pack >= n_packs) continue;
        Pack given;
        if (BACKWARD) given = grad[row * n_packs + pack];
#pragma unroll
        for (int i = 0; i < PACK; ++i) {
            normed[k][i] *= factor;
            const float w = WEIGHTED ? wide(weight[pack * PACK + i]) : 1.0f, v = normed[k][i] * w;
            if (BACKWARD) {  // with u = x f: dx = f (du - u mean(du u)), du = dy silu'(v) w
                du[k][i] = before_silu(wide(given.numbers[i]), v) * w;
                along = fmaf(du[k][i], normed[k][i], along);
            } else {
                narrow(v * sigmoid(v), given.numbers[i]);
            }
        }
        if (!BACKWARD) out[row * n_packs + pack] = given;
    }
    if (!BACKWARD) return;
    along = sum_of<LANES>(along) / c;
#pragma unroll
    for (int k = 0; k < PER; ++k) {
        const int pack = k * LANES + lane;
        if (!there || pack >= n_packs) continue;
        Pack result;
#pragma unroll
        for (int i = 0; i < PACK; ++i) narrow(factor * (du[k][i] - normed[k][i] * along), result.numbers[i]);
        out[row * n_packs + pack] = result;
    }
}
"""
)
"""NUMBER, WEIGHT, PACK, THREADS; LANES, a power of two, each with PER packs; WEIGHTED and BACKWARD, 0 or 1."""

ROWS = (
    PACKS
    + r"""
// x += bias; with `h`: out = x + h + bias
KERNEL shifted(
    const Pack* x, const Pack* h, const WEIGHT* __restrict__ bias, Pack* out,
    long long r, long long c, long long lanes, long long has_h
) {
    PLACE
    if (!inside) return;
    float shift[PACK];
#pragma unroll
    for (int i = 0; i < PACK; ++i) shift[i] = wide(bias[channel + i]);
    const long long begin = (long long)blockIdx.x * STEPS * rows + slot;
    Pack given[STEPS], more[STEPS];
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        if (begin + step * rows >= r) break;
        const long long at = (begin + step * rows) * row_packs + channel / PACK;
        given[step] = x[at];
        if (has_h) more[step] = h[at];
    }
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        if (begin + step * rows >= r) return;
#pragma unroll
        for (int i = 0; i < PACK; ++i) {
            const float before = wide(given[step].numbers[i]);
            narrow((has_h ? before + wide(more[step].numbers[i]) : before) + shift[i], given[step].numbers[i]);
        }
        out[(begin + step * rows) * row_packs + channel / PACK] = given[step];
    }
}

// every place of an image's line written to its four; blockIdx.x: lines of all images
KERNEL doubled(const Pack* __restrict__ x, Pack* __restrict__ out, long long width, long long c, long long lanes) {
    PLACE
    const long long column = (long long)blockIdx.y * rows + slot;
    if (!inside || column >= width) return;
    const Pack given = x[(blockIdx.x * width + column) * row_packs + channel / PACK];
    Pack* to = out + ((2 * (long long)blockIdx.x) * (2 * width) + 2 * column) * row_packs + channel / PACK;
    to[0] = given;
    to[row_packs] = given;
    to[2 * width * row_packs] = given;
    to[(2 * width + 1) * row_packs] = given;
}

// x [r, 2 c]: the first half times gelu of the second
KERNEL gated(const Pack* __restrict__ x, Pack* __restrict__ out, long long r, long long c, long long lanes) {
    PLACE
    const long long begin = (long long)blockIdx.x * STEPS * rows + slot;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        const long long row = begin + step * rows;
        if (!inside || row >= r) return;
        Pack given = x[2 * row * row_packs + channel / PACK];
        const Pack gate = x[(2 * row + 1) * row_packs + channel / PACK];
#pragma unroll
        for (int i = 0; i < PACK; ++i) {
            const float g = wide(gate.numbers[i]);
            narrow(wide(given.numbers[i]) * (0.5f * g * (1.0f + erff(g * 0.70710678f))), given.numbers[i]);
        }
        out[row * row_packs + channel / PACK] = given;
    }
}
"""
)
"""NUMBER, WEIGHT, PACK, THREADS; STEPS, rows of a thread."""
