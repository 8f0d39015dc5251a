#include "attention.h"

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

namespace loraplex {

namespace {

// Keys whose scores are held at once. Its multiples divide the positions of every sequence alike, so a query's sums are
// made of the same parts in the same order however its prompt was divided into steps.
constexpr int64_t CHUNK = 512;
constexpr int64_t ROWS_PER_ITEM = 48;  // queries x heads that share a kv head
constexpr int64_t ITEMS_PER_THREAD = 4;  // fewer would leave threads without work at the end
constexpr int64_t PIECES = 16;  // blocks whose values are multiplied at once
constexpr int64_t WIDENED = 128;  // rounded keys, or values, that are widened and then multiplied: in the nearest cache

// Some neighbouring queries of one sequence, with all query heads of one kv head: row i is query i / group.
struct Item {
    int64_t sequence, kv_head, first_query, queries;
};

template <class T, class S>
class Attention {
  public:
    using X = typename Operand<T>::Type;
    static constexpr int PAIR = Operand<T>::pair;
    static constexpr bool ROUNDED = Cache<T, S>::ROUNDED;
    using E = std::conditional_t<ROUNDED, X, S>;  // keys and values as the inner loop reads them

    Attention(const T* q, T* out, int64_t heads, const Cache<T, S>& cache, const Sequences& sequences,
              const Scoring& scoring)
        : q_(q), out_(out), heads_(heads), group_(heads / cache.kv_heads), cache_(cache), sequences_(sequences),
          scoring_(scoring), width_(cache.width()) {}

    int64_t queries_per_item() const { return std::max<int64_t>(1, ROWS_PER_ITEM / group_); }
    int64_t summary_size(const Item& item) const { return item.queries * group_ * (width_ + 2); }

    // Where the chunks of keys begin that the item's queries see: from the first to the last of these, by CHUNK.
    std::pair<int64_t, int64_t> chunks(const Item& item) const {
        return {first_key(position(item, 0)) / CHUNK * CHUNK, position(item, item.queries - 1) / CHUNK * CHUNK};
    }

    // All of an item. next: the item that follows, or null.
    void compute(const Item& item, const Item* next) const {
        static thread_local Scratch scratch;  // each worker's own, kept from call to call
        float* both = scratch.get<float>(2 * summary_size(item));
        const Summary whole = summary(item, both), part = summary(item, both + summary_size(item));
        clear(item, whole);
        const auto [first, last] = chunks(item);
        for (int64_t start = first; start <= last; start += CHUNK) {
            summarise(item, next, start, part);
            merge(item, part, whole);
        }
        write(item, whole);
    }

    // One chunk of an item, and all of it from the summaries of its chunks, which lie one after the other.
    void compute_chunk(const Item& item, int64_t start, float* out) const {
        summarise(item, nullptr, start, summary(item, out));
    }
    void combine(const Item& item, float* parts) const {
        static thread_local Scratch scratch;
        const Summary whole = summary(item, scratch.get<float>(summary_size(item)));
        clear(item, whole);
        const auto [first, last] = chunks(item);
        for (int64_t start = first; start <= last; start += CHUNK, parts += summary_size(item))
            merge(item, summary(item, parts), whole);
        write(item, whole);
    }

  private:
    // What some keys come to, of each row: Σ weight · value, Σ weight, and the largest score, which the weights are
    // relative to.
    struct Summary {
        float* sums;  // [rows, width]
        float* total;  // [rows]
        float* largest;  // [rows]
    };

    Summary summary(const Item& item, float* memory) const {
        const int64_t rows = item.queries * group_;
        return {memory, memory + rows * width_, memory + rows * (width_ + 1)};
    }

    void clear(const Item& item, const Summary& whole) const {
        const int64_t rows = item.queries * group_;
        std::fill_n(whole.sums, rows * width_, 0.0f);
        std::fill_n(whole.total, rows, 0.0f);
        std::fill_n(whole.largest, rows, -std::numeric_limits<float>::infinity());
    }

