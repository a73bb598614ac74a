// The float steps of a layer, compiled once per path: included with QB_TARGET set to that path's target attribute and
// QB_WIDE to the floats that one of its registers has: 16, 8 or 4 (with QB_NEON by NEON's instructions).
//
// Every step is a fixed sequence of IEEE operations, none of them fused (the build says -ffp-contract=off), the same
// as the formulas of quantizers.py and ops.py. Sums run in double and are rounded once, so their order does not show.

// Vectors of QB_WIDE numbers, as many as a register has: compilers take wider ones apart through memory.
constexpr int kWide = QB_WIDE;
typedef float fv __attribute__((vector_size(QB_WIDE * 4), aligned(4), may_alias));
typedef float half __attribute__((vector_size(QB_WIDE * 2)));
typedef int32_t iv __attribute__((vector_size(QB_WIDE * 4), aligned(4), may_alias));
typedef double dv __attribute__((vector_size(QB_WIDE * 4), aligned(8), may_alias));  // half as many
typedef int64_t lv __attribute__((vector_size(QB_WIDE * 4), aligned(8), may_alias));

#define QB_MEMBER QB_TARGET __attribute__((always_inline)) inline
#define QB_INLINE static QB_MEMBER

constexpr float kMagic = 12582912.0f;         // 1.5 * 2^23: adding it rounds to a whole number, halves to even
constexpr int32_t kMagicBits = 0x4B400000;    // its bits; the low bits of a sum are the whole number
constexpr double kMagicDouble = 6755399441055744.0;  // 1.5 * 2^52

QB_INLINE fv splat(float x) { return fv{} + x; }
QB_INLINE fv load(const float* x) { return *reinterpret_cast<const fv*>(x); }
QB_INLINE void store(float* x, fv value) { *reinterpret_cast<fv*>(x) = value; }
QB_INLINE fv lower(fv a, fv b) { return a < b ? a : b; }
QB_INLINE fv higher(fv a, fv b) { return a > b ? a : b; }
QB_INLINE fv floats(iv whole) { return __builtin_convertvector(whole, fv); }

// The lowest byte of each number.
template <typename Byte>
QB_INLINE void store_bytes(Byte* bytes, iv numbers) {
#if QB_WIDE == 16
    _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), _mm512_cvtepi32_epi8((__m512i)numbers));
#elif QB_WIDE == 8
    const __m256i picked = _mm256_shuffle_epi8((__m256i)numbers, _mm256_set1_epi32(0x0C080400));
    const __m128i both = _mm_unpacklo_epi32(_mm256_castsi256_si128(picked), _mm256_extracti128_si256(picked, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(bytes), both);
#elif defined(QB_NEON)
    const int16x4_t low = vmovn_s32((int32x4_t)numbers);
    const int32x2_t picked = vreinterpret_s32_s8(vmovn_s16(vcombine_s16(low, low)));
    const int32_t word = vget_lane_s32(picked, 0);
    __builtin_memcpy(bytes, &word, 4);
#else
    for (int lane = 0; lane < kWide; ++lane) bytes[lane] = static_cast<Byte>(numbers[lane]);
#endif
}

QB_INLINE void widen(Range& range, float x) {
    range.low = x < range.low ? x : range.low;
    range.high = x > range.high ? x : range.high;
}

QB_INLINE Range collect(fv low, fv high, Range range) {
#if QB_WIDE == 16
    const float least = _mm512_reduce_min_ps((__m512)low), most = _mm512_reduce_max_ps((__m512)high);
    return {least < range.low ? least : range.low, most > range.high ? most : range.high};
#endif
    for (int lane = 0; lane < kWide; ++lane) {
        range.low = low[lane] < range.low ? low[lane] : range.low;
        range.high = high[lane] > range.high ? high[lane] : range.high;
    }
    return range;
}

QB_TARGET static Range range_row(const float* x, long n) {
    const float infinity = __builtin_inff();
    fv low = splat(infinity), high = splat(-infinity);
    Range range{infinity, -infinity};
    long i = 0;
    for (; i + kWide <= n; i += kWide) {
        low = lower(load(x + i), low);
        high = higher(load(x + i), high);
    }
    for (; i < n; ++i) widen(range, x[i]);
    return collect(low, high, range);
}

