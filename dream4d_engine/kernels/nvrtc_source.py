"""The device code of the nvrtc kernels, in CUDA C++; `nvrtc_kernels` holds the functions around it.

Letters as in `torch_kernels`: S samples, N rays, D dimensions, C = 2^D corners, F features, L levels. What is written
in capitals is put in front of the code as #define. Nothing is included: NVRTC may be there without its headers.
"""

from __future__ import annotations

INSTRUCTIONS = r"""
struct f16 { unsigned short bits; };
struct b16 { unsigned short bits; };
__device__ __forceinline__ float wide(float x) { return x; }
__device__ __forceinline__ float wide(f16 x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits)); return y; }
__device__ __forceinline__ float wide(b16 x) { return __uint_as_float((unsigned)x.bits << 16); }
__device__ __forceinline__ void narrow(float x, float& y) { y = x; }
__device__ __forceinline__ void narrow(float x, f16& y) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
__device__ __forceinline__ void narrow(float x, b16& y) {
    unsigned bits = __float_as_uint(x);
    bool number = (bits & 0x7fffffff) <= 0x7f800000;
    y.bits = number ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fff;  // to the nearest, to even
}
// two neighbouring numbers, in one transaction where the GPU can
__device__ __forceinline__ void add(float* to, const float (&x)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1201
    asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" :: "l"(to), "f"(x[0]), "f"(x[1]));
#else
    atomicAdd(to, x[0]);
    atomicAdd(to + 1, x[1]);
#endif
}
__device__ __forceinline__ void add(float* to, const float (&x)[1]) { atomicAdd(to, x[0]); }
#define ALL 0xffffffffu
"""
"""Numbers in half precision, as NVRTC's headers would have them, and sums in memory."""

