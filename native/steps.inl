// The float steps of a layer, compiled once per path: included with QB_TARGET set to that path's target attribute.
//
// Every step is a fixed sequence of IEEE operations, none of them fused (the build says -ffp-contract=off), the same
// as the formulas of quantizers.py and ops.py. Sums run in double and are rounded once, so their order does not show.

typedef float f8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float f16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t i16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int8_t c16 __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint8_t u16x __attribute__((vector_size(16), aligned(1), may_alias));
typedef double d8 __attribute__((vector_size(64), aligned(8), may_alias));
typedef int64_t l8 __attribute__((vector_size(64), aligned(8), may_alias));

#define QB_INLINE QB_TARGET __attribute__((always_inline)) static inline

constexpr float kMagic = 12582912.0f;         // 1.5 * 2^23: adding it rounds to a whole number, halves to even
constexpr int32_t kMagicBits = 0x4B400000;    // its bits; the low bits of a sum are the whole number
constexpr double kMagicDouble = 6755399441055744.0;  // 1.5 * 2^52

QB_INLINE f16 splat(float x) { return f16{} + x; }
QB_INLINE f16 load16(const float* x) { return *reinterpret_cast<const f16*>(x); }
QB_INLINE void store16(float* x, f16 value) { *reinterpret_cast<f16*>(x) = value; }
QB_INLINE f16 low16(f16 a, f16 b) { return a < b ? a : b; }
QB_INLINE f16 high16(f16 a, f16 b) { return a > b ? a : b; }

QB_INLINE void widen(Range& range, float x) {
    range.low = x < range.low ? x : range.low;
    range.high = x > range.high ? x : range.high;
}

QB_INLINE Range collect(f16 low, f16 high, Range range) {
#ifdef QB_AVX512
    const float least = _mm512_reduce_min_ps((__m512)low), most = _mm512_reduce_max_ps((__m512)high);
    return {least < range.low ? least : range.low, most > range.high ? most : range.high};
#endif
    for (int lane = 0; lane < 16; ++lane) {
        range.low = low[lane] < range.low ? low[lane] : range.low;
        range.high = high[lane] > range.high ? high[lane] : range.high;
    }
    return range;
}

QB_TARGET static Range range_row(const float* x, long n) {
    const float infinity = __builtin_inff();
    f16 low = splat(infinity), high = splat(-infinity);
    Range range{infinity, -infinity};
    long i = 0;
    for (; i + 16 <= n; i += 16) {
        low = low16(load16(x + i), low);
        high = high16(load16(x + i), high);
    }
    for (; i < n; ++i) widen(range, x[i]);
    return collect(low, high, range);
}

// How a row becomes codes: the nearest whole number to x * inverse + shift, x held in [low, high]; by a fixed step; or
// by the sign of what is above a threshold for each column.
struct Line {
    float scale, offset, inverse, shift, low, high;
    bool holds;
    const Activation* step;   // null: by the line
    const float* thresholds;  // null: by one of the two above
};

QB_INLINE Line line_of(Range range, const Activation& activation) {
    Line line{};
    if (activation.kind == kSigns) {
        line.scale = activation.step;
        line.thresholds = activation.shift;
        return line;
    }
    if (activation.kind == kStep) {
        line.scale = activation.step;
        line.offset = activation.less ? activation.step * static_cast<float>(activation.less) + activation.floor
                                      : activation.floor;
        line.step = &activation;
        return line;
    }
    line.low = range.low > activation.clip_low ? range.low : activation.clip_low;
    line.low = line.low < activation.clip_high ? line.low : activation.clip_high;
    line.high = range.high > activation.clip_low ? range.high : activation.clip_low;
    line.high = line.high < activation.clip_high ? line.high : activation.clip_high;
    line.holds = line.low != range.low || line.high != range.high;
    if (activation.kind == kSymmetric) {
        const float levels = static_cast<float>((1 << (activation.bits - 1)) - 1);
        float high = -line.low > line.high ? -line.low : line.high;
        if (!(high > kTiny)) high = kTiny;
        line.scale = high / levels;
        line.inverse = (1 / high) * levels;
    } else {
        const float levels = static_cast<float>((1 << activation.bits) - 1);
        const float least = -static_cast<float>(1 << (activation.bits - 1));
        float width = line.high - line.low;
        if (!(width > kTiny)) width = kTiny;
        line.scale = width / levels;
        line.offset = line.low - line.scale * least;
        line.inverse = (1 / width) * levels;
        line.shift = least - line.low * line.inverse;
    }
    return line;
}

