// Attention of one head of one sentence at the trained precision, as attention.quantized_attention: Q and K have one
// range per token, V one over the sentence, probabilities are unsigned codes. Needs `panel_product` of its path.

constexpr int kQueries = 4;  // a block of queries

struct AttentionScratch {
    long keys, quads, depth, width;  // tokens rounded up to 16, to 8; D rounded up to 4, to 16
    uint8_t *key_panel, *value_panel, *probabilities;
    int8_t* row;  // 4 quantized rows
    int8_t* queries;
    float *key_scale, *key_offset, *key_sum, *scores;
    int32_t* context;
};

// Bytes laid out from address `at`.
QB_INLINE long lay_out(uintptr_t at, long tokens, long size, AttentionScratch& s) {
    s.keys = round_up(tokens, kLanes), s.quads = round_up(tokens, 8);
    s.depth = round_up(size, 4), s.width = round_up(size, kLanes);
    const uintptr_t start = at;
    auto take = [&at](long bytes) QB_TARGET {
        at += round_up(bytes, 64);
        return reinterpret_cast<uint8_t*>(at - round_up(bytes, 64));
    };
    s.key_panel = take(s.keys * s.depth);
    s.value_panel = take(s.width * s.quads);
    s.probabilities = take(kQueries * s.keys);
    s.row = reinterpret_cast<int8_t*>(take(4 * s.width));
    s.queries = reinterpret_cast<int8_t*>(take(kQueries * s.depth));
    s.key_scale = reinterpret_cast<float*>(take(s.keys * 4));
    s.key_offset = reinterpret_cast<float*>(take(s.keys * 4));
    s.key_sum = reinterpret_cast<float*>(take(s.keys * 4));
    s.scores = reinterpret_cast<float*>(take(kQueries * s.keys * 4));
    s.context = reinterpret_cast<int32_t*>(take(kQueries * s.width * 4));
    return static_cast<long>(at - start);
}

QB_INLINE void quantize_keys(const Head& head, const AttentionScratch& s) {
    int32_t codes[4] = {};
    for (long token = 0; token < head.tokens; ++token) {
        const float* key = head.key + token * head.stride;
        const Line line = line_of(range_row(key, head.size), *head.of_key);
        const int32_t sum = codes_row(key, head.size, line, s.row);
        for (long i = head.size; i < s.depth; ++i) s.row[i] = 0;
        uint8_t* panel = s.key_panel + token / kLanes * s.depth * kLanes + token % kLanes * 4;
        for (long quad = 0; quad < s.depth / 4; ++quad) {
            __builtin_memcpy(codes, s.row + quad * 4, 4);
            codes[0] ^= static_cast<int32_t>(0x80808080u);
            __builtin_memcpy(panel + quad * 64, codes, 4);
        }
        s.key_scale[token] = line.scale;
        s.key_offset[token] = line.offset;
        s.key_sum[token] = static_cast<float>(sum) * line.scale;
    }
}

QB_INLINE Line quantize_values(const Head& head, const AttentionScratch& s) {
    Range range{__builtin_inff(), -__builtin_inff()};
    for (long token = 0; token < head.tokens; ++token) {
        const Range row = range_row(head.value + token * head.stride, head.size);
        if (!(row.low <= row.high)) {  // nor has the sentence a range then
            range = row;
            break;
        }
        widen(range, row.low);
        widen(range, row.high);
    }
    const Line line = line_of(range, *head.of_value);
    for (long first = 0; first < head.tokens; first += 4) {
        for (long i = 0; i < 4; ++i) {
            int8_t* row = s.row + i * s.width;
            if (first + i < head.tokens) codes_row(head.value + (first + i) * head.stride, head.size, line, row);
            else for (long d = 0; d < s.width; ++d) row[d] = 0;
        }
        for (long d = 0; d < s.width; d += kLanes) {
            uint8_t* quads = s.value_panel + d * s.quads + first / 4 * 64;
            const int8_t *a = s.row + d, *b = a + s.width, *c = b + s.width, *e = c + s.width;
            for (int lane = 0; lane < kLanes; ++lane) {
                quads[lane * 4] = static_cast<uint8_t>(a[lane]);
                quads[lane * 4 + 1] = static_cast<uint8_t>(b[lane]);
                quads[lane * 4 + 2] = static_cast<uint8_t>(c[lane]);
                quads[lane * 4 + 3] = static_cast<uint8_t>(e[lane]);
            }
        }
    }
    return line;
}

