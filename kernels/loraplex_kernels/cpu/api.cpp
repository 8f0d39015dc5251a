// The plain C face of the library: what kernels/loraplex_kernels/cpu/library.py declares to ctypes.
//
// Pointers are to host memory, arrays are contiguous, dtypes are 0 float32, 1 bfloat16, 2 float16. Functions that can
// run out of memory return null or a status other than 0; nothing throws across this border.

#include <new>

#include "attention.h"
#include "integer_linear.h"
#include "linear.h"
#include "lora.h"
#include "quantized.h"
#include "routes.h"
#include "rows.h"
#include "sampling.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace loraplex;

namespace {

template <class T>
struct Of {
    using Type = T;
};

// f(Of<T>) for the T that a dtype stands for.
template <class F>
auto with_type(int dtype, F f) {
    switch (dtype) {
        case 0: return f(Of<float>{});
        case 1: return f(Of<bf16>{});
        default: return f(Of<f16>{});
    }
}

// f(cache) for the cache of a T that `stored` names: 0 as it is, 1 signed bytes, 2 float8 e4m3.
template <class T, class F>
void with_cache(int stored, void* k, void* v, float* k_scale, float* v_scale, int64_t block_shift, int64_t kv_heads,
                int64_t head_dim, F f) {
    const auto of = [&](auto* as) {
        using S = std::remove_pointer_t<decltype(as)>;
        f(Cache<T, S>{static_cast<S*>(k), static_cast<S*>(v), block_shift, kv_heads, head_dim, k_scale, v_scale});
    };
    switch (stored) {
        case 0: return of(static_cast<T*>(nullptr));
        case 1: return of(static_cast<i8*>(nullptr));
        default: return of(static_cast<f8*>(nullptr));
    }
}

template <class F>
int guarded(F f) noexcept {
    try {
        f();
        return 0;
    } catch (const std::exception&) {
        return 1;
    }
}

template <class F>
auto created(F f) noexcept -> decltype(f()) {
    try {
        return f();
    } catch (const std::exception&) {
        return nullptr;
    }
}

// A linear of any dtype, dense or quantised, behind one handle.
struct AnyLinear {
    virtual ~AnyLinear() = default;
    virtual void apply(Context& context, const void* x, void* y, int64_t rows) const = 0;
    // Of several like this one.
    virtual void apply_group(Context& context, const AnyLinear* const* experts, int64_t count, const int64_t* starts,
                             const void* x, void* y) const = 0;
    virtual void unpack(int64_t first, int64_t last, float* out) const = 0;
    virtual int64_t bytes() const = 0;
};

// L: Linear, QuantizedLinear or IntegerLinear of T
template <class T, class L>
struct TypedLinear final : AnyLinear {
    template <class... Arguments>
    explicit TypedLinear(Arguments&&... arguments) : linear(std::forward<Arguments>(arguments)...) {}
    void apply(Context& context, const void* x, void* y, int64_t rows) const override {
        linear.apply(context, static_cast<const T*>(x), static_cast<T*>(y), rows);
    }
    void apply_group(Context& context, const AnyLinear* const* experts, int64_t count, const int64_t* starts,
                     const void* x, void* y) const override {
        static thread_local std::vector<const L*> list;
        list.clear();
        for (int64_t e = 0; e < count; ++e) list.push_back(&static_cast<const TypedLinear*>(experts[e])->linear);
        L::apply_group(context, list.data(), count, starts, static_cast<const T*>(x), static_cast<T*>(y));
    }
    void unpack(int64_t first, int64_t last, float* out) const override { linear.unpack(first, last, out); }
    int64_t bytes() const override { return linear.bytes(); }

    L linear;
};

template <class T>
AnyLinear* create_quantized(Context& context, int codec, const QuantizedMatrix& matrix, const T* bias) {
    switch (codec) {
        case 0: return new TypedLinear<T, QuantizedLinear<T, TableCodec>>(context, matrix, bias);
        case 1: return new TypedLinear<T, QuantizedLinear<T, SignedCodec>>(context, matrix, bias);
        default: return new TypedLinear<T, QuantizedLinear<T, Float8Codec>>(context, matrix, bias);
    }
}

}  // namespace

// Changes with any signature or meaning here, so that a library left from an older build is not called.
EXPORT int loraplex_version() { return 22; }

EXPORT Context* loraplex_context_create(int threads) {
    return created([&] { return new Context(threads); });
}

EXPORT void loraplex_context_destroy(Context* context) { delete context; }

EXPORT void loraplex_advise_huge_pages(void* begin, int64_t bytes) { advise_huge_pages(begin, size_t(bytes)); }

