// Products of 1-bit weights with activations of 1 or 2 bits: and, count, add. Bit p of the activation codes, in the
// order of columns that the weight has, is a plane of one 32-bit word per piece of 32 columns. The planes weigh 1 and 2,
// the highest -1 or -2 where codes are signed; what a stored 0 stands for (-1) is in the correction of `store_sums`.
// Activations of -1 and +1 alone (PLANES 0) have one plane, 1 for -1: where it differs from the weight's bit the product
// is +1, otherwise -1, so a sum is twice the count of differences less the number of columns. Pads are equal: 0 and 0.
//
// Planes of one row of x: (pieces, planes) words.

template <int PLANES>
constexpr int kWords = PLANES ? PLANES : 1;

template <int PLANES>
QB_TARGET void build_planes(const int8_t* x, long pieces, uint8_t* planes) {
    alignas(32) static constexpr uint8_t kOrder[32] = {0, 4, 8,  12, 16, 20, 24, 28, 1, 5, 9,  13, 17, 21, 25, 29,
                                                       2, 6, 10, 14, 18, 22, 26, 30, 3, 7, 11, 15, 19, 23, 27, 31};
    const __m256i order = _mm256_load_si256(reinterpret_cast<const __m256i*>(kOrder));
    for (long piece = 0; piece < pieces; ++piece) {
        const __m256i codes = _mm256_permutexvar_epi8(
                order, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + piece * 32)));
        QB_UNROLL for (int p = 0; p < kWords<PLANES>; ++p) {
            const uint32_t word = _mm256_movepi8_mask(PLANES ? _mm256_slli_epi16(codes, 7 - p) : codes);
            __builtin_memcpy(planes + (piece * kWords<PLANES> + p) * 4, &word, 4);
        }
    }
}

template <int PLANES, int MR, int NV>
QB_TARGET __attribute__((noinline)) void count_product(const Block& b, const Target& t) {
    __m512i sums[MR][NV], upper[MR][NV];
    QB_UNROLL for (int r = 0; r < MR; ++r) QB_UNROLL for (int v = 0; v < NV; ++v)
        sums[r][v] = upper[r][v] = _mm512_setzero_si512();
    for (long chunk = 0; chunk < b.chunks; ++chunk) {
        __m512i piece[NV];
        QB_UNROLL for (int v = 0; v < NV; ++v) {
            __builtin_prefetch(b.next + v * b.vector_bytes + chunk * 64);
            piece[v] = _mm512_load_si512(b.codes + v * b.vector_bytes + chunk * 64);
        }
        QB_UNROLL for (int r = 0; r < MR; ++r) QB_UNROLL for (int p = 0; p < kWords<PLANES>; ++p) {
            int32_t word;
            __builtin_memcpy(&word, b.x + r * b.depth + (chunk * kWords<PLANES> + p) * 4, 4);
            const __m512i plane = _mm512_set1_epi32(word);
            QB_UNROLL for (int v = 0; v < NV; ++v) {
                __m512i& sum = p + 1 == PLANES ? upper[r][v] : sums[r][v];
                const __m512i found = PLANES ? _mm512_and_si512(piece[v], plane) : _mm512_xor_si512(piece[v], plane);
                sum = _mm512_add_epi32(sum, _mm512_popcnt_epi32(found));
            }
        }
    }
    QB_UNROLL for (int r = 0; r < MR; ++r) QB_UNROLL for (int v = 0; v < NV; ++v) {
        // Twice the sum of codes where the weight is +1: planes weigh 2, 4, ...
        const __m512i high = PLANES == 2 ? _mm512_add_epi32(upper[r][v], upper[r][v]) : upper[r][v];
        const __m512i sum = t.is_signed ? _mm512_sub_epi32(sums[r][v], high) : _mm512_add_epi32(sums[r][v], high);
        sums[r][v] = _mm512_add_epi32(sum, sum);
    }
    store_sums<MR, NV>(t, sums);
}

// Two planes keep twice the sums: 2 vectors at a time.
template <int PLANES>
constexpr Product kCountProducts[4][6] = {
    {count_product<PLANES, 1, 1>, count_product<PLANES, 1, 2>, count_product<PLANES, 1, 3>, count_product<PLANES, 1, 4>,
     count_product<PLANES, 1, 5>, count_product<PLANES, 1, 6>},
    {count_product<PLANES, 2, 1>, count_product<PLANES, 2, 2>, count_product<PLANES, 2, 3>, count_product<PLANES, 2, 4>,
     count_product<PLANES, 2, 5>, count_product<PLANES, 2, 6>},
    {count_product<PLANES, 3, 1>, count_product<PLANES, 3, 2>, count_product<PLANES, 3, 3>, count_product<PLANES, 3, 4>,
     nullptr, nullptr},
    {count_product<PLANES, 4, 1>, count_product<PLANES, 4, 2>, count_product<PLANES, 4, 3>, count_product<PLANES, 4, 4>,
     nullptr, nullptr},
};
constexpr Product kCountTwoProducts[4][2] = {
    {count_product<2, 1, 1>, count_product<2, 1, 2>},
    {count_product<2, 2, 1>, count_product<2, 2, 2>},
    {count_product<2, 3, 1>, count_product<2, 3, 2>},
    {count_product<2, 4, 1>, count_product<2, 4, 2>},
};
