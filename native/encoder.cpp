// The batch is walked in waves of whole sentences. Within a wave each thread owns an equal run of rows (tokens), which
// it takes through the row-wise steps in blocks that stay in its L2. Only attention needs rows of others, so a layer has
// two barriers, and one more for each of its places with ghost features, which see the rows beside. Lines that another
// core has written are slow to read, and slower to write: threads attend to the sentences of their own rows first, and
// where there are too few sentences each takes some heads from the product to the context. Rows are independent and sums
// exact: neither waves nor threads nor padding can move an answer.

#include "encoder.h"

#include <algorithm>
#include <atomic>

namespace qbert {
namespace {

constexpr long kBlockRows = 32;             // rows through the feed-forward at a time: 32 x 3072 floats are 384 KiB
constexpr long kBlockRowsOfBytes = 128;     // with 8-bit weights, which come from memory once per block
constexpr long kWaveRows = 128;             // rows a thread takes through a layer before the next wave
constexpr size_t kKeptBytes = 64u << 20;    // scratch kept between calls
constexpr int kKeptScratches = 4;

struct ThreadScratch {
    Buffer<float> wide;       // a block of the widest layer
    Buffer<int8_t> codes;     // its codes
    Buffer<float> scale, offset;
    Buffer<int32_t> sums;
    Buffer<uint8_t> attention;
    Buffer<int8_t> word;      // codes of one embedding row
    Buffer<uint8_t> operand;  // of a product
    Buffer<float> total;      // a row with its ghost features
    std::vector<const float*> taps;

    size_t bytes() const { return wide.count() * 4 + codes.count() + sums.count() * 4 + attention.count() + operand.count(); }
};

struct Scratch {
    Buffer<float> x, query_key_value, context;
    Buffer<float> attended, fed;  // products that ghost features follow
    Buffer<int8_t> codes;
    Buffer<float> scale, offset;
    Buffer<int32_t> sums;
    std::vector<ThreadScratch> threads;

    size_t bytes() const {
        size_t sum = (x.count() + query_key_value.count() + context.count() + attended.count() + fed.count()) * 4 +
                     codes.count() + sums.count() * 4;
        for (const ThreadScratch& thread : threads) sum += thread.bytes();
        return sum;
    }
};

// Without locks, so that a child forked at any moment can go on.
std::atomic<Scratch*> kept[kKeptScratches];

struct Lease {
    std::unique_ptr<Scratch> scratch;
    Lease() {
        for (auto& slot : kept) {
            scratch.reset(slot.exchange(nullptr));
            if (scratch) return;
        }
        scratch = std::make_unique<Scratch>();
    }
    ~Lease() {
        if (scratch->bytes() > kKeptBytes) return;
        for (auto& slot : kept) {
            Scratch* expected = nullptr;
            if (slot.compare_exchange_strong(expected, scratch.get())) {
                scratch.release();
                return;
            }
        }
    }
};

struct Sentence {
    long first, tokens;  // rows of the wave
};

struct Wave {
    const Encoder& encoder;
    const Batch& batch;
    const Kernels& run;
    Scratch& scratch;
    std::vector<Sentence> sentences;
    std::vector<long> places;                 // of every row in (B, T)
    std::vector<int64_t> positions;           // of every row in the table, if there is one
    std::vector<std::atomic<long>>& tickets;  // of attention tasks: one counter per layer and thread

    long rows() const { return static_cast<long>(places.size()); }
};

Codes at_row(const Codes& codes, long row) {
    return {codes.codes + row * codes.depth, codes.scale + row,  codes.offset + row,
            codes.sums + row * codes.groups, codes.depth,        codes.groups, codes.alphabet, codes.operand};
}


long block_rows(const Encoder& encoder) {
    return !encoder.layers.empty() && encoder.layers[0].up->bits == 8 ? kBlockRowsOfBytes : kBlockRows;
}

class Worker {
 public:
    Worker(Wave& wave, int thread, Team& team)
        : wave_(wave), encoder_(wave.encoder), run_(wave.run), scratch_(wave.scratch), own_(scratch_.threads[thread]),
          team_(team), thread_(thread), first_(first_row(thread)), last_(first_row(thread + 1)),
          by_heads_(wave.sentences.size() < static_cast<size_t>(team.size()) && encoder_.heads % team.size() == 0 &&
                    encoder_.head_size % kLanes == 0) {}