// weights: `count` matrices of c columns and rows[i] rows, one above the other. bias: of all rows, or null.
EXPORT AnyLinear* loraplex_linear_create(Context* context, int dtype, int64_t c, int64_t count, const int64_t* rows,
                                         const void* const* weights, const void* bias) {
    return created([&] {
        return with_type(dtype, [&](auto of) -> AnyLinear* {
            using T = typename decltype(of)::Type;
            std::vector<WeightRows<T>> list;
            for (int64_t i = 0; i < count; ++i) list.push_back({static_cast<const T*>(weights[i]), rows[i]});
            return new TypedLinear<T, Linear<T>>(*context, c, list, static_cast<const T*>(bias));
        });
    });
}

// codec: 0 entries of a table of 16, 1 signed bytes, 2 float8 e4m3. scale and offset: of these values, [groups, n], and
// their units, as QuantizedMatrix has them; order: [c]; all but scale may be null, and so may table for other codecs.
EXPORT AnyLinear* loraplex_quantized_create(Context* context, int dtype, int codec, int64_t n, int64_t c,
                                            const uint8_t* codes, const float* table, int64_t group, const float* scale,
                                            const float* offset, int minima, const float* scale_unit,
                                            const float* offset_unit, const int64_t* order, const void* bias) {
    return created([&] {
        const QuantizedMatrix matrix{n,      c,           codes,      table,       group, scale,
                                     offset, minima != 0, scale_unit, offset_unit, order};
        return with_type(dtype, [&](auto of) -> AnyLinear* {
            return create_quantized(*context, codec, matrix, static_cast<const typename decltype(of)::Type*>(bias));
        });
    });
}

// scale: [n]. rounding: of inputs, 0 symmetric or 1 not, row by row; 2 by these two for all rows. bias: [n], or null.
EXPORT AnyLinear* loraplex_integer_create(Context* context, int dtype, int64_t n, int64_t c, const int8_t* weights,
                                          const float* scale, int rounding, float input_scale, float input_zero,
                                          const void* bias) {
    return created([&] {
        const ByteMatrix matrix{n, c, weights, scale, {InputRounding::Kind(rounding), input_scale, input_zero}};
        return with_type(dtype, [&](auto of) -> AnyLinear* {
            using T = typename decltype(of)::Type;
            return new TypedLinear<T, IntegerLinear<T>>(*context, matrix, static_cast<const T*>(bias));
        });
    });
}

EXPORT void loraplex_linear_destroy(AnyLinear* linear) { delete linear; }

// Called by any thread.
EXPORT void loraplex_linear_unpack(const AnyLinear* linear, float* out, int64_t first, int64_t last) {
    linear->unpack(first, last, out);
}

EXPORT int64_t loraplex_linear_bytes(const AnyLinear* linear) { return linear->bytes(); }

EXPORT int loraplex_linear(Context* context, const AnyLinear* linear, const void* x, void* y, int64_t rows) {
    return guarded([&] { linear->apply(*context, x, y, rows); });
}

// experts: `count` linears of one dtype, shape and kind, and of one codec. x: sorted by expert, rows starts[e] …
// starts[e + 1] - 1 are e's.
EXPORT int loraplex_grouped_linear(Context* context, const AnyLinear* const* experts, int64_t count,
                                   const int64_t* starts, const void* x, void* y) {
    return guarded([&] { experts[0]->apply_group(*context, experts, count, starts, x, y); });
}

// Returns the number of segments, as `route` has it, or -1 without memory.
EXPORT int64_t loraplex_route(Context* context, int dtype, const void* logits, const float* correction, int64_t tokens,
                              int64_t experts, int64_t per_token, int sigmoid, int normalised, float least_sum,
                              float scale, int64_t groups, int64_t groups_kept, int64_t adapters, const int32_t* slots,
                              const int32_t* starts, const int32_t* ends, float* weights, int64_t* rows,
                              int64_t* row_tokens, int64_t* row_starts, int32_t* segments) {
    int64_t count = -1;
    const int failed = guarded([&] {
        count = with_type(dtype, [&](auto of) {
            using T = typename decltype(of)::Type;
            const Routing routing{per_token, sigmoid != 0, normalised != 0, least_sum, scale, groups, groups_kept};
            return route(*context, static_cast<const T*>(logits), correction, tokens, experts, routing,
                         Segments{adapters, slots, starts, ends},
                         Routes{weights, rows, row_tokens, row_starts, segments});
        });
    });
    return failed ? -1 : count;
}

