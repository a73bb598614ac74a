// Products of 1-bit weights by tables, with the byte shuffles of AVX2. With the activations of 4 columns known there are
// only 16 sums of those whose bit is 1: a table of 16 bytes, for which half a byte of the weight is the index. A piece of
// a vector of the weight is turned, so that the 16 outputs of byte j fill one half of a register and those of byte j + 1
// the other, each with a table of its own. Tables hold sums without sign, `bias` above the true ones, so small that the
// four look-ups of a piece, and of `run` pieces, fit a byte before they are widened. Activations of 8 bits are
// 16 * high + low: two sets of tables.
//
// Tables of one row of x: (pieces, 4 (j = 0 and 1 low half of the byte, high half; j = 2 and 3), sets, 32 bytes).

constexpr long kTableBytes = 4 * 32;  // of a piece and set

struct Lookup {
    int sets;   // 0: codes are multiplied, there are no tables
    int bias;   // of the tables of all codes, or of the high halves of 8-bit ones
    long run;   // pieces whose sums fit a byte
    int above;  // of the sums of a piece
};

inline Lookup lookup_of(const Weight& w, const Alphabet& alphabet) {
    if (w.bits != 1) return {};
    const int least = alphabet.least < 0 ? alphabet.least : 0, most = alphabet.most > 0 ? alphabet.most : 0;
    const int width = most - least > 0 ? most - least : 1;
    if (width > 15) return {2, 32, 1, 16 * 8 * 32};
    return {1, -4 * least, 255 / (16 * width), 8 * -4 * least};
}

// For every byte of two tables the column, of the 16 of its half, whose code the digit's bit adds; 0x80 adds nothing.
struct TableIndex {
    alignas(32) uint8_t of[2][4][32];
    constexpr TableIndex() : of() {
        for (int pair = 0; pair < 2; ++pair)
            for (int digit = 0; digit < 4; ++digit)
                for (int byte = 0; byte < 32; ++byte)
                    of[pair][digit][byte] =
                            byte >> digit & 1 ? static_cast<uint8_t>(4 * digit + 2 * pair + byte / 16) : 0x80;
    }
};
constexpr TableIndex kTableIndex;

QB_INLINE void store_tables(__m256i columns, int pair, int bias, uint8_t* table) {
    __m256i sum = _mm256_set1_epi8(static_cast<char>(bias));
    for (int digit = 0; digit < 4; ++digit) {
        const __m256i order = _mm256_load_si256(reinterpret_cast<const __m256i*>(kTableIndex.of[pair][digit]));
        sum = _mm256_add_epi8(sum, _mm256_shuffle_epi8(columns, order));
    }
    _mm256_store_si256(reinterpret_cast<__m256i*>(table), sum);
}

QB_TARGET static void build_tables(const Lookup& lookup, const int8_t* x, long pieces, uint8_t* tables) {
    const __m256i low_half = _mm256_set1_epi8(15), eights = _mm256_set1_epi8(8);
    for (long half = 0; half < 2 * pieces; ++half, x += 16) {
        const __m256i codes = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
        const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(codes, 4), low_half);
        const __m256i high = _mm256_sub_epi8(_mm256_xor_si256(upper, eights), eights);
        for (int pair = 0; pair < 2; ++pair) {
            uint8_t* at = tables + ((half / 2 * 2 + pair) * 2 + half % 2) * lookup.sets * 32;
            if (lookup.sets == 1) {
                store_tables(codes, pair, lookup.bias, at);
            } else {
                store_tables(_mm256_and_si256(codes, low_half), pair, 0, at);
                store_tables(high, pair, lookup.bias, at + 32);
            }
        }
    }
}

// A piece as indices: low and high halves of the bytes 0 and 1 of all outputs, then of 2 and 3. Outputs come in fours,
// in the order 0, 2, 1, 3.
QB_INLINE void indices(const uint8_t* codes, __m256i (&index)[4]) {
    const __m256i order = _mm256_broadcastsi128_si256(
            _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m256i low_half = _mm256_set1_epi8(15);
    const __m256i* halves = reinterpret_cast<const __m256i*>(codes);
    const __m256i left = _mm256_shuffle_epi8(_mm256_load_si256(halves), order);
    const __m256i right = _mm256_shuffle_epi8(_mm256_load_si256(halves + 1), order);
    const __m256i first = _mm256_permute4x64_epi64(_mm256_unpacklo_epi32(left, right), 0xD8);
    const __m256i second = _mm256_permute4x64_epi64(_mm256_unpackhi_epi32(left, right), 0xD8);
    index[0] = _mm256_and_si256(first, low_half);
    index[1] = _mm256_and_si256(_mm256_srli_epi16(first, 4), low_half);
    index[2] = _mm256_and_si256(second, low_half);
    index[3] = _mm256_and_si256(_mm256_srli_epi16(second, 4), low_half);
}

// The four look-ups of a piece in one set of tables, added to `found`.
template <int SETS>
QB_INLINE void look_up_piece(const uint8_t* tables, const __m256i (&index)[4], __m256i& found) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m256i table = _mm256_load_si256(reinterpret_cast<const __m256i*>(tables + i * SETS * 32));
        found = _mm256_add_epi8(found, _mm256_shuffle_epi8(table, index[i]));
    }
}

