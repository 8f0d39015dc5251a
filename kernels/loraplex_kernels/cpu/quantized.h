// Quantised linear layers: packed codes, multiplied as they are; scales and offsets are applied to the sums of groups.
//
//     y[n] = Σ_g scale[g, n] · (Σ_{c in g} x[c] · value[n, c] + offset[g, n] · Σ_{c in g} x[c]) + bias[n]
//
// or, where offsets are minima, with scale[g, n] for the values alone.
//
// A value is what a codec makes of a code: exact in bfloat16, but for tables of other numbers. So nothing else is
// rounded than in a product of float32 matrices.
#pragma once

#include <vector>

#include "bytes.h"
#include "code_products.h"
#include "linear.h"

namespace loraplex {

constexpr int64_t UNIT_INPUTS = 256;  // that share a unit; a group lies in one

// What a quantised matrix [n, c] is made of. Copied.
struct QuantizedMatrix {
    int64_t n, c;
    const uint8_t* codes;  // [n, c]
    const float* table;    // [16], for TableCodec
    int64_t group;         // inputs that share a scale; the last group may be shorter
    const float* scale;    // [groups, n]
    const float* offset;   // [groups, n], or null: none
    bool minima;           // offsets are added as they are, not times the scale
    // [ceil(c / UNIT_INPUTS), n]: what scales and offsets are whole multiples of, from -128 to 127; null: of nothing
    const float* scale_unit;
    const float* offset_unit;
    const int64_t* order;  // [c]: which input a column of codes multiplies; null: its own
};

// One number for each group and output [panels, groups, CODE_PANEL], as narrow as holds all of them exactly; or a byte
// each, times what the groups of a unit have in common.
class GroupValues {
  public:
    GroupValues() = default;
    GroupValues(Context& context, const std::vector<float>& values);
    // units: [panels, units, CODE_PANEL]; every `groups_in_unit` groups share one.
    GroupValues(Context& context, const std::vector<float>& values, const std::vector<float>& units, int64_t groups,
                int64_t groups_in_unit);

    bool empty() const { return size_ == 0; }
    int64_t bytes() const { return int64_t(data_.bytes() + units_.bytes()); }
    // index: panel · groups + group
    Vec at(int64_t index, int64_t column) const;

  private:
    enum Kind { FLOAT32, FLOAT16, BFLOAT16, MULTIPLES };

    template <class S>
    bool try_as(Context& context, const std::vector<float>& values, Kind kind);

    Kind kind_ = FLOAT32;
    int64_t size_ = 0, groups_ = 0, groups_in_unit_ = 0, units_in_panel_ = 0;
    Array<char> data_;
    Array<f16> units_;
};

template <class T, class Codec>
class QuantizedLinear {
  public:
    QuantizedLinear(Context& context, const QuantizedMatrix& matrix, const T* bias);

    // x: [rows, c] → y: [rows, n]
    void apply(Context& context, const T* x, T* y, int64_t rows) const;

    // As Linear has it: one region for all experts with few rows; those with many are enough work by themselves.
    static void apply_group(Context& context, const QuantizedLinear* const* experts, int64_t count,
                            const int64_t* starts, const T* x, T* y);

    // Rows first … last - 1 of the matrix, in the order of the inputs → out: [last - first, c]
    void unpack(int64_t first, int64_t last, float* out) const;

    int64_t bytes() const;

  private:
    using X = typename Operand<T>::Type;

    // Neighbouring inputs with one scale each; a long group of the matrix is several of these.
    struct Group {
        int64_t first, count;  // columns of codes
        int64_t unit, units;  // where they are packed, two inputs a unit
        int64_t input, steps;  // where x has them, and how many steps of the inner loop they take
        int64_t source;  // group of the matrix
    };

    // x as it is multiplied.
    struct Input {
        Rows<X> rows;
        bool few = true;  // as FEW_ROWS has it
        bool tiled = false;  // as `tile_rows` does it
        const float* sums = nullptr;  // of the inputs of each group [groups, sums_stride]; null: there are no offsets
        int64_t sums_stride = 0;

        Rows<X> from(int64_t row, int64_t input) const {
            return {rows.data + row * rows.stride + input * (tiled ? TILED_ROWS : 1), rows.stride};
        }
    };

    int64_t panels_at_once() const;
    const uint32_t* units(int64_t panel, const Group& group) const {
        return codes_.data() + (panel * units_ + group.unit) * UNIT_WORDS<Codec>;
    }
    CodeColumns<Codec, X> codes(int64_t panel, const Group& group) const;
    void pack(Context& context, const QuantizedMatrix& matrix);
    void order(const T* x, X* to) const;
    void pad(const T* x, X* to) const;
    Rows<X> gather(Context& context, const T* x, int64_t rows) const;
    const float* sum_groups(Context& context, const Rows<X>& x, int64_t rows) const;
    // The scale of what the codec makes of codes, and the offset beside it, of some outputs of a group.
    Vec scale(int64_t panel, int64_t group, int64_t column) const;
    Vec offset(int64_t panel, int64_t group, int64_t column) const;
    GroupFactors factors(int64_t panel, int64_t group, const Input& x, int64_t first) const;
    void unpack_group(int64_t panel, const Group& group, X* to) const;
    void add_codes(const Input& x, int64_t first, int64_t rows, int64_t panel, float* totals) const;
    void add_unpacked(const Input& x, int64_t first, int64_t rows, int64_t panel, float* totals) const;
    void panel(const Input& x, T* y, int64_t first, int64_t rows, int64_t panel) const;

    int64_t n_, c_, units_;
    bool ordered_;  // a column of codes multiplies another input than its own
    bool padded_;  // groups of x are filled up
    bool minima_;
    Codec codec_;
    std::vector<Group> groups_;
    std::vector<int32_t> inputs_;  // by place in x as it is multiplied: which input, or -1: none
    Array<uint32_t> codes_;  // [panels, units, UNIT_WORDS]
    GroupValues scales_;  // [panels, groups, CODE_PANEL]
    GroupValues offsets_;
    Array<float> bias_;  // [panels, CODE_PANEL]
};

}  // namespace loraplex
