// Vectors of float32 for one instruction set, and the 16-bit types that are widened to them.
//
// Each library is compiled once per instruction set; what is here is the only part that knows which.
// Fused multiply-add is always explicit (`fma`): the build forbids the compiler to contract, so that every
// instantiation of a kernel rounds alike and a row's bits do not depend on how many rows are beside it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace loraplex {

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

inline float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float widen(float value) { return value; }
inline float widen(bf16 value) { return bits_to_float(uint32_t(value.bits) << 16); }

inline float widen(f16 value) {
    const uint32_t sign = uint32_t(value.bits & 0x8000) << 16;
    const uint32_t rest = value.bits & 0x7fff;
    if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    if (rest >= 0x400) return bits_to_float(sign | ((rest << 13) + (112u << 23)));
    return bits_to_float(sign | float_to_bits(float(rest) * 0x1p-24f));
}

template <class T>
T narrow(float value);

template <>
inline float narrow<float>(float value) {
    return value;
}

// Round to nearest, ties to even, as torch does; NaN stays NaN.
template <>
inline bf16 narrow<bf16>(float value) {
    const uint32_t bits = float_to_bits(value);
    if (value != value) return {uint16_t(bits >> 16 | 0x40)};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <>
inline f16 narrow<f16>(float value) {
    const uint32_t bits = float_to_bits(value);
    const uint16_t sign = bits >> 16 & 0x8000;
    const uint32_t rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return {uint16_t(sign | 0x7e00)};
    if (rest >= 0x47800000) return {uint16_t(sign | 0x7c00)};  // 65536 and more
    if (rest < 0x38800000)                                     // subnormal: the hardware adds and rounds for us
        return {uint16_t(sign | (float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000))};
    return {uint16_t(sign | ((rest + 0xfff + (rest >> 13 & 1) - (112u << 23)) >> 13))};
}

#if defined(__AVX512F__)

// ---------------------------------------------------------------------------------------------------- AVX512: 16 lanes

using Vec = __m512;
constexpr int W = 16;

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec fill(float value) { return _mm512_set1_ps(value); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec maximum(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec minimum(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec square_root(Vec a) { return _mm512_sqrt_ps(a); }
inline float sum(Vec a) { return _mm512_reduce_add_ps(a); }
inline float largest(Vec a) { return _mm512_reduce_max_ps(a); }
inline void sums(Vec a, Vec b, Vec c, Vec d, float* out) {
    const Vec ab = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
    const Vec cd = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
    const Vec abcd = _mm512_shuffle_ps(ab, cd, 0x44) + _mm512_shuffle_ps(ab, cd, 0xee);
    const __m256 half = _mm512_castps512_ps256(abcd) + _mm512_castps512_ps256(_mm512_shuffle_f32x4(abcd, abcd, 0xee));
    _mm_storeu_ps(out, _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1));
}
inline Vec nearest(Vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec times_power_of_two(Vec a, Vec n) { return _mm512_scalef_ps(a, n); }

// Lanes first … end - 1 of a, the others of b.
inline Vec between(int first, int end, Vec a, Vec b) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __mmask16 from = _mm512_cmpge_epi32_mask(lane, _mm512_set1_epi32(first));
    return _mm512_mask_blend_ps(_mm512_mask_cmplt_epi32_mask(from, lane, _mm512_set1_epi32(end)), b, a);
}

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const bf16* p) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
inline Vec load(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }

inline __m256i to_bf16(Vec a) {
#if defined(__AVX512BF16__)
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a));
#else
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, quiet), 16));
#endif
}

inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a); }
inline void store(bf16* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(a)); }
inline void store(f16* p, Vec a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// 32-bit words that hold codes of quantised weights, one word beside each lane of a Vec.
using Words = __m512i;
struct Table16 {
    explicit Table16(const float* entries) : entries(_mm512_loadu_ps(entries)) {}
    __m512 entries;
};
inline Words load_words(const uint32_t* p) { return _mm512_loadu_si512(p); }
inline Words shift_right(Words a, int bits) { return _mm512_srli_epi32(a, unsigned(bits)); }
// The entry that the low 4 bits of each word name; the others do not matter.
inline Vec lookup(const Table16& table, Words a) { return _mm512_permutexvar_ps(a, table.entries); }
// The byte at bit `at` of each word, as a signed number times 2^24.
inline Vec signed_byte(Words a, int at) {
    const __m512i top = _mm512_set1_epi32(int(0xff000000));
    return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_slli_epi32(a, unsigned(24 - at)), top));
}
// The byte at bit `at` of each word as float8 e4m3 (no NaN), divided by 256: with the exponent's bias of float16.
inline Vec float8_byte(Words a, int at) {
    const __m512i sign_twice = _mm512_srai_epi32(_mm512_slli_epi32(a, unsigned(24 - at)), 1);
    const __m512i half = _mm512_srli_epi32(_mm512_and_si512(sign_twice, _mm512_set1_epi32(int(0xbf800000))), 16);
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(half));
}