// How a row becomes codes: the nearest whole number to x * inverse + shift in [least, most], x held in [low, high]; by a
// fixed step; or by the sign of what is above a threshold for each column.
struct Line {
    float scale, offset, inverse, shift, low, high, least, most;
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
    if (!(range.low <= range.high)) {  // a row without numbers
        line.scale = line.offset = __builtin_nanf("");
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
        line.least = -levels, line.most = levels;
    } else {
        const float levels = static_cast<float>((1 << activation.bits) - 1);
        const float least = -static_cast<float>(1 << (activation.bits - 1));
        float width = line.high - line.low;
        if (!(width > kTiny)) width = kTiny;
        line.scale = width / levels;
        line.offset = line.low - line.scale * least;
        line.inverse = (1 / width) * levels;
        line.shift = least - line.low * line.inverse;
        line.least = least, line.most = least + levels;
    }
    return line;
}

template <typename T>
QB_INLINE T held(T x, T low, T high) {
    x = x > low ? x : low;
    return x < high ? x : high;
}

// x as the code to be rounded. The sum may round beyond the last code where a range is narrow and far from 0.
template <bool HOLDS, typename T>
QB_INLINE T on_line(T x, T inverse, T shift, T low, T high, T least, T most) {
    return held((HOLDS ? held(x, low, high) : x) * inverse + shift, least, most);
}

template <typename T>
QB_INLINE T on_steps(T x, T step, T floor, T least, T most) {
    return held((x - floor) / step, least, most);
}

QB_INLINE int32_t sum_of(iv v) {
#if QB_WIDE == 16
    return _mm512_reduce_add_epi32((__m512i)v);
#endif
    int32_t sum = 0;
    for (int lane = 0; lane < kWide; ++lane) sum += v[lane];
    return sum;
}

template <bool STEPS, bool HOLDS>
QB_INLINE int32_t codes_of(const float* x, long n, const Line& line, int8_t* codes) {
    const Activation activation = STEPS ? *line.step : Activation{};
    const float least = static_cast<float>(activation.least), most = static_cast<float>(activation.most);
    const int32_t base = kMagicBits + (STEPS ? activation.less : 0);
    iv sum = {};
    long i = 0;
    for (; i + kWide <= n; i += kWide) {
        const fv v = load(x + i);
        const fv place = STEPS ? on_steps(v, splat(activation.step), splat(activation.floor), splat(least), splat(most))
                                : on_line<HOLDS>(v, splat(line.inverse), splat(line.shift), splat(line.low),
                                                 splat(line.high), splat(line.least), splat(line.most));
        const iv code = (iv)(place + splat(kMagic)) - base;
        sum += code;
        store_bytes(codes + i, code);
    }
    int32_t total = sum_of(sum);
    for (; i < n; ++i) {
        const float place = STEPS ? on_steps(x[i], activation.step, activation.floor, least, most)
                                  : on_line<HOLDS>(x[i], line.inverse, line.shift, line.low, line.high, line.least,
                                                   line.most);
        const float rounded = place + kMagic;
        int32_t bits;
        __builtin_memcpy(&bits, &rounded, 4);
        codes[i] = static_cast<int8_t>(bits - base);
        total += codes[i];
    }
    return total;
}

QB_INLINE int32_t signs_of(const float* x, long n, const float* thresholds, int8_t* codes) {
    iv sum = {};
    long i = 0;
    for (; i + kWide <= n; i += kWide) {
        const iv code = -2 * (iv)(load(x + i) >= load(thresholds + i)) - 1;
        sum += code;
        store_bytes(codes + i, code);
    }
    int32_t total = sum_of(sum);
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
    fv low = splat(infinity), high = splat(-infinity);
    Range range{infinity, -infinity};
    long i = 0;
    for (; i + kWide <= n; i += kWide) {
        const fv v = load(x + i);
        const fv y = gelu_of(v, higher(lower(v, splat(kGeluLimit)), splat(-kGeluLimit)));
        store(x + i, y);
        low = lower(y, low);
        high = higher(y, high);
    }
    for (; i < n; ++i) {
        const float t = x[i] < kGeluLimit ? x[i] : kGeluLimit;
        x[i] = gelu_of(x[i], t > -kGeluLimit ? t : -kGeluLimit);
        widen(range, x[i]);
    }
    return collect(low, high, range);
}