EXPORT int loraplex_weighted_sums(Context* context, int dtype, const void* x, const int64_t* places,
                                  const float* weights, void* out, int64_t rows, int64_t k, int64_t c) {
    return guarded([&] {
        with_type(dtype, [&](auto of) {
            using T = typename decltype(of)::Type;
            weighted_sums(*context, static_cast<const T*>(x), places, weights, static_cast<T*>(out), rows, k, c);
        });
    });
}

// parts: [count, 4] of rank_start, rank, out_start, n. affine: [2, affine_n], or null. Called by any thread.
EXPORT AnyLora* loraplex_lora_create(Context* context, int dtype, int64_t in_features, const void* a, int64_t rank,
                                     int64_t count, const int64_t* parts, const void* const* b, const float* affine,
                                     int64_t affine_n) {
    return created([&] {
        std::vector<LoraPart> list;
        for (int64_t i = 0; i < count; ++i, parts += 4) list.push_back({parts[0], parts[1], parts[2], parts[3]});
        return with_type(dtype, [&](auto of) -> AnyLora* {
            using T = typename decltype(of)::Type;
            return new LoraAdapter<T>(context->arena, in_features, static_cast<const T*>(a), rank, list,
                                      reinterpret_cast<const T* const*>(b), affine, affine_n);
        });
    });
}

EXPORT void loraplex_lora_destroy(AnyLora* adapter) { delete adapter; }

EXPORT int64_t loraplex_lora_bytes(const AnyLora* adapter) { return adapter->bytes(); }

// adapters: by slot, each of this dtype and of these features, or null.
EXPORT int loraplex_lora(Context* context, int dtype, const AnyLora* const* adapters, int64_t in_features,
                         int64_t out_features, const void* x, void* y, int64_t rows, int64_t segments,
                         const int32_t* slots, const int32_t* starts, const int32_t* ends) {
    return guarded([&] {
        with_type(dtype, [&](auto of) {
            using T = typename decltype(of)::Type;
            segmented_lora(*context, adapters, in_features, out_features, static_cast<const T*>(x), static_cast<T*>(y),
                           rows, Segments{segments, slots, starts, ends});
        });
    });
}

EXPORT int loraplex_rms_norm(Context* context, int dtype, const void* x, const float* weight, void* out, int64_t rows,
                             int64_t c, float eps) {
    return guarded([&] {
        with_type(dtype, [&](auto of) {
            using T = typename decltype(of)::Type;
            rms_norm(*context, static_cast<const T*>(x), weight, static_cast<T*>(out), rows, c, eps);
        });
    });
}

EXPORT int loraplex_add_rms_norm(Context* context, int dtype, const void* x, void* residual, const float* weight,
                                 void* out, int64_t rows, int64_t c, float eps) {
    return guarded([&] {
        with_type(dtype, [&](auto of) {
            using T = typename decltype(of)::Type;
            add_rms_norm(*context, static_cast<const T*>(x), static_cast<T*>(residual), weight, static_cast<T*>(out),
                         rows, c, eps);
        });
    });
}

EXPORT int loraplex_layer_norm(Context* context, int dtype, const void* x, void* residual, const float* weight,
                               const float* bias, void* out, int64_t rows, int64_t c, float eps) {
    return guarded([&] {
        with_type(dtype, [&](auto of) {
            using T = typename decltype(of)::Type;
            layer_norm(*context, static_cast<const T*>(x), static_cast<T*>(residual), weight, bias,
                       static_cast<T*>(out), rows, c, eps);
        });
    });
}

EXPORT int loraplex_gelu_tanh(Context* context, int dtype, const void* x, void* out, int64_t rows, int64_t f) {
    return guarded([&] {
        with_type(dtype, [&](auto of) {
            using T = typename decltype(of)::Type;
            gelu_tanh(*context, static_cast<const T*>(x), static_cast<T*>(out), rows, f);
        });
    });
}

EXPORT int loraplex_xielu(Context* context, int dtype, float positive, float negative, float beta, float eps,
                          const void* x, void* out, int64_t rows, int64_t f) {
    return guarded([&] {
        with_type(dtype, [&](auto of) {
            using T = typename decltype(of)::Type;
            xielu(*context, Xielu{positive, negative, beta, eps}, static_cast<const T*>(x), static_cast<T*>(out), rows,
                  f);
        });
    });
}

EXPORT int loraplex_gate(Context* context, int dtype, int activation, const void* x, void* out, int64_t rows,
                         int64_t f) {
    return guarded([&] {
        with_type(dtype, [&](auto of) {
            using T = typename decltype(of)::Type;
            gate(*context, Activation(activation), static_cast<const T*>(x), static_cast<T*>(out), rows, f);
        });
    });
}

