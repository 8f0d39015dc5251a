#include "lora.h"

#include <algorithm>

#include "shrink.h"

namespace loraplex {

namespace {

constexpr int64_t PARTS_PER_THREAD = 4;  // fewer would leave threads without work at the end
constexpr int64_t RANKS_PER_PIECE = 16;
constexpr int64_t PANELS_AT_ONCE = 8;

// Some rows of one segment.
template <class T>
struct Part {
    const LoraAdapter<T>* adapter;
    int64_t first_row, rows;
    int64_t shrunk;  // where its shrunk rows begin
};

template <class T>
class Lora {
  public:
    using X = typename Operand<T>::Type;
    using Adapter = LoraAdapter<T>;
    using Projection = typename Adapter::Projection;

    Lora(const X* x, int64_t width, float* shrunk, T* y, int64_t n)
        : x_(x), width_(width), shrunk_(shrunk), y_(y), n_(n) {}

    void whole(const Part<T>& part) const {
        shrink(part, 0, part.adapter->rank);
        for (const Projection& projection : part.adapter->projections)
            expand(part, projection, 0, ceil_div(projection.part.n, PANEL));
        scale(part);
    }

    void shrink(const Part<T>& part, int64_t first_rank, int64_t last_rank) const {
        const Rows<X> x{x_ + part.first_row * width_, width_};
        const Adapter& adapter = *part.adapter;
        shrink_rows(x, part.rows, width_, adapter.a.data(), adapter.rank, first_rank, last_rank, shrunk_ + part.shrunk);
    }

    void expand(const Part<T>& rows, const Projection& projection, int64_t first_panel, int64_t last_panel) const {
        const LoraPart& part = projection.part;
        const int64_t rank = rows.adapter->rank;
        constexpr int64_t WIDTH = PANELS_AT_ONCE * PANEL;
        for (int64_t p = first_panel; p < last_panel; p += PANELS_AT_ONCE) {
            const int64_t panels = std::min(PANELS_AT_ONCE, last_panel - p);
            const int64_t columns = std::min(part.n - p * PANEL, panels * PANEL);
            const T* vectors[WIDTH / W];
            for (int64_t v = 0; v < panels * PANEL / W; ++v)
                vectors[v] = projection.b.data() + (p + v * W / PANEL) * part.rank * PANEL + v * W % PANEL;
            const Columns<T> w{vectors, PANEL, part.rank, LORA_AHEAD};
            const int64_t whole = columns / W, rest = columns % W;
            for_row_blocks(rows.rows, [&](int64_t first, int count) {
                const float* from = shrunk_ + rows.shrunk + first * rank + part.rank_start;
                T* out = y_ + (rows.first_row + first) * n_ + part.out_start + p * PANEL;
                multiply(count, from, rank, w, whole, out, n_, true);
                if (!rest) return;
                const Columns<T> last{vectors + whole, PANEL, part.rank, 0};
                T edge[ROWS_AT_ONCE * W] = {};
                for (int r = 0; r < count; ++r) std::copy_n(out + r * n_ + whole * W, rest, edge + r * W);
                multiply(count, from, rank, last, 1, edge, W, true);
                for (int r = 0; r < count; ++r) std::copy_n(edge + r * W, rest, out + r * n_ + whole * W);
            });
        }
    }

    // Does nothing for plain LoRA.
    void scale(const Part<T>& part) const {
        const float* gain = part.adapter->gain.data();
        const float* offset = part.adapter->offset.data();
        if (!gain) return;
        for (int64_t r = 0; r < part.rows; ++r) {
            T* row = y_ + (part.first_row + r) * n_;
            map(row, row, n_, [&](Vec a, int64_t j) { return fma(a, load(gain + j), load(offset + j)); });
        }
    }

    // The parts divided: some ranks of a part's shrink, then some panels of one projection of its expand, at a time.
    void by_pieces(Pool& pool, const std::vector<Part<T>>& parts) const {
        struct Piece {
            const Part<T>* part;
            const Projection* projection;
            int64_t begin, end;
        };
        static thread_local std::vector<Piece> shrinks, expands;
        shrinks.clear();
        expands.clear();
        for (const Part<T>& part : parts) {
            for (int64_t r = 0; r < part.adapter->rank; r += RANKS_PER_PIECE)
                shrinks.push_back({&part, nullptr, r, std::min(part.adapter->rank, r + RANKS_PER_PIECE)});
            for (const Projection& projection : part.adapter->projections) {
                const int64_t panels = ceil_div(projection.part.n, PANEL);
                for (int64_t p = 0; p < panels; p += PANELS_AT_ONCE)
                    expands.push_back({&part, &projection, p, std::min(panels, p + PANELS_AT_ONCE)});
            }
        }
        pool.run(int64_t(shrinks.size()),
                 [&, list = shrinks.data()](int64_t i) { shrink(*list[i].part, list[i].begin, list[i].end); });
        pool.run(int64_t(expands.size()), [&, list = expands.data()](int64_t i) {
            expand(*list[i].part, *list[i].projection, list[i].begin, list[i].end);
        });
        if (std::any_of(parts.begin(), parts.end(), [](const Part<T>& part) { return part.adapter->gain.size() > 0; }))
            pool.run(int64_t(parts.size()), [&, list = parts.data()](int64_t i) { scale(list[i]); });
    }