    void summarise(const Item& item, const Item* next, int64_t start, const Summary& out) const {
        static thread_local Scratch query_scratch, score_scratch, weight_scratch;
        const int64_t rows = item.queries * group_;
        X* queries = query_scratch.get<X>(rows * width_);
        float* scores = score_scratch.get<float>(rows * CHUNK);
        X* weights = weight_scratch.get<X>(rows * CHUNK + PAIR);
        if (cache_.block_size() < PAIR)  // half of a pair is nobody's
            std::memset(static_cast<void*>(weights), 0, (rows * CHUNK + PAIR) * sizeof(X));
        const int64_t begin = std::max(start, first_key(position(item, 0)));
        const int64_t end = std::min(start + CHUNK, position(item, item.queries - 1) + 1);
        copy_queries(item, queries);
        score(item, queries, rows, start, begin, end, scores);
        weigh(item, rows, start, begin, end, scores, weights, out);
        gather(item, next, rows, start, begin, end, weights, out.sums);
    }

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
    static int64_t bytes_between(const S* from, const S* to) {
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
        const int64_t keys = cache_.tile_keys(), values_ahead = bytes_between(cache_.k, cache_.v);
        const E* vectors[CHUNK / W];
        E* const wide = widened(WIDENED * width_ + CACHE_SLACK);
        int64_t count = 0, first_key = begin / keys * keys;  // of the vectors
        const auto multiply_all = [&](float* out, int64_t stride) {
            // While a tile of keys is read, the values of the same tokens are prefetched: they lie alike.
            const Columns<E> w{vectors, keys * PAIR, width_ / PAIR, ROUNDED ? 0 : values_ahead};
            for_piece_rows<X>(rows, [&](int64_t first, int some) {
                multiply_pieces(some, queries + first * width_, width_, w, count, out + first * stride, stride, false);
            });
            count = 0;
        };
        for (int64_t key = first_key; key < end; key += keys) {
            const S* stored = cache_.key(slot(item, key), item.kv_head);
            const E* tile = operands(stored, keys * width_, wide + count * W * width_, values_ahead);
            for (int lane = 0; lane < LANES; lane += W) vectors[count++] = tile + lane * PAIR;
            if (ROUNDED && count == WIDENED / W) {
                multiply_all(scores + first_key - start, CHUNK);
                first_key = key + keys;
            }
            if (keys == LANES) continue;
            // A small block: the lanes past its keys are garbage.
            float* few = few_scores(rows);
            multiply_all(few, LANES);
            for (int64_t r = 0; r < rows; ++r) std::copy_n(few + r * LANES, keys, scores + r * CHUNK + key - start);
        }
        if (count) multiply_all(scores + first_key - start, CHUNK);
    }

    // Room for keys or values on their way to the inner loop; none if they are read where they lie.
    static E* widened(int64_t elements) {
        static thread_local Scratch scratch;
        return ROUNDED ? scratch.get<E>(elements) : nullptr;
    }

    // Elements of the cache as the inner loop reads them: where they lie, or widened.
    // ahead: bytes to what is prefetched.
    static const E* operands(const S* stored, int64_t count, E* wide, int64_t ahead) {
        if constexpr (ROUNDED) {
            for (int64_t i = 0; i < count; i += LANES) {
                __builtin_prefetch(reinterpret_cast<const char*>(stored + i) + ahead);
                for (int lane = 0; lane < LANES; lane += W) store(wide + i + lane, load(stored + i + lane));
            }
            return wide;
        } else {
            return stored;
        }
    }

    // out[key - start] = the scale of each key from begin to end - 1, and of the others in their blocks.
    void copy_scales(const Item& item, const float* of, int64_t start, int64_t begin, int64_t end, float* out) const {
        const int64_t size = std::min(cache_.block_size(), CHUNK);
        for (int64_t key = begin / size * size; key < end; key += size)
            std::copy_n(of + cache_.scale(slot(item, key), item.kv_head), size, out + key - start);
    }

    static float* few_scores(int64_t rows) {
        static thread_local Scratch scratch;
        return scratch.get<float>(rows * LANES);
    }

    // weights = e^(score - the row's largest in this chunk), exactly 0 for keys that a row does not see, up to the ends
    // of the blocks of the first and the last key. A key's lane is its place in the chunk, whichever other keys are
    // seen.
    void weigh(const Item& item, int64_t rows, int64_t start, int64_t begin, int64_t end, float* scores, X* weights,
               const Summary& out) const {
        const int64_t size = std::max<int64_t>(W, std::min(cache_.block_size(), CHUNK));
        const int64_t whole_begin = begin / size * size - start, whole_end = round_up(end, size) - start;
        const float scale = scoring_.scale, cap = scoring_.soft_cap;
        float key_scales[CHUNK], value_scales[CHUNK];
        if (ROUNDED) {
            copy_scales(item, cache_.k_scale, start, begin, end, key_scales);
            copy_scales(item, cache_.v_scale, start, begin, end, value_scales);
        }
        for (int64_t row = 0; row < rows; ++row) {
            float* s = scores + row * CHUNK;
            X* w = weights + row * CHUNK;
            const int64_t at = position(item, row / group_);
            const int64_t low = std::min(std::max(begin, first_key(at)), end) - start;
            const int64_t high = std::max(std::min(end, at + 1) - start, low);
            const int64_t first = low / W * W, last = round_up(high, W);
            std::memset(static_cast<void*>(w + whole_begin), 0, (first - whole_begin) * sizeof(X));
            std::memset(static_cast<void*>(w + last), 0, (whole_end - last) * sizeof(X));
            const auto seen = [&](int64_t i, Vec a, float otherwise) {
                return i >= low && i + W <= high ? a : between(int(low - i), int(high - i), a, fill(otherwise));
            };
            Vec most = fill(-std::numeric_limits<float>::infinity());
            for (int64_t i = first; i < last; i += W) {
                Vec a = load(s + i);
                if (ROUNDED) a = a * load(key_scales + i);
                a = cap != 0.0f ? hyperbolic_tangent(a * fill(scale / cap)) * fill(cap) : a * fill(scale);
                store(s + i, a);
                most = maximum(seen(i, a, -std::numeric_limits<float>::infinity()), most);
            }
            out.largest[row] = largest(most);
            const Vec relative_to = fill(out.largest[row]);
            Vec total = zero();
            for (int64_t i = first; i < last; i += W) {
                const Vec weight = seen(i, exponential(load(s + i) - relative_to), 0.0f);
                if constexpr (ROUNDED) {
                    store(w + i, seen(i, weight * load(value_scales + i), 0.0f));
                    total = total + weight;
                } else {
                    store(w + i, weight);
                    total = total + load(w + i);  // as rounded: that is what the values are weighed with
                }
            }
            out.total[row] = sum(total);
        }
    }

