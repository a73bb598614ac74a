// Matrix products of the paths that work on blocks of at most 4 rows and one vector. Needs `multiply<BITS, MR, SIGNED>`:
// sums (MR, 16) of unsigned stored codes times signed bytes of x, or with SIGNED of signed stored times unsigned x. With
// QB_TABLES 1-bit weights of alphabets that `lookup_of` knows are multiplied by tables instead (tables_avx2.inl).

constexpr int kRows = 4;

// One vector of one row: `second` are the sums of a second plane, or null.
QB_INLINE void store_block(const Weight& w, long output, const Codes& x, long row, long group, const int32_t* first,
                           const int32_t* second, float* y) {
    const int32_t correction = w.zero * x.sums[row * x.groups + group];
    const long at = group * w.padded_rows() + output;
    for (int i = 0; i < kLanes; i += kWide) {
        const fv before = load(group ? y + i : w.bias.get() + output + i);
        const fv start = splat(x.offset[row]) * load(w.sums.get() + at + i) + before;
        const fv scale = splat(x.scale[row]) * load(w.scale.get() + at + i);
        const iv a = *reinterpret_cast<const iv*>(first + i) - correction;
        fv products = floats(a) * scale;
        if (second) {
            const iv b = *reinterpret_cast<const iv*>(second + i) - correction;
            const fv rest = splat(x.scale[row]) * load(w.scale.get() + w.groups * w.padded_rows() + at + i);
            products = floats(a + b) * scale + floats(a - b) * rest;
        }
        store(y + i, products + start);
    }
}

template <int BITS, bool SIGNED>
QB_INLINE void block(const uint8_t* codes, const uint8_t* x, long depth, long pieces, int rows, int32_t* sums) {
    switch (rows) {
        case 1: multiply<BITS, 1, SIGNED>(codes, x, depth, pieces, sums); break;
        case 2: multiply<BITS, 2, SIGNED>(codes, x, depth, pieces, sums); break;
        case 3: multiply<BITS, 3, SIGNED>(codes, x, depth, pieces, sums); break;
        default: multiply<BITS, 4, SIGNED>(codes, x, depth, pieces, sums); break;
    }
}

// Rows of x as a product reads them: their codes, or tables of them.
struct Operand {
    const uint8_t* rows;
    long row_bytes, piece_bytes;  // from row to row; of a 64-byte piece of a vector of the weight
};

template <int BITS>
struct Bytes {
    static constexpr int kBits = BITS;
    QB_MEMBER void run(const uint8_t* codes, const uint8_t* x, long row_bytes, long pieces, int rows,
                       int32_t* sums) const {
        block<BITS, false>(codes, x, row_bytes, pieces, rows, sums);
        if (BITS == 1)
            for (int i = 0; i < rows * kLanes; ++i) sums[i] *= 2;
    }
};

// Either whole numbers of one plane into `out` (N, padded rows), or floats of all planes into y (N, stride), of the rows
// from `begin_row` on, with which the operand begins.
template <typename Method>
QB_INLINE void term(const Weight& w, const Method& method, long plane, long group, const Codes& x, const Operand& operand,
                    long begin_row, long end_row, long first, long last, int32_t* out, float* y, long stride) {
    const long begin = group * w.group_columns, end = group + 1 == w.groups ? w.depth : begin + w.group_columns;
    const int piece = 64 * 8 / (16 * Method::kBits);
    const long planes = out ? 1 : w.planes, plane_bytes = w.vectors * w.vector_bytes();
    const uint8_t* codes = w.codes.get() + plane * plane_bytes + begin / piece * 64;
    const uint8_t* rows_of_group = operand.rows + begin / piece * operand.piece_bytes;
    for (long vector = first; vector < last; ++vector) {
        for (long row = begin_row; row < end_row; row += kRows) {
            const int count = static_cast<int>(end_row - row < kRows ? end_row - row : kRows);
            alignas(64) int32_t sums[2][kRows * kLanes];
            for (long p = 0; p < planes; ++p) {
                method.run(codes + p * plane_bytes + vector * w.vector_bytes(),
                           rows_of_group + (row - begin_row) * operand.row_bytes, operand.row_bytes,
                           (end - begin + piece - 1) / piece, count, sums[p]);
            }
            const long output = vector * kLanes;
            for (int r = 0; r < count; ++r) {
                if (out) {
                    const int32_t correction = w.zero * x.sums[(row + r) * x.groups + group];
                    for (int lane = 0; lane < kLanes; ++lane)
                        out[(row + r) * w.padded_rows() + output + lane] = sums[0][r * kLanes + lane] - correction;
                } else {
                    store_block(w, output, x, row + r, group, sums[0] + r * kLanes,
                                planes > 1 ? sums[1] + r * kLanes : nullptr, y + (row + r) * stride + output);
                }
            }
        }
    }
}

