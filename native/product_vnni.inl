// Kernels on 256-bit byte dot products, 16 outputs as two registers. Needs QB_TARGET, QB_DOT and QB_KERNELS, their name.

#include "steps.inl"

template <int BITS, int MR, bool SIGNED>
QB_INLINE void multiply(const uint8_t* codes, const uint8_t* x, long depth, long pieces, int32_t* out) {
    const __m256i mask = _mm256_set1_epi8((1 << BITS % 8) - 1);
    __m256i sums[MR][2];
    for (int r = 0; r < MR; ++r) sums[r][0] = sums[r][1] = _mm256_setzero_si256();
    for (long piece = 0; piece < pieces; ++piece, codes += 64, x += 32 / BITS) {
        const __m256i* halves = reinterpret_cast<const __m256i*>(codes);
        const __m256i left = _mm256_load_si256(halves), right = _mm256_load_si256(halves + 1);
#pragma GCC unroll 8
        for (int q = 0; q < 8 / BITS; ++q) {
            const __m256i a = BITS == 8 ? left : _mm256_and_si256(_mm256_srli_epi16(left, q * BITS), mask);
            const __m256i b = BITS == 8 ? right : _mm256_and_si256(_mm256_srli_epi16(right, q * BITS), mask);
            for (int r = 0; r < MR; ++r) {
                int32_t quad;
                __builtin_memcpy(&quad, x + r * depth + q * 4, 4);
                const __m256i value = _mm256_set1_epi32(quad);
                sums[r][0] = SIGNED ? QB_DOT(sums[r][0], value, a) : QB_DOT(sums[r][0], a, value);
                sums[r][1] = SIGNED ? QB_DOT(sums[r][1], value, b) : QB_DOT(sums[r][1], b, value);
            }
        }
    }
    for (int r = 0; r < MR; ++r)
        for (int half = 0; half < 2; ++half)
            _mm256_store_si256(reinterpret_cast<__m256i*>(out + r * kLanes + half * 8), sums[r][half]);
}

#include "product_blocks.inl"

#include "attention.inl"

#include "ghost.inl"

#include "training.inl"

const Kernels kKernels = {operand_blocks, sums_blocks, linear_blocks, quantize_row,   range_row,     gelu_row,
                          relu_row,       layer_norm_row, attention_head, ghost_row,
                          ghost_gradient, dropout_row, scale_row, finish_row, linear_gradient, step_gradient,
                              softmax_codes_row, softmax_gradient_row};
