// The reference: plain loops, on every CPU. native.py leaves a CPU that has nothing better to torch.

#include "qbert.h"

#define QB_TARGET

#define QB_WIDE 4

namespace qbert {
namespace {

#include "steps.inl"

// Stored code of column `quad * 4 + j` of a row in the 64-byte pieces of a vector.
template <int BITS>
inline int stored_code(const uint8_t* codes, long quad, int lane, int j) {
    constexpr int kQuads = 8 / BITS;
    return codes[quad / kQuads * 64 + lane * 4 + j] >> quad % kQuads * BITS & ((1 << BITS) - 1);
}

template <int BITS, int MR, bool SIGNED>
void multiply(const uint8_t* codes, const uint8_t* x, long depth, long pieces, int32_t* sums) {
    for (int i = 0; i < MR * kLanes; ++i) sums[i] = 0;
    for (long quad = 0; quad < pieces * (8 / BITS); ++quad)
        for (int lane = 0; lane < kLanes; ++lane)
            for (int j = 0; j < 4; ++j) {
                const int code = stored_code<BITS>(codes, quad, lane, j);
                for (int r = 0; r < MR; ++r) {
                    const uint8_t value = x[r * depth + quad * 4 + j];
                    sums[r * kLanes + lane] += SIGNED ? static_cast<int8_t>(code) * value
                                                      : code * static_cast<int8_t>(value);
                }
            }
}

#include "product_blocks.inl"

#include "attention.inl"

#include "ghost.inl"

#include "training.inl"

}  // namespace

long attention_scratch(long tokens, long size) {
    AttentionScratch s;
    return lay_out(0, tokens, size, s);
}

const Kernels kScalarKernels = {operand_blocks, sums_blocks, linear_blocks, quantize_row,   range_row,     gelu_row,
                                relu_row,    layer_norm_row, attention_head, ghost_row,
                                ghost_gradient, dropout_row, scale_row, finish_row, linear_gradient, step_gradient,
                              softmax_codes_row, softmax_gradient_row};

}  // namespace qbert