    // chunk_sums[row] = Σ weight · value over the chunk's keys in ascending order.
    void gather(const Item& item, const Item* next, int64_t rows, int64_t start, int64_t begin, int64_t end,
                const X* weights, float* chunk_sums) const {
        const int64_t at_once = std::min(cache_.block_size(), CHUNK), count = width_ / W;
        const int64_t length = sequences_.lengths[item.sequence], first_key = begin / at_once * at_once;
        const int64_t most_pieces = at_once < PAIR ? 1
                                    : ROUNDED      ? std::clamp<int64_t>(WIDENED / at_once, 1, PIECES)
                                                   : PIECES;
        const int64_t piece_size = std::max<int64_t>(at_once, PAIR) * width_;
        E* const wide = widened(most_pieces * piece_size);
        const E* vectors[PIECES * MAX_HEAD_DIM / W];
        int64_t ahead[PIECES];
        for (int64_t key = first_key; key < end;) {
            const int64_t from = key;
            int64_t pieces = 0;
            // Single numbers end at the last key; pairs go on to the block's end, with weights of zero.
            const int64_t steps = PAIR > 1 ? ceil_div(at_once, PAIR) : std::min(end - key, at_once);
            for (; pieces < most_pieces && key < end && (PAIR > 1 || key + steps <= end); ++pieces, key += at_once) {
                const S* stored = cache_.value(slot(item, key), item.kv_head);
                const S* upcoming = upcoming_keys(item, next, key, key - start);
                const int64_t to_upcoming = upcoming ? bytes_between(stored, upcoming) : 0;
                ahead[pieces] = ROUNDED ? 0 : to_upcoming;
                const E* values = operands(stored, steps * PAIR * width_, wide + pieces * piece_size, to_upcoming);
                // Past the sequence's end lies what a former owner of the block left: NaN perhaps, unless rounded.
                if constexpr (PAIR > 1 && !ROUNDED)
                    if (key + at_once > length) values = known_values(values, length - key, at_once);
                for (int64_t v = 0; v < count; ++v) vectors[pieces * count + v] = values + v * W * PAIR;
            }
            const Pieces<E> w{vectors, count, width_ * PAIR, steps, ahead, pieces * steps};
            for_piece_rows<X>(rows, [&](int64_t first, int some) {
                multiply_pieces(some, weights + first * CHUNK + from - start, CHUNK, w, count,
                                chunk_sums + first * width_, width_, from != first_key);
            });
        }
    }

    // A copy of the first `known` values of `count`, the others zero.
    const T* known_values(const T* values, int64_t known, int64_t count) const {
        static thread_local Scratch scratch;
        T* copy = scratch.get<T>(std::max<int64_t>(count, PAIR) * width_);
        const int64_t whole = known / PAIR * PAIR * width_, rest = known % PAIR;
        std::memcpy(copy, values, whole * sizeof(T));
        std::memset(static_cast<void*>(copy + whole), 0, (std::max<int64_t>(count, PAIR) * width_ - whole) * sizeof(T));
        if (rest)
            for (int64_t d = 0; d < width_; ++d) copy[whole + d * PAIR] = values[whole + d * PAIR];
        return copy;
    }

    // The keys to prefetch while the values of `key` are read: those of the next chunk, or of the next item.
    const S* upcoming_keys(const Item& item, const Item* next, int64_t key, int64_t into_chunk) const {
        if (key + CHUNK <= position(item, item.queries - 1)) return cache_.key(slot(item, key + CHUNK), item.kv_head);
        if (!next) return nullptr;
        const int64_t there = first_key(position(*next, 0)) / CHUNK * CHUNK + into_chunk;
        return there <= position(*next, next->queries - 1) ? cache_.key(slot(*next, there), next->kv_head) : nullptr;
    }