template <typename Method>
QB_INLINE void terms(const Weight& w, const Method& method, long plane, long first_group, long last_group, const Codes& x,
                     const Operand& operand, long begin_row, long end_row, long first, long last, int32_t* out, float* y,
                     long stride) {
    for (long group = first_group; group < last_group; ++group)
        term(w, method, plane, group, x, operand, begin_row, end_row, first, last, out, y, stride);
}

QB_INLINE void terms_of(const Weight& w, long plane, long first_group, long last_group, const Codes& x, long rows,
                        long first, long last, int32_t* out, float* y, long stride) {
#if defined(QB_TABLES)
    const Lookup lookup = lookup_of(w, x.alphabet);
    if (lookup.sets) {
        const long pieces = w.depth / 32, piece_bytes = lookup.sets * kTableBytes;
        const Operand operand{x.operand, pieces * piece_bytes, piece_bytes};
        for (long row = 0; row < rows; row += kRows) {
            const long end_row = rows - row < kRows ? rows : row + kRows;
            for (long r = row; r < end_row; ++r)
                build_tables(lookup, x.codes + r * w.depth, pieces, x.operand + (r - row) * operand.row_bytes);
            if (lookup.sets == 2)
                terms(w, Tables<2, false>{lookup}, plane, first_group, last_group, x, operand, row, end_row, first, last,
                      out, y, stride);
            else if (lookup.run == 1)
                terms(w, Tables<1, false>{lookup}, plane, first_group, last_group, x, operand, row, end_row, first, last,
                      out, y, stride);
            else
                terms(w, Tables<1, true>{lookup}, plane, first_group, last_group, x, operand, row, end_row, first, last,
                      out, y, stride);
        }
        return;
    }
#endif
    const Operand operand{reinterpret_cast<const uint8_t*>(x.codes), w.depth, 32 / w.bits};
    if (w.bits == 8)
        terms(w, Bytes<8>{}, plane, first_group, last_group, x, operand, 0, rows, first, last, out, y, stride);
    else if (w.bits == 2)
        terms(w, Bytes<2>{}, plane, first_group, last_group, x, operand, 0, rows, first, last, out, y, stride);
    else
        terms(w, Bytes<1>{}, plane, first_group, last_group, x, operand, 0, rows, first, last, out, y, stride);
}

long operand_blocks(const Weight& w, const Alphabet& alphabet) {
#if defined(QB_TABLES)
    return kRows * (w.depth / 32) * lookup_of(w, alphabet).sets * kTableBytes;
#else
    return (void)w, (void)alphabet, 0;
#endif
}

QB_TARGET void sums_blocks(const Weight& w, long plane, long group, const Codes& x, long rows, int32_t* out) {
    terms_of(w, plane, group, group + 1, x, rows, 0, w.vectors, out, nullptr, 0);
}

QB_TARGET void linear_blocks(const Weight& w, const Codes& x, long rows, long first, long last, float* y, long stride) {
    terms_of(w, 0, 0, w.groups, x, rows, first, last, nullptr, y, stride);
}

// out (rows, stride) = x (rows, quads * 4) times a panel of bytes; one of the two factors is unsigned.
template <bool SIGNED>
QB_INLINE void panel_product(const uint8_t* panel, long vector_bytes, long vectors, long quads, const uint8_t* x,
                             long depth, int rows, int32_t* out, long stride) {
    for (long v = 0; v < vectors; ++v) {
        for (int row = 0; row < rows; row += kRows) {
            alignas(64) int32_t sums[kRows * kLanes];
            const int count = rows - row < kRows ? rows - row : kRows;
            block<8, SIGNED>(panel + v * vector_bytes, x + row * depth, depth, quads, count, sums);
            for (int r = 0; r < count; ++r)
                __builtin_memcpy(out + (row + r) * stride + v * kLanes, sums + r * kLanes, kLanes * 4);
        }
    }
}