HASH = r"""
#define C (1 << D)
#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS)

// an entry of the table; PIECE numbers at a time are what every entry's place is a multiple of
struct __align__(4 * PIECE) Entry { float numbers[F]; };
// OUT: float, f16 or b16. PACK: the numbers that are read and written at once
struct __align__(PACK * sizeof(OUT)) Pack { OUT numbers[PACK]; };

struct __align__(D % 4 ? D % 2 ? 4 : 8 : 16) Point { float numbers[D]; };

struct Level { float scale; int offset, size; bool hashed; unsigned factors[D]; };

__device__ __forceinline__ Level level_of(int k, const float* scales, const int* places, const int* factors) {
    Level level = {scales[k], places[3 * k], places[3 * k + 1], places[3 * k + 2] != 0, {}};
#pragma unroll
    for (int d = 0; d < D; ++d) level.factors[d] = (unsigned)factors[4 * k + d];
    return level;
}

// the number of an entry, from the coordinates' parts; inside the level whatever the coordinates are
__device__ __forceinline__ int place_of(unsigned mixed, unsigned sum, const Level& level) {
    const unsigned last = (unsigned)level.size - 1;
    if (level.hashed) return level.offset + (int)(mixed & last);
    // at u = 1 the upper corners of a dense level lie beyond its last entry, and start over
    const unsigned dense = sum > last ? sum - (unsigned)level.size : sum;
    return level.offset + (int)(dense < last ? dense : last);
}

// the whole part of a position and the rest
__device__ __forceinline__ void split(float position, unsigned& low, float& share) {
    // a conversion takes several times as long as a sum; that with 2^23, rounded down, ends with the whole part
    const float shifted = __fadd_rd(position, 8388608.0f);
    low = __float_as_uint(shifted) - 0x4b000000u;
    share = position - (shifted - 8388608.0f);
    if (__float_as_uint(position) >= 0x4a800000u) {  // below 0, from 2^22 on, or no number
        const int whole = (int)position;
        low = (unsigned)whole;
        share = position - (float)whole;
    }
}

struct Cell { unsigned low[D]; float share[D]; };

__device__ __forceinline__ Cell cell_of(const float (&u)[D], float scale) {
    Cell cell;
#pragma unroll
    for (int d = 0; d < D; ++d) split(fmaf(u[d], scale, 0.5f), cell.low[d], cell.share[d]);
    return cell;
}

__device__ __forceinline__ int corner_of(const Cell& cell, int c, const Level& level) {
    unsigned mixed = 0, sum = 0;
#pragma unroll
    for (int d = 0; d < D; ++d) {
        const unsigned part = (cell.low[d] + ((c >> d) & 1)) * level.factors[d];
        mixed ^= part;
        sum += part;
    }
    return place_of(mixed, sum, level);
}

__device__ __forceinline__ float weight_of(const Cell& cell, int c, int without) {
    float weight = 1.0f;
#pragma unroll
    for (int d = 0; d < D; ++d)
        if (d != without) weight *= (c >> d) & 1 ? cell.share[d] : 1.0f - cell.share[d];
    return weight;
}

// A thread interpolates TOGETHER neighbouring levels of one sample and writes them at once. The blocks of one group of
// levels run together, so that its entries stay in the cache.
KERNEL hash_forward(
    const float* __restrict__ x, const float* __restrict__ table, OUT* __restrict__ out,
    const float* __restrict__ scales, const int* __restrict__ places, const int* __restrict__ factors,
    long long n_samples, long long n_active
) {
    const long long row = (long long)blockIdx.x * THREADS + threadIdx.x;
    const int first = blockIdx.y * TOGETHER;
    if (row >= n_samples) return;
    float u[D];
#pragma unroll
    for (int d = 0; d < D; ++d) u[d] = x[row * D + d];
    union { OUT numbers[TOGETHER * F]; Pack packs[TOGETHER * F / PACK]; } made;
#pragma unroll
    for (int k = 0; k < TOGETHER; ++k) {
        float total[F] = {};
        if (first + k < n_active) {
            const Level level = level_of(first + k, scales, places, factors);
            const Cell cell = cell_of(u, level.scale);
#pragma unroll
            for (int c = 0; c < C; ++c) {
                const Entry entry = *reinterpret_cast<const Entry*>(table + (long long)corner_of(cell, c, level) * F);
                const float weight = weight_of(cell, c, -1);
#pragma unroll
                for (int f = 0; f < F; ++f) total[f] += weight * entry.numbers[f];
            }
        }
#pragma unroll
        for (int f = 0; f < F; ++f) narrow(total[f], made.numbers[k * F + f]);
    }
    OUT* to = out + row * (L * F) + first * F;
#pragma unroll
    for (int p = 0; p < TOGETHER * F / PACK; ++p)
        if (first * F + p * PACK < L * F) reinterpret_cast<Pack*>(to)[p] = made.packs[p];
}

__device__ __forceinline__ void add_held(float* to, float (&held)[FEW]) {
    bool any = false;
#pragma unroll
    for (int f = 0; f < FEW; ++f) any |= held[f] != 0.0f;
    if (any) add(to, held);
#pragma unroll
    for (int f = 0; f < FEW; ++f) held[f] = 0.0f;
}

struct __align__(FEW * sizeof(OUT)) Given { OUT numbers[FEW]; };

// A thread has FEW features of those corners of one level's cells whose coordinates are even or odd as its number says,
// and of the last BOTH coordinates both, along LENGTH neighbouring samples. Neighbours along a ray mostly lie in the
// same cell of the coarse levels, or share corners: what they give to a corner is summed here and added to its entry
// when they have left it. One addition a sample would make the whole GPU queue up before a few hundred entries.
KERNEL hash_backward_table(
    const float* __restrict__ x, const OUT* __restrict__ grad, float* __restrict__ grad_table,
    const float* __restrict__ scales, const int* __restrict__ places, const int* __restrict__ factors,
    long long n_samples, long long n_active
) {
    const int parts = F / FEW, corners = C >> BOTH;
    const long long thread = (long long)blockIdx.x * THREADS + threadIdx.x;
    const int lane = (int)(thread % (corners * parts * BESIDE));
    const long long first = thread / (corners * parts * BESIDE) * LENGTH;
    const int feature = lane % parts * FEW, corner = lane / parts % corners;
    const int k = blockIdx.y * BESIDE + lane / (parts * corners);
    if (k >= n_active || first >= n_samples) return;
    const Level level = level_of(k, scales, places, factors);
    float held[1 << BOTH][FEW] = {};  // sums that were not added yet
    int owner[1 << BOTH] = {};  // and the entries that they belong to
    for (int start = 0; start < LENGTH; start += AHEAD) {
        float u[AHEAD][D], given[AHEAD][FEW];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const bool there = first + start + i < n_samples;
            const long long row = there ? first + start + i : n_samples - 1;
            const Given from = *reinterpret_cast<const Given*>(grad + row * (L * F) + k * F + feature);
            const Point point = *reinterpret_cast<const Point*>(x + row * D);
#pragma unroll
            for (int d = 0; d < D; ++d) u[i][d] = point.numbers[d];
#pragma unroll
            for (int f = 0; f < FEW; ++f) given[i][f] = there ? wide(from.numbers[f]) : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const Cell cell = cell_of(u[i], level.scale);
            unsigned mixed[1 << BOTH] = {}, sum[1 << BOTH] = {};
            float weight[1 << BOTH] = {1.0f};
#pragma unroll
            for (int d = 0; d < D; ++d) {
                const unsigned upper = (cell.low[d] ^ (d < D - BOTH ? corner >> d : 0)) & 1;
                const unsigned part = (cell.low[d] + upper) * level.factors[d];
                const unsigned other = (cell.low[d] + 1 - upper) * level.factors[d];
                const float near = upper ? cell.share[d] : 1.0f - cell.share[d];
                const float far = upper ? 1.0f - cell.share[d] : cell.share[d];
                const int bit = d < D - BOTH ? 0 : 1 << (d - (D - BOTH));
#pragma unroll
                for (int c = 0; c < bit; ++c) {
                    weight[c + bit] = weight[c] * far;
                    mixed[c + bit] = mixed[c] ^ other;
                    sum[c + bit] = sum[c] + other;
                }
#pragma unroll
                for (int c = 0; c < (bit ? bit : 1); ++c) {
                    weight[c] *= near;
                    mixed[c] ^= part;
                    sum[c] += part;
                }
            }
#pragma unroll
            for (int c = 0; c < 1 << BOTH; ++c) {
                const int number = place_of(mixed[c], sum[c], level);
                if (number != owner[c]) {
                    add_held(grad_table + (long long)owner[c] * F + feature, held[c]);
                    owner[c] = number;
                }
#pragma unroll
                for (int f = 0; f < FEW; ++f) held[c][f] += weight[c] * given[i][f];
            }
        }
    }
#pragma unroll
    for (int c = 0; c < 1 << BOTH; ++c) add_held(grad_table + (long long)owner[c] * F + feature, held[c]);
}

// A thread adds to one point's gradient what TOGETHER levels, from `first` on, give; it writes it where that is 0.
KERNEL hash_backward_points(
    const float* __restrict__ x, const float* __restrict__ table, const OUT* __restrict__ grad,
    float* __restrict__ grad_x,
    const float* __restrict__ scales, const int* __restrict__ places, const int* __restrict__ factors,
    long long n_samples, long long n_active, long long first_level
) {
    const long long row = (long long)blockIdx.x * THREADS + threadIdx.x;
    const int first = (int)first_level;
    if (row >= n_samples) return;
    float u[D], slope[D];
#pragma unroll
    for (int d = 0; d < D; ++d) {
        u[d] = x[row * D + d];
        slope[d] = first ? grad_x[row * D + d] : 0.0f;
    }
    union { OUT numbers[TOGETHER * F]; Pack packs[TOGETHER * F / PACK]; } given;
    const OUT* from = grad + row * (L * F) + first * F;
#pragma unroll
    for (int p = 0; p < TOGETHER * F / PACK; ++p)
        if (first * F + p * PACK < L * F) given.packs[p] = reinterpret_cast<const Pack*>(from)[p];
#pragma unroll
    for (int k = 0; k < TOGETHER; ++k) {
        if (first + k >= n_active) continue;
        const Level level = level_of(first + k, scales, places, factors);
        const Cell cell = cell_of(u, level.scale);
#pragma unroll
        for (int c = 0; c < C; ++c) {
            const Entry entry = *reinterpret_cast<const Entry*>(table + (long long)corner_of(cell, c, level) * F);
            float value = 0.0f;
#pragma unroll
            for (int f = 0; f < F; ++f) value += entry.numbers[f] * wide(given.numbers[k * F + f]);
            value *= level.scale;
#pragma unroll
            for (int d = 0; d < D; ++d) slope[d] += ((c >> d) & 1 ? value : -value) * weight_of(cell, c, d);
        }
    }
#pragma unroll
    for (int d = 0; d < D; ++d) grad_x[row * D + d] = slope[d];
}
"""
"""D, F, L; OUT, the type of what is encoded; THREADS of a block; PIECE, PACK, TOGETHER; FEW, BOTH, BESIDE, AHEAD, and
LENGTH, a multiple of that."""

