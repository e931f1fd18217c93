// Whole layers of a few rows in one call: a decode step.
//
// A row passes through some ten operations per layer, of 3 to 700 microseconds each. When Python called them one by
// one, the interpreter took a quarter of a step, as the weights evict its memory from the caches. The operations are
// the exported ones, in the order of `Decoder` in workers/model/decoder.py, which is the fallback.
#include "gemm/layers.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

namespace longreach::gemm {
namespace {

int linear(const Step& step, const bf16* x, const Weights& weight, const bf16* bias, bf16* out, long n, long k) {
    const LinearCall call{x, bias, out, weight, step.tokens, k, n, k, step.path, step.threads};
    return longreach_linear(&call);
}

void norm(const Step& step, const Layer& layer, const bf16* weight) {
    const long m = layer.hidden_size;
    const NormCall call{step.x, weight, step.normed, nullptr, step.tokens, m, m, layer.eps, step.path, step.threads};
    longreach_rms_norm(&call);
}

// Queries, keys and values of the normed rows: one product, or one of each where their weights differ in type.
int project(const Step& step, const Layer& layer) {
    const long m = layer.hidden_size, row = (layer.heads + 2 * layer.kv_heads) * layer.dim;
    if (layer.qkv[1].values == nullptr) {
        return linear(step, step.normed, layer.qkv[0], layer.qkv_bias, step.qkv, row, m);
    }
    bf16* part = step.attended;  // free until attention: the rows of a product are contiguous
    long first = 0;
    for (int i = 0; i < 3; ++i) {
        const long width = (i == 0 ? layer.heads : layer.kv_heads) * layer.dim;
        const bf16* bias = layer.qkv_bias == nullptr ? nullptr : layer.qkv_bias + first;
        if (const int status = linear(step, step.normed, layer.qkv[i], bias, part, width, m)) return status;
        for (long t = 0; t < step.tokens; ++t) {
            std::memcpy(step.qkv + t * row + first, part + t * width, width * sizeof(bf16));
        }
        first += width;
    }
    return 0;
}

// Query and key heads in place, after the queries of far regions to their own rows.
void rotate(const Step& step, const Layer& layer) {
    const long dim = layer.dim, row = (layer.heads + 2 * layer.kv_heads) * dim;
    RotateCall call{};
    call.x = step.qkv, call.weight = layer.head_norm, call.eps = layer.eps;
    call.tokens = step.tokens, call.dim = dim, call.row_stride = row, call.head_stride = call.out_head_stride = dim;
    call.path = step.path, call.threads = step.threads;
    for (int region = 2; region >= 0; --region) {
        if (step.cos[region] == nullptr) continue;
        const bool own = region == 0;
        call.out = own ? step.qkv : step.far[region - 1];
        call.heads = own ? layer.heads + layer.kv_heads : layer.heads;
        call.out_row_stride = own ? row : layer.heads * dim;
        call.cos = step.cos[region], call.sin = step.sin[region], call.cos_stride = step.cos_stride[region];
        longreach_norm_rotate(&call);
    }
}

// A row as codes; returns its scale. Equal to `quantise` in workers/kv/paged.py, also where a value is not finite: then
// the scale is not either.
float quantise(std::int8_t* codes, const bf16* row, long dim) {
    float largest = 0.0f;
    for (long i = 0; i < dim; ++i) {
        const float size = std::fabs(widen(row[i]));
        largest = size > largest || std::isnan(size) ? size : largest;
    }
    const float scale = largest / 127.0f, step = std::max(scale, FLT_MIN);
    for (long i = 0; i < dim; ++i) {
        const float code = std::nearbyint(widen(row[i]) / step);
        codes[i] = std::isfinite(code) ? std::int8_t(code) : std::int8_t(0);
    }
    return scale;
}

// Key or value heads [K, D] of a row to a slot of the cache.
void write_heads(const Layer& layer, void* cache, float* scales, const bf16* heads, long slot) {
    const long dim = layer.dim;
    for (long h = 0; h < layer.kv_heads; ++h, heads += dim) {
        const long at = h * layer.kv_head + slot * dim;
        if (scales != nullptr) {
            scales[h * layer.scale_head + slot] = quantise(static_cast<std::int8_t*>(cache) + at, heads, dim);
        } else {
            std::memcpy(static_cast<bf16*>(cache) + at, heads, dim * sizeof(bf16));
        }
    }
}

void write(const Step& step, const Layer& layer) {
    const long dim = layer.dim, row = (layer.heads + 2 * layer.kv_heads) * dim;
    for (long t = 0; t < step.tokens; ++t) {
        const bf16* keys = step.qkv + t * row + layer.heads * dim;
        write_heads(layer, layer.keys, layer.key_scales, keys, step.slots[t]);
        write_heads(layer, layer.values, layer.value_scales, keys + layer.kv_heads * dim, step.slots[t]);
    }
}

int attend(const Step& step, const Layer& layer) {
    const long dim = layer.dim, heads = layer.heads, row = (heads + 2 * layer.kv_heads) * dim;
    for (long i = 0; i < step.num_pieces; ++i) {
        const Piece& piece = step.pieces[i];
        attention::Args args = piece.args;
        for (int region = 0; region < 3; ++region) {
            const long stride = region == 0 ? row : heads * dim;
            args.q[region] = step.cos[region] == nullptr
                                 ? nullptr
                                 : (region == 0 ? step.qkv : step.far[region - 1]) + piece.row * stride;
            args.q_row[region] = stride;
            args.q_head[region] = dim;
        }
        args.out = step.attended + piece.row * heads * dim;
        args.keys = layer.keys;
        args.values = layer.values;
        args.key_head = args.value_head = layer.kv_head;
        args.key_scales = layer.key_scales;
        args.value_scales = layer.value_scales;
        args.key_scale_head = args.value_scale_head = layer.scale_head;
        if (const int status = attention::longreach_attend(&args)) return status;
    }
    return 0;
}

// The attention half of a layer: x -> out.
int attention_half(const Step& step, const Layer& layer) {
    const long m = layer.hidden_size, dim = layer.dim;
    norm(step, layer, layer.input_norm);
    if (const int status = project(step, layer)) return status;
    rotate(step, layer);
    write(step, layer);
    if (const int status = attend(step, layer)) return status;
    return linear(step, step.attended, layer.o, layer.o_bias, step.out, m, layer.heads * dim);
}

// The experts' half of a layer: x -> out.
int experts_half(const Step& step, const Layer& layer) {
    const long m = layer.hidden_size;
    norm(step, layer, layer.post_norm);
    if (layer.all_experts > 0) {
        const int status = linear(step, step.normed, layer.router, nullptr, step.logits, layer.all_experts, m);
        if (status) return status;
        const RouteCall route{step.logits, step.chosen,     step.weights, step.tokens, layer.all_experts,
                              layer.top_k, layer.normalise, step.path,    step.threads};
        longreach_route(&route);
    }
    const ExpertsCall experts{
        step.normed, step.chosen, step.weights, step.rows,     step.out, layer.gate_up, layer.down, step.tokens,
        m,           layer.top_k, layer.first,  layer.experts, m,        layer.width,   step.path,  step.threads};
    return longreach_experts(&experts);
}

void add(const Step& step, const Layer& layer) {
    for (long i = 0; i < step.tokens * layer.hidden_size; ++i) {
        step.x[i] = narrow(widen(step.out[i]) + widen(step.x[i]));
    }
}

}  // namespace

// One half of a layer, attention (0) or experts (1), without the sum: shards reduce it first. A status of the calls.
EXPORT int longreach_half_layer(const Layer* layer, const Step* step, int half) {
    return half == 0 ? attention_half(*step, *layer) : experts_half(*step, *layer);
}

// Layers of a stage of one shard: x becomes the result. `done` counts the finished ones.
EXPORT int longreach_layers(const Layer* layers, std::int64_t count, const Step* step, std::int64_t* done) {
    for (std::int64_t i = 0; i < count; ++i) {
        if (const int status = attention_half(*step, layers[i])) return status;
        add(*step, layers[i]);
        if (const int status = experts_half(*step, layers[i])) return status;
        add(*step, layers[i]);
        __atomic_fetch_add(done, 1, __ATOMIC_RELAXED);
    }
    return 0;
}

}  // namespace longreach::gemm
