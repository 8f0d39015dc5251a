#include "routes.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace loraplex {

namespace {

constexpr int64_t ROWS_PER_CHUNK = 32;

// The index of the highest of `count` values that is not taken yet; some index, whatever the values are.
int64_t best_of(const float* values, const std::vector<char>& taken, int64_t count) {
    int64_t best = -1;
    for (int64_t i = 0; i < count; ++i)
        if (!taken[i] && (best < 0 || values[i] > values[best])) best = i;
    return best;
}

// What one token needs beside its results.
struct Scores {
    explicit Scores(int64_t experts) : score(experts), choosable(experts), group(experts), taken(experts) {}

    std::vector<float> score, choosable, group;
    std::vector<char> taken;
};

template <class T>
void score(const T* logits, int64_t experts, bool sigmoid, std::vector<float>& to) {
    for (int64_t e = 0; e < experts; ++e) to[e] = widen(logits[e]);
    if (sigmoid) {
        for (int64_t e = 0; e < experts; ++e) to[e] = 1.0f / (1.0f + std::exp(-to[e]));
        return;
    }
    const float highest = *std::max_element(to.begin(), to.begin() + experts);
    float total = 0.0f;
    for (int64_t e = 0; e < experts; ++e) total += to[e] = std::exp(to[e] - highest);
    for (int64_t e = 0; e < experts; ++e) to[e] /= total;
}

// Makes the experts of groups that are not kept the last to be chosen.
void keep_groups(const Routing& routing, int64_t experts, Scores& scores) {
    const int64_t size = experts / routing.groups;
    for (int64_t g = 0; g < routing.groups; ++g) {
        float first = -std::numeric_limits<float>::infinity(), second = first;
        for (int64_t e = g * size; e < (g + 1) * size; ++e) {
            const float value = scores.choosable[e];
            second = std::max(second, std::min(first, value));
            first = std::max(first, value);
        }
        scores.group[g] = first + second;
    }
    std::fill_n(scores.taken.begin(), routing.groups, 0);
    for (int64_t i = 0; i < routing.groups_kept; ++i)
        scores.taken[best_of(scores.group.data(), scores.taken, routing.groups)] = 1;
    for (int64_t g = 0; g < routing.groups; ++g)
        if (!scores.taken[g])
            std::fill_n(scores.choosable.begin() + g * size, size, -std::numeric_limits<float>::infinity());
}

// The experts of one token and their weights.
template <class T>
void choose(const T* logits, const float* correction, int64_t experts, const Routing& routing, Scores& scores,
            float* weights, int64_t* chosen) {
    score(logits, experts, routing.sigmoid, scores.score);
    for (int64_t e = 0; e < experts; ++e) scores.choosable[e] = scores.score[e] + (correction ? correction[e] : 0.0f);
    if (routing.groups > 1) keep_groups(routing, experts, scores);
    std::fill(scores.taken.begin(), scores.taken.end(), 0);
    float total = 0.0f;
    for (int64_t j = 0; j < routing.per_token; ++j) {
        chosen[j] = best_of(scores.choosable.data(), scores.taken, experts);
        scores.taken[chosen[j]] = 1;
        total += weights[j] = scores.score[chosen[j]];
    }
    const float divisor = routing.normalised ? std::max(total, routing.least_sum) : 1.0f;
    for (int64_t j = 0; j < routing.per_token; ++j) weights[j] = weights[j] / divisor * routing.scale;
}

}  // namespace

template <class T>
int64_t route(Context& context, const T* logits, const float* correction, int64_t tokens, int64_t experts,
              const Routing& routing, const Segments& adapters, const Routes& routes) {
    const int64_t k = routing.per_token, rows = tokens * k;
    std::vector<int64_t> chosen(rows), next(experts + 1);
    context.pool.run(ceil_div(tokens, ROWS_PER_CHUNK), [&](int64_t chunk) {
        Scores scores(experts);
        for (int64_t t = chunk * ROWS_PER_CHUNK; t < std::min(tokens, (chunk + 1) * ROWS_PER_CHUNK); ++t)
            choose(logits + t * experts, correction, experts, routing, scores, routes.weights + t * k,
                   chosen.data() + t * k);
    });
    for (int64_t expert : chosen) ++next[expert + 1];
    for (int64_t e = 0; e < experts; ++e) next[e + 1] += next[e];
    std::copy(next.begin(), next.end(), routes.starts);
    for (int64_t i = 0; i < rows; ++i) {
        routes.rows[i] = next[chosen[i]]++;
        routes.tokens[routes.rows[i]] = i / k;
    }
    if (!adapters.count) return 0;
    std::vector<int64_t> of_token(tokens, -1);
    for (int64_t g = 0; g < adapters.count; ++g)
        std::fill(of_token.begin() + adapters.starts[g], of_token.begin() + adapters.ends[g], g);
    int64_t count = 0;
    for (int64_t e = 0; e < experts; ++e)
        for (int64_t first = routes.starts[e], end; first < routes.starts[e + 1]; first = end) {
            const int64_t adapter = of_token[routes.tokens[first]];
            for (end = first + 1; end < routes.starts[e + 1] && of_token[routes.tokens[end]] == adapter;) ++end;
            if (adapter < 0) continue;
            routes.segments[count] = int32_t(adapters.slots[adapter] * experts + e);
            routes.segments[rows + count] = int32_t(first);
            routes.segments[2 * rows + count++] = int32_t(end);
        }
    return count;
}

#define INSTANTIATE(T)                                                                                          \
    template int64_t route(Context&, const T*, const float*, int64_t, int64_t, const Routing&, const Segments&, \
                           const Routes&);
INSTANTIATE(float)
INSTANTIATE(bf16)
INSTANTIATE(f16)

}  // namespace loraplex
