// The fused encoder: everything between token ids (or embeddings) and the last hidden state in one call.
#pragma once

#include <vector>

#include "qbert.h"

namespace qbert {

struct Layer {
    std::unique_ptr<Weight> query_key_value, output, up, down;
    LayerNorm after_attention, after_feed_forward;
};

// Packed word embedding in the checkpoint's layout, read where the caller keeps it; so are the float tables.
struct Embedding {
    Layout layout = kTwoBit;
    const uint8_t* words = nullptr;  // (V, bytes)
    const float* scale = nullptr;    // (1 or V, G)
    const float *types = nullptr, *positions = nullptr;
    long scale_rows = 1, groups = 1, group_columns = 0;
    LayerNorm norm;
};

enum Feature { kGelu = 0, kRelu = 1 };

struct Encoder {
    long hidden = 0, heads = 0, head_size = 0, intermediate = 0;
    Feature feature = kGelu;
    Activation activation;
    float scaling = 1;
    std::vector<Layer> layers;
    std::unique_ptr<Embedding> embedding;
};

// One batch of B sentences of T tokens. Tokens whose mask byte is 0 are neither read nor computed: their output is 0.
struct Batch {
    long sentences, tokens;
    const uint8_t* mask;    // (B, T) or null: every token is real
    const float* embedded;  // (B, T, C), or null and the three below
    const int64_t *words, *types, *positions;  // (B, T) each
    float* output;                             // (B, T, C)
};

void forward(const Encoder&, const Batch&, int threads);

}  // namespace qbert
