// Numbers in eight bits, as a rounded cache keeps keys and values, with a scale for each head.
#pragma once

#include "simd.h"

namespace loraplex {

struct i8 {
    int8_t value;
};
// e4m3: sign, four bits of exponent less 7, three of mantissa; no infinity, and here no NaN.
struct f8 {
    uint8_t bits;
};

// Float16 has the same fields, wider: its exponent counts from 15.
constexpr float F8_IN_F16 = 256.0f;

inline float widen(i8 number) { return float(number.value); }
inline float widen(f8 number) {
    return widen(f16{uint16_t((number.bits & 0x80) << 8 | (number.bits & 0x7f) << 7)}) * F8_IN_F16;
}

#if defined(__AVX512F__)
inline Vec load(const i8* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline Vec load(const f8* p) {
    const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256i half = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(int16_t(0xbfff)));
    return _mm512_cvtph_ps(half) * fill(F8_IN_F16);
}
#elif defined(__AVX2__)
inline Vec load(const i8* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline Vec load(const f8* p) {
    const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m128i half = _mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16(int16_t(0xbfff)));
    return _mm256_cvtph_ps(half) * fill(F8_IN_F16);
}
#endif

// The nearest number, of two equally near the even one, for what is within the type's range.
template <>
inline i8 narrow<i8>(float value) {
    return {int8_t((value + 0x1.8p23f) - 0x1.8p23f)};  // beside 1.5 · 2^23 a float32 has no room for a fraction
}
template <>
inline f8 narrow<f8>(float value) {
    const uint32_t bits =
        float_to_bits(std::fabs(value) * 0x1p-120f);  // float32's exponent counts from 127, not from 7
    const uint32_t rounded = (bits + 0x7ffff + (bits >> 20 & 1)) >> 20;
    return {uint8_t(rounded | (float_to_bits(value) >> 24 & 0x80))};
}

template <class S>
constexpr float LARGEST = 127.0f;
template <>
constexpr float LARGEST<f8> = 448.0f;

// Rounds the n numbers of a head and returns their scale: 0 if all are, NaN if one is not finite, whatever the others.
template <class S>
float round_head(const float* head, S* out, int64_t n) {
    float largest = 0.0f, invalid = 0.0f;
    for (int64_t i = 0; i < n; ++i) {
        largest = std::fmax(largest, std::fabs(head[i]));
        invalid += head[i] * 0.0f;
    }
    const float scale = largest / LARGEST<S> + invalid;
    if (scale > 0.0f)
        for (int64_t i = 0; i < n; ++i) out[i] = narrow<S>(head[i] / scale);
    else
        std::memset(static_cast<void*>(out), 0, size_t(n) * sizeof(S));
    return scale;
}

}  // namespace loraplex
