// Matrix products on AVX-512 VNNI: unsigned stored codes times signed activation bytes, four columns an instruction.

#if defined(__x86_64__)

#include <immintrin.h>

#include "qbert.h"

#define QB_WIDE 16
#define QB_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512vpopcntdq")))
#define QB_UNROLL _Pragma("GCC unroll 16")

namespace qbert {
namespace {

#include "steps.inl"

// A block of products: MR rows of x, NV vectors of the weight.
struct Block {
    const uint8_t* codes;  // first vector, first column of the term
    long vector_bytes;
    const int8_t* x;  // first row, first column of the term
    long depth;       // bytes from row to row of x
    long chunks;      // 64-byte pieces of a vector
    const uint8_t* next;  // codes of the block to come, brought to the cache meanwhile
};

// Stored codes of quad q of a 64-byte piece, as bytes.
template <int BITS>
QB_INLINE __m512i expand(__m512i piece, int q) {
    if (BITS == 8) return piece;
    return _mm512_and_si512(q ? _mm512_srli_epi16(piece, q * BITS) : piece, _mm512_set1_epi8((1 << BITS % 8) - 1));
}

template <int BITS, int MR, int NV, bool SIGNED_WEIGHT = false>
QB_INLINE void multiply(const Block& b, __m512i (&sums)[MR][NV]) {
    constexpr int kQuads = 8 / BITS;
    QB_UNROLL for (int r = 0; r < MR; ++r) QB_UNROLL for (int v = 0; v < NV; ++v) sums[r][v] = _mm512_setzero_si512();
    for (long chunk = 0; chunk < b.chunks; ++chunk) {
        __m512i piece[NV];
        QB_UNROLL for (int v = 0; v < NV; ++v)
            __builtin_prefetch(b.next + v * b.vector_bytes + chunk * 64);
        QB_UNROLL for (int v = 0; v < NV; ++v) piece[v] = _mm512_load_si512(b.codes + v * b.vector_bytes + chunk * 64);
        QB_UNROLL for (int q = 0; q < kQuads; ++q) {
            __m512i stored[NV];
            QB_UNROLL for (int v = 0; v < NV; ++v) stored[v] = expand<BITS>(piece[v], q);
            QB_UNROLL for (int r = 0; r < MR; ++r) {
                int32_t quad;
                __builtin_memcpy(&quad, b.x + r * b.depth + chunk * kQuads * 4 + q * 4, 4);
                const __m512i x = _mm512_set1_epi32(quad);
                QB_UNROLL for (int v = 0; v < NV; ++v) sums[r][v] = SIGNED_WEIGHT
                        ? _mm512_dpbusd_epi32(sums[r][v], x, stored[v])
                        : _mm512_dpbusd_epi32(sums[r][v], stored[v], x);
            }
        }
    }
}

// Where the sums of a block go: whole numbers, or the float formula of ops.linear_codes.
struct Target {
    int32_t* sums;  // whole numbers if not null
    float* y;
    long stride;
    const int32_t* first;  // whole numbers of the first of two planes, of blocks of kMostVectors vectors a row, or null
    const float *weight_scale, *second_scale, *weight_sums, *bias;  // bias null: y holds the terms before
    const float *scale, *offset;                     // of the rows of x
    const int32_t* row_sums;                         // sums of the codes of x, `groups` apart
    long groups;
    int zero;
    bool is_signed;   // of codes of 1 or 2 bits
    int32_t columns;  // of the term where sums of signs are twice a count of equal ones, otherwise 0
};

constexpr int kMostRows = 4, kMostVectors = 6;  // of a block

template <int MR, int NV>
QB_INLINE void store_sums(const Target& t, __m512i (&sums)[MR][NV]) {
    QB_UNROLL for (int r = 0; r < MR; ++r) {
        const __m512i correction = _mm512_set1_epi32(t.columns ? t.columns : t.zero * t.row_sums[r * t.groups]);
        if (t.sums) {
            QB_UNROLL for (int v = 0; v < NV; ++v)
                _mm512_storeu_si512(t.sums + r * t.stride + v * 16, _mm512_sub_epi32(sums[r][v], correction));
            continue;
        }
        const __m512 scale = _mm512_set1_ps(t.scale[r]), offset = _mm512_set1_ps(t.offset[r]);
        QB_UNROLL for (int v = 0; v < NV; ++v) {
            float* y = t.y + r * t.stride + v * 16;
            const __m512 before = _mm512_loadu_ps(t.bias ? t.bias + v * 16 : y);
            const __m512 start = _mm512_add_ps(_mm512_mul_ps(offset, _mm512_loadu_ps(t.weight_sums + v * 16)), before);
            const __m512i here = _mm512_sub_epi32(sums[r][v], correction);
            const __m512 scales = _mm512_mul_ps(scale, _mm512_loadu_ps(t.weight_scale + v * 16));
            __m512 products;
            if (t.first) {
                const __m512i first = _mm512_load_si512(t.first + (r * kMostVectors + v) * 16);
                const __m512 rest = _mm512_mul_ps(scale, _mm512_loadu_ps(t.second_scale + v * 16));
                products = _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(first, here)), scales),
                                         _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(first, here)), rest));
            } else {
                products = _mm512_mul_ps(_mm512_cvtepi32_ps(here), scales);
            }
            _mm512_storeu_ps(y, _mm512_add_ps(products, start));
        }
    }
}