  private:
    const X* x_;
    int64_t width_;
    float* shrunk_;
    T* y_;
    int64_t n_;
};

}  // namespace

template <class T>
LoraAdapter<T>::LoraAdapter(Arena& arena, int64_t in_features, const T* a_rows, int64_t rank,
                            const std::vector<LoraPart>& parts, const T* const* b, const float* affine,
                            int64_t affine_n)
    : rank(rank) {
    const int64_t width = round_up(in_features, SHRINK_WIDTH);
    a = Array<T>(arena, rank * width);
    for (int64_t r = 0; r < rank; ++r) {
        const int64_t group = r / RANK_GROUP<T> * RANK_GROUP<T>;
        const int64_t ranks = std::min<int64_t>(RANK_GROUP<T>, rank - group);
        const T* from = a_rows + r * in_features;
        T* to = a.data() + group * width + (r - group) * PIECE<T>;
        for (int64_t c = 0; c < width; c += PIECE<T>, to += ranks * PIECE<T>) {
            const int64_t count = std::clamp<int64_t>(in_features - c, 0, PIECE<T>);
            std::fill(std::copy_n(from + c, count, to), to + PIECE<T>, T{});
        }
    }
    for (size_t i = 0; i < parts.size(); ++i) {
        const LoraPart& part = parts[i];
        const int64_t panels = ceil_div(part.n, PANEL);
        Array<T> packed(arena, panels * part.rank * PANEL);
        for (int64_t p = 0; p < panels; ++p) {
            const int64_t rows = std::min<int64_t>(PANEL, part.n - p * PANEL);
            const T* from = b[i] + p * PANEL * part.rank;
            T* to = packed.data() + p * part.rank * PANEL;
            for (int64_t r = 0; r < part.rank; ++r, to += PANEL) {  // what is written is one stream
                for (int64_t j = 0; j < rows; ++j) to[j] = from[j * part.rank + r];
                std::fill(to + rows, to + PANEL, T{});
            }
        }
        projections.push_back({part, std::move(packed)});
    }
    if (!affine) return;
    const int64_t padded = round_up(affine_n, PANEL);
    for (Array<float>* array : {&gain, &offset}) {
        *array = Array<float>(arena, padded);
        std::fill_n(std::copy_n(affine, affine_n, array->data()), padded - affine_n, 0.0f);
        affine += affine_n;
    }
}

template <class T>
int64_t LoraAdapter<T>::bytes() const {
    size_t total = a.bytes() + gain.bytes() + offset.bytes();
    for (const Projection& projection : projections) total += projection.b.bytes();
    return int64_t(total);
}

template <class T>
void segmented_lora(Context& context, const AnyLora* const* adapters, int64_t in_features, int64_t out_features,
                    const T* x, T* y, int64_t rows, const Segments& segments) {
    // Reused from step to step by the thread that steps; the workers only read it.
    static thread_local std::vector<Part<T>> parts;
    parts.clear();
    int64_t shrunk_size = 0;
    for (int64_t g = 0; g < segments.count; ++g) {
        const auto* adapter = static_cast<const LoraAdapter<T>*>(adapters[segments.slots[g]]);
        if (!adapter || (adapter->rank == 0 && adapter->gain.size() == 0)) continue;
        for (int64_t first = segments.starts[g]; first < segments.ends[g]; first += SHRINK_ROWS) {
            const int64_t count = std::min<int64_t>(SHRINK_ROWS, segments.ends[g] - first);
            parts.push_back({adapter, first, count, shrunk_size});
            shrunk_size += count * adapter->rank;
        }
    }
    if (parts.empty()) return;
    const int64_t width = round_up(in_features, SHRINK_WIDTH);
    const auto input = prepare(context, x, rows, in_features, width);
    const Lora<T> lora(input.data, width, context.intermediate.get<float>(shrunk_size), y, out_features);
    // Whole parts, each one stream through an adapter's memory, if that occupies everybody; else their pieces.
    if (int64_t(parts.size()) >= PARTS_PER_THREAD * context.pool.threads())
        context.pool.run(int64_t(parts.size()), [&, list = parts.data()](int64_t i) { lora.whole(list[i]); });
    else
        lora.by_pieces(context.pool, parts);
}

#define INSTANTIATE(T)                                                                                     \
    template struct LoraAdapter<T>;                                                                        \
    template void segmented_lora(Context&, const AnyLora* const*, int64_t, int64_t, const T*, T*, int64_t, \
                                 const Segments&);
INSTANTIATE(float)
INSTANTIATE(bf16)
INSTANTIATE(f16)

}  // namespace loraplex
