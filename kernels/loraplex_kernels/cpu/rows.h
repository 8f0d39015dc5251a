// Operations on each row by itself: norms, rotation, gated activations.
#pragma once

#include "attention.h"

namespace loraplex {

// out = x / sqrt(mean(x²) + eps) · weight.  x, out: [rows, c]
template <class T>
void rms_norm(Context& context, const T* x, const float* weight, T* out, int64_t rows, int64_t c, float eps);

// residual += x, then rms_norm(residual).
template <class T>
void add_rms_norm(Context& context, const T* x, T* residual, const float* weight, T* out, int64_t rows, int64_t c,
                  float eps);

// If there is a residual, it becomes residual + x, and is x from then on.
// out = (x - mean(x)) / sqrt(mean((x - mean(x))²) + eps) · weight + bias.  bias: null for none
template <class T>
void layer_norm(Context& context, const T* x, T* residual, const float* weight, const float* bias, T* out, int64_t rows,
                int64_t c, float eps);

// Weights of the norms over query and key heads; null: none.
struct QKNorm {
    const float* q;
    const float* k;
    float eps;
};

// How the first `dims` of a head are turned, pair by pair: those `dims` / 2 apart, or neighbours.
struct Rotation {
    const float* cos_sin;  // [positions, 2, dims / 2]
    int64_t dims;
    bool interleaved;
};

// qkv: [rows, (heads + 2 kv heads) · D] → q: [rows, heads, D], keys and values to the cache.
template <class T, class S>
void rotary_store_kv(Context& context, const T* qkv, T* q, int64_t rows, int64_t heads, const QKNorm& norm,
                     const int64_t* positions, const Rotation& rotation, const Cache<T, S>& cache,
                     const int64_t* slots);

enum class Activation { silu, gelu_tanh };

// out = activation(x[:, :f]) · x[:, f:].  x: [rows, 2 f]
template <class T>
void gate(Context& context, Activation activation, const T* x, T* out, int64_t rows, int64_t f);

// out[t] = Σ_j weights[t, j] · x[places[t, j]].  x: [any, c], places and weights: [rows, k], out: [rows, c]
template <class T>
void weighted_sums(Context& context, const T* x, const int64_t* places, const float* weights, T* out, int64_t rows,
                   int64_t k, int64_t c);

// out = gelu_tanh(x).  x: [rows, f]
template <class T>
void gelu_tanh(Context& context, const T* x, T* out, int64_t rows, int64_t f);

// Where x > 0: positive · x² + beta · x; elsewhere: negative · (exp(min(x, eps)) - 1 - x) + beta · x.
struct Xielu {
    float positive, negative, beta, eps;
};
template <class T>
void xielu(Context& context, const Xielu& shape, const T* x, T* out, int64_t rows, int64_t f);

}  // namespace loraplex
