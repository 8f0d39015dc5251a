// Codes of quantised weights, packed once: what the inner loop reads instead of a dense matrix.
//
// A panel has 64 columns; its unit is two neighbouring inputs of all of them. Word n of 16 holds column n, n + 16, … in
// fields of BITS from bit 0 up for the first input, and from bit 16 up for the second:
//
//     4 bits:  word n = columns n, n+16, n+32, n+48 of input k | the same of input k+1
//     8 bits:  word n = columns n, n+16 of k | of k+1; word 16+n = columns n+32, n+48
//
// so that one shift and one look-up make a vector of neighbouring columns, with any width of vector, both as float32
// and as pairs of bfloat16.
#pragma once

#include "multiply.h"

namespace loraplex {

constexpr int CODE_PANEL = 64;
constexpr int CODE_VECTORS = CODE_PANEL / W;
constexpr int WORDS = 16;  // that hold neighbouring columns

// 16 values of any kind: integers of up to 4 bits, nf4, fp4.
struct TableCodec {
    static constexpr int BITS = 4;
    static constexpr float FACTOR = 1.0f;  // what it makes of codes, times this, are the values

    explicit TableCodec(const float* entries) : table(entries) {
#if defined(__AVX512BF16__)
        const __m256i half = to_bf16(load(entries));
        pairs = _mm512_inserti64x4(_mm512_castsi256_si512(half), half, 1);
#endif
    }

    Vec decode(Words words, int at) const { return lookup(table, shift_right(words, at)); }

    Table16 table;
#if defined(__AVX512BF16__)
    // A look-up takes 5 bits of each half of a word: twice the 16 values, and the fifth bit does not matter.
    __m512bh decode_pair(Words words, int at) const {
        const __m512i fields = _mm512_srli_epi16(words, unsigned(at));
        return reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(fields, pairs));
    }

    __m512i pairs;
#endif
};

// Numbers from -128 to 127, times 2^24: so a byte need not be brought down from the top of its word.
struct SignedCodec {
    static constexpr int BITS = 8;
    static constexpr float FACTOR = 1.0f / (1 << 24);
    Vec decode(Words words, int at) const { return signed_byte(words, at); }
#if defined(__AVX512FP16__)
    // By way of float16, which takes a whole vector at once. Of a byte in the upper half of 16 bits its exponent is 23
    // to 30, unless it is zero: 1abcd in bits 14 to 10. Bfloat16 has 128 + 16 + abcd then, in bits 14 to 7.
    __m512bh decode_pair(Words words, int at) const {
        const __m512i top =
            at ? _mm512_and_si512(words, _mm512_set1_epi16(int16_t(0xff00))) : _mm512_slli_epi16(words, 8);
        const __m512i half = _mm512_castph_si512(_mm512_cvtepi16_ph(top));
        const __m512i low = _mm512_and_si512(_mm512_srli_epi16(half, 3), _mm512_set1_epi16(0x0fff));
        const __m512i high = _mm512_and_si512(half, _mm512_set1_epi16(int16_t(0xc000)));
        return reinterpret_cast<__m512bh>(_mm512_or_si512(high, low));
    }
#elif defined(__AVX512BF16__)
    __m512bh decode_pair(Words words, int at) const { return pair_up(decode(words, at), decode(words, at + 16)); }
#endif
};

// Float8 e4m3, divided by 256.
struct Float8Codec {
    static constexpr int BITS = 8;
    static constexpr float FACTOR = 256.0f;
    Vec decode(Words words, int at) const { return float8_byte(words, at); }
#if defined(__AVX512BF16__)
    __m512bh decode_pair(Words words, int at) const { return pair_up(decode(words, at), decode(words, at + 16)); }
#endif
};

template <class Codec>
constexpr int FIELDS = 16 / Codec::BITS;  // columns in a word
template <class Codec>
constexpr int UNIT_WORDS = CODE_PANEL / FIELDS<Codec>;

// A source of columns for `multiply`: a stretch of a panel's units, multiplied by x of type X.
template <class Codec, class X>
struct CodeColumns {
    const uint32_t* units;
    int64_t steps;
    int64_t ahead;  // bytes from what is read to what is prefetched
    const Codec& codec;

    template <int VECTORS, class>
    class Reader {
        static constexpr int PARTS = WORDS / W;  // vectors that share a field
        static constexpr int LOADS = std::min(PARTS, VECTORS);
        static constexpr int ROWS = std::max(1, VECTORS / PARTS / FIELDS<Codec>);  // of words

      public:
        static constexpr int STEPS = 2 / PAIR_OF<X>;

        Reader(const CodeColumns& columns, int64_t first_vector) : codec_(columns.codec), ahead_(columns.ahead) {
            const int64_t field = first_vector / PARTS;
            for (int p = 0; p < LOADS; ++p)
                at_[p] = columns.units + field / FIELDS<Codec> * WORDS + (first_vector + p) % PARTS * W;
            shift_ = VECTORS == CODE_VECTORS ? 0 : int(field % FIELDS<Codec>) * Codec::BITS;
        }

        [[gnu::always_inline]] void fetch(int64_t step) {
            const int64_t offset = step / STEPS * UNIT_WORDS<Codec>;
#pragma GCC unroll 2
            for (int i = 0; i < ROWS; ++i)
                __builtin_prefetch(reinterpret_cast<const char*>(at_[0] + offset + i * WORDS) + ahead_);
#pragma GCC unroll 4
            for (int p = 0; p < LOADS; ++p)
#pragma GCC unroll 2
                for (int i = 0; i < ROWS; ++i)
                    words_[i][p] = shift_right(load_words(at_[p] + offset + i * WORDS), shift_);
        }

        [[gnu::always_inline]] void weights(int i, Weights<X> (&out)[VECTORS]) const {
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) {
                const int field = v / PARTS;
                const Words words = words_[field / FIELDS<Codec>][v % PARTS];
                const int at = field % FIELDS<Codec> * Codec::BITS;
                if constexpr (PAIR_OF<X> == 1) out[v] = codec_.decode(words, at + 16 * i);
#if defined(__AVX512BF16__)
                else
                    out[v] = codec_.decode_pair(words, at);
#endif
            }
        }

      private:
        Codec codec_;
        const uint32_t* at_[LOADS];
        int64_t ahead_;
        int shift_;
        Words words_[ROWS][LOADS];
    };
};

// out: [steps, CODE_PANEL, pair]
template <class Codec, class X>
void unpack_codes(const CodeColumns<Codec, X>& columns, X* out) {
    constexpr int VECTORS = std::min(4, CODE_VECTORS);
    for (int first = 0; first < CODE_VECTORS; first += VECTORS) {
        typename CodeColumns<Codec, X>::template Reader<VECTORS, X> reader(columns, first);
        for (int64_t s = 0; s < columns.steps; s += reader.STEPS) {
            reader.fetch(s);
#pragma GCC unroll 2
            for (int i = 0; i < reader.STEPS; ++i) {
                Weights<X> weights[VECTORS];
                reader.weights(i, weights);
                X* to = out + ((s + i) * CODE_PANEL + first * W) * PAIR_OF<X>;
                for (int v = 0; v < VECTORS; ++v) std::memcpy(to + v * W * PAIR_OF<X>, &weights[v], sizeof(weights[v]));
            }
        }
    }
}

}  // namespace loraplex
