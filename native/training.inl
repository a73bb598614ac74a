// What only training needs, compiled once per path as steps.inl is: dropout, the rest of a product of codes, what a linear
// layer's gradient becomes, and softmax with codes and its gradient. What dropout drops follows from the seed and a number's place: not from path or threads.

typedef uint32_t uv __attribute__((vector_size(QB_WIDE * 4), aligned(4), may_alias));
typedef uint16_t sv __attribute__((vector_size(QB_WIDE * 2), aligned(2), may_alias));

struct RowSeed {
    uint32_t first, second;
};

// splitmix64 of the row.
QB_INLINE RowSeed seed_of(const Dropout& dropout, long row) {
    uint64_t z = dropout.seed + (static_cast<uint64_t>(row) + 1) * 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    return {static_cast<uint32_t>(z), static_cast<uint32_t>(z >> 32)};
}

// 0 for columns [column, column + kWide) that are dropped, otherwise the factor 1 / (1 - p): two rounds of
// multiplication and shifts make a column's number as good as random.
QB_INLINE fv kept(const Dropout& dropout, RowSeed seed, long column) {
    uv x;
    for (int lane = 0; lane < kWide; ++lane) x[lane] = static_cast<uint32_t>(lane);
    x = (x + static_cast<uint32_t>(column)) * 0x9E3779B1u + seed.first;
    x = (x ^ x >> 16) * 0x7FEB352Du ^ seed.second;
    x = (x ^ x >> 15) * 0x846CA68Bu;
    x ^= x >> 16;
    return x >= dropout.below ? splat(dropout.factor) : fv{};
}

// The numbers of a row from `i` on, `other` behind its end; and back.
QB_INLINE fv load_some(const float* x, long i, long n, float other) {
    if (i + kWide <= n) return load(x + i);
    fv value = splat(other);
    __builtin_memcpy(&value, x + i, (n - i) * 4);
    return value;
}

QB_INLINE void store_some(float* x, long i, long n, fv value) {
    if (i + kWide <= n) store(x + i, value);
    else __builtin_memcpy(x + i, &value, (n - i) * 4);
}

// The nearest bfloat16, halves to even, as torch rounds.
QB_INLINE void store_bfloat16(uint16_t* out, long i, long n, fv value) {
    const uv bits = (uv)value, even = bits >> 16 & 1;
    const uv rounded = (bits + 0x7FFFu + even) >> 16, none = uv{} + 0x7FC0u;
    const sv both = __builtin_convertvector(value == value ? rounded : none, sv);
    __builtin_memcpy(out + i, &both, (i + kWide <= n ? kWide : n - i) * 2);
}

QB_TARGET static void finish_row(const int32_t* products, long n, float scale, float offset, const float* column_scale,
                                 const float* column_sum, const float* bias, float* y) {
    for (long i = 0; i < n; i += kWide) {
        iv whole = {};
        __builtin_memcpy(&whole, products + i, (i + kWide <= n ? kWide : n - i) * 4);
        fv value = floats(whole) * (splat(scale) * load_some(column_scale, i, n, 0));
        if (column_sum) {
            const fv part = splat(offset) * load_some(column_sum, i, n, 0);
            value += bias ? part + load_some(bias, i, n, 0) : part;
        } else if (bias) {
            value += load_some(bias, i, n, 0);
        }
        store_some(y, i, n, value);
    }
}

QB_TARGET static void linear_gradient(const LinearGradient& g, long first, long last, float* sum, float* offset_sum) {
    for (long row = first; row < last; ++row) {
        const long n = g.columns, at = row * n;
        const fv scale = splat(g.row_scale[row]), offset = splat(g.row_offset ? g.row_offset[row] : 0);
        for (long i = 0; i < n; i += kWide) {
            const fv gradient = load_some(g.gradient + at, i, n, 0);
            store_bfloat16(g.by_column + at, i, n, gradient * load_some(g.column_scale, i, n, 0));
            store_bfloat16(g.by_row + at, i, n, gradient * scale);
            store_some(sum, i, n, load_some(sum, i, n, 0) + gradient);
            if (g.row_offset) store_some(offset_sum, i, n, load_some(offset_sum, i, n, 0) + gradient * offset);
        }
    }
}