    // Add a chunk to those before it, both brought to the larger of their largest scores.
    void merge(const Item& item, const Summary& chunk, const Summary& whole) const {
        for (int64_t row = 0; row < item.queries * group_; ++row) {
            const float before = whole.largest[row], here = chunk.largest[row];
            if (here == -std::numeric_limits<float>::infinity()) continue;  // the row sees no key of this chunk
            const float largest = std::max(before, here);
            const float keep = std::exp(before - largest), add = std::exp(here - largest);
            whole.largest[row] = largest;
            whole.total[row] = whole.total[row] * keep + chunk.total[row] * add;
            const float* from = chunk.sums + row * width_;
            map(whole.sums + row * width_, whole.sums + row * width_, width_,
                [&](Vec a, int64_t d) { return fma(a, fill(keep), load(from + d) * fill(add)); });
        }
    }

    void write(const Item& item, const Summary& whole) const {
        for (int64_t row = 0; row < item.queries * group_; ++row) {
            float total = whole.total[row];
            if (scoring_.sinks)
                total += std::exp(scoring_.sinks[item.kv_head * group_ + row % group_] - whole.largest[row]);
            const Vec scale = fill(1.0f / total);
            map(whole.sums + row * width_, out_ + row_offset(item, row), cache_.head_dim,
                [&](Vec a, int64_t) { return a * scale; });
        }
    }

    const T* q_;
    T* out_;
    int64_t heads_, group_;
    const Cache<T, S>& cache_;
    const Sequences& sequences_;
    const Scoring& scoring_;
    int64_t width_;
};

// Few items with many keys: their chunks are divided among the threads, and then put together in order.
template <class T, class S>
void compute_by_chunks(Context& context, const Attention<T, S>& attention, const std::vector<Item>& items) {
    struct Piece {
        const Item* item;
        int64_t start, offset;
    };
    static thread_local std::vector<Piece> pieces;
    static thread_local std::vector<int64_t> offsets;
    pieces.clear();
    offsets.clear();
    int64_t size = 0;
    for (const Item& item : items) {
        offsets.push_back(size);
        const auto [first, last] = attention.chunks(item);
        for (int64_t start = first; start <= last; start += CHUNK, size += attention.summary_size(item))
            pieces.push_back({&item, start, size});
    }
    float* summaries = context.intermediate.get<float>(size);
    context.pool.run(int64_t(pieces.size()), [&, list = pieces.data()](int64_t i) {
        attention.compute_chunk(*list[i].item, list[i].start, summaries + list[i].offset);
    });
    context.pool.run(int64_t(items.size()), [&, offset = offsets.data()](int64_t i) {
        attention.combine(items[size_t(i)], summaries + offset[i]);
    });
}

}  // namespace

template <class T, class S>
void paged_attention(Context& context, const T* q, T* out, int64_t heads, const Cache<T, S>& cache,
                     const Sequences& sequences, const Scoring& scoring) {
    const Attention<T, S> attention(q, out, heads, cache, sequences, scoring);
    static thread_local std::vector<Item> items;
    items.clear();
    const int64_t step = attention.queries_per_item();
    int64_t chunks = 0;
    for (int64_t s = 0; s < sequences.count; ++s) {
        const int64_t queries = sequences.query_starts[s + 1] - sequences.query_starts[s];
        for (int64_t first = 0; first < queries; first += step)
            for (int64_t head = 0; head < cache.kv_heads; ++head) {
                items.push_back({s, head, first, std::min(step, queries - first)});
                const auto [begin, end] = attention.chunks(items.back());
                chunks += (end - begin) / CHUNK + 1;
            }
    }
    const int64_t count = int64_t(items.size());
    if (count < ITEMS_PER_THREAD * context.pool.threads() && chunks > count) {
        compute_by_chunks(context, attention, items);
        return;
    }
    context.pool.run(count, [&, items = items.data()](int64_t i) {
        attention.compute(items[i], i + 1 < count ? items + i + 1 : nullptr);
    });
}

#define LORAPLEX_ATTENTION(T, S)                                                                         \
    template void paged_attention(Context&, const T*, T*, int64_t, const Cache<T, S>&, const Sequences&, \
                                  const Scoring&);
#define LORAPLEX_ATTENTIONS(T) \
    LORAPLEX_ATTENTION(T, T)   \
    LORAPLEX_ATTENTION(T, i8)  \
    LORAPLEX_ATTENTION(T, f8)
LORAPLEX_ATTENTIONS(float)
LORAPLEX_ATTENTIONS(bf16)
LORAPLEX_ATTENTIONS(f16)
#undef LORAPLEX_ATTENTIONS
#undef LORAPLEX_ATTENTION

}  // namespace loraplex