template <int BITS, int MR, int NV>
QB_TARGET __attribute__((noinline)) void product(const Block& b, const Target& t) {
    __m512i sums[MR][NV];
    multiply<BITS, MR, NV>(b, sums);
    store_sums<MR, NV>(t, sums);
}

using Product = void (*)(const Block&, const Target&);

// [rows - 1][vectors - 1]. 4 x 4 sums stay in registers with what they are made of; larger blocks measured slower.
template <int BITS>
constexpr Product kTable[4][6] = {
    {product<BITS, 1, 1>, product<BITS, 1, 2>, product<BITS, 1, 3>, product<BITS, 1, 4>, product<BITS, 1, 5>,
     product<BITS, 1, 6>},
    {product<BITS, 2, 1>, product<BITS, 2, 2>, product<BITS, 2, 3>, product<BITS, 2, 4>, product<BITS, 2, 5>,
     product<BITS, 2, 6>},
    {product<BITS, 3, 1>, product<BITS, 3, 2>, product<BITS, 3, 3>, product<BITS, 3, 4>, nullptr, nullptr},
    {product<BITS, 4, 1>, product<BITS, 4, 2>, product<BITS, 4, 3>, product<BITS, 4, 4>, nullptr, nullptr},
};

#include "tables_avx512.inl"

#include "popcount_avx512.inl"

// How a weight and the codes of an activation meet.
struct Way {
    enum { kBytes, kTables, kCounts } kind = kBytes;
    int parts = 1;     // sets of tables; planes, of which 0 means one of signs
    long piece_bytes;   // of a row of the operand per 64-byte piece of a vector of the weight
    int most_vectors;   // of a block of 1 or 2 rows and of more
    int few_vectors = 6;
    bool is_signed = true;
};

constexpr long kOperandRows = 16;  // rows whose tables stay in L2

inline Way way_of(const Weight& w, const Alphabet& alphabet) {
    const auto [least, most, signs] = alphabet;
    Way way;
    way.most_vectors = 4;
    way.piece_bytes = 32 / w.bits;  // the codes themselves: 4 columns of 16 rows are 64 * w.bits / 8 bytes
    const bool small = least >= -15 && most <= 15;
    if (w.bits == 1 && signs) {
        way.kind = Way::kCounts;
        way.parts = 0;
        way.piece_bytes = 4;
    } else if (w.bits == 1 && (least >= 0 ? most <= 3 : least >= -2 && most <= 1)) {
        way.kind = Way::kCounts;
        way.is_signed = least < 0;
        way.parts = (least >= 0 ? most <= 1 : least >= -1 && most <= 0) ? 1 : 2;
        way.piece_bytes = 4 * way.parts;
        if (way.parts == 2) way.most_vectors = way.few_vectors = 2;
    } else if (w.bits == 1 || (w.bits == 2 && small)) {
        way.kind = Way::kTables;
        way.parts = small ? 1 : 2;
        way.piece_bytes = tables_of_piece(way.parts);
    }
    return way;
}

QB_TARGET void build_operand(const Weight& w, const Way& way, const int8_t* x, uint8_t* out) {
    if (way.kind == Way::kCounts) {
        const long pieces = w.depth / 32;
        if (way.parts == 0) build_planes<0>(x, pieces, out);
        else if (way.parts == 1) build_planes<1>(x, pieces, out);
        else build_planes<2>(x, pieces, out);
    } else if (w.bits == 2) {
        build_tables<2, 1>(x, w.depth / 16, out);
    } else if (way.parts == 1) {
        build_tables<1, 1>(x, w.depth / 32, out);
    } else {
        build_tables<1, 2>(x, w.depth / 32, out);
    }
}