    void work() {
        for (long row = first_; row < last_; ++row) begin(row);
        for (size_t index = 0; index < encoder_.layers.size(); ++index) {
            const Layer& layer = encoder_.layers[index];
            const Layer* next = index + 1 < encoder_.layers.size() ? &encoder_.layers[index + 1] : nullptr;
            if (by_heads_) {
                team_.barrier();
                heads(layer);
            } else {
                blocks(first_, last_, [&](long row, long rows) {
                    query_key_value(layer, row, rows, 0, layer.query_key_value->vectors);
                });
                team_.barrier();
                attention(layer, index);
            }
            team_.barrier();
            const bool attended = layer.attention_ghosts.features != 0, fed = layer.feed_forward_ghosts.features != 0;
            if (attended) {
                blocks(first_, last_, [&](long row, long rows) { attention_output(layer, row, rows); });
                team_.barrier();
            }
            blocks(first_, last_, [&](long row, long rows) {
                if (!attended) attention_output(layer, row, rows);
                feed_forward(layer, row, rows);
                if (!fed) finish(layer, next, row, rows);
            });
            if (fed) {
                team_.barrier();
                blocks(first_, last_, [&](long row, long rows) { finish(layer, next, row, rows); });
            }
        }
        for (long row = first_; row < last_; ++row)
            __builtin_memcpy(wave_.batch.output + wave_.places[row] * encoder_.hidden, x(row), encoder_.hidden * 4);
    }

 private:
    long first_row(int thread) const { return wave_.rows() * thread / team_.size(); }

    template <typename Body>
    void blocks(long first, long last, Body body) {
        const long rows = last - first, most_rows = block_rows(encoder_), count = (rows + most_rows - 1) / most_rows;
        if (rows == 0) return;
        const long most = round_up((rows + count - 1) / count, std::min<long>(8, rows));
        for (long row = first; row < last; row += most) body(row, std::min(most, last - row));
    }

    float* x(long row) { return scratch_.x.get() + row * encoder_.hidden; }

    // Codes of the whole wave for the first product of a layer.
    Codes input_codes(const Layer& layer) {
        const Weight& w = *layer.query_key_value;
        const Activation& place = layer.places[kInput];
        return {scratch_.codes.get(),  scratch_.scale.get(), scratch_.offset.get(),
                scratch_.sums.get(),   w.depth,              w.groups,
                place.alphabet(),      own_.operand.get()};
    }

    // Codes of one block for any other.
    Codes block_codes(const Weight& w, const Activation& place) {
        return {own_.codes.get(),    own_.scale.get(),     own_.offset.get(),
                own_.sums.get(),     w.depth,              w.groups,
                place.alphabet(),    own_.operand.get()};
    }

    void quantize(const Weight& w, const Activation& place, const float* values, Range range, const Codes& codes,
                  long row) {
        run_.quantize(values, w.columns, range, place, w.group_columns, codes, row);
    }

    // The embedding of a row, normalized, and its codes for the first layer.
    void begin(long row) {
        const Batch& batch = wave_.batch;
        const long place = wave_.places[row], hidden = encoder_.hidden;
        Range range;
        if (batch.embedded) {
            __builtin_memcpy(x(row), batch.embedded + place * hidden, hidden * 4);
            range = run_.range(x(row), hidden);
        } else {
            const Embedding& e = *encoder_.embedding;
            const long word = batch.words[place];
            const long bytes = packed_row_bytes(e.layout, hidden);
            const float* type = e.types + (batch.types ? batch.types[place] : 0) * hidden;
            const float* position = e.positions + wave_.positions[row] * hidden;
            for (long plane = 0; plane < e.planes; ++plane) {
                unpack_row(e.layout, e.words + (plane * e.rows + word) * bytes, hidden, own_.word.get());
                const float* scale = e.scale + (plane * e.scale_rows + (e.scale_rows == 1 ? 0 : word)) * e.groups;
                for (long group = 0; group < e.groups; ++group) {
                    const long end = group + 1 == e.groups ? hidden : (group + 1) * e.group_columns;
                    for (long c = group * e.group_columns; c < end; ++c) {
                        const float value = static_cast<float>(own_.word[c]) * scale[group];
                        x(row)[c] = plane ? x(row)[c] + value : value;
                    }
                }
            }
            for (long c = 0; c < hidden; ++c) x(row)[c] = x(row)[c] + type[c] + position[c];
            range = run_.layer_norm(e.norm, nullptr, x(row), hidden);
        }
        if (!encoder_.layers.empty()) {
            const Weight& w = *encoder_.layers[0].query_key_value;
            quantize(w, encoder_.layers[0].places[kInput], x(row), range, input_codes(encoder_.layers[0]), row);
        }
    }

