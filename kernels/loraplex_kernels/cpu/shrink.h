// x Aᵀ of LoRA: some rows of x times groups of ranks, each of which is one stream through its rows of A. In AMX tiles
// where the library is compiled for them and the operands are bfloat16, else dot products in vectors. Each sum has an
// order of its own, the same for any number of rows.
#pragma once

#include <algorithm>

#include "lora.h"

namespace loraplex {

constexpr int64_t SHRINK_ROWS = 64;             // at most, at a time
constexpr int DOT_ROWS = HAS_BF16_DOT ? 4 : 2;  // x RANK_GROUP accumulators

// acc += the products of SHRINK_WIDTH neighbours, lane by lane.
template <class T>
inline Vec dot(Vec acc, const T* a, const float* x) {
#pragma GCC unroll 8
    for (int i = 0; i < SHRINK_WIDTH; i += W) acc = fma(load(a + i), load(x + i), acc);
    return acc;
}

#if defined(__AVX512BF16__)
inline Vec dot(Vec acc, const bf16* a, const bf16* x) {
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(_mm512_loadu_si512(a)),
                            reinterpret_cast<__m512bh>(_mm512_loadu_si512(x)));
}
#endif

// out[row][rank] = x[row] · a[rank] for a constant number of rows and of ranks of one group.
template <int ROWS, int RANKS, class X, class T>
void dots(const X* x, int64_t width, const T* a, float* out, int64_t out_stride) {
    Vec acc[ROWS][RANKS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int k = 0; k < RANKS; ++k) acc[r][k] = zero();
    for (int64_t c = 0; c < width; c += SHRINK_WIDTH, a += RANKS * SHRINK_WIDTH) {
        for (int k = 0; k < RANKS; ++k)
            __builtin_prefetch(reinterpret_cast<const char*>(a + k * SHRINK_WIDTH) + LORA_AHEAD);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
            for (int k = 0; k < RANKS; ++k) acc[r][k] = dot(acc[r][k], a + k * SHRINK_WIDTH, x + r * width + c);
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
        if constexpr (RANKS == 4)
            sums(acc[r][0], acc[r][1], acc[r][2], acc[r][3], out + r * out_stride);
        else
            for (int k = 0; k < RANKS; ++k) out[r * out_stride + k] = sum(acc[r][k]);
    }
}

template <int RANKS, class X, class T>
void dot_rows(int rows, const X* x, int64_t width, const T* a, float* out, int64_t out_stride) {
    switch (rows) {
        case 1: return dots<1, RANKS>(x, width, a, out, out_stride);
        case 2: return dots<2, RANKS>(x, width, a, out, out_stride);
        case 3: return dots<3, RANKS>(x, width, a, out, out_stride);
        default: return dots<4, RANKS>(x, width, a, out, out_stride);
    }
}

#if defined(__AMX_BF16__)

static_assert(SHRINK_ROWS == 4 * TILE_ROWS, "as many sums, of 16 rows each, hide the time that a product takes");

// Tiles 0 … 3 are sums of 16 rows each but the last, 4 holds a whole block of x, 5 the last one, 6 the ranks.
struct alignas(64) ShrinkShapes {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    ShrinkShapes(int num_rows, int ranks) {
        const int blocks = int(ceil_div(num_rows, TILE_ROWS)), last = num_rows - (blocks - 1) * TILE_ROWS;
        for (int b = 0; b < blocks; ++b) set(b, b + 1 < blocks ? TILE_ROWS : last, ranks * 4);
        set(4, TILE_ROWS, 64);
        set(5, last, 64);
        set(6, TILE_STEPS, ranks * 4);
    }
    void set(int tile, int num_rows, int bytes) {
        rows[tile] = uint8_t(num_rows);
        row_bytes[tile] = uint16_t(bytes);
    }
};

