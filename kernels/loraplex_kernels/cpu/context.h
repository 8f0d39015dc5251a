// What every operation needs: the threads and the memory. One per backend object.
#pragma once

#include "memory.h"
#include "pool.h"

namespace loraplex {

struct Context {
    explicit Context(int threads) : pool(threads) {}

    Arena arena;
    Pool pool;
    Scratch inputs;  // the caller's: what one operation prepares for all its chunks
    Scratch tiles;
    Scratch intermediate;
};

// Contiguous rows in the type and width that the inner loop reads.
template <class X>
struct Rows {
    const X* data;
    int64_t stride;
};

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
constexpr int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

}  // namespace loraplex
