#include "lora.h"

#include <algorithm>

namespace loraplex {

namespace {

constexpr int DOT_ROWS = HAS_BF16_DOT ? 4 : 2;  // x RANK_GROUP accumulators
constexpr int64_t RANKS_PER_CHUNK = 16;
constexpr int64_t PANELS_PER_CHUNK = 8;
constexpr int64_t SHRINK_ROWS = 64;
constexpr int64_t EXPAND_ROWS = 96;

// acc += the products of DOT_LENGTH neighbours, lane by lane.
template <class T>
inline Vec dot(Vec acc, const T* a, const float* x) {
#pragma GCC unroll 8
    for (int i = 0; i < DOT_LENGTH; i += W) acc = fma(load(a + i), load(x + i), acc);
    return acc;
}

#if defined(__AVX512BF16__)
inline Vec dot(Vec acc, const bf16* a, const bf16* x) {
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(_mm512_loadu_si512(a)),
                            reinterpret_cast<__m512bh>(_mm512_loadu_si512(x)));
}
#endif

// out[row][rank] = x[row] · a[rank] for a constant number of rows and of ranks of one group.
template <int ROWS, int RANKS, class X, class T>
void dots(const X* x, int64_t width, const T* a, float* out, int64_t out_stride) {
    Vec acc[ROWS][RANKS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int k = 0; k < RANKS; ++k) acc[r][k] = zero();
    for (int64_t c = 0; c < width; c += DOT_LENGTH, a += RANKS * DOT_LENGTH) {
        for (int k = 0; k < RANKS; ++k) __builtin_prefetch(a + k * DOT_LENGTH + 1024);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
            for (int k = 0; k < RANKS; ++k) acc[r][k] = dot(acc[r][k], a + k * DOT_LENGTH, x + r * width + c);
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int k = 0; k < RANKS; ++k) out[r * out_stride + k] = sum(acc[r][k]);
}

template <int RANKS, class X, class T>
void dot_rows(int rows, const X* x, int64_t width, const T* a, float* out, int64_t out_stride) {
    switch (rows) {
        case 1: return dots<1, RANKS>(x, width, a, out, out_stride);
        case 2: return dots<2, RANKS>(x, width, a, out, out_stride);
        case 3: return dots<3, RANKS>(x, width, a, out, out_stride);
        default: return dots<4, RANKS>(x, width, a, out, out_stride);
    }
}

// One piece of a phase: some rows of a segment with some of the adapter's ranks or of a projection's panels.
struct Chunk {
    const void* weights;
    int64_t rank;    // of the adapter: how far apart the shrunk rows are
    int64_t shrunk;  // where the first of these rows is among the shrunk ones
    int64_t first_row, rows, begin, end;
};

}  // namespace

template <class T>
LoraTable<T>::LoraTable(int64_t in_features, int64_t out_features, int64_t slots)
    : c_(in_features), n_(out_features), width_(round_up(in_features, DOT_LENGTH)), adapters_(slots) {}

template <class T>
void LoraTable<T>::put(Context& context, int64_t slot, const T* a, int64_t rank, const std::vector<LoraPart>& parts,
                       const T* const* b) {
    auto adapter = std::make_unique<Adapter>();
    adapter->rank = rank;
    adapter->a = Array<T>(context.arena, rank * width_);
    for (int64_t r = 0; r < rank; ++r) {
        const int64_t group = r / RANK_GROUP * RANK_GROUP;
        const int64_t ranks = std::min<int64_t>(RANK_GROUP, rank - group);
        T* to = adapter->a.data() + group * width_ + (r - group) * DOT_LENGTH;
        for (int64_t c = 0; c < width_; c += DOT_LENGTH, to += ranks * DOT_LENGTH)
            for (int64_t i = 0; i < DOT_LENGTH; ++i) to[i] = c + i < c_ ? a[r * c_ + c + i] : T{};
    }
    for (size_t i = 0; i < parts.size(); ++i) {
        const LoraPart& part = parts[i];
        const int64_t panels = ceil_div(part.n, PANEL);
        Array<T> packed(context.arena, panels * part.rank * PANEL);
        for (int64_t p = 0; p < panels; ++p)
            for (int64_t j = 0; j < PANEL; ++j)
                for (int64_t r = 0; r < part.rank; ++r)
                    packed.data()[(p * part.rank + r) * PANEL + j] =
                        p * PANEL + j < part.n ? b[i][(p * PANEL + j) * part.rank + r] : T{};
        adapter->projections.push_back({part, std::move(packed)});
    }
    adapters_[slot] = std::move(adapter);
}

