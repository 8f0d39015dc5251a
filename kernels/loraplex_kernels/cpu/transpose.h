// Sixteen steps of sixteen rows at once, for laying out weights: what was side by side in a row comes one below the
// other.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

namespace loraplex {

constexpr int TRANSPOSED = 16;  // words of 4 bytes a side

#if defined(__AVX512F__)

// to[s · to_stride + j] = word s of from[j], whose words begin at `offset`. from: TRANSPOSED rows. In words.
inline void transpose_words(const uint32_t* const* from, int64_t offset, uint32_t* to, int64_t to_stride) {
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) a[j] = _mm512_loadu_si512(from[j] + offset);
    // Within each quarter of 128 bits: pairs of rows, then fours.
#pragma GCC unroll 8
    for (int j = 0; j < 16; j += 2) {
        b[j] = _mm512_unpacklo_epi32(a[j], a[j + 1]);
        b[j + 1] = _mm512_unpackhi_epi32(a[j], a[j + 1]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 16; j += 4) {
        a[j] = _mm512_unpacklo_epi64(b[j], b[j + 2]);
        a[j + 1] = _mm512_unpackhi_epi64(b[j], b[j + 2]);
        a[j + 2] = _mm512_unpacklo_epi64(b[j + 1], b[j + 3]);
        a[j + 3] = _mm512_unpackhi_epi64(b[j + 1], b[j + 3]);
    }
    // a[4 g + i] has steps i, 4 + i, 8 + i and 12 + i of rows 4 g … 4 g + 3. Across the quarters:
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512i even_low = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88);
        const __m512i odd_low = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd);
        const __m512i even_high = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
        const __m512i odd_high = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
        _mm512_storeu_si512(to + i * to_stride, _mm512_shuffle_i32x4(even_low, even_high, 0x88));
        _mm512_storeu_si512(to + (4 + i) * to_stride, _mm512_shuffle_i32x4(odd_low, odd_high, 0x88));
        _mm512_storeu_si512(to + (8 + i) * to_stride, _mm512_shuffle_i32x4(even_low, even_high, 0xdd));
        _mm512_storeu_si512(to + (12 + i) * to_stride, _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd));
    }
}

#else

inline void transpose_words(const uint32_t* const* from, int64_t offset, uint32_t* to, int64_t to_stride) {
    for (int j = 0; j < TRANSPOSED; ++j)
        for (int s = 0; s < TRANSPOSED; ++s) std::memcpy(to + s * to_stride + j, from[j] + offset + s, 4);
}

#endif

}  // namespace loraplex
