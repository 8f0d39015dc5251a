#include "rows.h"

#include <algorithm>

namespace loraplex {

namespace {

constexpr int64_t ELEMENTS_PER_CHUNK = 8192;  // less is not worth waking anybody

// f(row) for every row, at least `fewest` neighbours a chunk.
template <class F>
void for_rows(Context& context, int64_t rows, int64_t elements_per_row, F f, int64_t fewest = 1) {
    const int64_t each = std::max<int64_t>(fewest, ELEMENTS_PER_CHUNK / elements_per_row);
    context.pool.run(ceil_div(rows, each), [&](int64_t chunk) {
        for (int64_t row = chunk * each; row < std::min(rows, (chunk + 1) * each); ++row) f(row);
    });
}

// 1 / sqrt(mean(x²) + eps)
template <class T>
float inverse_rms(const T* x, int64_t c, float eps) {
    Vec first = zero(), second = zero();  // two chains: the additions of one wait for each other
    int64_t i = 0;
    for (; i + 2 * W <= c; i += 2 * W) {
        const Vec a = load(x + i), b = load(x + i + W);
        first = fma(a, a, first);
        second = fma(b, b, second);
    }
    for (; i < c; i += W) {
        const Vec a = i + W <= c ? load(x + i) : load_some(x + i, int(c - i));
        first = fma(a, a, first);
    }
    return 1.0f / std::sqrt(sum(first + second) / float(c) + eps);
}

// weight[i …]: W of them, or what is left of c
inline Vec weights_at(const float* weight, int64_t i, int64_t c) {
    return i + W <= c ? load(weight + i) : load_some(weight + i, int(c - i));
}

template <class In, class Out>
void norm_row(const In* x, const float* weight, Out* out, int64_t c, float eps) {
    const Vec scale = fill(inverse_rms(x, c, eps));
    map(x, out, c, [&](Vec a, int64_t i) { return a * scale * weights_at(weight, i, c); });
}

// bias: null for none.
template <class T>
void layer_norm_row(const T* x, const float* weight, const float* bias, T* out, int64_t c, float eps) {
    const auto some = [&](int64_t i) {
        return i + W <= c ? load(x + i) : load_some(x + i, int(c - i));
    };
    Vec total = zero(), squares = zero();
    for (int64_t i = 0; i < c; i += W) total = total + some(i);
    const Vec mean = fill(sum(total) / float(c));
    for (int64_t i = 0; i < c; i += W) {
        const Vec apart = some(i) - mean, inside = i + W <= c ? apart : between(0, int(c - i), apart, zero());
        squares = fma(inside, inside, squares);
    }
    const Vec scale = fill(1.0f / std::sqrt(sum(squares) / float(c) + eps));
    map(x, out, c, [&](Vec a, int64_t i) {
        const Vec normed = (a - mean) * scale * weights_at(weight, i, c);
        return bias ? normed + weights_at(bias, i, c) : normed;
    });
}

template <class T>
void add_row(const T* added, T* total, int64_t c) {
    map(total, total, c,
        [&](Vec a, int64_t i) { return a + (i + W <= c ? load(added + i) : load_some(added + i, int(c - i))); });
}

// One head of d elements: norm if weight is not null, then rotate. out: float
template <class T>
void rotate_head(const T* head, const float* weight, float eps, const Rotation& rotation, int64_t position, int64_t d,
                 float* out) {
    const int64_t half = rotation.dims / 2;
    const float* cos = rotation.cos_sin + position * rotation.dims;
    const float* sin = cos + half;
    if (weight)
        norm_row(head, weight, out, d, eps);
    else
        map(head, out, d, [](Vec a, int64_t) { return a; });
    if (rotation.interleaved) {
        for (int64_t i = 0; i < half; ++i) {
            const float first = out[2 * i], second = out[2 * i + 1];
            out[2 * i] = first * cos[i] - second * sin[i];
            out[2 * i + 1] = second * cos[i] + first * sin[i];
        }
        return;
    }
    int64_t i = 0;
    for (; i + W <= half; i += W) {
        const Vec first = load(out + i), second = load(out + half + i), c = load(cos + i), s = load(sin + i);
        store(out + i, first * c - second * s);
        store(out + half + i, second * c + first * s);
    }
    for (; i < half; ++i) {
        const float first = out[i], second = out[half + i];
        out[i] = first * cos[i] - second * sin[i];
        out[half + i] = second * cos[i] + first * sin[i];
    }
}

// Spread a key over its tile, pair by pair.
template <int PAIR, class S>
void store_key(const S* head, S* key, int64_t head_dim, int64_t stride) {
    for (int64_t d = 0; d < head_dim; d += PAIR, key += stride) std::memcpy(key, head + d, PAIR * sizeof(S));
}

// Put a value beside that of its neighbour.
template <int PAIR, class S>
void store_value(const S* head, S* value, int64_t head_dim) {
    for (int64_t d = 0; d < head_dim; ++d) value[d * PAIR] = head[d];
}

inline Vec activated(Activation activation, Vec x) {
    if (activation == Activation::silu) return x / (fill(1.0f) + exponential(zero() - x));
    const Vec inner = fill(0.7978845608028654f) * fma(fill(0.044715f) * x * x, x, x);  // sqrt(2 / π)
    return fill(0.5f) * x * (fill(1.0f) + hyperbolic_tangent(inner));
}

// Source: arXiv 2411.13010. What only one side of 0 has is 0 on the other.
inline Vec activated(const Xielu& xielu, Vec x) {
    const Vec positive = maximum(x, zero()), negative = minimum(x, zero());
    const Vec is_negative = fill(1.0f) - minimum(positive * fill(1e30f), fill(1.0f));
    const Vec curve = exponential(minimum(x, fill(xielu.eps))) - fill(1.0f) - negative;
    return fill(xielu.beta) * x + fill(xielu.positive) * positive * positive +
           fill(xielu.negative) * is_negative * curve;
}

}  // namespace

template <class T>
void rms_norm(Context& context, const T* x, const float* weight, T* out, int64_t rows, int64_t c, float eps) {
    for_rows(context, rows, c, [&](int64_t row) { norm_row(x + row * c, weight, out + row * c, c, eps); });
}

template <class T>
void add_rms_norm(Context& context, const T* x, T* residual, const float* weight, T* out, int64_t rows, int64_t c,
                  float eps) {
    for_rows(context, rows, c, [&](int64_t row) {
        T* total = residual + row * c;
        add_row(x + row * c, total, c);
        norm_row(total, weight, out + row * c, c, eps);
    });
}

template <class T>
void layer_norm(Context& context, const T* x, T* residual, const float* weight, const float* bias, T* out, int64_t rows,
                int64_t c, float eps) {
    for_rows(context, rows, c, [&](int64_t row) {
        const T* from = x + row * c;
        if (residual) {
            add_row(from, residual + row * c, c);
            from = residual + row * c;
        }
        layer_norm_row(from, weight, bias, out + row * c, c, eps);
    });
}

template <class T, class S>
void rotary_store_kv(Context& context, const T* qkv, T* q, int64_t rows, int64_t heads, const QKNorm& norm,
                     const int64_t* positions, const Rotation& rotation, const Cache<T, S>& cache,
                     const int64_t* slots) {
    constexpr int PAIR = Cache<T, S>::PAIR;
    const int64_t d = cache.head_dim, width = (heads + 2 * cache.kv_heads) * d;
    const int64_t key_stride = cache.tile_keys() * PAIR;
    const auto one = [&](int64_t row) {
        static thread_local Scratch wide, narrowed;
        float* turned = wide.get<float>(d);
        S* stored = narrowed.get<S>(d);
        const T* from = qkv + row * width;
        // Every pair of a key goes to a cache line of its own: fetch them while the queries are rotated.
        for (int64_t head = 0; head < cache.kv_heads; ++head)
            for (int64_t pair = 0; pair < d / PAIR; ++pair)
                __builtin_prefetch(cache.key(slots[row], head) + pair * key_stride, 1);
        for (int64_t head = 0; head < heads; ++head, from += d) {
            rotate_head(from, norm.q, norm.eps, rotation, positions[row], d, turned);
            map(turned, q + (row * heads + head) * d, d, [](Vec a, int64_t) { return a; });
        }
        for (int64_t head = 0; head < cache.kv_heads; ++head, from += d) {
            rotate_head(from, norm.k, norm.eps, rotation, positions[row], d, turned);
            if constexpr (Cache<T, S>::ROUNDED)
                cache.k_scale[cache.scale(slots[row], head)] = round_head(turned, stored, d);
            else
                map(turned, stored, d, [](Vec a, int64_t) { return a; });
            store_key<PAIR>(stored, cache.key(slots[row], head), d, key_stride);
        }
        for (int64_t head = 0; head < cache.kv_heads; ++head, from += d) {
            if constexpr (Cache<T, S>::ROUNDED) {
                map(from, turned, d, [](Vec a, int64_t) { return a; });
                cache.v_scale[cache.scale(slots[row], head)] = round_head(turned, stored, d);
                store_value<PAIR>(stored, cache.value(slots[row], head), d);
            } else {
                store_value<PAIR>(from, cache.value(slots[row], head), d);
            }
        }
    };
    // The keys of a tile share cache lines: neighbouring tokens of a prompt on different cores would take them from
    // each other. Few rows are mostly of different sequences.
    for_rows(context, rows, width, one, rows > 4 * LANES ? LANES : 1);
}

template <class T>
void gate(Context& context, Activation activation, const T* x, T* out, int64_t rows, int64_t f) {
    for_rows(context, rows, 2 * f, [&](int64_t row) {
        const T* gates = x + row * 2 * f;
        const T* ups = gates + f;
        map(gates, out + row * f, f, [&](Vec a, int64_t i) {
            return activated(activation, a) * (i + W <= f ? load(ups + i) : load_some(ups + i, int(f - i)));
        });
    });
}

template <class T>
void weighted_sums(Context& context, const T* x, const int64_t* places, const float* weights, T* out, int64_t rows,
                   int64_t k, int64_t c) {
    for_rows(context, rows, k * c, [&](int64_t row) {
        const int64_t* from = places + row * k;
        const float* factors = weights + row * k;
        map(x + from[0] * c, out + row * c, c, [&](Vec first, int64_t i) {
            Vec total = first * fill(factors[0]);
            for (int64_t j = 1; j < k; ++j) {
                const T* others = x + from[j] * c + i;
                total = fma(i + W <= c ? load(others) : load_some(others, int(c - i)), fill(factors[j]), total);
            }
            return total;
        });
    });
}

template <class T>
void gelu_tanh(Context& context, const T* x, T* out, int64_t rows, int64_t f) {
    for_rows(context, rows, f, [&](int64_t row) {
        map(x + row * f, out + row * f, f, [](Vec a, int64_t) { return activated(Activation::gelu_tanh, a); });
    });
}

template <class T>
void xielu(Context& context, const Xielu& shape, const T* x, T* out, int64_t rows, int64_t f) {
    for_rows(context, rows, f, [&](int64_t row) {
        map(x + row * f, out + row * f, f, [&](Vec a, int64_t) { return activated(shape, a); });
    });
}

#define LORAPLEX_STORE(T, S)                                                                               \
    template void rotary_store_kv(Context&, const T*, T*, int64_t, int64_t, const QKNorm&, const int64_t*, \
                                  const Rotation&, const Cache<T, S>&, const int64_t*);
#define LORAPLEX_ROWS(T)                                                                                             \
    template void rms_norm<T>(Context&, const T*, const float*, T*, int64_t, int64_t, float);                        \
    template void add_rms_norm<T>(Context&, const T*, T*, const float*, T*, int64_t, int64_t, float);                \
    template void layer_norm<T>(Context&, const T*, T*, const float*, const float*, T*, int64_t, int64_t, float);    \
    template void gelu_tanh<T>(Context&, const T*, T*, int64_t, int64_t);                                            \
    template void xielu<T>(Context&, const Xielu&, const T*, T*, int64_t, int64_t);                                  \
    LORAPLEX_STORE(T, T)                                                                                             \
    LORAPLEX_STORE(T, i8)                                                                                            \
    LORAPLEX_STORE(T, f8)                                                                                            \
    template void gate<T>(Context&, Activation, const T*, T*, int64_t, int64_t);                                     \
    template void weighted_sums<T>(Context&, const T*, const int64_t*, const float*, T*, int64_t, int64_t, int64_t);
LORAPLEX_ROWS(float)
LORAPLEX_ROWS(bf16)
LORAPLEX_ROWS(f16)
#undef LORAPLEX_ROWS
#undef LORAPLEX_STORE

}  // namespace loraplex
