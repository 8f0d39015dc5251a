// Products of a few rows with a panel, by whichever inner loop is the fastest: AMX tiles where the library is compiled
// for them and the operands are bfloat16, else vectors.
//
// A tile of 16 rows and 16 columns takes 16 pairs of inputs at once, so inputs are padded with zeros to whole tiles.
// It sums the products of each element in an order of its own, the same for any number of rows.
#pragma once

#include <algorithm>
#include <optional>

#include "context.h"
#include "multiply.h"

namespace loraplex {

#if defined(__AMX_BF16__)
template <class X>
constexpr bool USES_TILES = std::is_same_v<X, bf16>;
#else
template <class X>
constexpr bool USES_TILES = false;
#endif

constexpr int TILE_ROWS = 16;
constexpr int TILE_STEPS = 16;

// Many rows as pairs of tiles read them: [blocks of 32 rows][32 inputs at a time][32][32], each tile without a gap.
constexpr int64_t TILED_ROWS = 2 * TILE_ROWS;
constexpr int64_t TILED_INPUTS = 2 * TILE_STEPS;

// x: `rows` rows of `width` inputs, a multiple of TILED_INPUTS. A block of the result begins `width` elements a row
// after the first, and its inputs from i on, a multiple of TILED_INPUTS, i · TILED_ROWS after that. Past the last row
// are zeros.
template <class X>
Rows<X> tile_rows(Pool& pool, const Rows<X>& x, int64_t rows, int64_t width, Scratch& scratch) {
    X* const to = scratch.get<X>(round_up(rows, TILED_ROWS) * width);
    pool.run(ceil_div(rows, TILED_ROWS), [&](int64_t block) {
        for (int64_t r = 0; r < TILED_ROWS; ++r) {
            const int64_t row = block * TILED_ROWS + r;
            X* line = to + block * TILED_ROWS * width + r * TILED_INPUTS;
            for (int64_t i = 0; i < width; i += TILED_INPUTS, line += TILED_ROWS * TILED_INPUTS) {
                if (row < rows)
                    std::memcpy(line, x.data + row * x.stride + i, TILED_INPUTS * sizeof(X));
                else
                    std::fill_n(line, TILED_INPUTS, X{});
            }
        }
    });
    return {to, width};
}

// What the number of steps of a panel has to be a multiple of.
template <class X>
constexpr int STEPS_AT_ONCE = USES_TILES<X> ? TILE_STEPS : 1;

#if defined(__AMX_BF16__)

// The tiles of this thread, for blocks of `rows` rows or, if there are more, of 16: 0 … 3 are sums, 4 and 5 hold x, 6
// and 7 (and 5) the panel.
class TileScope {
  public:
    explicit TileScope(int64_t rows) {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        const auto x_rows = uint8_t(std::clamp<int64_t>(rows, 1, TILE_ROWS));
        for (int tile = 0; tile < 8; ++tile) {
            config.row_bytes[tile] = 64;
            config.rows[tile] = tile < 5 ? x_rows : TILE_ROWS;
        }
        _tile_loadconfig(&config);
        _mm_setcsr(before_ | DENORMALS_ARE_ZERO);
    }
    ~TileScope() {
        _mm_setcsr(before_);
        _tile_release();
    }
    TileScope(const TileScope&) = delete;

