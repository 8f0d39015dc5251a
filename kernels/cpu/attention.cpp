#include "attention.h"

#include <algorithm>
#include <limits>
#include <vector>

namespace loraplex {

namespace {

// Keys whose scores are held at once. Its multiples divide the positions of every sequence alike, so a query's sums are
// made of the same parts in the same order however its prompt was divided into steps.
constexpr int64_t CHUNK = 512;
constexpr int64_t ROWS_PER_ITEM = 48;  // queries x heads that share a kv head
constexpr int64_t MAX_HEAD_DIM = 1024;

// Some neighbouring queries of one sequence, with all query heads of one kv head: row i is query i / group.
struct Item {
    int64_t sequence, kv_head, first_query, queries;
};

template <class T>
class Attention {
  public:
    using X = typename Operand<T>::Type;
    static constexpr int PAIR = Operand<T>::pair;

    Attention(const T* q, T* out, int64_t heads, const Cache<T>& cache, const Sequences& sequences,
              const Scoring& scoring)
        : q_(q), out_(out), heads_(heads), group_(heads / cache.kv_heads), cache_(cache), sequences_(sequences),
          scoring_(scoring), width_(cache.width()) {}

    int64_t queries_per_item() const { return std::max<int64_t>(1, ROWS_PER_ITEM / group_); }

    // next: the item that follows, or null.
    void compute(const Item& item, const Item* next) const {
        // Each worker's own, kept from call to call.
        static thread_local Scratch query_scratch, float_scratch;
        const int64_t rows = item.queries * group_;
        X* queries = query_scratch.get<X>(rows * width_);
        float* floats = float_scratch.get<float>(rows * (CHUNK + 2 * width_ + 4));
        float* scores = floats;
        float* chunk_sums = scores + rows * CHUNK;
        float* sums = chunk_sums + rows * width_;
        State state{sums + rows * width_, sums + rows * (width_ + 1), sums + rows * (width_ + 2),
                    sums + rows * (width_ + 3)};
        copy_queries(item, queries);
        std::fill_n(sums, rows * width_, 0.0f);
        std::fill_n(state.largest, rows, -std::numeric_limits<float>::infinity());
        std::fill_n(state.total, rows, 0.0f);

        const int64_t last = position(item, item.queries - 1);
        for (int64_t start = first_key(position(item, 0)) / CHUNK * CHUNK; start <= last; start += CHUNK) {
            const int64_t begin = std::max(start, first_key(position(item, 0)));
            const int64_t end = std::min(start + CHUNK, last + 1);
            score(item, queries, rows, start, begin, end, scores);
            weigh(item, rows, start, begin, end, scores, state);
            gather(item, next, rows, start, begin, end, scores, chunk_sums);
            merge(rows, chunk_sums, sums, state);
        }
        write(item, rows, sums, state.total);
    }

  private:
    // Of each row: the largest score and the sum of weights, so far and in this chunk.
    struct State {
        float* largest;
        float* total;
        float* chunk_largest;
        float* chunk_total;
    };

    int64_t position(const Item& item, int64_t query) const {
        const int64_t queries = sequences_.query_starts[item.sequence + 1] - sequences_.query_starts[item.sequence];
        return sequences_.lengths[item.sequence] - queries + item.first_query + query;
    }
    int64_t first_key(int64_t position) const {
        return scoring_.window ? std::max<int64_t>(0, position - scoring_.window + 1) : 0;
    }
    int64_t slot(const Item& item, int64_t key) const {
        const int32_t* table = sequences_.block_tables + item.sequence * sequences_.blocks_per_table;
        return (int64_t(table[key >> cache_.block_shift]) << cache_.block_shift) + (key & (cache_.block_size() - 1));
    }
    static int64_t bytes_between(const T* from, const T* to) {
        return reinterpret_cast<const char*>(to) - reinterpret_cast<const char*>(from);
    }
    int64_t row_offset(const Item& item, int64_t row) const {
        const int64_t token = sequences_.query_starts[item.sequence] + item.first_query + row / group_;
        return (token * heads_ + item.kv_head * group_ + row % group_) * cache_.head_dim;
    }

