// The one inner loop of linears, attention and LoRA: a few rows times a few vectors' width of a matrix, in registers.
//
//     out[r][j] = Σ_s x[r][s] · w[s][j]      (or out[r][j] + …)
//
// Each sum runs over s in ascending order in a lane of its own, so it does not depend on the number of rows.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "simd.h"

namespace loraplex {

// Rows that are multiplied at once by two vectors; by four vectors half as many. Accumulators take 24 of AVX512's 32
// registers, 12 of AVX2's 16.
#if defined(__AVX512F__)
constexpr int ROWS_AT_ONCE = 12;
#elif defined(__AVX2__)
constexpr int ROWS_AT_ONCE = 6;
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

// How many neighbours of x and of w one lane takes.
template <class X>
constexpr int PAIR_OF = std::is_same_v<X, bf16> ? 2 : 1;

// W columns of one step, as the inner loop takes them.
template <class X>
struct WeightsFor {
    using Type = Vec;
};
#if defined(__AVX512BF16__)
template <>
struct WeightsFor<bf16> {
    using Type = __m512bh;
};
#endif
template <class X>
using Weights = typename WeightsFor<X>::Type;

template <class X, class T>
inline Weights<X> load_weights(const T* from) {
#if defined(__AVX512BF16__)
    if constexpr (PAIR_OF<X> == 2) return reinterpret_cast<__m512bh>(_mm512_loadu_si512(from));
#endif
    if constexpr (PAIR_OF<X> == 1) return load(from);
}

// Neighbouring vectors share a cache line of 64 bytes, and its prefetch.
template <class X, class T>
constexpr int VECTORS_PER_LINE = std::max<int>(1, 64 / (W * PAIR_OF<X> * int(sizeof(T))));

// A matrix [steps, columns, pair] whose columns are found W at a time: `vectors[i]` is where columns i·W … begin, and
// the next step is `stride` elements on.
template <class T>
struct Columns {
    const T* const* vectors;
    int64_t stride;
    int64_t steps;
    int64_t ahead;  // bytes from what is read to what is prefetched

    // Hands the inner loop the weights of neighbouring vectors: `fetch` is called once for STEPS steps, then `weights`
    // once for each of them. Each is inlined: a call would take what the loop has in registers to memory, at every
    // step.
    template <int VECTORS, class X>
    class Reader {
      public:
        static constexpr int STEPS = 1;

        Reader(const Columns& columns, int64_t first_vector) : stride_(columns.stride), ahead_(columns.ahead) {
            for (int v = 0; v < VECTORS; ++v) at_[v] = columns.vectors[first_vector + v];
        }

        [[gnu::always_inline]] void fetch(int64_t step) {
            offset_ = step * stride_;
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v += VECTORS_PER_LINE<X, T>)
                __builtin_prefetch(reinterpret_cast<const char*>(at_[v] + offset_) + ahead_);
        }

        [[gnu::always_inline]] void weights(int, Weights<X> (&out)[VECTORS]) const {
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) out[v] = load_weights<X>(at_[v] + offset_);
        }

      private:
        const T* at_[VECTORS];
        int64_t stride_, ahead_, offset_ = 0;
    };
};

// acc[r][v] += x[r][step] · weights[v]
template <int ROWS, int VECTORS, class X>
inline void multiply_step(const X* x, int64_t x_stride, int64_t step, const Weights<X> (&weights)[VECTORS],
                          Vec (&acc)[ROWS][VECTORS]) {
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
        if constexpr (std::is_same_v<X, bf16>) {
#if defined(__AVX512BF16__)
            int32_t both;
            std::memcpy(&both, x + r * x_stride + 2 * step, 4);
            const __m512bh spread = reinterpret_cast<__m512bh>(_mm512_set1_epi32(both));
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], weights[v], spread);
#endif
        } else {
            const Vec spread = fill(x[r * x_stride + step]);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) acc[r][v] = fma(spread, weights[v], acc[r][v]);
        }
    }
}

// The loop for a constant number of rows and vectors. C: Columns, or another source of columns with a Reader.
template <int ROWS, int VECTORS, class X, class C, class Out>
void multiply_block(const X* x, int64_t x_stride, const C& w, int64_t first_vector, Out* out, int64_t out_stride,
                    bool accumulate) {
    using Reader = typename C::template Reader<VECTORS, X>;
    Reader reader(w, first_vector);
    Vec acc[ROWS][VECTORS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) acc[r][v] = accumulate ? load(out + r * out_stride + v * W) : zero();
    const int64_t steps = w.steps;
    for (int64_t s = 0; s < steps; s += Reader::STEPS) {
        reader.fetch(s);
#pragma GCC unroll 2
        for (int i = 0; i < Reader::STEPS; ++i) {
            Weights<X> weights[VECTORS];
            reader.weights(i, weights);
            multiply_step<ROWS, VECTORS>(x, x_stride, s + i, weights, acc);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) store(out + r * out_stride + v * W, acc[r][v]);
}

template <class X, class C, class Out>
using Block = void (*)(const X*, int64_t, const C&, int64_t, Out*, int64_t, bool);

// The loops for 1 … sizeof...(I) rows.
template <int VECTORS, class X, class C, class Out, int... I>
constexpr std::array<Block<X, C, Out>, sizeof...(I)> make_blocks(std::integer_sequence<int, I...>) {
    return {multiply_block<I + 1, VECTORS, X, C, Out>...};
}

// rows: 1 … ROWS_AT_ONCE. out[r][v · W …] for every vector v of w, added to what is there if `accumulate`. Strides in
// elements.
template <class X, class C, class Out>
void multiply(int rows, const X* x, int64_t x_stride, const C& w, int64_t vectors, Out* out, int64_t out_stride,
              bool accumulate) {
    static constexpr auto ones = make_blocks<1, X, C, Out>(std::make_integer_sequence<int, ROWS_AT_ONCE>{});
    static constexpr auto twos = make_blocks<2, X, C, Out>(std::make_integer_sequence<int, ROWS_AT_ONCE>{});
    static constexpr auto fours = make_blocks<4, X, C, Out>(std::make_integer_sequence<int, ROWS_AT_ONCE / 2>{});
    int64_t v = 0;
    const auto all = [&](const auto& blocks, int64_t at_once) {
        for (; v + at_once <= vectors; v += at_once)
            blocks[rows - 1](x, x_stride, w, v, out + v * W, out_stride, accumulate);
    };
    if (rows <= ROWS_AT_ONCE / 2) all(fours, 4);
    all(twos, 2);
    all(ones, 1);
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

// Where the vectors of a panel of PANEL neighbouring columns begin.
constexpr int PANEL = 32;

template <class X, class T>
std::array<const T*, PANEL / W> panel_vectors(const T* panel) {
    std::array<const T*, PANEL / W> vectors;
    for (int v = 0; v < PANEL / W; ++v) vectors[v] = panel + v * W * PAIR_OF<X>;
    return vectors;
}

}  // namespace loraplex