template <typename T>
QB_INLINE T held(T x, T low, T high) {
    x = x > low ? x : low;
    return x < high ? x : high;
}

// x as the code to be rounded.
template <bool HOLDS, typename T>
QB_INLINE T on_line(T x, T inverse, T shift, T low, T high) {
    return (HOLDS ? held(x, low, high) : x) * inverse + shift;
}

template <typename T>
QB_INLINE T on_steps(T x, T step, T floor, T least, T most) {
    return held((x - floor) / step, least, most);
}

QB_INLINE int32_t total16(i16 v) {
#ifdef QB_AVX512
    return _mm512_reduce_add_epi32((__m512i)v);
#endif
    int32_t sum = 0;
    for (int lane = 0; lane < 16; ++lane) sum += v[lane];
    return sum;
}

template <bool STEPS, bool HOLDS>
QB_INLINE int32_t codes_of(const float* x, long n, const Line& line, int8_t* codes) {
    const Activation activation = STEPS ? *line.step : Activation{};
    const float least = static_cast<float>(activation.least), most = static_cast<float>(activation.most);
    const int32_t base = kMagicBits + (STEPS ? activation.less : 0);
    i16 sum = {};
    long i = 0;
    for (; i + 16 <= n; i += 16) {
        const f16 v = load16(x + i);
        const f16 place = STEPS ? on_steps(v, splat(activation.step), splat(activation.floor), splat(least), splat(most))
                                : on_line<HOLDS>(v, splat(line.inverse), splat(line.shift), splat(line.low),
                                                 splat(line.high));
        const i16 code = (i16)(place + splat(kMagic)) - base;
        sum += code;
        *reinterpret_cast<c16*>(codes + i) = __builtin_convertvector(code, c16);
    }
    int32_t total = total16(sum);
    for (; i < n; ++i) {
        const float place = STEPS ? on_steps(x[i], activation.step, activation.floor, least, most)
                                  : on_line<HOLDS>(x[i], line.inverse, line.shift, line.low, line.high);
        const float rounded = place + kMagic;
        int32_t bits;
        __builtin_memcpy(&bits, &rounded, 4);
        codes[i] = static_cast<int8_t>(bits - base);
        total += codes[i];
    }
    return total;
}

QB_INLINE int32_t signs_of(const float* x, long n, const float* thresholds, int8_t* codes) {
    i16 sum = {};
    long i = 0;
    for (; i + 16 <= n; i += 16) {
        const i16 code = -2 * (i16)(load16(x + i) >= load16(thresholds + i)) - 1;
        sum += code;
        *reinterpret_cast<c16*>(codes + i) = __builtin_convertvector(code, c16);
    }
    int32_t total = total16(sum);
    for (; i < n; ++i) total += codes[i] = x[i] >= thresholds[i] ? 1 : -1;
    return total;
}

// Codes of n numbers; returns their sum.
QB_INLINE int32_t codes_row(const float* x, long n, const Line& line, int8_t* codes) {
    if (line.thresholds) return signs_of(x, n, line.thresholds, codes);
    if (line.step) return codes_of<true, false>(x, n, line, codes);
    return line.holds ? codes_of<false, true>(x, n, line, codes) : codes_of<false, false>(x, n, line, codes);
}