QB_TARGET static Range relu_row(float* x, long n) {
    for (long i = 0; i < n; ++i) x[i] = x[i] < 0 ? 0 : x[i];
    return range_row(x, n);
}

QB_INLINE double sum_of(dv v) {
    double sum = 0;
    for (int lane = 0; lane < kWide / 2; ++lane) sum += v[lane];
    return sum;
}

struct Doubles {
    dv left, right;
};

// Through registers: what is stored in halves and loaded whole waits for the cache.
QB_INLINE Doubles to_doubles(fv x) {
#if QB_WIDE == 16
    return {(dv)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)x)),
            (dv)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)x, 1))};
#elif QB_WIDE == 8
    return {(dv)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x)),
            (dv)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x, 1))};
#elif defined(QB_NEON)
    return {(dv)vcvt_f64_f32(vget_low_f32((float32x4_t)x)), (dv)vcvt_high_f64_f32((float32x4_t)x)};
#else
    half halves[2];
    __builtin_memcpy(halves, &x, sizeof x);
    return {__builtin_convertvector(halves[0], dv), __builtin_convertvector(halves[1], dv)};
#endif
}

QB_INLINE fv to_floats(Doubles x) {
#if QB_WIDE == 16
    const __m512 left = _mm512_castps256_ps512(_mm512_cvtpd_ps((__m512d)x.left));
    return (fv)_mm512_insertf32x8(left, _mm512_cvtpd_ps((__m512d)x.right), 1);
#elif QB_WIDE == 8
    const __m256 left = _mm256_castps128_ps256(_mm256_cvtpd_ps((__m256d)x.left));
    return (fv)_mm256_insertf128_ps(left, _mm256_cvtpd_ps((__m256d)x.right), 1);
#elif defined(QB_NEON)
    return (fv)vcvt_high_f32_f64(vcvt_f32_f64((float64x2_t)x.left), (float64x2_t)x.right);
#else
    const half halves[2] = {__builtin_convertvector(x.left, half), __builtin_convertvector(x.right, half)};
    fv y;
    __builtin_memcpy(&y, halves, sizeof y);
    return y;
#endif
}

QB_INLINE void add(dv (&sums)[2], Doubles x) {
    sums[0] += x.left;
    sums[1] += x.right;
}