// quantizers.LsqQuantizer.gradients. What is no number stays none: it is multiplied, not chosen.
template <bool SIGNS>
QB_INLINE double step_gradient_of(const StepGradient& g, long first, long last, float* of_shift) {
    const fv one = splat(1), zero = {}, least = splat(g.least), most = splat(g.most), magic = splat(kMagic);
    double total = 0;
    for (long row = first; row < last; ++row) {
        const long n = g.columns, at = row * n;
        fv sum = {};
        for (long i = 0; i < n; i += kWide) {
            const fv gradient = load_some(g.gradient + at, i, n, 0);
            const fv x = load_some(g.x + at, i, n, 0) - (SIGNS ? load_some(g.shift, i, n, 0) : splat(g.floor));
            const fv level = x / splat(g.step);
            fv inside = level >= least ? one : zero;
            inside = level <= most ? inside : zero;
            const fv of_x = gradient * inside;
            if (SIGNS) {
                sum += gradient * (x >= zero ? one : -one);
                store_some(of_shift, i, n, load_some(of_shift, i, n, 0) - of_x);
            } else {
                sum += gradient * (held(level, least, most) + magic - magic - level * inside);
            }
            store_some(g.of_x + at, i, n, of_x);
        }
        for (int lane = 0; lane < kWide; ++lane) total += sum[lane];
    }
    return total;
}

QB_TARGET static double step_gradient(const StepGradient& g, long first, long last, float* of_shift) {
    return g.shift ? step_gradient_of<true>(g, first, last, of_shift) : step_gradient_of<false>(g, first, last, of_shift);
}

QB_TARGET static void dropout_row(const float* x, long n, const Dropout& dropout, long row, float* y) {
    const RowSeed seed = seed_of(dropout, row);
    for (long i = 0; i < n; i += kWide) store_some(y, i, n, load_some(x, i, n, 0) * kept(dropout, seed, i));
}

// ops._product after the product of codes: scales and offsets of a row and of the columns.
QB_TARGET static void scale_row(const Factors& f, long n, float* y) {
    const fv scale = splat(f.scale), sum = splat(f.sum * f.scale), offset = splat(f.offset);
    const fv terms = splat(f.terms * f.offset), factor = splat(f.factor);
    for (long i = 0; i < n; i += kWide) {
        fv value = load_some(y, i, n, 0) * (scale * load_some(f.column_scale, i, n, 0));
        if (f.column_offset) value += sum * load_some(f.column_offset, i, n, 0);
        if (f.column_sum) value += offset * load_some(f.column_sum, i, n, 0);
        if (f.column_offset && f.column_sum) value += terms * load_some(f.column_offset, i, n, 0);
        store_some(y, i, n, value * factor);
    }
}

// quantizers.softmax_codes with a range for each query: codes of what dropout keeps, whose factor the scale has.
QB_TARGET static void softmax_codes_row(const float* scores, long n, float levels, const Dropout& dropout, long row,
                                        float* probabilities, float* codes, float* scale) {
    const float infinity = __builtin_inff();
    fv highest = splat(-infinity);
    for (long i = 0; i < n; i += kWide) highest = higher(load_some(scores, i, n, -infinity), highest);
    const fv high = splat(collect(highest, highest, {0, -infinity}).high), least = splat(kLeastExponent), zero = {};
    dv sums[2] = {};
    for (long i = 0; i < n; i += kWide) {
        const fv below = load_some(scores, i, n, -infinity) - high;
        const Doubles exact = to_doubles(below < least ? least : below);  // what is no number stays none
        const fv all = to_floats(exponentials(exact));
        const fv e = below <= least ? zero : all;
        add(sums, to_doubles(e));
        store_some(probabilities, i, n, e);
    }
    const float total = static_cast<float>(sum_of(sums[0] + sums[1]));
    const RowSeed seed = seed_of(dropout, row);
    for (long i = 0; i < n; i += kWide) {
        const fv e = load_some(probabilities, i, n, 0);
        const fv code = e * splat(levels) + splat(kMagic) - splat(kMagic);
        store_some(codes, i, n, kept(dropout, seed, i) > zero ? code : zero);
        store_some(probabilities, i, n, e / splat(total));
    }
    *scale = 1 / (levels * total) * dropout.factor;
}

// The gradient of the scores from that of the probabilities after dropout; `gradient` and `out` may be the same.
QB_TARGET static void softmax_gradient_row(const float* gradient, const float* probabilities, long n,
                                           const Dropout& dropout, long row, float* out) {
    const RowSeed seed = seed_of(dropout, row);
    fv sum = {};
    for (long i = 0; i < n; i += kWide) {
        const fv product = load_some(gradient, i, n, 0) * kept(dropout, seed, i) * load_some(probabilities, i, n, 0);
        sum += product;
        store_some(out, i, n, product);
    }
    float total = 0;
    for (int lane = 0; lane < kWide; ++lane) total += sum[lane];
    for (long i = 0; i < n; i += kWide)
        store_some(out, i, n, load_some(out, i, n, 0) - load_some(probabilities, i, n, 0) * splat(total));
}