    void query_key_value(const Layer& layer, long row, long rows, long first, long last) {
        const Weight& w = *layer.query_key_value;
        run_.linear(w, at_row(input_codes(layer), row), rows, first, last,
                    scratch_.query_key_value.get() + row * w.padded_rows(), w.padded_rows());
    }

    // Query, key, value and attention of this thread's heads: only codes of the input come from other threads.
    void heads(const Layer& layer) {
        const long first = encoder_.heads * thread_ / team_.size(), last = encoder_.heads * (thread_ + 1) / team_.size();
        const long vectors = 3 * encoder_.head_size / kLanes;
        blocks(0, wave_.rows(), [&](long row, long rows) {
            query_key_value(layer, row, rows, first * vectors, last * vectors);
        });
        for (const Sentence& sentence : wave_.sentences)
            for (long head = first; head < last; ++head) attend(layer, sentence, head);
    }

    // The sentences that mostly lie in this thread's rows, then what is left of others.
    void attention(const Layer& layer, size_t index) {
        const int threads = team_.size();
        for (int i = 0; i < threads; ++i) {
            const int owner = (thread_ + i) % threads;
            const long begin = first_sentence(owner), tasks = (first_sentence(owner + 1) - begin) * encoder_.heads;
            std::atomic<long>& ticket = wave_.tickets[index * threads + owner];
            for (long task; (task = ticket.fetch_add(1, std::memory_order_relaxed)) < tasks;)
                attend(layer, wave_.sentences[begin + task / encoder_.heads], task % encoder_.heads);
        }
    }

    long first_sentence(int thread) const {
        const auto begin = wave_.sentences.begin();
        return std::partition_point(begin, wave_.sentences.end(), [row = first_row(thread)](const Sentence& sentence) {
                   return sentence.first + sentence.tokens / 2 < row;
               }) - begin;
    }

    void attend(const Layer& layer, const Sentence& sentence, long head) {
        const long size = encoder_.head_size, all = encoder_.heads * size, stride = layer.query_key_value->padded_rows();
        const float* query = scratch_.query_key_value.get() + sentence.first * stride + head * 3 * size;
        run_.attention({query, query + size, query + 2 * size, stride,
                        scratch_.context.get() + sentence.first * all + head * size, all, sentence.tokens, size,
                        encoder_.scaling, &layer.places[kQuery], &layer.places[kKey], &layer.places[kValue],
                        &layer.places[kProbability], own_.attention.get()});
    }

    void attention_output(const Layer& layer, long row, long rows) {
        const long all = encoder_.heads * encoder_.head_size;
        const Codes codes = block_codes(*layer.output, layer.places[kContext]);
        for (long r = 0; r < rows; ++r) {
            const float* context = scratch_.context.get() + (row + r) * all;
            quantize(*layer.output, layer.places[kContext], context, run_.range(context, all), codes, r);
        }
        linear(*layer.output, codes, rows, product(layer.attention_ghosts, scratch_.attended, *layer.output, row));
    }

    // From the product of the attention output to that of the feed-forward output.
    void feed_forward(const Layer& layer, long row, long rows) {
        const long hidden = encoder_.hidden;
        float* const wide = own_.wide.get();
        Codes codes = block_codes(*layer.up, layer.places[kHidden]);
        for (long r = 0; r < rows; ++r) {
            const float* y = with_ghosts(layer.attention_ghosts, scratch_.attended, *layer.output, row, r);
            const Range range = run_.layer_norm(layer.after_attention, y, x(row + r), hidden);
            quantize(*layer.up, layer.places[kHidden], x(row + r), range, codes, r);
        }
        linear(*layer.up, codes, rows, wide);
        codes = block_codes(*layer.down, layer.places[kFeature]);
        for (long r = 0; r < rows; ++r) {
            float* y = wide + r * layer.up->padded_rows();
            const Range range = encoder_.function == kGelu ? run_.gelu(y, encoder_.intermediate)
                                                           : run_.relu(y, encoder_.intermediate);
            quantize(*layer.down, layer.places[kFeature], y, range, codes, r);
        }
        linear(*layer.down, codes, rows, product(layer.feed_forward_ghosts, scratch_.fed, *layer.down, row));
    }

