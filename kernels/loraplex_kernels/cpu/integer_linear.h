// Linear layers of integers: weights of a byte with a scale for each output, and inputs that are rounded to a byte row
// by row.
//
//     y[n] = s · (scale[n] · Σ_c (q[c] − z) · weight[n, c]) + bias[n],  q[c] = round(x[c] / s + z), from -128 to 127
//
// The sum is one of integers; what follows it is rounded in float32 step by step, in this order.
#pragma once

#include <vector>

#include "context.h"
#include "integers.h"

namespace loraplex {

// Where s and z come from.
struct InputRounding {
    // Of each row: s = max|x| / 127 and z = 0; or s = (max − min) / 255 and z = round(−128 − min / s), with 0 between
    // min and max. Or the same for all rows.
    enum Kind { SYMMETRIC, ASYMMETRIC, GIVEN };
    Kind kind;
    float scale;
    float zero;
};

// What such a layer is made of. Copied.
struct ByteMatrix {
    int64_t n, c;
    const int8_t* weights;  // [n, c]
    const float* scale;     // [n]
    InputRounding rounding;
};

template <class T>
class IntegerLinear {
  public:
    IntegerLinear(Context& context, const ByteMatrix& matrix, const T* bias);

    // x: [rows, c] → y: [rows, n]
    void apply(Context& context, const T* x, T* y, int64_t rows) const;

    // As Linear has it: one region for all experts.
    static void apply_group(Context& context, const IntegerLinear* const* experts, int64_t count, const int64_t* starts,
                            const T* x, T* y);

    // Rows first … last - 1 of the weight → out: [last - first, c]
    void unpack(int64_t first, int64_t last, float* out) const;

    int64_t bytes() const;

  private:
    // Rounded rows.
    struct Input {
        CodeRows codes;
        const float* scale;   // [rows]
        const int32_t* zero;  // [rows], with CODE_OFFSET
    };
    struct Piece {
        const IntegerLinear* linear;
        int64_t first, rows, panel;
    };

    int64_t rows_at_once() const;
    int64_t panels_at_once() const;
    void pack(const int8_t* rows, int64_t count, int8_t* to) const;
    void round_row(const T* x, Code* codes, float& scale, int32_t& zero) const;
    void panel(const Input& x, T* y, int64_t first, int64_t rows, int64_t panel) const;

    int64_t n_, c_, steps_;
    InputRounding rounding_;
    Array<int8_t> weights_;  // [panels, steps, PANEL, INPUTS]
    Array<float> scale_;     // [panels, PANEL]
    Array<int32_t> sums_;    // [panels, PANEL]: of each output's weights
    Array<float> bias_;      // [panels, PANEL]
};

}  // namespace loraplex