inline Product product_of(const Weight& w, const Way& way, long rows, long vectors) {
    const long r = rows - 1, v = vectors - 1;
    if (way.kind == Way::kCounts)
        return way.parts == 0 ? kCountProducts<0>[r][v] : way.parts == 1 ? kCountProducts<1>[r][v] : kCountTwoProducts[r][v];
    if (way.kind == Way::kTables) return way.parts == 1 ? kTableProducts<1>[r][v] : kTableProducts<2>[r][v];
    return w.bits == 8 ? kTable<8>[r][v] : kTable<2>[r][v];
}

// One term of `rows` rows whose operand has `row_bytes` a row: whole numbers of one plane, or floats of all.
QB_TARGET void term(const Weight& w, const Way& way, long plane, long group, const uint8_t* operand, long row_bytes,
                    long rows, long first, long last, Target t) {
    const long begin = group * w.group_columns;
    const long end = group + 1 == w.groups ? w.depth : begin + w.group_columns;
    const int piece = 64 * 8 / (16 * w.bits);  // columns of a 64-byte piece
    const long plane_bytes = w.vectors * w.vector_bytes();
    const uint8_t* codes = w.codes.get() + plane * plane_bytes + begin / piece * 64;
    const int8_t* x = reinterpret_cast<const int8_t*>(operand) + begin / piece * way.piece_bytes;
    const long blocks = (rows + kMostRows - 1) / kMostRows, most_rows = (rows + blocks - 1) / blocks;
    const long most_vectors = most_rows > 2 ? way.most_vectors : way.few_vectors;
    const long outputs = w.padded_rows(), at = group * outputs;
    const bool two = !t.sums && w.planes == 2;
    alignas(64) int32_t first_sums[kMostRows * kMostVectors * kLanes];
    Block block{nullptr, w.vector_bytes(), nullptr, row_bytes, (end - begin + piece - 1) / piece, nullptr};
    for (long vector = first; vector < last; vector += most_vectors) {
        const long vectors = last - vector < most_vectors ? last - vector : most_vectors, output = vector * kLanes;
        const Product full = product_of(w, way, most_rows, vectors);
        Target here = t;
        here.sums = t.sums ? t.sums + output : nullptr;
        here.y = t.y ? t.y + output : nullptr;
        here.weight_scale = w.scale.get() + at + output;
        here.second_scale = here.weight_scale + w.groups * outputs;
        here.weight_sums = w.sums.get() + at + output;
        here.bias = group == 0 ? w.bias.get() + output : nullptr;
        here.row_sums = t.row_sums + group;
        if (way.kind == Way::kCounts && way.parts == 0)
            here.columns = static_cast<int32_t>((group + 1 == w.groups ? w.columns : end) - begin);
        block.codes = codes + vector * w.vector_bytes();
        block.next = two ? block.codes + plane_bytes : block.codes + vectors * w.vector_bytes();
        block.x = x;
        for (long row = 0; row < rows; row += most_rows) {
            const long count = rows - row < most_rows ? rows - row : most_rows;
            const Product product = count == most_rows ? full : product_of(w, way, count, vectors);
            if (two) {
                Target whole = here;
                whole.sums = first_sums, whole.stride = kMostVectors * kLanes;
                product(block, whole);
                here.first = first_sums;
                block.codes += plane_bytes;
                block.next = row == 0 ? block.codes - plane_bytes + vectors * w.vector_bytes() : block.codes;
            }
            product(block, here);
            if (two) block.codes -= plane_bytes;
            block.next = block.codes;
            block.x += count * row_bytes;
            if (t.sums) here.sums += count * t.stride;
            else here.y += count * t.stride;
            if (t.scale) here.scale += count, here.offset += count;
            here.row_sums += count * t.groups;
        }
    }
}

Target target_of(const Weight& w, const Way& way, const Codes& x) {
    Target t{};
    t.scale = x.scale, t.offset = x.offset, t.row_sums = x.sums, t.groups = w.groups;
    t.zero = way.kind == Way::kTables ? 0 : w.zero;
    t.is_signed = way.is_signed;
    return t;
}