    void copy_queries(const Item& item, X* to) const {
        const int64_t d = cache_.head_dim;
        for (int64_t row = 0; row < item.queries * group_; ++row, to += width_) {
            const T* from = q_ + row_offset(item, row);
            if constexpr (std::is_same_v<T, X>)
                std::memcpy(to, from, d * sizeof(T));
            else
                map(from, to, d, [](Vec a, int64_t) { return a; });
            std::memset(static_cast<void*>(to + d), 0, (width_ - d) * sizeof(X));
        }
    }

    // scores[row][key - start] = q · k for the tiles that hold keys begin … end - 1.
    void score(const Item& item, const X* queries, int64_t rows, int64_t start, int64_t begin, int64_t end,
               float* scores) const {
        const int64_t keys = cache_.tile_keys();
        const T* vectors[CHUNK / W];
        int64_t count = 0;
        const int64_t first_key = begin / keys * keys;
        const auto multiply_all = [&](float* out, int64_t stride) {
            // While a tile of keys is read, the values of the same tokens are prefetched: they lie alike.
            const Columns<T> w{vectors, keys * PAIR, width_ / PAIR, bytes_between(cache_.k, cache_.v)};
            for_row_blocks(rows, [&](int64_t first, int some) {
                multiply(some, queries + first * width_, width_, w, count, out + first * stride, stride, false);
            });
            count = 0;
        };
        for (int64_t key = first_key; key < end; key += keys) {
            const T* tile = cache_.key(slot(item, key), item.kv_head);
            for (int lane = 0; lane < LANES; lane += W) vectors[count++] = tile + lane * PAIR;
            if (keys == LANES) continue;
            // A small block: the lanes past its keys are garbage.
            float* few = few_scores(rows);
            multiply_all(few, LANES);
            for (int64_t r = 0; r < rows; ++r) std::copy_n(few + r * LANES, keys, scores + r * CHUNK + key - start);
        }
        if (count) multiply_all(scores + first_key - start, CHUNK);
    }

    static float* few_scores(int64_t rows) {
        static thread_local Scratch scratch;
        return scratch.get<float>(rows * LANES);
    }

    // scores → e^(score - the row's largest in this chunk), exactly 0 for keys that a row does not see.
    void weigh(const Item& item, int64_t rows, int64_t start, int64_t begin, int64_t end, float* scores,
               State& state) const {
        for (int64_t row = 0; row < rows; ++row) {
            float* s = scores + row * CHUNK;
            const int64_t at = position(item, row / group_);
            const int64_t low = std::min(std::max(begin, first_key(at)), end) - start;
            const int64_t high = std::max(std::min(end, at + 1) - start, low);
            std::fill(s + begin - start, s + low, 0.0f);
            std::fill(s + high, s + end - start, 0.0f);
            const float scale = scoring_.scale, cap = scoring_.soft_cap;
            if (cap != 0.0f)
                map(s + low, s + low, high - low, [&](Vec a, int64_t) {
                    return hyperbolic_tangent(a * fill(scale / cap)) * fill(cap);
                });
            else
                map(s + low, s + low, high - low, [&](Vec a, int64_t) { return a * fill(scale); });
            const float largest = largest_of(s + low, high - low);
            state.chunk_largest[row] = largest;
            map(s + low, s + low, high - low, [&](Vec a, int64_t) { return exponential(a - fill(largest)); });
            state.chunk_total[row] = total_of(s, low, high);
        }
    }

    static float largest_of(const float* s, int64_t n) {
        Vec acc = fill(-std::numeric_limits<float>::infinity());
        int64_t i = 0;
        for (; i + W <= n; i += W) acc = maximum(load(s + i), acc);
        float found = largest(acc);
        for (; i < n; ++i) found = s[i] > found ? s[i] : found;
        return found;
    }

    // The sum of s[low … high), in lanes that belong to a key's place in the chunk, whatever low and high are.
    static float total_of(const float* s, int64_t low, int64_t high) {
        float lanes[W] = {};
        int64_t i = low;
        for (; i < high && i % W; ++i) lanes[i % W] += s[i];
        Vec acc = load(lanes);
        for (; i + W <= high; i += W) acc = acc + load(s + i);
        store(lanes, acc);
        for (; i < high; ++i) lanes[i % W] += s[i];
        return sum(load(lanes));
    }

