// The one inner loop of linears, attention and LoRA: a few rows times a narrow panel, in registers.
//
//     out[r][j] = Σ_s x[r][s] · w[s][j]        r < rows, j < WIDTH
//
// Each sum runs over s in ascending order in a lane of its own, so it does not depend on the number of rows.
#pragma once

#include <array>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "simd.h"

namespace loraplex {

#if defined(__AVX512F__)
constexpr int ROWS_AT_ONCE = 12;  // x 2 vectors = 24 of 32 registers
#elif defined(__AVX2__)
constexpr int ROWS_AT_ONCE = 6;  // x 2 vectors = 12 of 16 registers
#else
constexpr int ROWS_AT_ONCE = 4;
#endif

// What a weight of type T is multiplied with, and how many of them one step takes. With AVX512-BF16 a lane multiplies
// two neighbouring bfloat16 of x with two of w and adds both products in float32; elsewhere everything is widened.
template <class T>
struct Operand {
    static constexpr bool paired = HAS_BF16_DOT && std::is_same_v<T, bf16>;
    static constexpr int pair = paired ? 2 : 1;
    using Type = std::conditional_t<paired, bf16, float>;
};

// The loop for a constant number of rows and vectors. x float: w is [steps, w_stride] of anything; x bf16: w holds
// pairs, [steps, w_stride / 2, 2], and so does x.
template <int ROWS, int VECTORS, class X, class T>
void multiply_block(const X* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t steps, float* out,
                    int64_t out_stride, bool accumulate) {
    Vec acc[ROWS][VECTORS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) acc[r][v] = accumulate ? load(out + r * out_stride + v * W) : zero();
    for (int64_t s = 0; s < steps; ++s, w += w_stride) {
#if defined(__x86_64__)
        __builtin_prefetch(reinterpret_cast<const char*>(w) + 2048);
        if (VECTORS * W * sizeof(T) * (std::is_same_v<X, bf16> ? 2 : 1) > 64)
            __builtin_prefetch(reinterpret_cast<const char*>(w) + 2048 + 64);
#endif
        if constexpr (std::is_same_v<X, bf16>) {
#if defined(__AVX512BF16__)
            __m512bh weights[VECTORS];
            for (int v = 0; v < VECTORS; ++v) weights[v] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(w + v * 2 * W));
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r) {
                int32_t both;
                std::memcpy(&both, x + r * x_stride + 2 * s, 4);
                const __m512bh spread = reinterpret_cast<__m512bh>(_mm512_set1_epi32(both));
#pragma GCC unroll 2
                for (int v = 0; v < VECTORS; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], weights[v], spread);
            }
#endif
        } else {
            Vec weights[VECTORS];
            for (int v = 0; v < VECTORS; ++v) weights[v] = load(w + v * W);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r) {
                const Vec spread = fill(x[r * x_stride + s]);
#pragma GCC unroll 2
                for (int v = 0; v < VECTORS; ++v) acc[r][v] = fma(spread, weights[v], acc[r][v]);
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) store(out + r * out_stride + v * W, acc[r][v]);
}

template <class X, class T>
using Block = void (*)(const X*, int64_t, const T*, int64_t, int64_t, float*, int64_t, bool);

// The loops for 1 … ROWS_AT_ONCE rows.
template <int VECTORS, class X, class T, int... I>
constexpr std::array<Block<X, T>, sizeof...(I)> make_blocks(std::integer_sequence<int, I...>) {
    return {multiply_block<I + 1, VECTORS, X, T>...};
}

// rows: 1 … ROWS_AT_ONCE. WIDTH: a multiple of 16. Strides in elements.
template <int WIDTH, class X, class T>
void multiply(int rows, const X* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t steps, float* out,
              int64_t out_stride, bool accumulate) {
    constexpr int VECTORS = WIDTH / W < 2 ? 1 : 2;
    constexpr int COLUMNS = VECTORS * W;
    static constexpr auto blocks = make_blocks<VECTORS, X, T>(std::make_integer_sequence<int, ROWS_AT_ONCE>{});
    const int lane = std::is_same_v<X, bf16> ? 2 : 1;
    for (int column = 0; column < WIDTH; column += COLUMNS)
        blocks[rows - 1](x, x_stride, w + column * lane, w_stride, steps, out + column, out_stride, accumulate);
}

// f(first, count) over [0, rows) in blocks of at most ROWS_AT_ONCE rows, as equal as can be.
template <class F>
void for_row_blocks(int64_t rows, F f) {
    const int64_t blocks = (rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = rows * block / blocks;
        f(first, int(rows * (block + 1) / blocks - first));
    }
}

}  // namespace loraplex
