// Matrix products on the byte dot products of Armv8.2, 16 outputs as four registers. They take signed bytes on both
// sides: ternary and binary codes are at most 2, and of 8-bit factors the unsigned one is 128 more than its signed byte.

#if defined(__aarch64__)

#include <arm_neon.h>

#include "qbert.h"

#if defined(__ARM_FEATURE_DOTPROD)  // the compiler may use them everywhere, as on every Mac
#define QB_TARGET
#else
#define QB_TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
#endif

#define QB_NEON
#define QB_WIDE 4

namespace qbert {
namespace {

#include "steps.inl"

QB_INLINE int8x16_t quad16(const uint8_t* x) {
    int32_t quad;
    __builtin_memcpy(&quad, x, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(quad));
}

template <int BITS, int MR>
QB_INLINE void add_small(const uint8_t* piece, const uint8_t* x, long depth, int32x4_t (&sums)[MR][4]) {
    const uint8x16_t mask = vdupq_n_u8((1 << BITS) - 1);
    uint8x16_t codes[4];
    for (int j = 0; j < 4; ++j) codes[j] = vld1q_u8(piece + j * 16);
#pragma GCC unroll 8
    for (int q = 0; q < 8 / BITS; ++q) {
        int8x16_t stored[4];
        for (int j = 0; j < 4; ++j) {
            stored[j] = vreinterpretq_s8_u8(vandq_u8(codes[j], mask));
            codes[j] = vshrq_n_u8(codes[j], BITS);
        }
        for (int r = 0; r < MR; ++r) {
            const int8x16_t value = quad16(x + r * depth + q * 4);
            for (int j = 0; j < 4; ++j) sums[r][j] = vdotq_s32(sums[r][j], stored[j], value);
        }
    }
}

// `lifted`: sums of what the factor 128 belongs to, of a row or, if x is the unsigned factor, of an output.
template <int MR, bool SIGNED>
QB_INLINE void add_bytes(const uint8_t* piece, const uint8_t* x, long depth, int32x4_t (&sums)[MR][4],
                         int32x4_t (&lifted)[4]) {
    const int8x16_t lift = vdupq_n_s8(-128), ones = vdupq_n_s8(1);
    int8x16_t codes[4];
    for (int j = 0; j < 4; ++j) {
        codes[j] = vreinterpretq_s8_u8(vld1q_u8(piece + j * 16));
        if (SIGNED) lifted[j] = vdotq_s32(lifted[j], codes[j], ones);
        else codes[j] = veorq_s8(codes[j], lift);
    }
    for (int r = 0; r < MR; ++r) {
        int8x16_t value = quad16(x + r * depth);
        if (SIGNED) value = veorq_s8(value, lift);
        else lifted[r] = vdotq_s32(lifted[r], value, ones);
        for (int j = 0; j < 4; ++j) sums[r][j] = vdotq_s32(sums[r][j], codes[j], value);
    }
}

template <int BITS, int MR, bool SIGNED>
QB_INLINE void multiply(const uint8_t* codes, const uint8_t* x, long depth, long pieces, int32_t* out) {
    int32x4_t sums[MR][4], lifted[4];
    for (int j = 0; j < 4; ++j) {
        lifted[j] = vdupq_n_s32(0);
        for (int r = 0; r < MR; ++r) sums[r][j] = vdupq_n_s32(0);
    }
    for (long piece = 0; piece < pieces; ++piece) {
        if constexpr (BITS == 8) add_bytes<MR, SIGNED>(codes + piece * 64, x + piece * 4, depth, sums, lifted);
        else add_small<BITS, MR>(codes + piece * 64, x + piece * (32 / BITS), depth, sums);
    }
    for (int r = 0; r < MR; ++r)
        for (int j = 0; j < 4; ++j)
            vst1q_s32(out + r * kLanes + j * 4, vaddq_s32(sums[r][j], vshlq_n_s32(lifted[SIGNED ? j : r], 7)));
}

#include "product_blocks.inl"

#include "attention.inl"

#include "ghost.inl"

#include "training.inl"

}  // namespace

const Kernels kNeonKernels = {operand_blocks, sums_blocks, linear_blocks, quantize_row,   range_row,     gelu_row,
                              relu_row,    layer_norm_row, attention_head, ghost_row,
                              ghost_gradient, dropout_row, scale_row, finish_row, linear_gradient, step_gradient,
                              softmax_codes_row, softmax_gradient_row};

}  // namespace qbert

#endif