MARCH = r"""
// 32 threads walk a ray, as many lattice points at a time. Without `write` its intervals are counted into counts [N];
// with it counts holds where each ray's intervals begin, and they are written there.
extern "C" __global__ void march(
    const int* __restrict__ firsts, const int* __restrict__ lasts,
    const float* __restrict__ start, const float* __restrict__ slope, const float* __restrict__ moved,
    const float* __restrict__ marks, const unsigned char* __restrict__ occupied, long long* counts,
    long long* rays, float* t_starts, float* t_ends,
    long long n_rays, long long n_marks, long long resolution, float half_step,
    long long has_moved, long long has_cells, long long write
) {
    const int lane = threadIdx.x % 32;
    const long long ray = ((long long)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    if (ray >= n_rays) return;
    const int side = (int)resolution;
    const int end = lasts[ray] < n_marks - 2 ? lasts[ray] : (int)n_marks - 2;  // an interval has two marks
    const float shift = has_moved ? moved[ray] : 0.0f;
    long long count = write ? counts[ray] : 0;
    for (int begin = firsts[ray]; begin <= end; begin += 32) {
        const int k = begin + lane;
        bool keep = k <= end;
        const float mark = keep ? marks[k] : 0.0f;
        if (keep && has_cells) {
            const float middle = mark + half_step + shift;
            int cell = 0;
            for (int d = 0; d < 3; ++d) {
                const int along = (int)fmaf(middle, slope[3 * ray + d], start[3 * ray + d]);
                cell = cell * side + (along < 0 ? 0 : along < side ? along : side - 1);
            }
            keep = occupied[cell] != 0;
        }
        const unsigned kept = __ballot_sync(ALL, keep);
        if (write && keep) {
            const long long to = count + __popc(kept & ((1u << lane) - 1));  // after those of the ray that come before
            rays[to] = ray;
            t_starts[to] = mark + shift;
            t_ends[to] = marks[k + 1] + shift;
        }
        count += __popc(kept);
    }
    if (!write && lane == 0) counts[ray] = count;
}
"""

