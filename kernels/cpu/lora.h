// LoRA adapters resident at one linear, and their products with the rows of a step.
#pragma once

#include <memory>
#include <vector>

#include "linear.h"

namespace loraplex {

constexpr int RANK_GROUP = 4;   // ranks whose rows of A are interleaved, so that A is one stream
constexpr int DOT_LENGTH = 32;  // columns of A per interleaved piece

// One projection: y[:, out_start : out_start + n] += (x Aᵀ)[:, rank_start : rank_start + rank] Bᵀ
struct LoraPart {
    int64_t rank_start, rank, out_start, n;
};

template <class T>
class LoraTable {
  public:
    LoraTable(int64_t in_features, int64_t out_features, int64_t slots);

    // a: [rank, in_features]; b[i]: [parts[i].n, parts[i].rank]. Copies all.
    void put(Context& context, int64_t slot, const T* a, int64_t rank, const std::vector<LoraPart>& parts,
             const T* const* b);
    void remove(int64_t slot) { adapters_[slot].reset(); }

    // x: [rows, in_features], y: [rows, out_features] += . Segment g: rows starts[g] … ends[g] - 1 use slots[g].
    void apply(Context& context, const T* x, T* y, int64_t rows, int64_t segments, const int32_t* slots,
               const int32_t* starts, const int32_t* ends) const;

  private:
    using X = typename Operand<T>::Type;

    struct Projection {
        LoraPart part;
        Array<T> b;  // [panels, rank, PANEL]
    };
    struct Adapter {
        int64_t rank;
        Array<T> a;  // [rank / RANK_GROUP, width / DOT_LENGTH, RANK_GROUP, DOT_LENGTH]; the last group has rank % RANK_GROUP
        std::vector<Projection> projections;
    };

    // Some rows of one segment.
    struct Part {
        const Adapter* adapter;
        int64_t first_row, rows;
        int64_t shrunk;  // where its shrunk rows begin
    };
    // Some ranks of a part's shrink, or some panels of one projection of its expand.
    struct Piece {
        const Part* part;
        const Projection* projection;
        int64_t begin, end;
    };

    void apply_pieces(Context& context, const std::vector<Part>& parts, const X* x, float* shrunk, T* y) const;
    void shrink(const Adapter& adapter, const X* x, int64_t rows, int64_t first_rank, int64_t last_rank,
                float* out) const;
    void expand(const Projection& projection, const float* shrunk, int64_t rank, int64_t rows, int64_t first_panel,
                int64_t last_panel, T* y) const;

    int64_t c_, n_, width_;
    std::vector<std::unique_ptr<Adapter>> adapters_;
};

}  // namespace loraplex