// Scores of one query, whole numbers in `scores` made floats in place; returns the largest.
QB_INLINE float score_row(const Head& head, const AttentionScratch& s, const Line& query, int32_t sum, float* scores) {
    const bool offsets = head.of_query->kind == kAsymmetric;
    const float query_sum = static_cast<float>(sum) * query.scale;
    const float offset_size = static_cast<float>(head.size) * query.offset;
    fv highest = splat(-__builtin_inff());
    float high = -__builtin_inff();
    for (long key = 0; key < head.tokens; key += kWide) {
        const iv products = *reinterpret_cast<const iv*>(scores + key) - 128 * sum;
        const fv scale = splat(query.scale) * load(s.key_scale + key);
        fv y = floats(products) * scale;
        if (offsets) {
            const fv key_offset = load(s.key_offset + key);
            y += splat(query_sum) * key_offset;
            y += splat(query.offset) * load(s.key_sum + key);
            y += splat(offset_size) * key_offset;
        }
        y *= splat(head.scaling);
        store(scores + key, y);
        if (key + kWide <= head.tokens) highest = higher(y, highest);
        else for (long i = key; i < head.tokens; ++i) high = scores[i] > high ? scores[i] : high;
    }
    const float all = collect(highest, highest, {0, -__builtin_inff()}).high;
    high = all > high ? all : high;
    return high;
}

QB_TARGET static void attention_head(const Head& head) {
    AttentionScratch s;
    lay_out(reinterpret_cast<uintptr_t>(head.scratch), head.tokens, head.size, s);
    quantize_keys(head, s);
    const Line value = quantize_values(head, s);
    const bool offsets = head.of_value->kind == kAsymmetric;
    const long blocks = (head.tokens + kQueries - 1) / kQueries, most = (head.tokens + blocks - 1) / blocks;
    for (long first = 0; first < head.tokens; first += most) {
        const int rows = static_cast<int>(head.tokens - first < most ? head.tokens - first : most);
        Line lines[kQueries];
        int32_t sums[kQueries];
        for (int r = 0; r < rows; ++r) {
            const float* query = head.query + (first + r) * head.stride;
            lines[r] = line_of(range_row(query, head.size), *head.of_query);
            sums[r] = codes_row(query, head.size, lines[r], s.queries + r * s.depth);
            for (long i = head.size; i < s.depth; ++i) s.queries[r * s.depth + i] = 0;
        }
        panel_product<false>(s.key_panel, s.depth * kLanes, s.keys / kLanes, s.depth / 4,
                             reinterpret_cast<const uint8_t*>(s.queries), s.depth, rows,
                             reinterpret_cast<int32_t*>(s.scores), s.keys);
        Probabilities probabilities[kQueries];
        for (int r = 0; r < rows; ++r) {
            float* scores = s.scores + r * s.keys;
            const float high = score_row(head, s, lines[r], sums[r], scores);
            probabilities[r] = softmax_row(scores, head.tokens, high, *head.of_probability, s.probabilities + r * s.keys);
        }
        panel_product<true>(s.value_panel, s.quads * kLanes, s.width / kLanes, (head.tokens + 3) / 4, s.probabilities,
                            s.keys, rows, s.context, s.width);
        for (int r = 0; r < rows; ++r) {
            float* context = head.context + (first + r) * head.context_stride;
            const int32_t* products = s.context + r * s.width;
            const float scale = probabilities[r].scale * value.scale;
            const float start = probabilities[r].sum * value.offset;
            for (long d = 0; d < head.size; ++d) {
                const float y = static_cast<float>(products[d]) * scale;
                context[d] = offsets ? y + start : y;
            }
        }
    }
}