template <int BLOCKS>
void shrink_tiles(const Rows<bf16>& x, int64_t width, const bf16* a, int ranks, float* out, int64_t out_stride) {
    const int64_t x_bytes = x.stride * 2, a_bytes = ranks * 4, out_bytes = out_stride * 4;
    const bf16* at[BLOCKS];
    for (int b = 0; b < BLOCKS; ++b) at[b] = x.data + b * TILE_ROWS * x.stride;
    _tile_zero(0);
    if constexpr (BLOCKS > 1) _tile_zero(1);
    if constexpr (BLOCKS > 2) _tile_zero(2);
    if constexpr (BLOCKS > 3) _tile_zero(3);
    for (int64_t c = 0; c < width; c += 2 * TILE_STEPS, a += ranks * 2 * TILE_STEPS) {
        for (int line = 0; line < ranks; ++line)
            __builtin_prefetch(reinterpret_cast<const char*>(a + line * 32) + LORA_AHEAD);
        _tile_loadd(6, a, a_bytes);
        if constexpr (BLOCKS > 1) {
            _tile_loadd(4, at[0] + c, x_bytes);
            _tile_dpbf16ps(0, 4, 6);
        }
        if constexpr (BLOCKS > 2) {
            _tile_loadd(4, at[1] + c, x_bytes);
            _tile_dpbf16ps(1, 4, 6);
        }
        if constexpr (BLOCKS > 3) {
            _tile_loadd(4, at[2] + c, x_bytes);
            _tile_dpbf16ps(2, 4, 6);
        }
        _tile_loadd(5, at[BLOCKS - 1] + c, x_bytes);
        if constexpr (BLOCKS == 1) _tile_dpbf16ps(0, 5, 6);
        if constexpr (BLOCKS == 2) _tile_dpbf16ps(1, 5, 6);
        if constexpr (BLOCKS == 3) _tile_dpbf16ps(2, 5, 6);
        if constexpr (BLOCKS == 4) _tile_dpbf16ps(3, 5, 6);
    }
    _tile_stored(0, out, out_bytes);
    if constexpr (BLOCKS > 1) _tile_stored(1, out + TILE_ROWS * out_stride, out_bytes);
    if constexpr (BLOCKS > 2) _tile_stored(2, out + 2 * TILE_ROWS * out_stride, out_bytes);
    if constexpr (BLOCKS > 3) _tile_stored(3, out + 3 * TILE_ROWS * out_stride, out_bytes);
}

inline void shrink_by_tiles(const Rows<bf16>& x, int64_t rows, int64_t width, const bf16* a, int64_t rank,
                            int64_t first, int64_t last, float* out) {
    int configured = 0;
    for (int64_t group = first; group < last; group += RANK_GROUP<bf16>) {
        const int ranks = int(std::min<int64_t>(RANK_GROUP<bf16>, rank - group));
        if (ranks != configured) {  // which takes as long as many products
            const ShrinkShapes shapes(int(rows), ranks);
            _tile_loadconfig(&shapes);
            configured = ranks;
        }
        const bf16* from = a + group * width;
        switch (ceil_div(rows, TILE_ROWS)) {
            case 1: shrink_tiles<1>(x, width, from, ranks, out + group, rank); break;
            case 2: shrink_tiles<2>(x, width, from, ranks, out + group, rank); break;
            case 3: shrink_tiles<3>(x, width, from, ranks, out + group, rank); break;
            default: shrink_tiles<4>(x, width, from, ranks, out + group, rank);
        }
    }
    _tile_release();
}

#endif

// out[row][first … last - 1] = x · aᵀ for some of an adapter's ranks, whole groups but the last. a: as LoraAdapter has
// it; x: at most SHRINK_ROWS rows of `width`; out: [rows, rank].
template <class X, class T>
void shrink_rows(const Rows<X>& x, int64_t rows, int64_t width, const T* a, int64_t rank, int64_t first, int64_t last,
                 float* out) {
#if defined(__AMX_BF16__)
    if constexpr (USES_TILES<X>) return shrink_by_tiles(x, rows, width, a, rank, first, last, out);
#endif
    for (int64_t group = first; group < last; group += RANK_GROUP<T>) {
        const T* weights = a + group * width;
        for (int64_t r = 0; r < rows; r += DOT_ROWS) {
            const int count = int(std::min<int64_t>(DOT_ROWS, rows - r));
            const X* from = x.data + r * x.stride;
            float* to = out + r * rank + group;
            switch (std::min<int64_t>(RANK_GROUP<T>, rank - group)) {
                case 1: dot_rows<1>(count, from, width, weights, to, rank); break;
                case 2: dot_rows<2>(count, from, width, weights, to, rank); break;
                case 3: dot_rows<3>(count, from, width, weights, to, rank); break;
                default: dot_rows<4>(count, from, width, weights, to, rank);
            }
        }
    }
}

}  // namespace loraplex