// ops.layer_norm: mean, variance and root are taken in double and rounded to float, everything else is float.
QB_TARGET static Range layer_norm_row(const LayerNorm& norm, const float* y, float* x, long n) {
    dv sums[2] = {};
    double tail = 0;
    long i = 0;
    for (; i + kWide <= n; i += kWide) {
        const fv value = y ? load(y + i) + load(x + i) : load(x + i);
        if (y) store(x + i, value);
        add(sums, to_doubles(value));
    }
    for (; i < n; ++i) {
        if (y) x[i] = y[i] + x[i];
        tail += x[i];
    }
    const float mean = static_cast<float>((sum_of(sums[0] + sums[1]) + tail) / static_cast<double>(n));
    sums[0] = sums[1] = dv{};
    tail = 0;
    for (i = 0; i + kWide <= n; i += kWide) {
        const fv difference = load(x + i) - splat(mean);
        store(x + i, difference);
        add(sums, to_doubles(difference * difference));
    }
    for (; i < n; ++i) {
        x[i] = x[i] - mean;
        tail += x[i] * x[i];
    }
    const float variance = static_cast<float>((sum_of(sums[0] + sums[1]) + tail) / static_cast<double>(n));
    const float inverse = static_cast<float>(1 / __builtin_sqrt(static_cast<double>(variance + norm.epsilon)));
    const float infinity = __builtin_inff();
    fv low = splat(infinity), high = splat(-infinity);
    Range range{infinity, -infinity};
    const float *gamma = norm.weight.get(), *beta = norm.bias.get();
    for (i = 0; i + kWide <= n; i += kWide) {
        const fv value = load(x + i) * splat(inverse) * load(gamma + i) + load(beta + i);
        store(x + i, value);
        low = lower(value, low);
        high = higher(value, high);
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

// exp of x <= 0 in double, within 2^-51: x = (16 k + j) ln 2 / 16 + r, e^x = 2^k 2^(j/16) e^r, r at most ln 2 / 32.
// torch.exp of doubles is about as near, so both round to one float but for a few arguments in 10^8. It matters: a dev
// split of SQuAD's size asks for 10^10 of them, and one neighbouring float can move a softmax's sum.
#if QB_WIDE != 8
QB_INLINE dv exponential(dv x) {
#if QB_WIDE == 16
    const __m512d magic = _mm512_set1_pd(kMagicDouble);
    const __m512d shifted = _mm512_fmadd_pd((__m512d)x, _mm512_set1_pd(23.083120654223414), magic);
    const __m512d whole = _mm512_sub_pd(shifted, magic);
    __m512d r = _mm512_fnmadd_pd(whole, _mm512_set1_pd(0.04332169878489367), (__m512d)x);
    r = _mm512_fnmadd_pd(whole, _mm512_set1_pd(1.0291218489310676e-13), r);
    __m512d p = _mm512_fmadd_pd(r, _mm512_set1_pd(1.0 / 5040), _mm512_set1_pd(1.0 / 720));
    p = _mm512_fmadd_pd(p, r, _mm512_set1_pd(1.0 / 120));
    p = _mm512_fmadd_pd(p, r, _mm512_set1_pd(1.0 / 24));
    p = _mm512_fmadd_pd(p, r, _mm512_set1_pd(1.0 / 6));
    p = _mm512_fmadd_pd(p, r, _mm512_set1_pd(0.5));
    p = _mm512_fmadd_pd(p, r, _mm512_set1_pd(1.0));
    p = _mm512_fmadd_pd(p, r, _mm512_set1_pd(1.0));
    // The low bits of `shifted` are 16 k + j: the permutation reads j, the shift moves k to the exponent.
    const __m512i n = (__m512i)shifted;
    const __m512d root = _mm512_permutex2var_pd(_mm512_load_pd(kRoots), n, _mm512_load_pd(kRoots + 8));
    const __m512i exponent = _mm512_slli_epi64(_mm512_and_si512(n, _mm512_set1_epi64(-16)), 48);
    return (dv)_mm512_add_epi64((__m512i)_mm512_mul_pd(p, root), exponent);
#else
    const dv shifted = x * 23.083120654223414 + kMagicDouble;
    const dv whole = shifted - kMagicDouble;
    const dv r = (x - whole * 0.04332169878489367) - whole * 1.0291218489310676e-13;
    dv p = r * (1.0 / 5040) + 1.0 / 720;
    p = p * r + 1.0 / 120;
    p = p * r + 1.0 / 24;
    p = p * r + 1.0 / 6;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    const lv n = (lv)shifted;  // its low bits are 16 k + j
    dv root;
    for (int lane = 0; lane < kWide / 2; ++lane) root[lane] = kRoots[n[lane] & 15];
    return (dv)((lv)(p * root) + ((n & -16) << 48));
#endif
}
#endif

QB_INLINE Doubles exponentials(Doubles x) {
#if QB_WIDE == 8
    const __m256d magic = _mm256_set1_pd(kMagicDouble);
    const __m256d of[2] = {(__m256d)x.left, (__m256d)x.right};
    __m256d shifted[2], p[2];
    for (int i = 0; i < 2; ++i) {
        shifted[i] = _mm256_fmadd_pd(of[i], _mm256_set1_pd(23.083120654223414), magic);
        const __m256d whole = _mm256_sub_pd(shifted[i], magic);
        __m256d r = _mm256_fnmadd_pd(whole, _mm256_set1_pd(0.04332169878489367), of[i]);
        r = _mm256_fnmadd_pd(whole, _mm256_set1_pd(1.0291218489310676e-13), r);
        p[i] = _mm256_fmadd_pd(r, _mm256_set1_pd(1.0 / 5040), _mm256_set1_pd(1.0 / 720));
        p[i] = _mm256_fmadd_pd(p[i], r, _mm256_set1_pd(1.0 / 120));
        p[i] = _mm256_fmadd_pd(p[i], r, _mm256_set1_pd(1.0 / 24));
        p[i] = _mm256_fmadd_pd(p[i], r, _mm256_set1_pd(1.0 / 6));
        p[i] = _mm256_fmadd_pd(p[i], r, _mm256_set1_pd(0.5));
        p[i] = _mm256_fmadd_pd(p[i], r, _mm256_set1_pd(1.0));
        p[i] = _mm256_fmadd_pd(p[i], r, _mm256_set1_pd(1.0));
    }
    // Eight roots at once, their lower words and their upper words: bits 0 to 2 choose within 8, bit 3 between them.
    const __m256i n = (__m256i)_mm256_shuffle_ps((__m256)shifted[0], (__m256)shifted[1], 0x88);
    const __m256 upper = (__m256)_mm256_slli_epi32(n, 28);
    __m256 words[2];
    for (int word = 0; word < 2; ++word) {
        __m256 found[2];
        for (int i = 0; i < 2; ++i) {
            const __m256 a = (__m256)_mm256_load_pd(kRoots + 8 * i), b = (__m256)_mm256_load_pd(kRoots + 8 * i + 4);
            const __m256 mixed = word ? _mm256_shuffle_ps(a, b, 0xDD) : _mm256_shuffle_ps(a, b, 0x88);
            const __m256d eight = _mm256_permute4x64_pd((__m256d)mixed, 0xD8);
            found[i] = _mm256_permutevar8x32_ps((__m256)eight, n);
        }
        words[word] = _mm256_blendv_ps(found[0], found[1], upper);
    }
    const __m256d roots[2] = {(__m256d)_mm256_unpacklo_ps(words[0], words[1]),
                              (__m256d)_mm256_unpackhi_ps(words[0], words[1])};
    dv parts[2];
    for (int i = 0; i < 2; ++i) {
        const __m256i k = _mm256_and_si256((__m256i)shifted[i], _mm256_set1_epi64x(-16));
        parts[i] = (dv)_mm256_add_epi64((__m256i)_mm256_mul_pd(p[i], roots[i]), _mm256_slli_epi64(k, 48));
    }
    return {parts[0], parts[1]};
#else
    return {exponential(x.left), exponential(x.right)};
#endif
}

// The code is 0 from here on, and a sum that is at least 1 stays as it is.
constexpr float kLeastExponent = -80.0f;

// Codes of the probabilities of one query from its scores (n of them, space for a multiple of kWide), whose largest is
// `high`: softmax_codes, or learned_softmax_codes with a fixed step.
struct Probabilities {
    float scale, sum;  // of a code; of the codes, times that scale
};

QB_TARGET static Probabilities softmax_row(float* scores, long n, float high, const Activation& activation,
                                           uint8_t* codes) {
    const bool steps = activation.kind == kStep;
    const float levels = static_cast<float>((1 << activation.bits) - 1);
    const long padded = round_up(n, kWide);
    for (long i = n; i < padded; ++i) scores[i] = -__builtin_inff();
    dv sums[2] = {};
    iv code_sum = {};
    const fv least = splat(kLeastExponent), levels_of_all = splat(levels);
    for (long i = 0; i < padded; i += kWide) {
        const fv below = higher(load(scores + i) - splat(high), least);
        const Doubles exact = to_doubles(below);
        const fv all = to_floats(exponentials(exact));
        add(sums, to_doubles(all));
        if (steps) {
            store(scores + i, all);
            continue;
        }
        const iv code = (iv)(all * levels_of_all + splat(kMagic)) - kMagicBits;
        code_sum += code;
        store_bytes(codes + i, code);
    }
    const float total = static_cast<float>(sum_of(sums[0] + sums[1]));
    const fv zero = {}, most = splat(static_cast<float>(activation.most));
    for (long i = 0; steps && i < padded; i += kWide) {
        const fv place = (load(scores + i) / total - activation.floor) / activation.step;
        const iv code = (iv)(held(place, zero, most) + splat(kMagic)) - kMagicBits;
        code_sum += code;
        store_bytes(codes + i, code);
    }
    const int32_t whole = sum_of(code_sum);
    const float scale = steps ? activation.step : 1 / (levels * total);
    return {scale, static_cast<float>(whole) * scale};
}