QB_TARGET static void quantize_row(const float* x, long n, Range range, const Activation& activation,
                                   long group_columns, const Codes& out, long row) {
    Line line = line_of(range, activation);
    int8_t* codes = out.codes + row * out.depth;
    out.scale[row] = line.scale;
    out.offset[row] = line.offset;
    for (long group = 0; group < out.groups; ++group) {
        const long begin = group * group_columns, end = group + 1 == out.groups ? n : begin + group_columns;
        if (activation.shift) line.thresholds = activation.shift + begin;
        out.sums[row * out.groups + group] = codes_row(x + begin, end - begin, line, codes + begin);
    }
    for (long i = n; i < out.depth; ++i) codes[i] = 0;
}

// GELU: x * (1/2 + t P(t^2) / Q(t^2)) with t = x held in [-5.25, 5.25]; least-squares fit of the normal distribution
// function by ops.gelu's coefficients, within 1.2e-6 of the exact GELU for |x| <= 12.
constexpr float kGeluLimit = 5.25f;
constexpr float kGeluP[6] = {0.39894214272499084f,  0.0336160734295845f,   0.004671834409236908f,
                             0.00016763329040259123f, 6.462956662289798e-06f, 2.371082175045558e-08f};
constexpr float kGeluQ[6] = {1.0f, 0.2509281039237976f, 0.0285341814160347f, 0.001877225935459137f, 7.388471567537636e-05f,
                             1.233577677339781e-06f};

template <typename T>
QB_INLINE T gelu_of(T x, T t) {
    const T s = t * t;
    T p = s * kGeluP[5] + kGeluP[4], q = s * kGeluQ[5] + kGeluQ[4];
    p = p * s + kGeluP[3], q = q * s + kGeluQ[3];
    p = p * s + kGeluP[2], q = q * s + kGeluQ[2];
    p = p * s + kGeluP[1], q = q * s + kGeluQ[1];
    p = p * s + kGeluP[0], q = q * s + kGeluQ[0];
    return x * (t * p / q + 0.5f);
}

QB_TARGET static Range gelu_row(float* x, long n) {
    const float infinity = __builtin_inff();
    f16 low = splat(infinity), high = splat(-infinity);
    Range range{infinity, -infinity};
    long i = 0;
    for (; i + 16 <= n; i += 16) {
        const f16 v = load16(x + i);
        const f16 y = gelu_of(v, high16(low16(v, splat(kGeluLimit)), splat(-kGeluLimit)));
        store16(x + i, y);
        low = low16(y, low);
        high = high16(y, high);
    }
    for (; i < n; ++i) {
        const float t = x[i] < kGeluLimit ? x[i] : kGeluLimit;
        x[i] = gelu_of(x[i], t > -kGeluLimit ? t : -kGeluLimit);
        widen(range, x[i]);
    }
    return collect(low, high, range);
}

QB_TARGET static Range relu_row(float* x, long n) {
    for (long i = 0; i < n; ++i) x[i] = x[i] > 0 ? x[i] : 0;
    return range_row(x, n);
}

QB_INLINE double total8(d8 v) {
    double sum = 0;
    for (int lane = 0; lane < 8; ++lane) sum += v[lane];
    return sum;
}

// GCC converts halves; the instruction takes all eight.
QB_INLINE d8 to_double(f8 x) {
#ifdef QB_AVX512
    return (d8)_mm512_cvtps_pd((__m256)x);
#else
    return __builtin_convertvector(x, d8);
#endif
}

QB_INLINE f8 to_float(d8 x) {
#ifdef QB_AVX512
    return (f8)_mm512_cvtpd_ps((__m512d)x);
#else
    return __builtin_convertvector(x, f8);
#endif
}

// Through registers: what is stored in halves and loaded whole waits for the cache.
QB_INLINE f8 left8(f16 x) { return __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7); }
QB_INLINE f8 right8(f16 x) { return __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15); }
QB_INLINE f16 join8(f8 a, f8 b) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

