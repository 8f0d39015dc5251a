#include "quantized.h"

#include <algorithm>

namespace loraplex {

namespace {

constexpr int64_t MAX_GROUP = 256;            // inputs: an unpacked group stays in a core's first or second cache
constexpr int64_t X_BLOCK_BYTES = 1 << 20;    // rows of x that stay in the second cache beside it
constexpr int64_t CHUNK_BYTES = 32 << 10;     // codes worth a trip to the chunk counter
constexpr int64_t MAX_ROWS = 256;             // whose sums are kept beside them
// Bytes to what is prefetched: the best of what was tried. Four-bit codes are the faster for not being fetched into the
// sets of the first cache that hold what is read now (see linear.cpp), eight-bit ones are slower for it.
template <class Codec>
constexpr int64_t AHEAD = Codec::BITS == 4 ? 5 << 10 : 4 << 10;

template <class Codec>
Codec make_codec(const float* table) {
    if constexpr (std::is_same_v<Codec, TableCodec>)
        return Codec(table);
    else
        return Codec();
}

}  // namespace

template <class S>
bool GroupValues::try_as(Context& context, const std::vector<float>& values, Kind kind) {
    if (!std::all_of(values.begin(), values.end(), [](float v) { return widen(narrow<S>(v)) == v; })) return false;
    data_ = Array<char>(context.arena, values.size() * sizeof(S));
    S* to = reinterpret_cast<S*>(data_.data());
    for (size_t i = 0; i < values.size(); ++i) to[i] = narrow<S>(values[i]);
    kind_ = kind;
    return true;
}

GroupValues::GroupValues(Context& context, const std::vector<float>& values) : size_(int64_t(values.size())) {
    if (!try_as<f16>(context, values, FLOAT16) && !try_as<bf16>(context, values, BFLOAT16))
        try_as<float>(context, values, FLOAT32);
}

GroupValues::GroupValues(Context& context, const std::vector<float>& values, const std::vector<float>& units,
                         int64_t groups, int64_t groups_in_unit)
    : kind_(MULTIPLES), size_(int64_t(values.size())), groups_(groups), groups_in_unit_(groups_in_unit),
      units_in_panel_(ceil_div(groups, groups_in_unit)), data_(context.arena, values.size()),
      units_(context.arena, units.size()) {
    for (size_t i = 0; i < units.size(); ++i) units_.data()[i] = narrow<f16>(units[i]);
    i8* to = reinterpret_cast<i8*>(data_.data());
    for (int64_t i = 0; i < size_; ++i) {
        const int64_t row = i / CODE_PANEL, unit = row / groups_ * units_in_panel_ + row % groups_ / groups_in_unit_;
        const float of = units[unit * CODE_PANEL + i % CODE_PANEL];
        to[i] = narrow<i8>(of == 0.0f ? 0.0f : values[i] / of);
    }
}

Vec GroupValues::at(int64_t index, int64_t column) const {
    const int64_t place = index * CODE_PANEL + column;
    switch (kind_) {
        case FLOAT32: return load(reinterpret_cast<const float*>(data_.data()) + place);
        case FLOAT16: return load(reinterpret_cast<const f16*>(data_.data()) + place);
        case BFLOAT16: return load(reinterpret_cast<const bf16*>(data_.data()) + place);
        default: break;
    }
    const int64_t unit = index / groups_ * units_in_panel_ + index % groups_ / groups_in_unit_;
    return load(reinterpret_cast<const i8*>(data_.data()) + place) * load(units_.data() + unit * CODE_PANEL + column);
}

template <class T, class Codec>
QuantizedLinear<T, Codec>::QuantizedLinear(Context& context, const QuantizedMatrix& matrix, const T* bias)
    : n_(matrix.n), c_(matrix.c), units_(0), minima_(matrix.minima), codec_(make_codec<Codec>(matrix.table)) {
    for (int64_t first = 0; first < c_;) {
        const int64_t source = first / matrix.group;
        const int64_t end = std::min({c_, (source + 1) * matrix.group, first + MAX_GROUP});
        const int64_t units = ceil_div(end - first, 2);
        const int64_t steps = round_up(2 * units / PAIR_OF<X>, STEPS_AT_ONCE<X>);
        const auto input = int64_t(inputs_.size());
        groups_.push_back({first, end - first, units_, units, input, steps, source});
        for (int64_t i = 0; i < steps * PAIR_OF<X>; ++i)
            inputs_.push_back(i >= end - first ? -1 : int32_t(matrix.order ? matrix.order[first + i] : first + i));
        units_ += units;
        first = end;
    }
    ordered_ = matrix.order;
    padded_ = int64_t(inputs_.size()) != c_;
    pack(context, matrix);
    const int64_t panels = ceil_div(n_, CODE_PANEL);
    const auto in_panels = [&](const float* values, int64_t rows, auto source) {
        std::vector<float> out;  // [panels, rows, CODE_PANEL]
        out.reserve(panels * rows * CODE_PANEL);
        for (int64_t p = 0; p < panels; ++p)
            for (int64_t row = 0; row < rows; ++row)
                for (int64_t j = p * CODE_PANEL; j < (p + 1) * CODE_PANEL; ++j)
                    out.push_back(j < n_ ? values[source(row) * n_ + j] : 0.0f);
        return out;
    };
    const auto groups = int64_t(groups_.size());
    const auto group_values = [&](const float* values, const float* units) {
        const auto spread = in_panels(values, groups, [&](int64_t g) { return groups_[g].source; });
        if (!units) return GroupValues(context, spread);
        const auto of_units = in_panels(units, ceil_div(c_, UNIT_INPUTS), [](int64_t unit) { return unit; });
        return GroupValues(context, spread, of_units, groups, UNIT_INPUTS / matrix.group);
    };
    scales_ = group_values(matrix.scale, matrix.scale_unit);
    if (matrix.offset) offsets_ = group_values(matrix.offset, matrix.offset_unit);
    if (!bias) return;
    bias_ = Array<float>(context.arena, panels * CODE_PANEL);
    for (int64_t j = 0; j < panels * CODE_PANEL; ++j) bias_.data()[j] = j < n_ ? widen(bias[j]) : 0.0f;
}

template <class T, class Codec>
void QuantizedLinear<T, Codec>::pack(Context& context, const QuantizedMatrix& matrix) {
    const int64_t panels = ceil_div(n_, CODE_PANEL);
    codes_ = Array<uint32_t>(context.arena, panels * units_ * UNIT_WORDS<Codec>);
    context.pool.run(panels, [&](int64_t p) {
        const int64_t columns = std::min<int64_t>(CODE_PANEL, n_ - p * CODE_PANEL);
        const uint8_t* codes = matrix.codes + p * CODE_PANEL * c_;
        for (const Group& group : groups_) {
            uint32_t* to = codes_.data() + (p * units_ + group.unit) * UNIT_WORDS<Codec>;
            std::fill_n(to, group.units * UNIT_WORDS<Codec>, 0);
            for (int64_t j = 0; j < columns; ++j) {
                const int64_t field = j / WORDS, row = field / FIELDS<Codec>;
                const int64_t at = field % FIELDS<Codec> * Codec::BITS;
                for (int64_t i = 0; i < group.count; ++i)
                    to[i / 2 * UNIT_WORDS<Codec> + row * WORDS + j % WORDS] |= uint32_t(codes[j * c_ + group.first + i])
                                                                               << (at + i % 2 * 16);
            }
        }
    });
}

// One row in the order of the packed inputs.
template <class T, class Codec>
void QuantizedLinear<T, Codec>::order(const T* x, X* to) const {
    for (const int32_t input : inputs_) {
        const T value = input < 0 ? T{} : x[input];
        if constexpr (std::is_same_v<T, X>)
            *to++ = value;
        else
            *to++ = widen(value);
    }
}

// One row with each group filled up.
template <class T, class Codec>
void QuantizedLinear<T, Codec>::pad(const T* x, X* to) const {
    for (const Group& group : groups_) {
        if constexpr (std::is_same_v<T, X>)
            std::memcpy(to + group.input, x + group.first, group.count * sizeof(X));
        else
            map(x + group.first, to + group.input, group.count, [](Vec a, int64_t) { return a; });
        std::fill(to + group.input + group.count, to + group.input + group.steps * PAIR_OF<X>, X{});
    }
}

// x in the order and with the padding of the packed inputs, in the type of the inner loop.
template <class T, class Codec>
Rows<typename Operand<T>::Type> QuantizedLinear<T, Codec>::gather(Context& context, const T* x, int64_t rows) const {
    const auto width = int64_t(inputs_.size());
    if (!ordered_ && !padded_) return prepare(context, x, rows, c_, width);
    X* copy = context.inputs.get<X>(rows * width);
    const int64_t rows_per_chunk = std::max<int64_t>(1, 16384 / width);
    context.pool.run(ceil_div(rows, rows_per_chunk), [&](int64_t chunk) {
        const int64_t end = std::min(rows, (chunk + 1) * rows_per_chunk);
        for (int64_t r = chunk * rows_per_chunk; r < end; ++r)
            ordered_ ? order(x + r * c_, copy + r * width) : pad(x + r * c_, copy + r * width);
    });
    return {copy, width};
}

// The sums of each row's groups [groups, rows], which offsets are multiplied by; null if there are none.
template <class T, class Codec>
const float* QuantizedLinear<T, Codec>::sum_groups(Context& context, const Rows<X>& x, int64_t rows) const {
    if (offsets_.empty()) return nullptr;
    const auto groups = int64_t(groups_.size());
    float* of_groups = context.intermediate.get<float>(rows * groups);
    const int64_t rows_per_chunk = std::max<int64_t>(1, 16384 / x.stride);
    context.pool.run(ceil_div(rows, rows_per_chunk), [&](int64_t chunk) {
        const int64_t end = std::min(rows, (chunk + 1) * rows_per_chunk);
        for (int64_t r = chunk * rows_per_chunk; r < end; ++r) {
            const auto lanes_of = [&](int64_t g) {
                const X* from = x.data + r * x.stride + groups_[g].input;
                const int64_t count = groups_[g].count;
                Vec total = zero();
                int64_t i = 0;
                for (; i + W <= count; i += W) total = total + load(from + i);
                if (i < count) total = total + load_some(from + i, int(count - i));
                return total;
            };
            int64_t g = 0;
            for (; g + 4 <= groups; g += 4) {
                float four[4];
                sums(lanes_of(g), lanes_of(g + 1), lanes_of(g + 2), lanes_of(g + 3), four);
                for (int i = 0; i < 4; ++i) of_groups[(g + i) * rows + r] = four[i];
            }
            for (; g < groups; ++g) of_groups[g * rows + r] = sum(lanes_of(g));
        }
    });
    return of_groups;
}

template <class T, class Codec>
CodeColumns<Codec, typename Operand<T>::Type> QuantizedLinear<T, Codec>::codes(int64_t panel,
                                                                               const Group& group) const {
    return {units(panel, group), 2 * group.units / PAIR_OF<X>, AHEAD<Codec>, codec_};
}

template <class T, class Codec>
Vec QuantizedLinear<T, Codec>::scale(int64_t panel, int64_t group, int64_t column) const {
    const Vec scale = scales_.at(panel * int64_t(groups_.size()) + group, column);
    if constexpr (Codec::FACTOR == 1.0f) return scale;
    return scale * fill(Codec::FACTOR);
}

template <class T, class Codec>
Vec QuantizedLinear<T, Codec>::offset(int64_t panel, int64_t group, int64_t column) const {
    const Vec offset = offsets_.at(panel * int64_t(groups_.size()) + group, column);
    if (Codec::FACTOR == 1.0f || minima_) return offset;
    return offset * fill(1.0f / Codec::FACTOR);
}

// What takes the products of rows with a group to their totals, from the first row on.
template <class T, class Codec>
GroupFactors QuantizedLinear<T, Codec>::factors(int64_t panel, int64_t group, const Input& x, int64_t first) const {
    GroupFactors factors;
    factors.sums = x.sums ? x.sums + group * x.sums_stride + first : nullptr;
    factors.minima = minima_;
    for (int v = 0; v < CODE_VECTORS; ++v) {
        store(factors.scale + v * W, scale(panel, group, v * W));
        if (x.sums) store(factors.offset + v * W, offset(panel, group, v * W));
    }
    return factors;
}

template <class T, class Codec>
void QuantizedLinear<T, Codec>::unpack_group(int64_t panel, const Group& group, X* to) const {
    constexpr int64_t STRIDE = CODE_PANEL * PAIR_OF<X>;
    const auto from = codes(panel, group);
    unpack_codes(from, to);
    std::fill(to + from.steps * STRIDE, to + group.steps * STRIDE, X{});
}

// totals += x times a panel, for few rows: codes are multiplied as they are unpacked.
template <class T, class Codec>
void QuantizedLinear<T, Codec>::add_codes(const Input& x, int64_t first, int64_t rows, int64_t panel,
                                          float* totals) const {
    alignas(64) float products[FEW_ROWS<X> * CODE_PANEL];
    for (int64_t g = 0; g < int64_t(groups_.size()); ++g) {
        const Rows<X> inputs = x.from(first, groups_[g].input);
        const auto from = codes(panel, groups_[g]);
        multiply_few_codes(int(rows), inputs, from, products);
        factors(panel, g, x, first).add(products, CODE_PANEL, 0, CODE_VECTORS, 0, rows, totals);
    }
}

// The same for many rows: each group is unpacked once for all of them.
template <class T, class Codec>
void QuantizedLinear<T, Codec>::add_unpacked(const Input& x, int64_t first, int64_t rows, int64_t panel,
                                             float* totals) const {
    alignas(64) X unpacked[MAX_GROUP * CODE_PANEL];
    std::array<const X*, CODE_VECTORS> vectors;
    for (int v = 0; v < CODE_VECTORS; ++v) vectors[v] = unpacked + v * W * PAIR_OF<X>;
    GroupFactors both[2];  // of a group, and of the one before
    Products<X> products(totals);
    for (int64_t g = 0; g < int64_t(groups_.size()); ++g) {
        const Group& group = groups_[g];
        unpack_group(panel, group, unpacked);
        both[g % 2] = factors(panel, g, x, first);
        const Columns<X> columns{vectors.data(), CODE_PANEL * PAIR_OF<X>, group.steps, 0};
        products.add(x.from(first, group.input), rows, columns, both[g % 2]);
    }
    products.finish();
}

// A row's products and totals are the same for few rows and for many.
template <class T, class Codec>
void QuantizedLinear<T, Codec>::panel(const Input& x, T* y, int64_t first, int64_t rows, int64_t panel) const {
    alignas(64) float totals[MAX_ROWS * CODE_PANEL];
    std::fill_n(totals, rows * CODE_PANEL, 0.0f);
    if (x.few)
        add_codes(x, first, rows, panel, totals);
    else
        add_unpacked(x, first, rows, panel, totals);
    const int64_t column = panel * CODE_PANEL;
    const int64_t columns = std::min<int64_t>(CODE_PANEL, n_ - column);
    for (int64_t r = 0; r < rows; ++r) {
        T* out = y + (first + r) * n_ + column;
        const float* bias = bias_.data() + column;
        if (bias_.size())
            map(totals + r * CODE_PANEL, out, columns, [&](Vec a, int64_t j) { return a + load(bias + j); });
        else
            map(totals + r * CODE_PANEL, out, columns, [](Vec a, int64_t) { return a; });
    }
}

template <class T, class Codec>
int64_t QuantizedLinear<T, Codec>::panels_at_once() const {
    return std::max<int64_t>(1, CHUNK_BYTES / (units_ * UNIT_WORDS<Codec> * int64_t(sizeof(uint32_t))));
}

template <class T, class Codec>
void QuantizedLinear<T, Codec>::apply_group(Context& context, const QuantizedLinear* const* experts, int64_t count,
                                            const int64_t* starts, const T* x, T* y) {
    struct Piece {
        const QuantizedLinear* expert;
        int64_t first, rows, begin;  // of rows and of panels
    };
    // Reused from step to step by the thread that steps; the workers only read it.
    static thread_local std::vector<Piece> pieces;
    pieces.clear();
    const QuantizedLinear& shape = *experts[0];
    const int64_t panels = ceil_div(shape.n_, CODE_PANEL), together = shape.panels_at_once();
    bool has_offsets = false;
    for (int64_t e = 0; e < count; ++e) {
        const QuantizedLinear& expert = *experts[e];
        const int64_t first = starts[e], rows = starts[e + 1] - first;
        if (rows > FEW_ROWS<X> || (rows && expert.ordered_)) {
            expert.apply(context, x + first * expert.c_, y + first * expert.n_, rows);
        } else if (rows) {
            has_offsets |= !expert.offsets_.empty();
            for (int64_t begin = 0; begin < panels; begin += together) pieces.push_back({&expert, first, rows, begin});
        }
    }
    if (pieces.empty()) return;
    Input input{pieces[0].expert->gather(context, x, starts[count])};
    if (has_offsets) {
        for (const Piece& piece : pieces)
            if (!piece.expert->offsets_.empty()) {
                input.sums = piece.expert->sum_groups(context, input.rows, starts[count]);
                break;
            }
        input.sums_stride = starts[count];
    }
    Input without = input;
    without.sums = nullptr;
    context.pool.run(int64_t(pieces.size()), [&, list = pieces.data()](int64_t i) {
        const Piece& piece = list[i];
        const RowsScope<X> scope(piece.rows);
        for (int64_t p = piece.begin; p < std::min(panels, piece.begin + together); ++p)
            piece.expert->panel(piece.expert->offsets_.empty() ? without : input, y, piece.first, piece.rows, p);
    });
}

template <class T, class Codec>
void QuantizedLinear<T, Codec>::apply(Context& context, const T* x, T* y, int64_t rows) const {
    const auto width = int64_t(inputs_.size());
    Input input{gather(context, x, rows)};
    input.sums = sum_groups(context, input.rows, rows);
    input.sums_stride = rows;
    input.few = rows <= FEW_ROWS<X>;
    if constexpr (USES_TILES<X>) {
        if (!input.few) {
            input.tiled = true;
            input.rows = tile_rows(context.pool, input.rows, rows, width, context.tiles);
        }
    }
    const int64_t panels = ceil_div(n_, CODE_PANEL);
    const int64_t fitting = X_BLOCK_BYTES / (width * int64_t(sizeof(X)));
    const int64_t blocks = ceil_div(rows, std::clamp<int64_t>(fitting, 4 * ROWS_AT_ONCE, MAX_ROWS));
    const auto block_begin = [&](int64_t block) {
        return std::min(rows, round_up(rows * block / blocks, input.tiled ? TILED_ROWS : 1));
    };
    const int64_t together = panels_at_once();
    const int64_t chunks = ceil_div(panels, together);
    context.pool.run(blocks * chunks, [&](int64_t chunk) {
        const int64_t block = chunk / chunks, begin = chunk % chunks * together;
        const int64_t first = block_begin(block), end = block_begin(block + 1);
        const RowsScope<X> scope(end - first);
        for (int64_t p = begin; p < std::min(panels, begin + together); ++p) panel(input, y, first, end - first, p);
    });
}

template <class T, class Codec>
void QuantizedLinear<T, Codec>::unpack(int64_t first, int64_t last, float* out) const {
    alignas(64) float unpacked[MAX_GROUP * CODE_PANEL];
    for (int64_t p = first / CODE_PANEL; p < ceil_div(last, CODE_PANEL); ++p)
        for (int64_t g = 0; g < int64_t(groups_.size()); ++g) {
            const Group& group = groups_[g];
            unpack_codes(CodeColumns<Codec, float>{units(p, group), 2 * group.units, 0, codec_}, unpacked);
            for (int v = 0; v < CODE_VECTORS; ++v) {
                const Vec of_scale = scale(p, g, v * W);
                const Vec beside = offsets_.empty() ? zero() : offset(p, g, v * W);
                for (int64_t i = 0; i < group.count; ++i) {
                    float weights[W];
                    const Vec value = load(unpacked + i * CODE_PANEL + v * W);
                    store(weights, minima_ ? of_scale * value + beside : of_scale * (value + beside));
                    for (int j = 0; j < W; ++j) {
                        const int64_t row = p * CODE_PANEL + v * W + j;
                        if (row >= first && row < last) out[(row - first) * c_ + inputs_[group.input + i]] = weights[j];
                    }
                }
            }
        }
}

template <class T, class Codec>
int64_t QuantizedLinear<T, Codec>::bytes() const {
    return int64_t(codes_.bytes() + bias_.bytes() + inputs_.size() * sizeof(int32_t)) + scales_.bytes() +
           offsets_.bytes();
}

template class QuantizedLinear<float, TableCodec>;
template class QuantizedLinear<bf16, TableCodec>;
template class QuantizedLinear<f16, TableCodec>;
template class QuantizedLinear<float, SignedCodec>;
template class QuantizedLinear<bf16, SignedCodec>;
template class QuantizedLinear<f16, SignedCodec>;
template class QuantizedLinear<float, Float8Codec>;
template class QuantizedLinear<bf16, Float8Codec>;
template class QuantizedLinear<f16, Float8Codec>;

}  // namespace loraplex