    // The second norm, and the codes that the next layer reads.
    void finish(const Layer& layer, const Layer* next, long row, long rows) {
        for (long r = 0; r < rows; ++r) {
            const float* y = with_ghosts(layer.feed_forward_ghosts, scratch_.fed, *layer.down, row, r);
            const Range range = run_.layer_norm(layer.after_feed_forward, y, x(row + r), encoder_.hidden);
            if (!next) continue;
            const Weight& w = *next->query_key_value;
            quantize(w, next->places[kInput], x(row + r), range, input_codes(*next), row + r);
        }
    }

    void linear(const Weight& w, const Codes& codes, long rows, float* y) {
        run_.linear(w, codes, rows, 0, w.vectors, y, w.padded_rows());
    }

    // Where the product of the block at `row` goes: `all` where ghost features of other threads read it.
    float* product(const Ghosts& ghosts, const Buffer<float>& all, const Weight& w, long row) {
        return ghosts.features ? all.get() + row * w.padded_rows() : own_.wide.get();
    }

    // Row r of that product, with its ghost features if it has any.
    const float* with_ghosts(const Ghosts& ghosts, const Buffer<float>& all, const Weight& w, long row, long r) {
        if (!ghosts.features) return own_.wide.get() + r * w.padded_rows();
        find_taps(ghosts, wave_.places.data(), wave_.rows(), wave_.batch.tokens, row + r, all.get(), w.padded_rows(),
                  own_.taps.data());
        run_.ghost(ghosts, own_.taps.data(), encoder_.hidden, own_.total.get());
        return own_.total.get();
    }