// Elements of the keys, and of the values, of one head in one block. A block holds 2^block_shift tokens. Those of a
// rounded cache, whatever is computed with, are as many as of bfloat16.
EXPORT int64_t loraplex_cache_head_size(int dtype, int64_t block_shift, int64_t head_dim) {
    return with_type(dtype, [&](auto of) {
        return Cache<typename decltype(of)::Type>{nullptr, nullptr, block_shift, 1, head_dim}.head_size();
    });
}

EXPORT int loraplex_rotary_store_kv(Context* context, int dtype, const void* qkv, void* q, int64_t rows, int64_t heads,
                                    int64_t kv_heads, int64_t head_dim, const float* q_norm, const float* k_norm,
                                    float eps, const int64_t* positions, const float* cos_sin, int64_t rotary_dim,
                                    int interleaved, int stored, void* k, void* v, float* k_scale, float* v_scale,
                                    int64_t block_shift, const int64_t* slots) {
    return guarded([&] {
        with_type(dtype, [&](auto of) {
            using T = typename decltype(of)::Type;
            with_cache<T>(stored, k, v, k_scale, v_scale, block_shift, kv_heads, head_dim, [&](const auto& cache) {
                rotary_store_kv(*context, static_cast<const T*>(qkv), static_cast<T*>(q), rows, heads,
                                QKNorm{q_norm, k_norm, eps}, positions, Rotation{cos_sin, rotary_dim, interleaved != 0},
                                cache, slots);
            });
        });
    });
}

EXPORT int loraplex_paged_attention(Context* context, int dtype, const void* q, void* out, int64_t heads,
                                    int64_t kv_heads, int64_t head_dim, int stored, void* k, void* v, float* k_scale,
                                    float* v_scale, int64_t block_shift, int64_t sequences, const int32_t* query_starts,
                                    const int32_t* lengths, const int32_t* block_tables, int64_t blocks_per_table,
                                    float scale, float soft_cap, int64_t window, const float* sinks) {
    return guarded([&] {
        with_type(dtype, [&](auto of) {
            using T = typename decltype(of)::Type;
            with_cache<T>(stored, k, v, k_scale, v_scale, block_shift, kv_heads, head_dim, [&](const auto& cache) {
                paged_attention(*context, static_cast<const T*>(q), static_cast<T*>(out), heads, cache,
                                Sequences{sequences, query_starts, lengths, block_tables, blocks_per_table},
                                Scoring{scale, soft_cap, sinks, window});
            });
        });
    });
}

EXPORT int loraplex_mask_logits(Context* context, float* logits, int64_t vocabulary, int64_t count,
                                const int64_t* row_ids, const uint32_t* bits, int64_t words) {
    return guarded([&] { mask_logits(*context, logits, vocabulary, count, row_ids, bits, words); });
}

EXPORT int loraplex_penalise(Context* context, float* logits, int64_t vocabulary, int64_t count, const int64_t* row_ids,
                             const int64_t* starts, const int64_t* token_ids, const int64_t* counts,
                             const double* repetition, const double* presence, const double* frequency) {
    return guarded([&] {
        penalise(*context, logits, vocabulary,
                 Penalties{count, row_ids, starts, token_ids, counts, repetition, presence, frequency});
    });
}

EXPORT int loraplex_mark(Context* context, float* logits, int64_t vocabulary, int64_t count, const int64_t* row_ids,
                         const uint64_t* seeds, const uint64_t* limits, const float* deltas) {
    return guarded([&] { mark(*context, logits, vocabulary, Watermarks{count, row_ids, seeds, limits, deltas}); });
}

EXPORT int loraplex_draw_tokens(Context* context, float* logits, int64_t rows, int64_t vocabulary,
                                const double* temperatures, const int64_t* top_k, const double* top_p,
                                const double* min_p, const double* typical_p, const double* numbers, int64_t* tokens) {
    return guarded([&] {
        draw_tokens(*context, logits, rows, vocabulary, Draws{temperatures, top_k, top_p, min_p, typical_p, numbers},
                    tokens);
    });
}

EXPORT int loraplex_likelihoods(Context* context, const float* logits, int64_t rows, int64_t vocabulary, int64_t asked,
                                const int64_t* token_ids, float* logprobs, int64_t* ranks, int64_t count,
                                int64_t* top_ids, float* top_logprobs) {
    return guarded([&] {
        likelihoods(*context, logits, rows, vocabulary,
                    Likelihoods{asked, token_ids, logprobs, ranks, count, top_ids, top_logprobs});
    });
}
