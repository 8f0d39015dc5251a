// What ends a step: the logits of each row are masked and penalised, and a token is drawn from them.
//
// A row's token depends on that row alone. No row is sorted: what comes first in descending order, up to some sum, is
// found by sums over bins of neighbouring logits, then over finer bins of the one in which that sum is passed.
#pragma once

#include "context.h"

namespace loraplex {

// logits[row, v] = −inf for every v whose bit is 0.  logits: [rows, vocabulary]; bits: [count, words], of row_ids[i].
void mask_logits(Context& context, float* logits, int64_t vocabulary, int64_t count, const int64_t* row_ids,
                 const uint32_t* bits, int64_t words);

// Penalties of `count` rows for the tokens that they have had, each once: token_ids[starts[i] : starts[i + 1]] of row
// row_ids[i], and in `counts` how often the output has each. All of them are ids of the vocabulary.
struct Penalties {
    int64_t count;
    const int64_t* row_ids;
    const int64_t* starts;
    const int64_t* token_ids;
    const int64_t* counts;
    const double* repetition;
    const double* presence;
    const double* frequency;
};

// A token that was there becomes x / repetition, or x · repetition if x ≤ 0; with n > 0 times in the output it falls by
// presence + frequency · n.
void penalise(Context& context, float* logits, int64_t vocabulary, const Penalties& penalties);

// Watermarks of `count` rows: the token v of row row_ids[i] is green if the 53 highest bits of
// mix(seeds[i] + (v + 1) · c) are below limits[i], where mix is SplitMix64's finaliser and c its constant.
struct Watermarks {
    int64_t count;
    const int64_t* row_ids;
    const uint64_t* seeds;
    const uint64_t* limits;
    const float* deltas;
};

// Each green token rises by its row's delta.
void mark(Context& context, float* logits, int64_t vocabulary, const Watermarks& marks);

// How the tokens of rows are drawn, each array by row. Those that cut nothing are 0, 1, 0 and 1.
struct Draws {
    const double* temperatures;  // 0: the most likely token
    const int64_t* top_k;
    const double* top_p;
    const double* min_p;
    const double* typical_p;
    const double* numbers;  // in [0, 1)
};

// The token of each row; −1: its logits are NaN or infinite, or nothing is left.  logits: [rows, vocabulary], changed
void draw_tokens(Context& context, float* logits, int64_t rows, int64_t vocabulary, const Draws& draws,
                 int64_t* tokens);

// Of each row the log-probabilities of `asked` ≥ 1 tokens, the rank of the first of them, and the `count` ≤ vocabulary
// most likely tokens.
struct Likelihoods {
    int64_t asked;
    const int64_t* token_ids;  // [rows, asked]
    float* logprobs;           // [rows, asked]
    int64_t* ranks;            // [rows]; 1: the most likely
    int64_t count;
    int64_t* top_ids;     // [rows, count], the lower id first where two are equal
    float* top_logprobs;  // [rows, count]
};

void likelihoods(Context& context, const float* logits, int64_t rows, int64_t vocabulary, const Likelihoods& out);

}  // namespace loraplex