QB_INLINE d8 double8(const float* x) { return to_double(*reinterpret_cast<const f8*>(x)); }

// ops.layer_norm: mean, variance and root are taken in double and rounded to float, everything else is float.
QB_TARGET static Range layer_norm_row(const LayerNorm& norm, const float* y, float* x, long n) {
    d8 sums[2] = {};
    double tail = 0;
    long i = 0;
    for (; i + 16 <= n; i += 16) {
        if (y) store16(x + i, load16(y + i) + load16(x + i));
        sums[0] += double8(x + i);
        sums[1] += double8(x + i + 8);
    }
    for (; i < n; ++i) {
        if (y) x[i] = y[i] + x[i];
        tail += x[i];
    }
    const float mean = static_cast<float>((total8(sums[0] + sums[1]) + tail) / static_cast<double>(n));
    sums[0] = sums[1] = d8{};
    tail = 0;
    for (i = 0; i + 16 <= n; i += 16) {
        const f16 difference = load16(x + i) - splat(mean);
        float squares[16];
        store16(x + i, difference);
        store16(squares, difference * difference);
        sums[0] += double8(squares);
        sums[1] += double8(squares + 8);
    }
    for (; i < n; ++i) {
        x[i] = x[i] - mean;
        tail += x[i] * x[i];
    }
    const float variance = static_cast<float>((total8(sums[0] + sums[1]) + tail) / static_cast<double>(n));
    const float inverse = static_cast<float>(1 / __builtin_sqrt(static_cast<double>(variance + norm.epsilon)));
    const float infinity = __builtin_inff();
    f16 low = splat(infinity), high = splat(-infinity);
    Range range{infinity, -infinity};
    const float *gamma = norm.weight.get(), *beta = norm.bias.get();
    for (i = 0; i + 16 <= n; i += 16) {
        const f16 value = load16(x + i) * splat(inverse) * load16(gamma + i) + load16(beta + i);
        store16(x + i, value);
        low = low16(value, low);
        high = high16(value, high);
    }
    for (; i < n; ++i) {
        x[i] = x[i] * inverse * gamma[i] + beta[i];
        widen(range, x[i]);
    }
    return collect(low, high, range);
}

// 2^(j/16)
alignas(64) constexpr double kRoots[16] = {
    1.0,
    1.0442737824274138403,
    1.0905077326652576592,
    1.1387886347566916537,
    1.1892071150027210667,
    1.2418578120734840486,
    1.2968395546510096659,
    1.3542555469368927283,
    1.4142135623730950488,
    1.4768261459394993114,
    1.5422108254079408236,
    1.6104903319492543081,
    1.6817928305074290861,
    1.7562521603732994831,
    1.8340080864093424635,
    1.9152065613971472939,
};

QB_INLINE d8 root8(l8 index) {
    d8 value;
    for (int lane = 0; lane < 8; ++lane) value[lane] = kRoots[index[lane] & 15];
    return value;
}

