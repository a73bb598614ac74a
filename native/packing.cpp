// From a checkpoint's layout to the kernels', and back.
//
// Codes are stored without sign, code + zero (zero 128 for 8 bits, 1 for ternary; 1 bit: +1 is 1, -1 is 0), vector by
// vector of 16 output rows, so that a kernel reads one stream per vector:
//
//   8 bits   (vectors, depth / 4, 16 rows, 4 columns)    one register is 16 rows of one quad
//   2 bits   (vectors, depth / 16, 16 rows, 4 bytes)     byte j holds columns j, 4 + j, 8 + j, 12 + j from the low end:
//                                                        shift by 2q and mask by 3, and quad q is as in 8 bits
//   1 bit    (vectors, depth / 32, 16 rows, 4 bytes)     byte j holds columns j, 4 + j, ..., 28 + j from the low end
//
// Pads hold code 0 of the activation, so what the weight's pads hold is of no account; they hold stored 0.

#include "qbert.h"

#include <algorithm>

namespace qbert {

long packed_row_bytes(Layout layout, long columns) {
    switch (layout) {
        case kTwoBit: return (columns + 3) / 4;
        case kDense: return (columns + 4) / 5;
        case kInt8: return columns + 1;
        default: return (columns + 7) / 8;
    }
}

void unpack_row(Layout layout, const uint8_t* packed, long columns, int8_t* codes) {
    switch (layout) {
        case kTwoBit:
            for (long c = 0; c < columns; ++c) codes[c] = static_cast<int8_t>((packed[c / 4] >> c % 4 * 2 & 3) - 1);
            break;
        case kDense:
            for (long c = 0; c < columns;) {
                int byte = packed[c / 5];
                for (int digit = 0; digit < 5 && c < columns; ++digit, ++c, byte /= 3)
                    codes[c] = static_cast<int8_t>(byte % 3 - 1);
            }
            break;
        case kInt8: __builtin_memcpy(codes, packed, columns); break;
        case kOneBit:
            for (long c = 0; c < columns; ++c) codes[c] = static_cast<int8_t>((packed[c / 8] >> c % 8 & 1) * 2 - 1);
            break;
    }
}

namespace {

// The inverse of unpack_row; pads are the digit 0.
void pack_row(Layout layout, const int8_t* codes, long columns, uint8_t* packed) {
    std::fill_n(packed, packed_row_bytes(layout, columns), uint8_t{0});
    switch (layout) {
        case kTwoBit:
            for (long c = 0; c < columns; ++c) packed[c / 4] |= static_cast<uint8_t>((codes[c] + 1) << c % 4 * 2);
            break;
        case kDense:
            for (long c = columns; c-- > 0;) packed[c / 5] = static_cast<uint8_t>(packed[c / 5] * 3 + codes[c] + 1);
            break;
        case kInt8: __builtin_memcpy(packed, codes, columns); break;
        case kOneBit:
            for (long c = 0; c < columns; ++c) packed[c / 8] |= static_cast<uint8_t>((codes[c] > 0) << c % 8);
            break;
    }
}

void store_row(Weight& w, uint8_t* plane, long row, const int8_t* codes) {
    uint8_t* vector = plane + row / kLanes * w.vector_bytes();
    const long lane = row % kLanes;
    for (long c = 0; c < w.columns; ++c) {
        if (w.bits == 8) {
            vector[c / 4 * 64 + lane * 4 + c % 4] = static_cast<uint8_t>(codes[c] + 128);
        } else if (w.bits == 2) {
            vector[c / 16 * 64 + lane * 4 + c % 4] |= static_cast<uint8_t>((codes[c] + 1) << c % 16 / 4 * 2);
        } else if (codes[c] > 0) {
            vector[c / 32 * 64 + lane * 4 + c % 4] |= static_cast<uint8_t>(1 << c % 32 / 4);
        }
    }
}

// The inverse of store_row.
void read_row(const Weight& w, const uint8_t* plane, long row, int8_t* codes) {
    const uint8_t* vector = plane + row / kLanes * w.vector_bytes();
    const long lane = row % kLanes;
    for (long c = 0; c < w.columns; ++c) {
        if (w.bits == 8) {
            codes[c] = static_cast<int8_t>(vector[c / 4 * 64 + lane * 4 + c % 4] - 128);
        } else if (w.bits == 2) {
            codes[c] = static_cast<int8_t>((vector[c / 16 * 64 + lane * 4 + c % 4] >> c % 16 / 4 * 2 & 3) - 1);
        } else {
            codes[c] = static_cast<int8_t>((vector[c / 32 * 64 + lane * 4 + c % 4] >> c % 32 / 4 & 1) * 2 - 1);
        }
    }
}

}  // namespace

// packed (P, O, bytes), scale (P, O, G), bias (O) or null.
std::unique_ptr<Weight> make_weight(Layout layout, const uint8_t* packed, long rows, long columns, long planes,
                                    long groups, long group_columns, const float* scale, const float* bias) {
    auto weight = std::make_unique<Weight>();
    Weight& w = *weight;
    w.bits = layout == kInt8 ? 8 : layout == kOneBit ? 1 : 2;
    w.zero = w.bits == 8 ? 128 : 1;
    w.rows = rows, w.columns = columns, w.planes = planes, w.groups = groups, w.group_columns = group_columns;
    w.depth = round_up(columns, w.bits == 1 ? 32 : 16);
    w.vectors = round_up(rows, kLanes) / kLanes;
    const long outputs = w.padded_rows(), bytes = packed_row_bytes(layout, columns);
    w.codes.reset(planes * w.vectors * w.vector_bytes());
    w.scale.reset(planes * groups * outputs);
    w.sums.reset(groups * outputs);
    w.bias.reset(outputs);
    Buffer<int8_t> codes(columns);
    Buffer<int32_t> sums(groups * outputs);  // of the first plane
    for (long plane = 0; plane < planes; ++plane) {
        for (long row = 0; row < rows; ++row) {
            unpack_row(layout, packed + (plane * rows + row) * bytes, columns, codes.get());
            store_row(w, w.codes.get() + plane * w.vectors * w.vector_bytes(), row, codes.get());
            for (long group = 0; group < groups; ++group) {
                const long end = group + 1 == groups ? columns : (group + 1) * group_columns;
                int32_t sum = 0;
                for (long c = group * group_columns; c < end; ++c) sum += codes[c];
                const long at = group * outputs + row;
                const float given = scale[(plane * rows + row) * groups + group];
                if (plane == 0) {
                    w.scale[at] = given;
                    w.sums[at] = static_cast<float>(sum) * given;
                    sums[at] = sum;
                } else {
                    const float half = (w.scale[at] + given) * 0.5f, rest = (w.scale[at] - given) * 0.5f;
                    w.scale[at] = half;
                    w.scale[groups * outputs + at] = rest;
                    w.sums[at] = static_cast<float>(sums[at] + sum) * half + static_cast<float>(sums[at] - sum) * rest;
                }
            }
        }
    }
    if (bias)
        for (long row = 0; row < rows; ++row) w.bias[row] = bias[row];
    return weight;
}

void packed_rows(const Weight& w, Layout layout, const Rows& rows, uint8_t* packed) {
    const long bytes = packed_row_bytes(layout, w.columns);
    Buffer<int8_t> codes(w.columns);
    for (long plane = 0; plane < w.planes; ++plane) {
        for (long i = 0; i < rows.count; ++i, packed += bytes) {
            const long row = rows.first + i / rows.run * rows.step + i % rows.run;
            read_row(w, w.codes.get() + plane * w.vectors * w.vector_bytes(), row, codes.get());
            pack_row(layout, codes.get(), w.columns, packed);
        }
    }
}

}  // namespace qbert
