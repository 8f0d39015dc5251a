// Sums of products of bytes, in 32 bits. They are exact, so that all instruction sets agree to the last bit.
//
// A lane takes INPUTS neighbouring inputs of one output: two, widened to 16 bits, whose products and their sum never
// overflow; or four, where the processor multiplies bytes. AVX512-VNNI does so with unsigned ones on one side: those
// of x are raised by CODE_OFFSET, and its product with the weights' sum is subtracted in the end.
#pragma once

#include "tiles.h"

namespace loraplex {

#if defined(__AMX_INT8__)
using Code = int8_t;
constexpr int INPUTS = 4, CODE_OFFSET = 0, INTEGER_STEPS = TILE_STEPS;
#elif defined(__AVX512VNNI__)
using Code = uint8_t;
constexpr int INPUTS = 4, CODE_OFFSET = 128, INTEGER_STEPS = 1;
#else
using Code = int16_t;
constexpr int INPUTS = 2, CODE_OFFSET = 0, INTEGER_STEPS = 1;
#endif

#if defined(__AVX512F__)

using Ints = __m512i;
using Bytes = __m512i;

inline Ints load_ints(const int32_t* p) { return _mm512_loadu_si512(p); }
inline void store_ints(int32_t* p, Ints a) { _mm512_storeu_si512(p, a); }
inline Vec to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
// sums - times · by; what overflows on the way comes back.
inline Ints subtract_product(Ints sums, Ints times, int32_t by) {
    return _mm512_sub_epi32(sums, _mm512_mullo_epi32(times, _mm512_set1_epi32(by)));
}
inline void store_codes(Code* p, Vec a) {
    const __m512i codes = _mm512_add_epi32(_mm512_cvtps_epi32(a), _mm512_set1_epi32(CODE_OFFSET));
    if constexpr (sizeof(Code) == 2)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(codes));
    else
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(codes));
}
#if defined(__AVX512VNNI__)
inline Bytes load_bytes(const int8_t* p) { return _mm512_loadu_si512(p); }
inline Ints add_products(Ints sums, Bytes x, Bytes w) { return _mm512_dpbusd_epi32(sums, x, w); }
#else
inline Bytes load_bytes(const int8_t* p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Ints add_products(Ints sums, Bytes x, Bytes w) { return _mm512_add_epi32(sums, _mm512_madd_epi16(x, w)); }
#endif
inline Bytes spread_codes(const Code* x) {
    int32_t together;
    std::memcpy(&together, x, 4);
    return _mm512_set1_epi32(together);
}

#elif defined(__AVX2__)

using Ints = __m256i;
using Bytes = __m256i;

inline Ints load_ints(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline void store_ints(int32_t* p, Ints a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
inline Vec to_floats(Ints a) { return _mm256_cvtepi32_ps(a); }
inline Ints subtract_product(Ints sums, Ints times, int32_t by) {
    return _mm256_sub_epi32(sums, _mm256_mullo_epi32(times, _mm256_set1_epi32(by)));
}
inline void store_codes(Code* p, Vec a) {
    const __m256i codes = _mm256_cvtps_epi32(a);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(codes, codes), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline Bytes load_bytes(const int8_t* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Ints add_products(Ints sums, Bytes x, Bytes w) { return _mm256_add_epi32(sums, _mm256_madd_epi16(x, w)); }
inline Bytes spread_codes(const Code* x) {
    int32_t together;
    std::memcpy(&together, x, 4);
    return _mm256_set1_epi32(together);
}

#else

typedef int32_t Ints __attribute__((vector_size(16)));
struct Bytes {
    int16_t of[W * INPUTS];
};

inline Ints load_ints(const int32_t* p) {
    Ints a;
    std::memcpy(&a, p, sizeof(a));
    return a;
}
inline void store_ints(int32_t* p, Ints a) { std::memcpy(p, &a, sizeof(a)); }
inline Vec to_floats(Ints a) {
    return each([&](int i) { return float(a[i]); });
}
inline Ints subtract_product(Ints sums, Ints times, int32_t by) { return sums - times * by; }
inline void store_codes(Code* p, Vec a) {
    const Vec whole = nearest(a);
    for (int i = 0; i < W; ++i) p[i] = Code(whole[i]);
}
inline Bytes load_bytes(const int8_t* p) {
    Bytes bytes;
    for (int i = 0; i < W * INPUTS; ++i) bytes.of[i] = p[i];
    return bytes;
}
inline Bytes spread_codes(const Code* x) {
    Bytes bytes;
    for (int i = 0; i < W * INPUTS; ++i) bytes.of[i] = x[i % INPUTS];
    return bytes;
}
inline Ints add_products(Ints sums, const Bytes& x, const Bytes& w) {
    for (int i = 0; i < W; ++i) sums[i] += x.of[2 * i] * w.of[2 * i] + x.of[2 * i + 1] * w.of[2 * i + 1];
    return sums;
}

#endif

// Codes of rows, and a panel of weights [steps, PANEL, INPUTS].
struct CodeRows {
    const Code* data;
    int64_t stride;
};
struct BytePanel {
    const int8_t* data;
    int64_t steps;
    int64_t ahead;  // bytes from what is read to what is prefetched
};
constexpr int64_t STEP_BYTES = PANEL * INPUTS;

#if defined(__AMX_INT8__)

// sums[16][PANEL] of 16 rows or less; if TWO, next_sums of 16 more from next_x on. The tiles are TileScope's.
template <bool TWO>
inline void multiply_byte_tiles(const Code* x, const Code* next_x, int64_t stride, const BytePanel& w, int32_t* sums,
                                int32_t* next_sums) {
    constexpr int64_t SUMS_BYTES = PANEL * int64_t(sizeof(int32_t));
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < w.steps; step += TILE_STEPS) {
        const int8_t* at = w.data + step * STEP_BYTES;
        for (int64_t i = 0; i < TILE_STEPS * STEP_BYTES; i += 64) __builtin_prefetch(at + i + w.ahead);
        _tile_loadd(4, x + step * INPUTS, stride);
        _tile_loadd(6, at, STEP_BYTES);
        _tile_dpbssd(0, 4, 6);
        _tile_loadd(7, at + STEP_BYTES / 2, STEP_BYTES);
        _tile_dpbssd(1, 4, 7);
        if constexpr (TWO) {
            _tile_loadd(5, next_x + step * INPUTS, stride);
            _tile_dpbssd(2, 5, 6);
            _tile_dpbssd(3, 5, 7);
        }
    }
    _tile_stored(0, sums, SUMS_BYTES);
    _tile_stored(1, sums + PANEL / 2, SUMS_BYTES);
    if constexpr (!TWO) return;
    _tile_stored(2, next_sums, SUMS_BYTES);
    _tile_stored(3, next_sums + PANEL / 2, SUMS_BYTES);
}

// f(first, count, sums) for a few rows after the other: sums[count][PANEL] are their products with the panel. Within
// the scope of their tiles.
template <class F>
void multiply_codes(const CodeRows& x, int64_t rows, const BytePanel& w, F f) {
    alignas(64) int32_t sums[2 * TILE_ROWS * PANEL];
    int32_t* const next_sums = sums + TILE_ROWS * PANEL;
    // The last block begins early enough to be whole: what it computes a second time is the same, and left out.
    const auto begin = [&](int64_t first) {
        return std::max<int64_t>(0, std::min(first, rows - TILE_ROWS));
    };
    for (int64_t first = 0; first < rows; first += 2 * TILE_ROWS) {
        const int64_t middle = first + TILE_ROWS, at = begin(first), next = begin(middle);
        const Code* from = x.data + at * x.stride;
        if (rows <= middle) {
            multiply_byte_tiles<false>(from, nullptr, x.stride, w, sums, nullptr);
            f(first, int(rows - first), sums + (first - at) * PANEL);
        } else {
            multiply_byte_tiles<true>(from, x.data + next * x.stride, x.stride, w, sums, next_sums);
            f(first, TILE_ROWS, sums);
            f(middle, int(std::min<int64_t>(TILE_ROWS, rows - middle)), next_sums + (middle - next) * PANEL);
        }
    }
}

#else

// sums[ROWS][…] of some vectors of a panel, which begin at `w`.
template <int ROWS, int VECTORS>
void multiply_bytes(const CodeRows& x, const int8_t* w, const BytePanel& panel, int32_t* sums) {
    Ints acc[ROWS][VECTORS] = {};
    for (int64_t step = 0; step < panel.steps; ++step, w += STEP_BYTES) {
        for (int64_t i = 0; i < VECTORS * W * INPUTS; i += 64) __builtin_prefetch(w + i + panel.ahead);
        Bytes weights[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) weights[v] = load_bytes(w + v * W * INPUTS);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
            const Bytes codes = spread_codes(x.data + r * x.stride + step * INPUTS);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) acc[r][v] = add_products(acc[r][v], codes, weights[v]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) store_ints(sums + r * PANEL + v * W, acc[r][v]);
}

using ByteBlock = void (*)(const CodeRows&, const int8_t*, const BytePanel&, int32_t*);

// The loops for 1 … sizeof...(I) rows.
template <int VECTORS, int... I>
constexpr std::array<ByteBlock, sizeof...(I)> make_byte_blocks(std::integer_sequence<int, I...>) {
    return {multiply_bytes<I + 1, VECTORS>...};
}

template <class F>
void multiply_codes(const CodeRows& x, int64_t rows, const BytePanel& w, F f) {
    constexpr int WIDE = PANEL % (4 * W) == 0 ? 4 : 2;
    static constexpr auto twos = make_byte_blocks<2>(std::make_integer_sequence<int, ROWS_AT_ONCE>{});
    static constexpr auto wide = make_byte_blocks<WIDE>(std::make_integer_sequence<int, ROWS_AT_ONCE / 2>{});
    for_row_blocks(rows, [&](int64_t first, int count) {
        alignas(64) int32_t sums[ROWS_AT_ONCE * PANEL];
        const CodeRows some{x.data + first * x.stride, x.stride};
        const bool few = count <= ROWS_AT_ONCE / 2;
        const int columns = (few ? WIDE : 2) * W;
        const ByteBlock block = few ? wide[count - 1] : twos[count - 1];
        for (int j = 0; j < PANEL; j += columns) block(some, w.data + j * INPUTS, w, sums + j);
        f(first, count, sums);
    });
}

#endif

}  // namespace loraplex
