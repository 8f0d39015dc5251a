// Products of rows with groups of codes, and what takes them to the rows' totals.
#pragma once

#include "codes.h"
#include "tiles.h"

namespace loraplex {

// How many rows are multiplied by codes as they are unpacked. More are multiplied by what was unpacked for all of them.
template <class X>
constexpr int FEW_ROWS = USES_TILES<X> ? TILE_ROWS : ROWS_AT_ONCE;

// Takes the products of rows with one group to the rows' totals.
struct GroupFactors {
    alignas(64) float scale[CODE_PANEL];
    alignas(64) float offset[CODE_PANEL];
    const float* sums;  // of the group's inputs, by row; null: there are no offsets
    bool minima;

    // totals[r] += scale · (products + offset · sum), or scale · products + offset · sum with minima, for rows first …
    // end - 1 and some vectors of the panel. products: [end - first, stride], totals: [rows, CODE_PANEL]
    void add(const float* products, int64_t stride, int vector, int vectors, int64_t first, int64_t end,
             float* totals) const {
        for (int v = 0; v < vectors; v += 2) {
            const int64_t column = (vector + v) * W;
            if (!sums)
                add_pairs<false, false>(products + v * W, stride, column, first, end, totals + column);
            else if (minima)
                add_pairs<true, true>(products + v * W, stride, column, first, end, totals + column);
            else
                add_pairs<true, false>(products + v * W, stride, column, first, end, totals + column);
        }
    }

  private:
    // Of two neighbouring vectors: a row's sum is read once for both.
    template <bool OFFSETS, bool MINIMA>
    void add_pairs(const float* products, int64_t stride, int64_t column, int64_t first, int64_t end,
                   float* totals) const {
        const Vec scales[2] = {load(scale + column), load(scale + column + W)};
        Vec offsets[2];
        if (OFFSETS)
            for (int v = 0; v < 2; ++v) offsets[v] = load(offset + column + v * W);
        for (int64_t r = first; r < end; ++r, products += stride) {
            float* to = totals + r * CODE_PANEL;
            const Vec sum_of_inputs = OFFSETS ? fill(sums[r]) : zero();
#pragma GCC unroll 2
            for (int v = 0; v < 2; ++v) {
                Vec product = load(products + v * W), total = load(to + v * W);
                if (MINIMA)
                    total = fma(offsets[v], sum_of_inputs, total);
                else if (OFFSETS)
                    product = fma(offsets[v], sum_of_inputs, product);
                store(to + v * W, fma(scales[v], product, total));
            }
        }
    }
};

#if defined(__AMX_BF16__)

// Up to 16 rows times a group of codes → products[16][CODE_PANEL]. The next tiles are unpacked before these are
// multiplied, so that the core does both at once.
template <class Codec>
void multiply_codes_by_tiles(const Rows<bf16>& x, const CodeColumns<Codec, bf16>& codes, float* products) {
    constexpr int64_t STRIDE = CODE_PANEL * 2;
    alignas(64) bf16 unpacked[2][TILE_STEPS * STRIDE];
    const auto unpack_from = [&](int64_t step) {
        bf16* to = unpacked[step / TILE_STEPS % 2];
        const int64_t steps = std::min<int64_t>(TILE_STEPS, codes.steps - step);
        unpack_codes(CodeColumns<Codec, bf16>{codes.units + step * UNIT_WORDS<Codec>, steps, codes.ahead, codes.codec},
                     to);
        std::fill(to + steps * STRIDE, to + TILE_STEPS * STRIDE, bf16{});
    };
    zero_tiles<CODE_VECTORS>();
    unpack_from(0);
    for (int64_t step = 0; step < codes.steps; step += TILE_STEPS) {
        if (step + TILE_STEPS < codes.steps) unpack_from(step + TILE_STEPS);
        const bf16* from = unpacked[step / TILE_STEPS % 2];
        const bf16* const vectors[] = {from, from + 2 * W, from + 4 * W, from + 6 * W};
        add_tiles<CODE_VECTORS>(x.data + 2 * step, x.stride, vectors, 0, STRIDE);
    }
    store_tiles<CODE_VECTORS>(products, CODE_PANEL);
}

// The same products of one row with the inputs of one tile, to the last bit, by vectors: a tile sums those of the first
// inputs of its pairs and those of the second ones, and adds both sums. What it multiplies has to go through memory,
// which takes longer than the products of one row.
template <class Codec>
void multiply_codes_as_tile(const bf16* x, const CodeColumns<Codec, bf16>& codes, float* products) {
    typename CodeColumns<Codec, bf16>::template Reader<CODE_VECTORS, bf16> reader(codes, 0);
    Vec sums[2][CODE_VECTORS] = {};
    for (int64_t step = 0; step < codes.steps; ++step) {
        reader.fetch(step);
        __m512bh pairs[CODE_VECTORS];
        reader.weights(0, pairs);
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            const Vec spread = fill(widen(x[2 * step + i]));
#pragma GCC unroll 4
            for (int v = 0; v < CODE_VECTORS; ++v) sums[i][v] = fma(spread, half_of(pairs[v], i), sums[i][v]);
        }
    }
#pragma GCC unroll 4
    for (int v = 0; v < CODE_VECTORS; ++v) store(products + v * W, zero() + (sums[0][v] + sums[1][v]));
}

