// Matrix products on AVX2, 16 outputs as two registers. Ternary and binary codes are at most 2, so that products of bytes
// are summed in 16 bits over several pieces; 8-bit codes are widened to 16 bits first.

#if defined(__x86_64__)

#include <immintrin.h>

#include "qbert.h"

#define QB_TARGET __attribute__((target("avx2,fma")))

#define QB_WIDE 8

namespace qbert {
namespace {

#include "steps.inl"

// Keeps GCC from summing in a tree, whose leaves do not fit into the registers.
QB_INLINE void in_order(__m256i& sum) { __asm__("" : "+x"(sum)); }

constexpr long kPieces = 15;  // of 64 bytes, each at most 2048 a sum: what 16 bits hold

template <int BITS, int MR>
QB_INLINE void add_small(const uint8_t* codes, const uint8_t* x, long depth, long pieces, __m256i (&sums)[MR][2]) {
    const __m256i mask = _mm256_set1_epi8((1 << BITS % 8) - 1), ones = _mm256_set1_epi16(1);
    __m256i pairs[MR][2];
    for (int r = 0; r < MR; ++r) pairs[r][0] = pairs[r][1] = _mm256_setzero_si256();
    for (long piece = 0; piece < pieces; ++piece, codes += 64, x += 32 / BITS) {
        const __m256i left = _mm256_load_si256(reinterpret_cast<const __m256i*>(codes));
        const __m256i right = _mm256_load_si256(reinterpret_cast<const __m256i*>(codes + 32));
#pragma GCC unroll 8
        for (int q = 0; q < 8 / BITS; ++q) {
            const __m256i a = _mm256_and_si256(_mm256_srli_epi16(left, q * BITS), mask);
            const __m256i b = _mm256_and_si256(_mm256_srli_epi16(right, q * BITS), mask);
            for (int r = 0; r < MR; ++r) {
                int32_t quad;
                __builtin_memcpy(&quad, x + r * depth + q * 4, 4);
                const __m256i value = _mm256_set1_epi32(quad);
                pairs[r][0] = _mm256_add_epi16(pairs[r][0], _mm256_maddubs_epi16(a, value));
                pairs[r][1] = _mm256_add_epi16(pairs[r][1], _mm256_maddubs_epi16(b, value));
                in_order(pairs[r][0]);
                in_order(pairs[r][1]);
            }
        }
    }
    for (int r = 0; r < MR; ++r)
        for (int half = 0; half < 2; ++half)
            sums[r][half] = _mm256_add_epi32(sums[r][half], _mm256_madd_epi16(pairs[r][half], ones));
}

template <bool SIGNED>
QB_INLINE __m256i even(__m256i bytes) {
    return SIGNED ? _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8)
                  : _mm256_and_si256(bytes, _mm256_set1_epi16(255));
}

template <bool SIGNED>
QB_INLINE __m256i odd(__m256i bytes) {
    return SIGNED ? _mm256_srai_epi16(bytes, 8) : _mm256_srli_epi16(bytes, 8);
}

template <int MR, bool SIGNED>
QB_INLINE void add_bytes(const uint8_t* piece, const uint8_t* x, long depth, __m256i (&sums)[MR][2]) {
    for (int half = 0; half < 2; ++half) {
        const __m256i codes = _mm256_load_si256(reinterpret_cast<const __m256i*>(piece + half * 32));
        const __m256i codes_even = even<SIGNED>(codes), codes_odd = odd<SIGNED>(codes);
        for (int r = 0; r < MR; ++r) {
            int32_t quad;
            __builtin_memcpy(&quad, x + r * depth, 4);
            const __m256i value = _mm256_set1_epi32(quad);
            sums[r][half] = _mm256_add_epi32(sums[r][half], _mm256_madd_epi16(codes_even, even<!SIGNED>(value)));
            sums[r][half] = _mm256_add_epi32(sums[r][half], _mm256_madd_epi16(codes_odd, odd<!SIGNED>(value)));
        }
    }
}

template <int BITS, int MR, bool SIGNED>
QB_INLINE void multiply(const uint8_t* codes, const uint8_t* x, long depth, long pieces, int32_t* out) {
    __m256i sums[MR][2];
    for (int r = 0; r < MR; ++r) sums[r][0] = sums[r][1] = _mm256_setzero_si256();
    constexpr long kStep = BITS == 8 ? 1 : kPieces;
    for (long piece = 0; piece < pieces; piece += kStep) {
        const long count = pieces - piece < kStep ? pieces - piece : kStep;
        if constexpr (BITS == 8) add_bytes<MR, SIGNED>(codes + piece * 64, x + piece * 4, depth, sums);
        else add_small<BITS, MR>(codes + piece * 64, x + piece * (32 / BITS), depth, count, sums);
    }
    for (int r = 0; r < MR; ++r)
        for (int half = 0; half < 2; ++half)
            _mm256_store_si256(reinterpret_cast<__m256i*>(out + r * kLanes + half * 8), sums[r][half]);
}

#define QB_TABLES
#include "tables_avx2.inl"

#include "product_blocks.inl"

#include "attention.inl"

#include "ghost.inl"

#include "training.inl"

}  // namespace

const Kernels kAvx2Kernels = {operand_blocks, sums_blocks, linear_blocks, quantize_row,   range_row,     gelu_row,
                              relu_row,    layer_norm_row, attention_head, ghost_row,
                              ghost_gradient, dropout_row, scale_row, finish_row, linear_gradient, step_gradient,
                              softmax_codes_row, softmax_gradient_row};

}  // namespace qbert

#endif