  private:
    // In what is read and in results. Tiles have it so whatever is set: vectors that do a tile's work follow.
    static constexpr unsigned DENORMALS_ARE_ZERO = 0x8040;
    const unsigned before_ = _mm_getcsr();
};

// One block of rows times VECTORS neighbouring vectors: `zero_tiles`, `add_tiles` for every TILE_STEPS steps,
// `store_tiles`.
template <int VECTORS>
inline void zero_tiles() {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (VECTORS == 4) {
        _tile_zero(2);
        _tile_zero(3);
    }
}

template <int VECTORS>
inline void add_tiles(const bf16* x, int64_t x_stride, const bf16* const* at, int64_t offset, int64_t stride) {
    const int64_t x_bytes = x_stride * int64_t(sizeof(bf16)), w_bytes = stride * int64_t(sizeof(bf16));
    _tile_loadd(4, x, x_bytes);
    _tile_loadd(6, at[0] + offset, w_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, at[1] + offset, w_bytes);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (VECTORS == 4) {
        _tile_loadd(5, at[2] + offset, w_bytes);
        _tile_dpbf16ps(2, 4, 5);
        _tile_loadd(6, at[3] + offset, w_bytes);
        _tile_dpbf16ps(3, 4, 6);
    }
}

template <int VECTORS>
inline void store_tiles(float* sums, int64_t sums_stride) {
    const int64_t sums_bytes = sums_stride * int64_t(sizeof(float));
    _tile_stored(0, sums, sums_bytes);
    _tile_stored(1, sums + W, sums_bytes);
    if constexpr (VECTORS == 4) {
        _tile_stored(2, sums + 2 * W, sums_bytes);
        _tile_stored(3, sums + 3 * W, sums_bytes);
    }
}

// sums[16][VECTORS · 16] = one block of rows of x times VECTORS neighbouring vectors of a panel.
template <int VECTORS>
void multiply_tiles(const bf16* x, int64_t x_stride, const Columns<bf16>& w, int64_t first_vector, float* sums,
                    int64_t sums_stride) {
    const bf16* const* at = w.vectors + first_vector;
    zero_tiles<VECTORS>();
    for (int64_t step = 0; step < w.steps; step += TILE_STEPS) {
        const int64_t offset = step * w.stride;
        if (w.ahead)
            for (int s = 0; s < TILE_STEPS; ++s)
                for (int v = 0; v < VECTORS; ++v)
                    __builtin_prefetch(reinterpret_cast<const char*>(at[v] + offset + s * w.stride) + w.ahead);
        add_tiles<VECTORS>(x + 2 * step, x_stride, at, offset, w.stride);
    }
    store_tiles<VECTORS>(sums, sums_stride);
}

// The same for two blocks of 16 rows and two vectors: half as many loads for a product. `x_step`: from the inputs of
// one tile to the next. `ahead`: nobody has read w yet. `meanwhile` is called while each four products are computed.
template <class F>
inline void multiply_tile_pairs(const bf16* x, const bf16* next_x, int64_t x_stride, int64_t x_step,
                                const Columns<bf16>& w, int64_t first_vector, bool ahead, float* sums, float* next_sums,
                                int64_t sums_stride, F meanwhile) {
    const int64_t x_bytes = x_stride * int64_t(sizeof(bf16)), w_bytes = w.stride * int64_t(sizeof(bf16));
    const bf16* const* at = w.vectors + first_vector;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < w.steps; step += TILE_STEPS, x += x_step, next_x += x_step) {
        const int64_t offset = step * w.stride;
        if (ahead)
            for (int s = 0; s < TILE_STEPS; ++s)
                for (int v = 0; v < 2; ++v)
                    __builtin_prefetch(reinterpret_cast<const char*>(at[v] + offset + s * w.stride) + w.ahead);
        _tile_loadd(4, x, x_bytes);
        _tile_loadd(6, at[0] + offset, w_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, at[1] + offset, w_bytes);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, next_x, x_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        meanwhile();
    }
    const int64_t sums_bytes = sums_stride * int64_t(sizeof(float));
    _tile_stored(0, sums, sums_bytes);
    _tile_stored(1, sums + W, sums_bytes);
    _tile_stored(2, next_sums, sums_bytes);
    _tile_stored(3, next_sums + W, sums_bytes);
}

// As below, for rows of bfloat16 within the scope of their tiles.
template <int VECTORS, class F>
void multiply_rows_by_tiles(const Rows<bf16>& x, int64_t rows, const Columns<bf16>& w, F f) {
    constexpr int WIDTH = VECTORS * W;
    alignas(64) float sums[2 * TILE_ROWS * WIDTH];
    float* next_sums = sums + TILE_ROWS * WIDTH;
    // The last block begins early enough to be whole: what it computes a second time is the same, and left out.
    const auto begin = [&](int64_t first) {
        return std::max<int64_t>(0, std::min(first, rows - TILE_ROWS));
    };
    int64_t first = 0;
    for (; rows - first > TILE_ROWS; first += 2 * TILE_ROWS) {
        const int64_t next = begin(first + TILE_ROWS), skipped = first + TILE_ROWS - next;
        for (int v = 0; v < VECTORS; v += 2)
            multiply_tile_pairs(x.data + first * x.stride, x.data + next * x.stride, x.stride, 2 * TILE_STEPS, w, v,
                                first == 0 && w.ahead, sums + v * W, next_sums + v * W, WIDTH, [] {});
        f(first, TILE_ROWS, sums);
        f(first + TILE_ROWS, int(TILE_ROWS - skipped), next_sums + skipped * WIDTH);
    }
    if (first >= rows) return;
    const int64_t last = begin(first), skipped = first - last;
    for (int v = 0; v < VECTORS; v += std::min(4, VECTORS))
        multiply_tiles<std::min(4, VECTORS)>(x.data + last * x.stride, x.stride, w, v, sums + v * W, WIDTH);
    f(first, int(rows - first), sums + skipped * WIDTH);
}

#endif

// Where `multiply_rows` is called for up to `rows` rows at a time, if X is what is multiplied.
template <class X>
struct RowsScope {
#if defined(__AMX_BF16__)
    explicit RowsScope(int64_t rows) {
        if (USES_TILES<X>) tiles.emplace(rows);
    }
    std::optional<TileScope> tiles;
#else
    explicit RowsScope(int64_t) {}
#endif
};

// f(first, count, sums) for a few rows after the other: sums[count][VECTORS · W] are their products with the columns.
template <int VECTORS, class X, class C, class F>
void multiply_rows(const Rows<X>& x, int64_t rows, const C& w, F f) {
#if defined(__AMX_BF16__)
    if constexpr (USES_TILES<X>) return multiply_rows_by_tiles<VECTORS>(x, rows, w, f);
#endif
    for_row_blocks(rows, [&](int64_t first, int count) {
        alignas(64) float sums[ROWS_AT_ONCE * VECTORS * W];
        multiply(count, x.data + first * x.stride, x.stride, w, VECTORS, sums, VECTORS * W, false);
        f(first, count, sums);
    });
}

}  // namespace loraplex
