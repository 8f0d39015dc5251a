// Dense linear layers: weights packed once into panels of 32 outputs, each a contiguous stream.
#pragma once

#include <vector>

#include "context.h"
#include "tiles.h"

namespace loraplex {

// A matrix as it is stored.
template <class T>
struct WeightRows {
    const T* data;
    int64_t rows;
};

template <class T>
class Linear {
  public:
    // weights: matrices of c columns, one above the other. bias: of all their rows, or null. Copies both.
    Linear(Context& context, int64_t c, const std::vector<WeightRows<T>>& weights, const T* bias);

    // x: [rows, c] → y: [rows, n]
    void apply(Context& context, const T* x, T* y, int64_t rows) const;

    // The rows of x that are sorted by expert: [starts[e], starts[e + 1]) → y = experts[e] of these. One region for
    // all.
    static void apply_group(Context& context, const Linear* const* experts, int64_t count, const int64_t* starts,
                            const T* x, T* y);

    // Rows first … last - 1 of the weight → out: [last - first, c]
    void unpack(int64_t first, int64_t last, float* out) const;

    int64_t bytes() const { return int64_t(weights_.bytes() + bias_.bytes()); }

  private:
    using X = typename Operand<T>::Type;
    static constexpr int PAIR = Operand<T>::pair;

    // Rows that stay in a core's second cache beside a panel, and panels that are worth a trip to the chunk counter.
    int64_t rows_at_once(int64_t stride) const;
    int64_t panels_at_once() const;
    void pack(const T* const* rows, int64_t count, T* to) const;
    void panel(const Rows<X>& x, T* y, int64_t first, int64_t rows, int64_t panel) const;

    int64_t n_, c_, steps_;
    Array<T> weights_;    // [panels, steps, PANEL, PAIR]
    Array<float> bias_;  // [panels, PANEL]
};

// x as the inner loop wants it: itself where it already is, else a copy, padded with zeros to `width`.
template <class T>
Rows<typename Operand<T>::Type> prepare(Context& context, const T* x, int64_t rows, int64_t c, int64_t width) {
    using X = typename Operand<T>::Type;
    if constexpr (std::is_same_v<T, X>) {
        if (c == width) return {x, c};
    }
    X* copy = context.inputs.get<X>(rows * width);
    const int64_t rows_per_chunk = std::max<int64_t>(1, 32768 / width);
    context.pool.run(ceil_div(rows, rows_per_chunk), [&](int64_t chunk) {
        const int64_t end = std::min(rows, (chunk + 1) * rows_per_chunk);
        for (int64_t r = chunk * rows_per_chunk; r < end; ++r) {
            if constexpr (std::is_same_v<T, X>)
                std::memcpy(copy + r * width, x + r * c, c * sizeof(T));
            else
                map(x + r * c, copy + r * width, c, [](Vec a, int64_t) { return a; });
            std::memset(static_cast<void*>(copy + r * width + c), 0, (width - c) * sizeof(X));
        }
    });
    return {copy, width};
}

}  // namespace loraplex