SUM_ALL = r"""
// the sum of the numbers of so many neighbouring threads of a warp, for each of them
template <int MANY>
__device__ __forceinline__ float sum_of(float x) {
#pragma unroll
    for (int step = MANY / 2; step; step /= 2) x += __shfl_xor_sync(ALL, x, step);
    return x;
}
"""

COMPOSITE = (
    SUM_ALL
    + r"""
// sums of all threads' numbers up to, and without, one's own: that may be large, and is not taken off again
__device__ __forceinline__ float sum_before(float x, int lane, float& all) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const float other = __shfl_up_sync(ALL, x, step);
        if (lane >= step) x += other;
    }
    const float before = __shfl_up_sync(ALL, x, 1);
    all = __shfl_sync(ALL, x, 31);
    return lane ? before : 0.0f;
}

// 32 threads have a ray, and as many of its samples at a time. bounds: [N + 1] where a ray's samples begin.
#define RAY                                                                        \
    const int lane = threadIdx.x % 32;                                             \
    const long long ray = ((long long)blockIdx.x * blockDim.x + threadIdx.x) / 32; \
    if (ray >= n_rays) return;                                                     \
    const long long begin = bounds[ray], end = bounds[ray + 1];

// clear: [S] what reaches a sample, kept for the gradient
extern "C" __global__ void composite_forward(
    const float* __restrict__ density, const float* __restrict__ values,
    const float* __restrict__ t_starts, const float* __restrict__ t_ends, const long long* __restrict__ bounds,
    float* weights, float* clear, float* sums, long long n_rays
) {
    RAY
    float before = 0.0f, total[K] = {};
    for (long long start = begin; start < end; start += 32) {
        const long long sample = start + lane;
        const bool there = sample < end;
        const float thickness = there ? density[sample] * (t_ends[sample] - t_starts[sample]) : 0.0f;
        float all;
        const float reaching = expf(-(before + sum_before(thickness, lane, all)));
        const float weight = -expm1f(-thickness) * reaching;
        before += all;
        if (!there) continue;
        weights[sample] = weight;
        clear[sample] = reaching;
#pragma unroll
        for (int k = 0; k < K; ++k) total[k] += weight * values[sample * K + k];
    }
#pragma unroll
    for (int k = 0; k < K; ++k) {
        const float sum = sum_of<32>(total[k]);
        if (lane == 0) sums[ray * K + k] = sum;
    }
}

// dL/dthickness_i = G_i (T_i - w_i) - sum of G_j w_j over later j, with G_i = dL/dw_i in all: walked backwards
extern "C" __global__ void composite_backward(
    const float* __restrict__ density, const float* __restrict__ values,
    const float* __restrict__ t_starts, const float* __restrict__ t_ends, const long long* __restrict__ bounds,
    const float* __restrict__ weights, const float* __restrict__ clear,
    const float* __restrict__ grad_weights, const float* __restrict__ grad_sums,
    float* grad_density, float* grad_values, long long n_rays
) {
    RAY
    float later = 0.0f, of_sums[K];
#pragma unroll
    for (int k = 0; k < K; ++k) of_sums[k] = grad_sums[ray * K + k];
    for (long long start = end - 1; start >= begin; start -= 32) {
        const long long sample = start - lane;
        const bool there = sample >= begin;
        float weight = 0.0f, grad = 0.0f;
        if (there) {
            weight = weights[sample];
            grad = grad_weights[sample];
#pragma unroll
            for (int k = 0; k < K; ++k) {
                grad += of_sums[k] * values[sample * K + k];
                grad_values[sample * K + k] = weight * of_sums[k];
            }
        }
        float all;
        const float suffix = later + sum_before(grad * weight, lane, all);
        later += all;
        if (there) {
            const float dt = t_ends[sample] - t_starts[sample];
            grad_density[sample] = dt * (grad * (clear[sample] - weight) - suffix);
        }
    }
}

extern "C" __global__ void sum_rays(
    const float* __restrict__ values, const long long* __restrict__ bounds, float* sums, long long n_rays
) {
    RAY
    float total[K] = {};
    for (long long sample = begin + lane; sample < end; sample += 32) {
#pragma unroll
        for (int k = 0; k < K; ++k) total[k] += values[sample * K + k];
    }
#pragma unroll
    for (int k = 0; k < K; ++k) {
        const float sum = sum_of<32>(total[k]);
        if (lane == 0) sums[ray * K + k] = sum;
    }
}
"""
)
"""K columns of values."""
