#include "linear.h"

#include <algorithm>

#include "transpose.h"

namespace loraplex {

namespace {

constexpr int64_t X_BLOCK_BYTES = 384 << 10;  // rows of x that stay in a core's second cache beside a panel
constexpr int64_t CHUNK_BYTES = 64 << 10;     // weights worth a trip to the chunk counter
// Bytes: what a few rows compute on in the time of one memory access. No multiple of 4 KiB, which would be fetched into
// the very sets of the first cache that hold what is read now.
constexpr int64_t AHEAD = 5 << 10;

}  // namespace

template <class T>
Linear<T>::Linear(Context& context, int64_t c, const std::vector<WeightRows<T>>& weights, const T* bias)
    : n_(0), c_(c), steps_(round_up(ceil_div(c, PAIR), STEPS_AT_ONCE<X>)) {
    std::vector<const T*> rows;
    for (const WeightRows<T>& weight : weights)
        for (int64_t row = 0; row < weight.rows; ++row) rows.push_back(weight.data + row * c);
    n_ = int64_t(rows.size());
    const int64_t panels = ceil_div(n_, PANEL);
    weights_ = Array<T>(context.arena, panels * steps_ * PANEL * PAIR);
    context.pool.run(panels, [&](int64_t p) {
        pack(rows.data() + p * PANEL, std::min<int64_t>(PANEL, n_ - p * PANEL),
             weights_.data() + p * steps_ * PANEL * PAIR);
    });
    if (!bias) return;
    bias_ = Array<float>(context.arena, panels * PANEL);
    for (int64_t j = 0; j < panels * PANEL; ++j) bias_.data()[j] = j < n_ ? widen(bias[j]) : 0.0f;
}

// One panel of `count` rows, filled up with zeros.
template <class T>
void Linear<T>::pack(const T* const* rows, int64_t count, T* to) const {
    int64_t first = 0;
    if constexpr (sizeof(T) * PAIR == sizeof(uint32_t)) {
        const auto* words = reinterpret_cast<const uint32_t* const*>(rows);
        for (; count == PANEL && (first + TRANSPOSED) * PAIR <= c_; first += TRANSPOSED)
            for (int j = 0; j < PANEL; j += TRANSPOSED)
                transpose_words(words + j, first, reinterpret_cast<uint32_t*>(to) + first * PANEL + j, PANEL);
    }
    constexpr int64_t BLOCK = 16;  // steps: the block read and the block written both stay in the first cache
    for (; first < steps_; first += BLOCK) {
        const int64_t last = std::min(steps_, first + BLOCK);
        for (int64_t j = 0; j < PANEL; ++j)
            for (int64_t s = first; s < last; ++s)
                for (int64_t i = 0; i < PAIR; ++i) {
                    const int64_t k = s * PAIR + i;
                    to[(s * PANEL + j) * PAIR + i] = j < count && k < c_ ? rows[j][k] : T{};
                }
    }
}

template <class T>
void Linear<T>::panel(const Rows<X>& x, T* y, int64_t first, int64_t rows, int64_t panel) const {
    const T* weights = weights_.data() + panel * steps_ * PANEL * PAIR;
    const int64_t column = panel * PANEL;
    const int64_t columns = std::min<int64_t>(PANEL, n_ - column);
    const auto vectors = panel_vectors<X>(weights);
    const Columns<T> w{vectors.data(), PANEL * PAIR, steps_, AHEAD};
    const Rows<X> inputs{x.data + first * x.stride, x.stride};
    multiply_rows<PANEL / W>(inputs, rows, w, [&](int64_t begin, int count, const float* sums) {
        for (int r = 0; r < count; ++r) {
            T* out = y + (first + begin + r) * n_ + column;
            if (bias_.size()) {
                const float* bias = bias_.data() + column;
                map(sums + r * PANEL, out, columns, [&](Vec a, int64_t j) { return a + load(bias + j); });
            } else {
                map(sums + r * PANEL, out, columns, [](Vec a, int64_t) { return a; });
            }
        }
    });
}

template <class T>
void Linear<T>::unpack(int64_t first, int64_t last, float* out) const {
    for (int64_t row = first; row < last; ++row) {
        const T* from = weights_.data() + (row / PANEL * steps_ * PANEL + row % PANEL) * PAIR;
        for (int64_t k = 0; k < c_; ++k) *out++ = widen(from[k / PAIR * PANEL * PAIR + k % PAIR]);
    }
}

template <class T>
int64_t Linear<T>::rows_at_once(int64_t stride) const {
    return std::max<int64_t>(4 * ROWS_AT_ONCE, X_BLOCK_BYTES / (stride * int64_t(sizeof(X))));
}

template <class T>
int64_t Linear<T>::panels_at_once() const {
    return std::max<int64_t>(1, CHUNK_BYTES / (steps_ * PANEL * PAIR * int64_t(sizeof(T))));
}

template <class T>
void Linear<T>::apply(Context& context, const T* x, T* y, int64_t rows) const {
    const Rows<X> input = prepare(context, x, rows, c_, steps_ * PAIR);
    const int64_t panels = ceil_div(n_, PANEL), group = panels_at_once();
    const int64_t block = rows_at_once(input.stride);
    const int64_t blocks = ceil_div(rows, block);
    const int64_t groups = ceil_div(panels, group);
    context.pool.run(blocks * groups, [&](int64_t chunk) {
        const int64_t first = chunk / groups * block;
        const int64_t begin = chunk % groups * group;
        const RowsScope<X> scope(std::min(block, rows - first));
        for (int64_t p = begin; p < std::min(panels, begin + group); ++p)
            panel(input, y, first, std::min(block, rows - first), p);
    });
}

template <class T>
void Linear<T>::apply_group(Context& context, const Linear* const* experts, int64_t count, const int64_t* starts,
                            const T* x, T* y) {
    const Linear& shape = *experts[0];
    const Rows<X> input = prepare(context, x, starts[count], shape.c_, shape.steps_ * PAIR);
    const int64_t panels = ceil_div(shape.n_, PANEL), group = shape.panels_at_once();
    const int64_t block = shape.rows_at_once(input.stride);
    struct Piece {
        const Linear* expert;
        int64_t first, rows, begin;  // of rows and of panels
    };
    // Reused from step to step by the thread that steps; the workers only read it.
    static thread_local std::vector<Piece> pieces;
    pieces.clear();
    for (int64_t e = 0; e < count; ++e)
        for (int64_t first = starts[e]; first < starts[e + 1]; first += block)
            for (int64_t begin = 0; begin < panels; begin += group)
                pieces.push_back({experts[e], first, std::min(block, starts[e + 1] - first), begin});
    context.pool.run(int64_t(pieces.size()), [&, list = pieces.data()](int64_t i) {
        const Piece& piece = list[i];
        const RowsScope<X> scope(piece.rows);
        for (int64_t p = piece.begin; p < std::min(panels, piece.begin + group); ++p)
            piece.expert->panel(input, y, piece.first, piece.rows, p);
    });
}

template class Linear<float>;
template class Linear<bf16>;
template class Linear<f16>;

}  // namespace loraplex