// exp of x <= 0 in double, within 2^-42: x = (16 k + j) ln 2 / 16 + r, e^x = 2^k 2^(j/16) e^r. Rounded to float it is
// the float nearest to e^x but for one argument in a million, as is torch.exp of doubles; fused or not does not show.
QB_INLINE d8 exp8(d8 x) {
#ifdef QB_AVX512
    const __m512d magic = _mm512_set1_pd(kMagicDouble);
    const __m512d shifted = _mm512_fmadd_pd((__m512d)x, _mm512_set1_pd(23.083120654223414), magic);
    const __m512d whole = _mm512_sub_pd(shifted, magic);
    __m512d r = _mm512_fnmadd_pd(whole, _mm512_set1_pd(0.04332169878489367), (__m512d)x);
    r = _mm512_fnmadd_pd(whole, _mm512_set1_pd(1.0291218489310676e-13), r);
    __m512d p = _mm512_fmadd_pd(r, _mm512_set1_pd(1.0 / 120), _mm512_set1_pd(1.0 / 24));
    p = _mm512_fmadd_pd(p, r, _mm512_set1_pd(1.0 / 6));
    p = _mm512_fmadd_pd(p, r, _mm512_set1_pd(0.5));
    p = _mm512_fmadd_pd(p, r, _mm512_set1_pd(1.0));
    p = _mm512_fmadd_pd(p, r, _mm512_set1_pd(1.0));
    // The low bits of `shifted` are 16 k + j: the permutation reads j, the shift moves k to the exponent.
    const __m512i n = (__m512i)shifted;
    const __m512d root = _mm512_permutex2var_pd(_mm512_load_pd(kRoots), n, _mm512_load_pd(kRoots + 8));
    const __m512i exponent = _mm512_slli_epi64(_mm512_and_si512(n, _mm512_set1_epi64(-16)), 48);
    return (d8)_mm512_add_epi64((__m512i)_mm512_mul_pd(p, root), exponent);
#else
    const d8 shifted = x * 23.083120654223414 + kMagicDouble;
    const d8 whole = shifted - kMagicDouble;
    const l8 n = (l8)shifted - (l8)(d8{} + kMagicDouble);
    const d8 r = (x - whole * 0.04332169878489367) - whole * 1.0291218489310676e-13;
    d8 p = r * (1.0 / 120) + 1.0 / 24;
    p = p * r + 1.0 / 6;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    return (d8)((l8)(p * root8(n & 15)) + ((n >> 4) << 52));
#endif
}

// The code is 0 from here on, and a sum that is at least 1 stays as it is.
constexpr float kLeastExponent = -80.0f;

// Codes of the probabilities of one query from its scores (n of them, space for a multiple of 16), whose largest is
// `high`: softmax_codes, or learned_softmax_codes with a fixed step.
struct Probabilities {
    float scale, sum;  // of a code; of the codes, times that scale
};

QB_TARGET static Probabilities softmax_row(float* scores, long n, float high, const Activation& activation,
                                           uint8_t* codes) {
    const bool steps = activation.kind == kStep;
    const float levels = static_cast<float>((1 << activation.bits) - 1);
    const long padded = round_up(n, 16);
    for (long i = n; i < padded; ++i) scores[i] = -__builtin_inff();
    d8 sums[2] = {};
    i16 code_sum = {};
    const f16 least = splat(kLeastExponent), levels16 = splat(levels);
    for (long i = 0; i < padded; i += 16) {
        const f16 below = high16(load16(scores + i) - splat(high), least);
        const f8 left = to_float(exp8(to_double(left8(below)))), right = to_float(exp8(to_double(right8(below))));
        sums[0] += to_double(left);
        sums[1] += to_double(right);
        const f16 all = join8(left, right);
        if (steps) {
            store16(scores + i, all);
            continue;
        }
        const i16 code = (i16)(all * levels16 + splat(kMagic)) - kMagicBits;
        code_sum += code;
        *reinterpret_cast<u16x*>(codes + i) = __builtin_convertvector(code, u16x);
    }
    const float total = static_cast<float>(total8(sums[0] + sums[1]));
    const f16 zero = {}, most = splat(static_cast<float>(activation.most));
    for (long i = 0; steps && i < padded; i += 16) {
        const f16 place = (load16(scores + i) / total - activation.floor) / activation.step;
        const i16 code = (i16)(held(place, zero, most) + splat(kMagic)) - kMagicBits;
        code_sum += code;
        *reinterpret_cast<u16x*>(codes + i) = __builtin_convertvector(code, u16x);
    }
    const int32_t whole = total16(code_sum);
    const float scale = steps ? activation.step : 1 / (levels * total);
    return {scale, static_cast<float>(whole) * scale};
}
