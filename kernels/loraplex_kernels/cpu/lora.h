// LoRA adapters at one linear, and their products with the rows of a step.
#pragma once

#include <vector>

#include "linear.h"

namespace loraplex {

// Ranks whose rows of A are interleaved piece by piece, so that A is one stream; and the columns of a piece.
template <class T>
constexpr int RANK_GROUP = USES_TILES<typename Operand<T>::Type> ? 16 : 4;
template <class T>
constexpr int PIECE = USES_TILES<typename Operand<T>::Type> ? 2 : 32;
constexpr int SHRINK_WIDTH = 32;  // what columns of A and of x are padded to a multiple of
constexpr int64_t LORA_AHEAD = 9 << 10;  // bytes to what is prefetched; no multiple of 4 KiB, see linear.cpp

// One projection: y[:, out_start : out_start + n] += (x Aᵀ)[:, rank_start : rank_start + rank] Bᵀ
struct LoraPart {
    int64_t rank_start, rank, out_start, n;
};

// An adapter of whichever dtype.
struct AnyLora {
    virtual ~AnyLora() = default;
    virtual int64_t bytes() const = 0;
};

// One adapter as `segmented_lora` reads it. Never changes, and is made by any thread.
template <class T>
struct LoraAdapter final : AnyLora {
    // a: [rank, in_features]; b[i]: [parts[i].n, parts[i].rank]; affine: [2, affine_n] or null. Copies all.
    LoraAdapter(Arena& arena, int64_t in_features, const T* a, int64_t rank, const std::vector<LoraPart>& parts,
                const T* const* b, const float* affine, int64_t affine_n);

    struct Projection {
        LoraPart part;
        Array<T> b;  // [panels, rank, PANEL]
    };

    int64_t bytes() const override;

    int64_t rank;
    Array<T> a;  // [rank / RANK_GROUP, width / PIECE, RANK_GROUP, PIECE]; the last group has rank % RANK_GROUP
    std::vector<Projection> projections;
    Array<float> gain, offset;  // [out_features and padding]: y = gain · y + offset at last; empty: plain LoRA
};

// Rows starts[g] … ends[g] - 1 use the adapter in slots[g], for each g below `count`.
struct Segments {
    int64_t count;
    const int32_t* slots;
    const int32_t* starts;
    const int32_t* ends;
};

// y += for every row of every segment. adapters: by slot, each of dtype T or null; x: [rows, in_features],
// y: [rows, out_features].
template <class T>
void segmented_lora(Context& context, const AnyLora* const* adapters, int64_t in_features, int64_t out_features,
                    const T* x, T* y, int64_t rows, const Segments& segments);

}  // namespace loraplex
