// `multiply` for attention: few or many rows by a matrix that is found piece by piece, in AMX tiles where the library
// is compiled for them, else in vectors. A tile's order of additions is its own and the same for any number of rows.
#pragma once

#include "tiles.h"

namespace loraplex {

// A matrix as `Columns` has it, but found piece by piece: `vectors[p * count + i]` is where columns i·W … of piece p
// begin.
template <class T>
struct Pieces {
    const T* const* vectors;
    int64_t count;
    int64_t stride;
    int64_t piece_steps;
    const int64_t* ahead;  // of each piece, bytes from what is read to what is prefetched; 0: nothing
    int64_t steps;         // of all pieces

    template <int VECTORS, class X>
    class Reader {
      public:
        static constexpr int STEPS = 1;

        Reader(const Pieces& pieces, int64_t first_vector) : pieces_(pieces), vectors_(pieces.vectors + first_vector) {}

        [[gnu::always_inline]] void fetch(int64_t step) {
            if (step == next_begin_) {
                for (int v = 0; v < VECTORS; ++v) at_[v] = vectors_[next_ * pieces_.count + v];
                ahead_ = pieces_.ahead[next_++];
                next_begin_ += pieces_.piece_steps;
            } else {
                for (int v = 0; v < VECTORS; ++v) at_[v] += pieces_.stride;
            }
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v += VECTORS_PER_LINE<X, T>)
                __builtin_prefetch(reinterpret_cast<const char*>(at_[v]) + ahead_);
        }

        [[gnu::always_inline]] void weights(int, Weights<X> (&out)[VECTORS]) const {
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) out[v] = load_weights<X>(at_[v]);
        }

      private:
        const Pieces& pieces_;
        const T* const* vectors_;
        const T* at_[VECTORS];
        int64_t ahead_ = 0;
        int64_t next_ = 0, next_begin_ = 0;  // the piece to come, and its first step
    };
};

// How many rows at once.
template <class X>
constexpr int MAX_PIECE_ROWS = USES_TILES<X> ? 2 * TILE_ROWS : ROWS_AT_ONCE;

#if defined(__AMX_BF16__)

constexpr int TILE_COLUMNS = 16;

// What `ldtilecfg` reads. Tiles 0 … 3 are sums (0 and 1 of the first 16 rows), 4 and 5 rows of x, 6 and 7 columns of w.
struct alignas(64) TileShapes {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    TileShapes(int num_rows, int steps) {
        const int first = std::min(num_rows, TILE_ROWS), second = num_rows - first;
        for (int tile : {0, 1}) set(tile, first, TILE_COLUMNS * 4);
        set(4, first, steps * 4);
        for (int tile : {6, 7}) set(tile, steps, TILE_COLUMNS * 4);
        if (!second) return;
        for (int tile : {2, 3}) set(tile, second, TILE_COLUMNS * 4);
        set(5, second, steps * 4);
    }
    void set(int tile, int num_rows, int bytes) {
        rows[tile] = uint8_t(num_rows);
        row_bytes[tile] = uint16_t(bytes);
    }
};

// How many steps a tile has: all of a short sum, else whole tiles or halves.
inline int64_t tile_steps(int64_t steps) {
    if (steps <= TILE_STEPS) return steps;
    return steps % TILE_STEPS ? TILE_STEPS / 2 : TILE_STEPS;
}