#endif

// products[rows][CODE_PANEL] = x times a group of codes, for 1 … FEW_ROWS rows.
template <class Codec, class X>
void multiply_few_codes(int rows, const Rows<X>& x, const CodeColumns<Codec, X>& codes, float* products) {
#if defined(__AMX_BF16__)
    if constexpr (USES_TILES<X>) {
        if (rows == 1 && codes.steps <= TILE_STEPS) return multiply_codes_as_tile(x.data, codes, products);
        return multiply_codes_by_tiles(x, codes, products);
    }
#endif
    multiply(rows, x.data, x.stride, codes, CODE_VECTORS, products, CODE_PANEL, false);
}

// Many rows times one unpacked group after the other, added to the rows' totals.
template <class X>
class Products {
  public:
    explicit Products(float* totals) : totals_(totals) {}

    // x: the inputs of this group
    void add(const Rows<X>& x, int64_t rows, const Columns<X>& w, const GroupFactors& factors) {
        for_row_blocks(rows, [&](int64_t first, int count) {
            multiply(count, x.data + first * x.stride, x.stride, w, CODE_VECTORS, products_, CODE_PANEL, false);
            factors.add(products_, CODE_PANEL, 0, CODE_VECTORS, first, first + count, totals_);
        });
    }
    void finish() {}

  private:
    float* totals_;
    alignas(64) float products_[ROWS_AT_ONCE * CODE_PANEL];
};

#if defined(__AMX_BF16__)
// By tiles, a block of rows times two vectors at a time. Products are added to their totals while the next ones are
// computed: else the vectors would wait for the tiles, and the tiles for the vectors.
template <>
class Products<bf16> {
  public:
    explicit Products(float* totals) : totals_(totals) {}

    // x: as `tile_rows` lays it out, the inputs of this group; `factors` has to last until the next call's end.
    void add(const Rows<bf16>& x, int64_t rows, const Columns<bf16>& w, const GroupFactors& factors) {
        constexpr int64_t INPUTS = TILED_INPUTS, ROWS = TILED_ROWS;
        const int64_t at_once = ceil_div(ROWS, w.steps / TILE_STEPS);
        for (int64_t r = 0; r < rows; r += ROWS)
            for (int v = 0; v < CODE_VECTORS; v += VECTORS) {
                const bf16* from = x.data + r * x.stride;
                float* to = products_[turn_ ^= 1];
                multiply_tile_pairs(from, from + TILE_ROWS * INPUTS, INPUTS, ROWS * INPUTS, w, v, false, to,
                                    to + TILE_ROWS * WIDTH, WIDTH, [&] { add_waiting(at_once); });
                waiting_ = {to, &factors, v, r, std::min(rows, r + ROWS)};
            }
    }
    void finish() { add_waiting(TILED_ROWS); }

  private:
    static constexpr int VECTORS = 2, WIDTH = VECTORS * W;

    void add_waiting(int64_t rows) {
        const int64_t end = std::min(waiting_.end, waiting_.next + rows);
        if (waiting_.next == end) return;
        waiting_.factors->add(waiting_.products, WIDTH, waiting_.vector, VECTORS, waiting_.next, end, totals_);
        waiting_.products += (end - waiting_.next) * WIDTH;
        waiting_.next = end;
    }

    struct {
        const float* products = nullptr;
        const GroupFactors* factors = nullptr;
        int vector = 0;
        int64_t next = 0, end = 0;  // rows
    } waiting_;
    float* totals_;
    int turn_ = 0;
    alignas(64) float products_[2][TILED_ROWS * WIDTH];
};
#endif

}  // namespace loraplex
