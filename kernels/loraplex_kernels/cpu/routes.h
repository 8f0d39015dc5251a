// The experts of each token of a mixture, and rows sorted by expert.
#pragma once

#include "context.h"
#include "lora.h"

namespace loraplex {

// From a router's logits to the experts of each token.
struct Routing {
    int64_t per_token;
    bool sigmoid;     // a score is that of a logit by itself, else its softmax
    bool normalised;  // weights are divided by their sum, which is at least `least_sum`
    float least_sum, scale;
    int64_t groups, groups_kept;  // of neighbouring experts, kept for the sum of their two best scores
};

struct Routes {
    float* weights;     // [tokens, per_token]
    int64_t* rows;      // [tokens, per_token]
    int64_t* tokens;    // [tokens · per_token], by row
    int64_t* starts;    // [experts + 1]
    int32_t* segments;  // [3, tokens · per_token]: slots (slot · experts + expert), first rows, end rows
};

// Returns the number of segments: the rows of each adapter at each expert. logits: [tokens, experts]; correction:
// [experts], added to scores to choose by, or null.
template <class T>
int64_t route(Context& context, const T* logits, const float* correction, int64_t tokens, int64_t experts,
              const Routing& routing, const Segments& adapters, const Routes& routes);

}  // namespace loraplex