    // chunk_sums[row] = Σ weight · value over the chunk's keys in ascending order.
    void gather(const Item& item, const Item* next, int64_t rows, int64_t start, int64_t begin, int64_t end,
                const float* weights, float* chunk_sums) const {
        const int64_t size = cache_.block_size();
        const T* vectors[MAX_HEAD_DIM / W];
        for (int64_t key = begin; key < end;) {
            const int64_t stop = std::min(end, (key & ~(size - 1)) + size);
            const T* values = cache_.value(slot(item, key), item.kv_head);
            for (int64_t v = 0; v < width_ / W; ++v) vectors[v] = values + v * W;
            const T* upcoming = upcoming_keys(item, next, key, key - start);
            const Columns<T> w{vectors, width_, stop - key, upcoming ? bytes_between(values, upcoming) : 0};
            for_row_blocks(rows, [&](int64_t first, int some) {
                multiply(some, weights + first * CHUNK + key - start, CHUNK, w, width_ / W,
                         chunk_sums + first * width_, width_, key != begin);
            });
            key = stop;
        }
    }

    // The keys to prefetch while the values of `key` are read: those of the next chunk, or of the next item.
    const T* upcoming_keys(const Item& item, const Item* next, int64_t key, int64_t into_chunk) const {
        if (key + CHUNK <= position(item, item.queries - 1)) return cache_.key(slot(item, key + CHUNK), item.kv_head);
        if (!next) return nullptr;
        const int64_t there = first_key(position(*next, 0)) / CHUNK * CHUNK + into_chunk;
        return there <= position(*next, next->queries - 1) ? cache_.key(slot(*next, there), next->kv_head) : nullptr;
    }

    // Add a chunk's sums to those before it, both brought to the larger of their largest scores.
    void merge(int64_t rows, const float* chunk_sums, float* sums, State& state) const {
        for (int64_t row = 0; row < rows; ++row) {
            const float before = state.largest[row], here = state.chunk_largest[row];
            if (here == -std::numeric_limits<float>::infinity()) continue;  // the row sees no key of this chunk
            const float largest = std::max(before, here);
            const float keep = std::exp(before - largest), add = std::exp(here - largest);
            state.largest[row] = largest;
            state.total[row] = state.total[row] * keep + state.chunk_total[row] * add;
            const float* from = chunk_sums + row * width_;
            map(sums + row * width_, sums + row * width_, width_,
                [&](Vec a, int64_t d) { return fma(a, fill(keep), load(from + d) * fill(add)); });
        }
    }

    void write(const Item& item, int64_t rows, const float* sums, const float* totals) const {
        for (int64_t row = 0; row < rows; ++row) {
            const Vec scale = fill(1.0f / totals[row]);
            map(sums + row * width_, out_ + row_offset(item, row), cache_.head_dim,
                [&](Vec a, int64_t) { return a * scale; });
        }
    }

    const T* q_;
    T* out_;
    int64_t heads_, group_;
    const Cache<T>& cache_;
    const Sequences& sequences_;
    const Scoring& scoring_;
    int64_t width_;
};

}  // namespace

template <class T>
void paged_attention(Context& context, const T* q, T* out, int64_t heads, const Cache<T>& cache,
                     const Sequences& sequences, const Scoring& scoring) {
    const Attention<T> attention(q, out, heads, cache, sequences, scoring);
    static thread_local std::vector<Item> items;
    items.clear();
    const int64_t step = attention.queries_per_item();
    for (int64_t s = 0; s < sequences.count; ++s) {
        const int64_t queries = sequences.query_starts[s + 1] - sequences.query_starts[s];
        for (int64_t first = 0; first < queries; first += step)
            for (int64_t head = 0; head < cache.kv_heads; ++head)
                items.push_back({s, head, first, std::min(step, queries - first)});
    }
    const int64_t count = int64_t(items.size());
    context.pool.run(count, [&, items = items.data()](int64_t i) {
        attention.compute(items[i], i + 1 < count ? items + i + 1 : nullptr);
    });
}

template void paged_attention<float>(Context&, const float*, float*, int64_t, const Cache<float>&, const Sequences&,
                                     const Scoring&);
template void paged_attention<bf16>(Context&, const bf16*, bf16*, int64_t, const Cache<bf16>&, const Sequences&,
                                    const Scoring&);
template void paged_attention<f16>(Context&, const f16*, f16*, int64_t, const Cache<f16>&, const Sequences&,
                                   const Scoring&);

}  // namespace loraplex
