#include "integer_linear.h"

#include <algorithm>

namespace loraplex {

namespace {

constexpr int64_t X_BLOCK_BYTES = 384 << 10;  // rows of x that stay in a core's second cache beside a panel
constexpr int64_t CHUNK_BYTES = 64 << 10;     // weights worth a trip to the chunk counter
constexpr int64_t AHEAD = 5 << 10;            // as linear.cpp has it
constexpr float LOWEST = -128.0f, HIGHEST = 127.0f;

// The smallest and the largest number of a row and 0; NaN both if one is not finite.
struct Range {
    float low, high;
};

template <class T>
Range range_of(const T* x, int64_t n) {
    Vec low = zero(), high = zero(), invalid = zero();
    const auto add = [&](Vec a) {
        low = minimum(a, low);
        high = maximum(a, high);
        invalid = fma(a, zero(), invalid);
    };
    int64_t i = 0;
    for (; i + W <= n; i += W) add(load(x + i));
    if (i < n) add(load_some(x + i, int(n - i)));
    const float nan = sum(invalid);
    return {nan - largest(zero() - low), nan + largest(high)};
}

}  // namespace

template <class T>
IntegerLinear<T>::IntegerLinear(Context& context, const ByteMatrix& matrix, const T* bias)
    : n_(matrix.n), c_(matrix.c), steps_(round_up(ceil_div(c_, INPUTS), INTEGER_STEPS)), rounding_(matrix.rounding) {
    const int64_t panels = ceil_div(n_, PANEL);
    weights_ = Array<int8_t>(context.arena, panels * steps_ * STEP_BYTES);
    scale_ = Array<float>(context.arena, panels * PANEL);
    sums_ = Array<int32_t>(context.arena, panels * PANEL);
    if (bias) bias_ = Array<float>(context.arena, panels * PANEL);
    context.pool.run(panels, [&](int64_t p) {
        const int8_t* rows = matrix.weights + p * PANEL * c_;
        pack(rows, std::min<int64_t>(PANEL, n_ - p * PANEL), weights_.data() + p * steps_ * STEP_BYTES);
        for (int64_t j = p * PANEL; j < (p + 1) * PANEL; ++j) {
            int32_t total = 0;
            for (int64_t k = 0; j < n_ && k < c_; ++k) total += matrix.weights[j * c_ + k];
            sums_.data()[j] = total;
            scale_.data()[j] = j < n_ ? matrix.scale[j] : 0.0f;
            if (bias) bias_.data()[j] = j < n_ ? widen(bias[j]) : 0.0f;
        }
    });
}

// One panel of `count` rows, filled up with zeros.
template <class T>
void IntegerLinear<T>::pack(const int8_t* rows, int64_t count, int8_t* to) const {
    for (int64_t s = 0; s < steps_; ++s)
        for (int64_t j = 0; j < PANEL; ++j)
            for (int64_t k = s * INPUTS; k < (s + 1) * INPUTS; ++k)
                *to++ = j < count && k < c_ ? rows[j * c_ + k] : int8_t(0);
}

// codes: steps · INPUTS of them, the last ones 0 where x has ended.
template <class T>
void IntegerLinear<T>::round_row(const T* x, Code* codes, float& scale, int32_t& zero_code) const {
    const Range range = range_of(x, c_);
    const float invalid = range.high * 0.0f;
    float zero_point = 0.0f;
    switch (rounding_.kind) {
        case InputRounding::SYMMETRIC: scale = std::fmax(range.high, -range.low) / HIGHEST + invalid; break;
        case InputRounding::ASYMMETRIC: scale = (range.high - range.low) / (HIGHEST - LOWEST) + invalid; break;
        case InputRounding::GIVEN: scale = rounding_.scale + invalid; break;
    }
    const float divisor = scale > 0.0f ? scale : 1.0f;
    if (rounding_.kind == InputRounding::GIVEN) zero_point = rounding_.zero;
    if (rounding_.kind == InputRounding::ASYMMETRIC && scale > 0.0f)
        zero_point = std::nearbyint(std::fmin(HIGHEST, std::fmax(LOWEST, LOWEST - range.low / divisor)));
    std::memset(codes, 0, size_t(steps_ * INPUTS) * sizeof(Code));
    zero_code = scale > 0.0f ? int32_t(zero_point) + CODE_OFFSET : 0;
    if (!(scale > 0.0f)) return;  // all inputs are 0, or one is not finite: all results are 0, or NaN
    const auto rounded = [&](Vec a) {
        return minimum(fill(HIGHEST), maximum(fill(LOWEST), a / fill(divisor) + fill(zero_point)));
    };
    int64_t i = 0;
    for (; i + W <= c_; i += W) store_codes(codes + i, rounded(load(x + i)));
    if (i == c_) return;
    Code last[W];
    store_codes(last, rounded(load_some(x + i, int(c_ - i))));
    std::memcpy(codes + i, last, size_t(c_ - i) * sizeof(Code));
}

template <class T>
void IntegerLinear<T>::panel(const Input& x, T* y, int64_t first, int64_t rows, int64_t panel) const {
    const int64_t column = panel * PANEL;
    const int64_t columns = std::min<int64_t>(PANEL, n_ - column);
    const BytePanel weights{weights_.data() + panel * steps_ * STEP_BYTES, steps_, AHEAD};
    const CodeRows codes{x.codes.data + first * x.codes.stride, x.codes.stride};
    multiply_codes(codes, rows, weights, [&](int64_t begin, int count, const int32_t* sums) {
        for (int64_t r = first + begin; r < first + begin + count; ++r, sums += PANEL) {
            alignas(64) float results[PANEL];
            for (int j = 0; j < PANEL; j += W) {
                const Ints exact =
                    subtract_product(load_ints(sums + j), load_ints(sums_.data() + column + j), x.zero[r]);
                const Vec product = load(scale_.data() + column + j) * to_floats(exact) * fill(x.scale[r]);
                store(results + j, bias_.size() ? product + load(bias_.data() + column + j) : product);
            }
            map(results, y + r * n_ + column, columns, [](Vec a, int64_t) { return a; });
        }
    });
}

template <class T>
int64_t IntegerLinear<T>::rows_at_once() const {
    return std::max<int64_t>(4 * ROWS_AT_ONCE, X_BLOCK_BYTES / (steps_ * INPUTS * int64_t(sizeof(Code))));
}

template <class T>
int64_t IntegerLinear<T>::panels_at_once() const {
    return std::max<int64_t>(1, CHUNK_BYTES / (steps_ * STEP_BYTES));
}

template <class T>
void IntegerLinear<T>::apply(Context& context, const T* x, T* y, int64_t rows) const {
    const IntegerLinear* const self = this;
    const int64_t starts[] = {0, rows};
    apply_group(context, &self, 1, starts, x, y);
}

template <class T>
void IntegerLinear<T>::apply_group(Context& context, const IntegerLinear* const* experts, int64_t count,
                                   const int64_t* starts, const T* x, T* y) {
    const IntegerLinear& shape = *experts[0];
    const int64_t width = shape.steps_ * INPUTS, rows = starts[count];
    const int64_t panels = ceil_div(shape.n_, PANEL), together = shape.panels_at_once(), block = shape.rows_at_once();
    Code* const codes = context.inputs.get<Code>(rows * width);
    float* const scale = context.intermediate.get<float>(2 * rows);
    int32_t* const zero = reinterpret_cast<int32_t*>(scale + rows);
    // Reused from step to step by the thread that steps; the workers only read them.
    static thread_local std::vector<Piece> to_round, to_multiply;
    to_round.clear();
    to_multiply.clear();
    const int64_t at_once = std::max<int64_t>(1, 16384 / width);
    for (int64_t e = 0; e < count; ++e) {
        for (int64_t r = starts[e]; r < starts[e + 1]; r += at_once)
            to_round.push_back({experts[e], r, std::min(at_once, starts[e + 1] - r), 0});
        for (int64_t r = starts[e]; r < starts[e + 1]; r += block)
            for (int64_t p = 0; p < panels; p += together)
                to_multiply.push_back({experts[e], r, std::min(block, starts[e + 1] - r), p});
    }
    context.pool.run(int64_t(to_round.size()), [&, list = to_round.data()](int64_t i) {
        const Piece& piece = list[i];
        for (int64_t r = piece.first; r < piece.first + piece.rows; ++r)
            piece.linear->round_row(x + r * piece.linear->c_, codes + r * width, scale[r], zero[r]);
    });
    const Input input{{codes, width}, scale, zero};
    context.pool.run(int64_t(to_multiply.size()), [&, list = to_multiply.data()](int64_t i) {
        const Piece& piece = list[i];
        const RowsScope<bf16> scope(piece.rows);  // their tiles have the same shape
        for (int64_t p = piece.panel; p < std::min(panels, piece.panel + together); ++p)
            piece.linear->panel(input, y, piece.first, piece.rows, p);
    });
}

template <class T>
void IntegerLinear<T>::unpack(int64_t first, int64_t last, float* out) const {
    for (int64_t row = first; row < last; ++row) {
        const int8_t* from = weights_.data() + row / PANEL * steps_ * STEP_BYTES + row % PANEL * INPUTS;
        for (int64_t k = 0; k < c_; ++k)
            *out++ = scale_.data()[row] * float(from[k / INPUTS * STEP_BYTES + k % INPUTS]);
    }
}

template <class T>
int64_t IntegerLinear<T>::bytes() const {
    return int64_t(weights_.bytes() + scale_.bytes() + sums_.bytes() + bias_.bytes());
}

template class IntegerLinear<float>;
template class IntegerLinear<bf16>;
template class IntegerLinear<f16>;

}  // namespace loraplex
