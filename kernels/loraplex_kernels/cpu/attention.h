// Keys and values in blocks, and attention over them.
//
// A block of P tokens of one kv head holds its keys in tiles of KEYS = min(P, 16) tokens, each laid out like a panel of
// weights: [tiles, D / pair, KEYS, pair], so that a query multiplies 16 keys at once, each in its own lane. Its values
// lie [P / pair, D, pair]: the weights of a pair of tokens multiply 16 elements at once. D is rounded up to 16. Blocks
// are [B, kv heads, ...]. A rounded cache lies alike, a byte for each element, and has scales [B, kv heads, P] beside
// it.
#pragma once

#include "bytes.h"
#include "context.h"
#include "pieces.h"

namespace loraplex {

constexpr int64_t MAX_HEAD_DIM = 1024;
constexpr int LANES = 16;  // keys that are multiplied at once; with smaller blocks some lanes are ignored

// The cache of one layer, as the operations get it. T: what is computed with; S: what is stored, T itself, i8 or f8.
template <class T, class S = T>
struct Cache {
    S* k;
    S* v;
    int64_t block_shift, kv_heads, head_dim;  // the block size is a power of two
    float* k_scale = nullptr;
    float* v_scale = nullptr;

    static constexpr bool ROUNDED = !std::is_same_v<T, S>;
    static constexpr int PAIR = Operand<T>::pair;
    // Who allocates rounded blocks does not know T.
    static constexpr int WIDEST_PAIR = ROUNDED ? Operand<bf16>::pair : PAIR;

    int64_t width() const { return round_up(head_dim, 16); }
    int64_t block_size() const { return int64_t(1) << block_shift; }
    int64_t tile_keys() const { return block_size() < LANES ? block_size() : LANES; }
    int64_t head_size() const { return width() * std::max<int64_t>(block_size(), WIDEST_PAIR); }

    // Element d = 0 of a key; element d is at d / PAIR * tile_keys() * PAIR + d % PAIR from there.
    S* key(int64_t slot, int64_t head) const {
        const int64_t offset = slot & (block_size() - 1), within = offset & (tile_keys() - 1);
        return k + ((slot >> block_shift) * kv_heads + head) * head_size() + (offset - within) * width() +
               within * PAIR;
    }
    // Element d = 0 of a value; element d is at d * PAIR from there.
    S* value(int64_t slot, int64_t head) const {
        const int64_t offset = slot & (block_size() - 1), within = offset % PAIR;
        return v + ((slot >> block_shift) * kv_heads + head) * head_size() + (offset - within) * width() + within;
    }
    // Where the scales of a key and a value are.
    int64_t scale(int64_t slot, int64_t head) const {
        return (((slot >> block_shift) * kv_heads + head) << block_shift) + (slot & (block_size() - 1));
    }
};

// Elements to allocate beyond the blocks: a tile of few keys is read LANES keys wide.
constexpr int64_t CACHE_SLACK = LANES * 2;

// What attends to what. Arrays as in loraplex_kernels.ops.AttentionMetadata.
struct Sequences {
    int64_t count;
    const int32_t* query_starts;
    const int32_t* lengths;
    const int32_t* block_tables;
    int64_t blocks_per_table;
};

struct Scoring {
    float scale;
    float soft_cap;  // 0: none
    const float* sinks;  // [heads], scores of no key and no value; null: none
    int64_t window;  // 0: none
};

// q: [T, heads, D] → out: [T, heads · D]
template <class T, class S>
void paged_attention(Context& context, const T* q, T* out, int64_t heads, const Cache<T, S>& cache,
                     const Sequences& sequences, const Scoring& scoring);

}  // namespace loraplex