#elif defined(__AVX2__)

// ------------------------------------------------------------------------------------------- AVX2, FMA, F16C: 8 lanes

using Vec = __m256;
constexpr int W = 8;

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec fill(float value) { return _mm256_set1_ps(value); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec maximum(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec minimum(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec square_root(Vec a) { return _mm256_sqrt_ps(a); }
inline Vec nearest(Vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline float sum(Vec a) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}

inline float largest(Vec a) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_shuffle_ps(half, half, 1)));
}

inline void sums(Vec a, Vec b, Vec c, Vec d, float* out) {
    const Vec ab = _mm256_unpacklo_ps(a, b) + _mm256_unpackhi_ps(a, b);
    const Vec cd = _mm256_unpacklo_ps(c, d) + _mm256_unpackhi_ps(c, d);
    const Vec abcd = _mm256_shuffle_ps(ab, cd, 0x44) + _mm256_shuffle_ps(ab, cd, 0xee);
    _mm_storeu_ps(out, _mm256_castps256_ps128(abcd) + _mm256_extractf128_ps(abcd, 1));
}

// n is a whole number from -252 to 254; two factors because 2^n alone may not be a normal float.
inline Vec times_power_of_two(Vec a, Vec n) {
    const __m256i whole = _mm256_cvtps_epi32(n);
    const __m256i half = _mm256_srai_epi32(whole, 1);
    const auto power = [](__m256i e) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23));
    };
    return a * power(half) * power(_mm256_sub_epi32(whole, half));
}

inline Vec between(int first, int end, Vec a, Vec b) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(first), lane);
    const __m256i inside = _mm256_andnot_si256(below, _mm256_cmpgt_epi32(_mm256_set1_epi32(end), lane));
    return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(inside));
}

inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec load(const bf16* p) {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
inline Vec load(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a); }
inline void store(bf16* p, Vec a) {
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline void store(f16* p, Vec a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

using Words = __m256i;
struct Table16 {
    explicit Table16(const float* entries) : low(_mm256_loadu_ps(entries)), high(_mm256_loadu_ps(entries + 8)) {}
    __m256 low, high;
};
inline Words load_words(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Words shift_right(Words a, int bits) { return _mm256_srli_epi32(a, bits); }
inline Vec lookup(const Table16& table, Words a) {
    const __m256 high = _mm256_castsi256_ps(_mm256_slli_epi32(a, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, a), _mm256_permutevar8x32_ps(table.high, a), high);
}
inline Vec signed_byte(Words a, int at) {
    const __m256i top = _mm256_set1_epi32(int(0xff000000));
    return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_slli_epi32(a, 24 - at), top));
}
inline Vec float8_byte(Words a, int at) {
    const __m256i sign_twice = _mm256_srai_epi32(_mm256_slli_epi32(a, 24 - at), 1);
    const __m256i half = _mm256_srli_epi32(_mm256_and_si256(sign_twice, _mm256_set1_epi32(int(0xbf800000))), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(half, half), 0x08);
    return _mm256_cvtph_ps(_mm256_castsi256_si128(packed));
}

#else

// ---------------------------------------------------------------------------- any machine: 4 lanes, the compiler's own

typedef float Vec __attribute__((vector_size(16)));
constexpr int W = 4;

template <class F>
inline Vec each(F f) {
    return Vec{f(0), f(1), f(2), f(3)};
}

inline Vec zero() { return Vec{0, 0, 0, 0}; }
inline Vec fill(float value) { return Vec{value, value, value, value}; }
inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__FP_FAST_FMAF) || defined(__ARM_FEATURE_FMA)
    return each([&](int i) { return __builtin_fmaf(a[i], b[i], c[i]); });
#else
    return a * b + c;
#endif
}
inline Vec maximum(Vec a, Vec b) {
    return each([&](int i) { return a[i] > b[i] ? a[i] : b[i]; });
}
inline Vec minimum(Vec a, Vec b) {
    return each([&](int i) { return a[i] < b[i] ? a[i] : b[i]; });
}
inline Vec square_root(Vec a) {
    return each([&](int i) { return std::sqrt(a[i]); });
}
inline float sum(Vec a) { return (a[0] + a[2]) + (a[1] + a[3]); }
inline void sums(Vec a, Vec b, Vec c, Vec d, float* out) {
    out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
}
inline Vec between(int first, int end, Vec a, Vec b) {
    return each([&](int i) { return i >= first && i < end ? a[i] : b[i]; });
}
inline float largest(Vec a) { return std::fmax(std::fmax(a[0], a[1]), std::fmax(a[2], a[3])); }
inline Vec nearest(Vec a) {
    return each([&](int i) { return std::nearbyint(a[i]); });
}
inline Vec times_power_of_two(Vec a, Vec n) {
    return each([&](int i) {
        const int whole = int(n[i]), half = whole >> 1;
        return a[i] * bits_to_float(uint32_t(half + 127) << 23) * bits_to_float(uint32_t(whole - half + 127) << 23);
    });
}

