// Products by byte tables, for weights of 1 bit, and of 2 bits with 4-bit activations.
//
// Half a byte of a weight's row holds the codes of 4 (1 bit) or 2 (2 bits) columns, and with the activations of those
// columns known there are only 16 sums: a table of 16 bytes. Four such tables, of the four bytes of a lane, fill a
// register, and one byte permutation looks up the sums of 64 half-bytes. Two look-ups added fit a signed byte (2 x 4 x
// 15 at most), and one byte dot product with ones adds the four bytes of a lane to its int32 sum. Activations of 8 bits
// are 16 * high + low: two sets of tables, the second dot product with sixteens.
//
// Tables of one row of x: (pieces, 2 halves, sets, 64 bytes), a piece being 64 bytes of a vector of the weight.

constexpr long tables_of_piece(int sets) { return 2 * sets * 64; }

// For every byte of a table the place, in {x, -x, 0} of the 16 columns of a table, of the column that digit `place` of
// its half-byte multiplies.
template <int BITS>
struct TableIndex {
    static constexpr int kDigits = 4 / BITS;
    alignas(64) uint8_t of[2][kDigits][64];
    constexpr TableIndex() : of() {
        for (int half = 0; half < 2; ++half)
            for (int digit = 0; digit < kDigits; ++digit)
                for (int byte = 0; byte < 64; ++byte) {
                    const int code = byte % 16 >> digit * BITS & ((1 << BITS) - 1);
                    const int column = BITS == 1 ? 4 * digit + byte / 16 : 8 * half + 4 * digit + byte / 16;
                    of[half][digit][byte] = static_cast<uint8_t>(BITS == 1 ? (code ? column : 16 + column)
                                                                 : code == 2 ? column : code == 0 ? 16 + column : 32);
                }
    }
};
template <int BITS>
constexpr TableIndex<BITS> kTableIndex;

template <int BITS>
QB_INLINE __m512i table_of(__m128i x, int half) {
    const __m128i zero = _mm_setzero_si128();
    const __m512i numbers = _mm512_inserti32x4(_mm512_castsi128_si512(x), _mm_sub_epi8(zero, x), 1);
    const __m512i source = _mm512_inserti64x4(numbers, _mm256_setzero_si256(), 1);
    __m512i sum = _mm512_permutexvar_epi8(_mm512_load_si512(kTableIndex<BITS>.of[half][0]), source);
    QB_UNROLL for (int digit = 1; digit < 4 / BITS; ++digit)
        sum = _mm512_add_epi8(
                sum, _mm512_permutexvar_epi8(_mm512_load_si512(kTableIndex<BITS>.of[half][digit]), source));
    return sum;
}

template <int BITS, int SETS>
QB_TARGET void build_tables(const int8_t* x, long pieces, uint8_t* tables) {
    const __m128i low_half = _mm_set1_epi8(15);
    for (long piece = 0; piece < pieces; ++piece) {
        QB_UNROLL for (int half = 0; half < 2; ++half) {
            const int8_t* columns = x + (BITS == 1 ? piece * 32 + half * 16 : piece * 16);
            const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(columns));
            uint8_t* at = tables + (piece * 2 + half) * SETS * 64;
            if (SETS == 1) {
                _mm512_store_si512(at, table_of<BITS>(codes, half));
            } else {
                const __m128i low = _mm_and_si128(codes, low_half);
                const __m128i shifted = _mm_and_si128(_mm_srli_epi16(codes, 4), low_half);
                const __m128i high = _mm_sub_epi8(_mm_xor_si128(shifted, _mm_set1_epi8(8)), _mm_set1_epi8(8));
                _mm512_store_si512(at, table_of<BITS>(low, half));
                _mm512_store_si512(at + 64, table_of<BITS>(high, half));
            }
        }
    }
}

// Block.x are the tables of the first row, Block.depth bytes from row to row.
template <int SETS, int MR, int NV>
QB_TARGET __attribute__((noinline)) void table_product(const Block& b, const Target& t) {
    __m512i sums[MR][NV];
    QB_UNROLL for (int r = 0; r < MR; ++r) QB_UNROLL for (int v = 0; v < NV; ++v) sums[r][v] = _mm512_setzero_si512();
    const __m512i low_half = _mm512_set1_epi8(15), tables = _mm512_set1_epi32(0x30201000);
    const __m512i ones = _mm512_set1_epi8(1), sixteens = _mm512_set1_epi8(16);
    for (long chunk = 0; chunk < b.chunks; ++chunk) {
        __m512i low[NV], high[NV];
        QB_UNROLL for (int v = 0; v < NV; ++v) {
            __builtin_prefetch(b.next + v * b.vector_bytes + chunk * 64);
            const __m512i piece = _mm512_load_si512(b.codes + v * b.vector_bytes + chunk * 64);
            low[v] = _mm512_ternarylogic_epi32(piece, low_half, tables, 0xEA);  // (piece & 15) | table
            high[v] = _mm512_ternarylogic_epi32(_mm512_srli_epi16(piece, 4), low_half, tables, 0xEA);
        }
        QB_UNROLL for (int r = 0; r < MR; ++r) {
            const int8_t* at = b.x + r * b.depth + chunk * tables_of_piece(SETS);
            QB_UNROLL for (int set = 0; set < SETS; ++set) {
                const __m512i first = _mm512_load_si512(at + set * 64);
                const __m512i second = _mm512_load_si512(at + (SETS + set) * 64);
                QB_UNROLL for (int v = 0; v < NV; ++v) {
                    const __m512i found = _mm512_add_epi8(_mm512_permutexvar_epi8(low[v], first),
                                                          _mm512_permutexvar_epi8(high[v], second));
                    sums[r][v] = _mm512_dpbusd_epi32(sums[r][v], set ? sixteens : ones, found);
                }
            }
        }
    }
    store_sums<MR, NV>(t, sums);
}

template <int SETS>
constexpr Product kTableProducts[4][6] = {
    {table_product<SETS, 1, 1>, table_product<SETS, 1, 2>, table_product<SETS, 1, 3>, table_product<SETS, 1, 4>,
     table_product<SETS, 1, 5>, table_product<SETS, 1, 6>},
    {table_product<SETS, 2, 1>, table_product<SETS, 2, 2>, table_product<SETS, 2, 3>, table_product<SETS, 2, 4>,
     table_product<SETS, 2, 5>, table_product<SETS, 2, 6>},
    {table_product<SETS, 3, 1>, table_product<SETS, 3, 2>, table_product<SETS, 3, 3>, table_product<SETS, 3, 4>, nullptr,
     nullptr},
    {table_product<SETS, 4, 1>, table_product<SETS, 4, 2>, table_product<SETS, 4, 3>, table_product<SETS, 4, 4>, nullptr,
     nullptr},
};