    Wave& wave_;
    const Encoder& encoder_;
    const Kernels& run_;
    Scratch& scratch_;
    ThreadScratch& own_;
    Team& team_;
    const int thread_;
    const long first_, last_;
    const bool by_heads_;  // each thread has heads instead of rows up to the attention: fewer sentences than threads
};

void make_room(const Encoder& encoder, Scratch& s, long rows, long longest, int threads) {
    long wide = encoder.hidden, depth = 0, narrow = 0, groups = 1, query_key_value = 0, operand = 0;
    long attended = 0, fed = 0, size = 0;
    for (const Layer& layer : encoder.layers) {
        const std::pair<const Weight*, Place> products[] = {{layer.query_key_value.get(), kInput},
                                                            {layer.output.get(), kContext},
                                                            {layer.up.get(), kHidden},
                                                            {layer.down.get(), kFeature}};
        for (const auto& [w, place] : products)
            operand = std::max(operand, kernels().operand(*w, layer.places[place].alphabet()));
        for (const Weight* w : {layer.query_key_value.get(), layer.output.get(), layer.up.get(), layer.down.get()}) {
            depth = std::max(depth, w->depth);
            groups = std::max(groups, w->groups);
        }
        for (const Weight* w : {layer.output.get(), layer.up.get(), layer.down.get()})
            wide = std::max(wide, w->padded_rows());
        query_key_value = std::max(query_key_value, layer.query_key_value->padded_rows());
        narrow = std::max(narrow, layer.query_key_value->depth);  // 1-bit weights round columns up further than others
        if (layer.attention_ghosts.features) attended = layer.output->padded_rows();
        if (layer.feed_forward_ghosts.features) fed = layer.down->padded_rows();
        size = std::max({size, layer.attention_ghosts.size, layer.feed_forward_ghosts.size});
    }
    const long block = block_rows(encoder);
    s.x.grow(rows * encoder.hidden);
    s.query_key_value.grow(rows * query_key_value);
    s.context.grow(rows * encoder.heads * encoder.head_size);
    s.attended.grow(rows * attended);
    s.fed.grow(rows * fed);
    s.codes.grow(rows * narrow);
    s.scale.grow(rows);
    s.offset.grow(rows);
    s.sums.grow(rows * groups);
    if (s.threads.size() < static_cast<size_t>(threads)) s.threads.resize(threads);
    for (int i = 0; i < threads; ++i) {
        ThreadScratch& t = s.threads[i];
        t.wide.grow(block * wide);
        t.codes.grow(block * depth);
        t.scale.grow(block);
        t.offset.grow(block);
        t.sums.grow(block * groups);
        t.attention.grow(attention_scratch(longest, encoder.head_size));
        t.word.grow(encoder.hidden);
        t.operand.grow(operand);
        t.total.grow(size ? encoder.hidden : 0);
        if (t.taps.size() < static_cast<size_t>(size)) t.taps.resize(size);
    }
}

}  // namespace

namespace {

// Appends the real tokens of sentence b; false where one has no row in a table.
bool add_sentence(const Encoder& encoder, const Batch& batch, long b, Wave& wave) {
    const long begin = b * batch.tokens, first = wave.rows();
    int64_t counted = batch.padding;
    for (long t = 0; t < batch.tokens; ++t) {
        const long place = begin + t;
        const bool real = !batch.mask || batch.mask[place];
        if (!real) __builtin_memset(batch.output + place * encoder.hidden, 0, encoder.hidden * 4);
        if (!batch.embedded) {
            const Embedding& e = *encoder.embedding;
            const int64_t word = batch.words[place], type = batch.types ? batch.types[place] : 0;
            counted += word != batch.padding;
            const int64_t position = batch.positions          ? batch.positions[place]
                                     : word == batch.padding ? batch.padding
                                                             : counted;
            if (word < 0 || word >= e.rows || type < 0 || type >= e.type_rows || position < 0 ||
                position >= e.position_rows)
                return false;
            if (real) wave.positions.push_back(position);
        }
        if (real) wave.places.push_back(place);
    }
    if (wave.rows() > first) wave.sentences.push_back({first, wave.rows() - first});
    return true;
}

}  // namespace

void find_taps(const Ghosts& ghosts, const long* places, long rows, long tokens, long row, const float* y, long stride,
               const float** taps) {
    const long half = ghosts.size / 2, begin = places[row] - places[row] % tokens;
    const long least = std::max(begin, places[row] - half);
    const long most = std::min(begin + tokens, places[row] - half + ghosts.size) - 1;
    std::fill(taps, taps + ghosts.size, ghosts.nothing.get());
    auto take = [&](long at) { taps[places[at] - places[row] + half] = y + at * stride; };
    for (long at = row; at >= 0 && places[at] >= least; --at) take(at);
    for (long at = row + 1; at < rows && places[at] <= most; ++at) take(at);
}

Status forward(const Encoder& encoder, const Batch& batch, int threads) {
    long longest = 1, all = 0;
    std::vector<long> lengths(batch.sentences, batch.tokens);
    for (long b = 0; b < batch.sentences; ++b) {
        if (batch.mask) {
            const uint8_t* mask = batch.mask + b * batch.tokens;
            if (!mask[0]) return kHiddenStart;
            lengths[b] = std::count_if(mask, mask + batch.tokens, [](uint8_t real) { return real != 0; });
        }
        longest = std::max(longest, lengths[b]);
        all += lengths[b];
    }
    threads = static_cast<int>(std::max<long>(1, std::min<long>(threads, all)));
    const long most = std::max(longest, kWaveRows * threads);
    Lease lease;
    make_room(encoder, *lease.scratch, std::min(most, all), longest, threads);
    for (long b = 0; b < batch.sentences;) {
        std::vector<std::atomic<long>> tickets(encoder.layers.size() * threads);
        Wave wave{encoder, batch, kernels(), *lease.scratch, {}, {}, {}, tickets};
        for (; b < batch.sentences && (wave.rows() == 0 || wave.rows() + lengths[b] <= most); ++b)
            if (!add_sentence(encoder, batch, b, wave)) return kOutOfTable;
        run_team(threads, [](void* context, int thread, Team& team) {
            Worker(*static_cast<Wave*>(context), thread, team).work();
        }, &wave);
    }
    return kDone;
}

}  // namespace qbert