// Two vectors of columns (or one) and up to 32 rows (or 16).
template <bool TWO_ROWS, bool TWO_COLUMNS>
void multiply_tile_block(const bf16* x, int64_t x_stride, const Pieces<bf16>& w, int64_t vector, float* out,
                         int64_t out_stride, bool accumulate) {
    const int64_t x_bytes = x_stride * 2, w_bytes = w.stride * 2, out_bytes = out_stride * 4;
    float* const out2 = out + TILE_ROWS * out_stride;
    const bf16* x2 = x + TILE_ROWS * x_stride;
    if (accumulate) {
        _tile_loadd(0, out, out_bytes);
        if constexpr (TWO_COLUMNS) _tile_loadd(1, out + TILE_COLUMNS, out_bytes);
        if constexpr (TWO_ROWS) _tile_loadd(2, out2, out_bytes);
        if constexpr (TWO_ROWS && TWO_COLUMNS) _tile_loadd(3, out2 + TILE_COLUMNS, out_bytes);
    } else {
        _tile_zero(0);
        if constexpr (TWO_COLUMNS) _tile_zero(1);
        if constexpr (TWO_ROWS) _tile_zero(2);
        if constexpr (TWO_ROWS && TWO_COLUMNS) _tile_zero(3);
    }
    const int64_t at_once = tile_steps(w.piece_steps), next = at_once * w.stride;
    for (int64_t piece = 0; piece * w.piece_steps < w.steps; ++piece) {
        const bf16* first = w.vectors[piece * w.count + vector];
        const bf16* second = w.vectors[piece * w.count + vector + TWO_COLUMNS];
        const int64_t ahead = w.ahead[piece];
        for (int64_t s = 0; s < w.piece_steps; s += at_once, first += next, second += next) {
            if (ahead)
                for (int64_t i = 0; i < at_once; ++i) {
                    __builtin_prefetch(reinterpret_cast<const char*>(first + i * w.stride) + ahead);
                    if constexpr (TWO_COLUMNS)
                        __builtin_prefetch(reinterpret_cast<const char*>(second + i * w.stride) + ahead);
                }
            _tile_loadd(4, x, x_bytes);
            _tile_loadd(6, first, w_bytes);
            _tile_dpbf16ps(0, 4, 6);
            if constexpr (TWO_COLUMNS) {
                _tile_loadd(7, second, w_bytes);
                _tile_dpbf16ps(1, 4, 7);
            }
            if constexpr (TWO_ROWS) {
                _tile_loadd(5, x2, x_bytes);
                _tile_dpbf16ps(2, 5, 6);
                if constexpr (TWO_COLUMNS) _tile_dpbf16ps(3, 5, 7);
            }
            x += 2 * at_once;
            x2 += 2 * at_once;
        }
    }
    _tile_stored(0, out, out_bytes);
    if constexpr (TWO_COLUMNS) _tile_stored(1, out + TILE_COLUMNS, out_bytes);
    if constexpr (TWO_ROWS) _tile_stored(2, out2, out_bytes);
    if constexpr (TWO_ROWS && TWO_COLUMNS) _tile_stored(3, out2 + TILE_COLUMNS, out_bytes);
}

// rows: 1 … 32; steps of a piece at most 16, or a multiple of 8.
inline void multiply_pieces_by_tiles(int rows, const bf16* x, int64_t x_stride, const Pieces<bf16>& w, int64_t vectors,
                                     float* out, int64_t out_stride, bool accumulate) {
    const TileShapes shapes(rows, int(tile_steps(w.piece_steps)));
    _tile_loadconfig(&shapes);
    const auto blocks = [&](auto two_rows) {
        constexpr bool TWO_ROWS = decltype(two_rows)::value;
        int64_t v = 0;
        for (; v + 2 <= vectors; v += 2)
            multiply_tile_block<TWO_ROWS, true>(x, x_stride, w, v, out + v * TILE_COLUMNS, out_stride, accumulate);
        if (v < vectors)
            multiply_tile_block<TWO_ROWS, false>(x, x_stride, w, v, out + v * TILE_COLUMNS, out_stride, accumulate);
    };
    rows > TILE_ROWS ? blocks(std::true_type{}) : blocks(std::false_type{});
    _tile_release();
}

#endif

template <class T>
Pieces<T> as_pieces(const Columns<T>& w) {
    return {w.vectors, 0, w.stride, w.steps, &w.ahead, w.steps};
}
template <class T>
const Pieces<T>& as_pieces(const Pieces<T>& w) {
    return w;
}

// As `multiply`, for 1 … MAX_PIECE_ROWS rows.
template <class X, template <class> class C, class T>
void multiply_pieces(int rows, const X* x, int64_t x_stride, const C<T>& w, int64_t vectors, float* out,
                     int64_t out_stride, bool accumulate) {
#if defined(__AMX_BF16__)
    if constexpr (USES_TILES<X>)
        return multiply_pieces_by_tiles(rows, x, x_stride, as_pieces(w), vectors, out, out_stride, accumulate);
#endif
    multiply(rows, x, x_stride, w, vectors, out, out_stride, accumulate);
}

// f(first, count) over [0, rows) in blocks of at most MAX_PIECE_ROWS rows: whole tiles where there are any.
template <class X, class F>
void for_piece_rows(int64_t rows, F f) {
    if constexpr (!USES_TILES<X>) return for_row_blocks(rows, f);
    constexpr int64_t AT_ONCE = MAX_PIECE_ROWS<X>;
    for (int64_t first = 0; first < rows; first += AT_ONCE) f(first, int(std::min(AT_ONCE, rows - first)));
}

}  // namespace loraplex