template <class T>
void LoraTable<T>::shrink(const Adapter& adapter, const X* x, int64_t rows, int64_t first_rank, int64_t last_rank,
                          float* out) const {
    for (int64_t group = first_rank; group < last_rank; group += RANK_GROUP) {
        const T* a = adapter.a.data() + group * width_;
        const int64_t ranks = std::min<int64_t>(RANK_GROUP, adapter.rank - group);
        for (int64_t r = 0; r < rows; r += DOT_ROWS) {
            const int count = int(std::min<int64_t>(DOT_ROWS, rows - r));
            const X* from = x + r * width_;
            float* to = out + r * adapter.rank + group;
            switch (ranks) {
                case 1: dot_rows<1>(count, from, width_, a, to, adapter.rank); break;
                case 2: dot_rows<2>(count, from, width_, a, to, adapter.rank); break;
                case 3: dot_rows<3>(count, from, width_, a, to, adapter.rank); break;
                default: dot_rows<4>(count, from, width_, a, to, adapter.rank);
            }
        }
    }
}

template <class T>
void LoraTable<T>::expand(const Projection& projection, const float* shrunk, int64_t rank, int64_t rows,
                          int64_t first_panel, int64_t last_panel, T* y) const {
    const LoraPart& part = projection.part;
    for (int64_t p = first_panel; p < last_panel; ++p) {
        const T* b = projection.b.data() + p * part.rank * PANEL;
        const int64_t columns = std::min<int64_t>(PANEL, part.n - p * PANEL);
        for_row_blocks(rows, [&](int64_t first, int count) {
            alignas(64) float sums[ROWS_AT_ONCE * PANEL];
            multiply<PANEL>(count, shrunk + first * rank + part.rank_start, rank, b, PANEL, part.rank, sums, PANEL,
                            false);
            for (int r = 0; r < count; ++r) {
                const float* delta = sums + r * PANEL;
                T* out = y + (first + r) * n_ + part.out_start + p * PANEL;
                map(out, out, columns, [&](Vec old, int64_t j) { return old + load(delta + j); });
            }
        });
    }
}

template <class T>
void LoraTable<T>::apply(Context& context, const T* x, T* y, int64_t rows, int64_t segments, const int32_t* slots,
                         const int32_t* starts, const int32_t* ends) const {
    // Reused from step to step by the thread that steps; the workers only read them.
    static thread_local std::vector<Chunk> shrinks, expands;
    shrinks.clear();
    expands.clear();
    int64_t shrunk_size = 0;
    for (int64_t g = 0; g < segments; ++g) {
        const Adapter* adapter = adapters_[slots[g]].get();
        if (!adapter) continue;
        const int64_t rank = adapter->rank;
        const auto add = [&](std::vector<Chunk>& to, const void* weights, int64_t block, int64_t count, int64_t step) {
            for (int64_t row = starts[g]; row < ends[g]; row += block)
                for (int64_t i = 0; i < count; i += step)
                    to.push_back({weights, rank, shrunk_size + (row - starts[g]) * rank, row,
                                  std::min(block, ends[g] - row), i, std::min(count, i + step)});
        };
        add(shrinks, adapter, SHRINK_ROWS, rank, RANKS_PER_CHUNK);
        for (const Projection& projection : adapter->projections)
            add(expands, &projection, EXPAND_ROWS, ceil_div(projection.part.n, PANEL), PANELS_PER_CHUNK);
        shrunk_size += (ends[g] - starts[g]) * rank;
    }
    if (shrinks.empty()) return;
    const Rows<X> input = prepare(context, x, rows, c_, width_);
    float* shrunk = context.intermediate.get<float>(shrunk_size);
    context.pool.run(int64_t(shrinks.size()), [&, chunks = shrinks.data()](int64_t i) {
        const Chunk& chunk = chunks[i];
        shrink(*static_cast<const Adapter*>(chunk.weights), input.data + chunk.first_row * width_, chunk.rows,
               chunk.begin, chunk.end, shrunk + chunk.shrunk);
    });
    context.pool.run(int64_t(expands.size()), [&, chunks = expands.data()](int64_t i) {
        const Chunk& chunk = chunks[i];
        expand(*static_cast<const Projection*>(chunk.weights), shrunk + chunk.shrunk, chunk.rank, chunk.rows,
               chunk.begin, chunk.end, y + chunk.first_row * n_);
    });
}

template class LoraTable<float>;
template class LoraTable<bf16>;
template class LoraTable<f16>;

}  // namespace loraplex