// Twice the sums (MR, 16) of the codes of x whose weight's bit is 1. LONG: of one set, with runs of more than a piece.
template <int SETS, bool LONG, int MR>
QB_INLINE void look_up(const uint8_t* codes, const uint8_t* tables, long row_bytes, long pieces, const Lookup& lookup,
                       int32_t* out) {
    const __m256i zero = _mm256_setzero_si256(), weights = _mm256_set1_epi16(16 << 8 | 1);
    const long run = LONG ? lookup.run : 1;
    const long most = run * (SETS == 2 ? 16 : 256);  // pieces whose sums fit 16 bits: 255 a run, 255 * 16 of two sets
    __m256i whole[MR][4], index[4];
    for (int r = 0; r < MR; ++r)
        for (int i = 0; i < 4; ++i) whole[r][i] = zero;
    for (long piece = 0; piece < pieces;) {
        const long stop = pieces - piece < most ? pieces : piece + most;
        __m256i sums[MR][2];
#pragma GCC unroll 4
        for (int r = 0; r < MR; ++r) sums[r][0] = sums[r][1] = zero;
        while (piece < stop) {
            if constexpr (LONG) {
                const long end = stop - piece < run ? stop : piece + run;
                __m256i found[MR];
#pragma GCC unroll 4
                for (int r = 0; r < MR; ++r) found[r] = zero;
                for (; piece < end; ++piece) {
                    indices(codes + piece * 64, index);
#pragma GCC unroll 4
                    for (int r = 0; r < MR; ++r) look_up_piece<1>(tables + r * row_bytes + piece * kTableBytes, index, found[r]);
                }
#pragma GCC unroll 4
                for (int r = 0; r < MR; ++r) {
                    sums[r][0] = _mm256_add_epi16(sums[r][0], _mm256_unpacklo_epi8(found[r], zero));
                    sums[r][1] = _mm256_add_epi16(sums[r][1], _mm256_unpackhi_epi8(found[r], zero));
                }
            } else {
                indices(codes + piece * 64, index);
#pragma GCC unroll 4
                for (int r = 0; r < MR; ++r) {
                    const uint8_t* at = tables + r * row_bytes + piece * SETS * kTableBytes;
                    __m256i low = zero, high = zero;
                    look_up_piece<SETS>(at, index, low);
                    if (SETS == 2) look_up_piece<SETS>(at + 32, index, high);
                    __m256i first = _mm256_unpacklo_epi8(low, high), second = _mm256_unpackhi_epi8(low, high);
                    if (SETS == 2) {
                        first = _mm256_maddubs_epi16(first, weights);
                        second = _mm256_maddubs_epi16(second, weights);
                    }
                    sums[r][0] = _mm256_add_epi16(sums[r][0], first);
                    sums[r][1] = _mm256_add_epi16(sums[r][1], second);
                }
                ++piece;
            }
        }
        for (int r = 0; r < MR; ++r)
            for (int i = 0; i < 2; ++i) {
                whole[r][i] = _mm256_add_epi32(whole[r][i], _mm256_unpacklo_epi16(sums[r][i], zero));
                whole[r][i + 2] = _mm256_add_epi32(whole[r][i + 2], _mm256_unpackhi_epi16(sums[r][i], zero));
            }
    }
    const __m256i above = _mm256_set1_epi32(static_cast<int32_t>(pieces) * lookup.above);
    for (int r = 0; r < MR; ++r)
        for (int i = 0; i < 4; i += 2) {
            const __m256i both = _mm256_add_epi32(_mm256_permute2x128_si256(whole[r][i], whole[r][i + 1], 0x20),
                                                  _mm256_permute2x128_si256(whole[r][i], whole[r][i + 1], 0x31));
            const __m256i sum = _mm256_sub_epi32(both, above);
            _mm256_store_si256(reinterpret_cast<__m256i*>(out + r * kLanes + i * 4), _mm256_add_epi32(sum, sum));
        }
}

template <int SETS, bool LONG>
struct Tables {
    static constexpr int kBits = 1;
    const Lookup& lookup;
    QB_MEMBER void run(const uint8_t* codes, const uint8_t* tables, long row_bytes, long pieces, int rows,
                       int32_t* sums) const {
        switch (rows) {
            case 1: look_up<SETS, LONG, 1>(codes, tables, row_bytes, pieces, lookup, sums); break;
            case 2: look_up<SETS, LONG, 2>(codes, tables, row_bytes, pieces, lookup, sums); break;
            case 3: look_up<SETS, LONG, 3>(codes, tables, row_bytes, pieces, lookup, sums); break;
            default: look_up<SETS, LONG, 4>(codes, tables, row_bytes, pieces, lookup, sums); break;
        }
    }
};