long operand_avx512(const Weight& w, const Alphabet& alphabet) {
    const Way way = way_of(w, alphabet);
    return way.kind == Way::kBytes ? 0 : kOperandRows * (w.vector_bytes() / 64 * way.piece_bytes);
}

// The rows from `row` on as operand, at most kOperandRows of them where it has to be built; returns how many.
QB_TARGET long operand_of(const Weight& w, const Way& way, const Codes& x, long row, long rows, const uint8_t** operand,
                          long row_bytes) {
    if (way.kind == Way::kBytes) {
        *operand = reinterpret_cast<const uint8_t*>(x.codes);
        return rows;
    }
    const long count = rows - row < kOperandRows ? rows - row : kOperandRows;
    for (long r = 0; r < count; ++r) build_operand(w, way, x.codes + (row + r) * w.depth, x.operand + r * row_bytes);
    *operand = x.operand;
    return count;
}

QB_TARGET void sums_avx512(const Weight& w, long plane, long group, const Codes& x, long rows, int32_t* out) {
    const Way way = way_of(w, x.alphabet);
    const long row_bytes = w.vector_bytes() / 64 * way.piece_bytes;
    const uint8_t* operand;
    for (long row = 0, count; row < rows; row += count) {
        count = operand_of(w, way, x, row, rows, &operand, row_bytes);
        Target t = target_of(w, way, x);
        t.sums = out + row * w.padded_rows(), t.stride = w.padded_rows(), t.row_sums += row * w.groups;
        term(w, way, plane, group, operand, row_bytes, count, 0, w.vectors, t);
    }
}

QB_TARGET void linear_avx512(const Weight& w, const Codes& x, long rows, long first, long last, float* y, long stride) {
    const Way way = way_of(w, x.alphabet);
    const long row_bytes = w.vector_bytes() / 64 * way.piece_bytes;
    const uint8_t* operand;
    for (long row = 0, count; row < rows; row += count) {
        count = operand_of(w, way, x, row, rows, &operand, row_bytes);
        Target t = target_of(w, way, x);
        t.y = y + row * stride, t.stride = stride;
        t.scale += row, t.offset += row, t.row_sums += row * w.groups;
        for (long group = 0; group < w.groups; ++group)
            term(w, way, 0, group, operand, row_bytes, count, first, last, t);
    }
}

template <bool SIGNED_WEIGHT, int MR, int NV>
QB_TARGET __attribute__((noinline)) void panel_block(const Block& b, int32_t* out, long stride) {
    __m512i sums[MR][NV];
    multiply<8, MR, NV, SIGNED_WEIGHT>(b, sums);
    QB_UNROLL for (int r = 0; r < MR; ++r) QB_UNROLL for (int v = 0; v < NV; ++v)
        _mm512_storeu_si512(out + r * stride + v * 16, sums[r][v]);
}

// out (rows, stride) = x (rows, quads * 4) times a panel of bytes; one of the two factors is unsigned.
template <bool SIGNED_WEIGHT>
QB_TARGET void panel_product(const uint8_t* panel, long vector_bytes, long vectors, long quads, const uint8_t* x,
                             long depth, int rows, int32_t* out, long stride) {
    using Run = void (*)(const Block&, int32_t*, long);
#define QB_ROW(MR) {panel_block<SIGNED_WEIGHT, MR, 1>, panel_block<SIGNED_WEIGHT, MR, 2>, \
                    panel_block<SIGNED_WEIGHT, MR, 3>, panel_block<SIGNED_WEIGHT, MR, 4>}
    static constexpr Run table[4][4] = {QB_ROW(1), QB_ROW(2), QB_ROW(3), QB_ROW(4)};
#undef QB_ROW
    for (long v = 0; v < vectors; v += 4)
        table[rows - 1][(vectors - v < 4 ? vectors - v : 4) - 1](
                {panel + v * vector_bytes, vector_bytes, reinterpret_cast<const int8_t*>(x), depth, quads,
                 panel + v * vector_bytes},
                out + v * 16,
                stride);
}

#include "attention.inl"

#include "ghost.inl"

#include "training.inl"

}  // namespace

const Kernels kAvx512Kernels = {operand_avx512, sums_avx512, linear_avx512, quantize_row,   range_row,     gelu_row,
                                relu_row,    layer_norm_row, attention_head, ghost_row,
                                ghost_gradient, dropout_row, scale_row, finish_row, linear_gradient, step_gradient,
                              softmax_codes_row, softmax_gradient_row};

}  // namespace qbert

#endif
