// The fused encoder: everything between token ids (or embeddings) and the last hidden state in one call.
#pragma once

#include <vector>

#include "qbert.h"

namespace qbert {

// Places where numbers become codes.
enum Place { kInput, kQuery, kKey, kValue, kProbability, kContext, kHidden, kFeature, kPlaces };

struct Layer {
    Activation places[kPlaces];
    Buffer<float> shifts[kPlaces];
    std::unique_ptr<Weight> query_key_value;  // outputs (H, query then key then value, D)
    std::unique_ptr<Weight> output, up, down;
    LayerNorm after_attention, after_feed_forward;
    Ghosts attention_ghosts, feed_forward_ghosts;  // between a product and the residual
};

// Packed word embedding in the checkpoint's layout, read where the caller keeps it; so are the float tables.
struct Embedding {
    Layout layout = kTwoBit;
    const uint8_t* words = nullptr;  // (P, V, bytes)
    const float* scale = nullptr;    // (P, 1 or V, G)
    const float *types = nullptr, *positions = nullptr;
    long planes = 1, scale_rows = 1, groups = 1, group_columns = 0;
    long rows = 0, type_rows = 0, position_rows = 0;
    LayerNorm norm;
};

enum Function { kGelu = 0, kRelu = 1 };

struct Encoder {
    long hidden = 0, heads = 0, head_size = 0, intermediate = 0;
    Function function = kGelu;
    float scaling = 1;
    std::vector<Layer> layers;
    std::unique_ptr<Embedding> embedding;
};

// One batch of B sentences of T tokens. Tokens whose mask byte is 0 are neither read nor computed: their output is 0.
struct Batch {
    long sentences, tokens;
    const uint8_t* mask;    // (B, T) or null: every token is real
    const float* embedded;  // (B, T, C), or null and the three below
    const int64_t *words, *types, *positions;  // (B, T) each; types null: 0; positions null: counted
    int64_t padding;  // -1: positions count tokens from 0; otherwise those unlike it from padding + 1, which it has itself
    float* output;                             // (B, T, C)
};

enum Status { kDone = 0, kNoMemory = -1, kOutOfTable = -2, kHiddenStart = -3 };

// The k rows of y (rows, stride) that the kernels see from `row`. places: of every row in (B, T), ascending.
void find_taps(const Ghosts&, const long* places, long rows, long tokens, long row, const float* y, long stride,
               const float** taps);

// kOutOfTable: an id, type or position has no row. kHiddenStart: a sentence's first token, which heads read, is masked.
Status forward(const Encoder&, const Batch&, int threads);

}  // namespace qbert