template <class T>
inline Vec load(const T* p) {
    return each([&](int i) { return widen(p[i]); });
}
template <class T>
inline void store(T* p, Vec a) {
    for (int i = 0; i < W; ++i) p[i] = narrow<T>(a[i]);
}

typedef uint32_t Words __attribute__((vector_size(16)));
struct Table16 {
    explicit Table16(const float* entries) { std::memcpy(this->entries, entries, sizeof(this->entries)); }
    float entries[16];
};
inline Words load_words(const uint32_t* p) {
    Words words;
    std::memcpy(&words, p, sizeof(words));
    return words;
}
inline Words shift_right(Words a, int bits) { return a >> uint32_t(bits); }
inline Vec lookup(const Table16& table, Words a) {
    return each([&](int i) { return table.entries[a[i] & 15]; });
}
inline Vec signed_byte(Words a, int at) {
    return each([&](int i) { return float(int32_t(a[i] >> at << 24)); });
}
inline Vec float8_byte(Words a, int at) {
    return each([&](int i) {
        const uint32_t byte = a[i] >> at;
        return widen(f16{uint16_t((byte & 0x80) << 8 | (byte & 0x7f) << 7)});
    });
}

#endif

// -------------------------------------------------------------------------------------------- built on the ones above

// The first n < W lanes; the others are zero.
template <class T>
inline Vec load_some(const T* p, int n) {
    float lanes[W] = {};
    for (int i = 0; i < n; ++i) lanes[i] = widen(p[i]);
    return load(lanes);
}

template <class T>
inline void store_some(T* p, Vec a, int n) {
    T lanes[W];
    store(lanes, a);
    std::memcpy(p, lanes, n * sizeof(T));
}

// out[i] = f(in[i], i) over [0, n), W lanes at a time; the last step is shortened.
template <class In, class Out, class F>
inline void map(const In* in, Out* out, int64_t n, F f) {
    int64_t i = 0;
    for (; i + W <= n; i += W) store(out + i, f(load(in + i), i));
    if (i < n) store_some(out + i, f(load_some(in + i, int(n - i)), i), int(n - i));
}

// e^x to 2 units in the last place, saturating at -87.3 and 88.7. The bound comes first in `minimum` and `maximum`
// because x86 returns the second operand where either is NaN: NaN stays NaN.
inline Vec exponential(Vec x) {
    const Vec clamped = minimum(fill(88.72f), maximum(fill(-87.33f), x));
    const Vec n = nearest(clamped * fill(1.44269504088896341f));
    Vec r = fma(n, fill(-0.693359375f), clamped);  // ln 2 in two parts, so that n·ln 2 is exact
    r = fma(n, fill(2.12194440e-4f), r);
    Vec p = fill(1.9875691500e-4f);  // minimax polynomial of e^r on ±ln 2 / 2 (Cephes expf)
    p = fma(p, r, fill(1.3981999507e-3f));
    p = fma(p, r, fill(8.3334519073e-3f));
    p = fma(p, r, fill(4.1665795894e-2f));
    p = fma(p, r, fill(1.6666665459e-1f));
    p = fma(p, r, fill(5.0000001201e-1f));
    p = fma(p, r * r, r) + fill(1.0f);
    return times_power_of_two(p, n);
}

inline Vec hyperbolic_tangent(Vec x) {
    const Vec e = exponential(minimum(fill(40.0f), x + x));  // tanh is 1 in float32 long before 20
    return (e - fill(1.0f)) / (e + fill(1.0f));
}

#if defined(__AVX512BF16__)
// Pairs of bfloat16, the second of each pair in the upper half of its lane. Both are exact in bfloat16.
inline __m512bh pair_up(Vec first, Vec second) {
    const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(first), 16);
    return reinterpret_cast<__m512bh>(_mm512_or_si512(low, _mm512_castps_si512(second)));
}

// The first (0) or the second (1) of each pair.
inline Vec half_of(__m512bh pairs, int which) {
    const __m512i bits = reinterpret_cast<__m512i>(pairs);
    return _mm512_castsi512_ps(which ? _mm512_and_si512(bits, _mm512_set1_epi32(int(0xffff0000)))
                                     : _mm512_slli_epi32(bits, 16));
}

constexpr bool HAS_BF16_DOT = true;
#else
constexpr bool HAS_BF16_DOT = false;
#endif

}  // namespace loraplex
