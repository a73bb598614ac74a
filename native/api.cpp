// The C interface. Pointers and sizes come from modeling_qbert/native*.py, which have checked them; memory that runs out
// is a null pointer or kNoMemory.

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include "encoder.h"

namespace qbert {
namespace {

// What `QBERT_CPU` calls the levels.
#if defined(__aarch64__)
constexpr const char* kLevelNames[] = {"scalar", "neon"};
#else
constexpr const char* kLevelNames[] = {"scalar", "avx2", "vnni", "avx512"};
#endif
constexpr int kLevels = sizeof kLevelNames / sizeof *kLevelNames;

std::atomic<int> level_in_use{-1};

#if defined(__x86_64__)
// In the encoding that this CPU has, or null.
const Kernels* vnni_kernels() {
    if (__builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni")) return &kVnniKernels;
#if defined(QBERT_AVXVNNI)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("avxvnni")) return &kAvxVnniKernels;
#endif
    return nullptr;
}
#endif

bool has(int level) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (level == kAvx512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
               __builtin_cpu_supports("avx512vpopcntdq");
    if (level == kVnni) return vnni_kernels() != nullptr;
    if (level == kAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#elif defined(__aarch64__) && defined(__linux__)
    constexpr unsigned long kDotProducts = 1ul << 20;  // HWCAP_ASIMDDP
    if (level == kNeon) return getauxval(AT_HWCAP) & kDotProducts;
#elif defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
    if (level == kNeon) return true;
#endif
    return level == kScalar;
}

Level best_up_to(int level) {
    while (!has(level)) --level;
    return static_cast<Level>(level);
}

}  // namespace

Level best_level() {
    static const Level best = [] {
        const char* cap = std::getenv("QBERT_CPU");
        int most = kLevels - 1;
        for (int i = 0; cap && i < most; ++i)
            if (!std::strcmp(cap, kLevelNames[i])) most = i;
        return best_up_to(most);
    }();
    return best;
}

Level level() {
    const int current = level_in_use.load(std::memory_order_relaxed);
    return current < 0 ? best_level() : static_cast<Level>(current);
}

void set_level(Level wanted) { level_in_use.store(best_up_to(std::min(wanted, best_level()))); }

const Kernels& kernels() {
#if defined(__x86_64__)
    if (level() == kAvx512) return kAvx512Kernels;
    if (level() == kVnni) return *vnni_kernels();
    if (level() == kAvx2) return kAvx2Kernels;
#elif defined(__aarch64__)
    if (level() == kNeon) return kNeonKernels;
#endif
    return kScalarKernels;
}

}  // namespace qbert

using namespace qbert;

namespace {

// Codes of activations as a product takes them.
class LaidRows {
 public:
    // Copies codes (N, I) to rows of the weight's depth, sums them per group and finds their bounds.
    LaidRows(const Weight& w, const int8_t* x, long rows) : codes_(rows * w.depth), sums_(rows * w.groups) {
        for (long row = 0; row < rows; ++row) {
            std::memcpy(codes_.get() + row * w.depth, x + row * w.columns, w.columns);
            for (long c = 0; c < w.columns; ++c) {
                const int code = x[row * w.columns + c];
                sums_[row * w.groups + (w.groups == 1 ? 0 : c / w.group_columns)] += code;
                alphabet_.least = std::min(alphabet_.least, code), alphabet_.most = std::max(alphabet_.most, code);
                alphabet_.signs &= code == 1 || code == -1;
            }
        }
    }

    // With room of its own for the operand.
    Codes codes(const Weight& w, float* scale, float* offset, Buffer<uint8_t>& operand) const {
        operand.reset(kernels().operand(w, alphabet_));
        return {codes_.get(), scale, offset, sums_.get(), w.depth, w.groups, alphabet_, operand.get()};
    }

 private:
    Buffer<int8_t> codes_;
    Buffer<int32_t> sums_;
    Alphabet alphabet_{0, 0, true};
};

void set_norm(LayerNorm& norm, const float* weight, const float* bias, float epsilon, long columns) {
    norm.weight.reset(columns), norm.bias.reset(columns);
    std::memcpy(norm.weight.get(), weight, columns * 4);
    std::memcpy(norm.bias.get(), bias, columns * 4);
    norm.epsilon = epsilon;
}

void set_ghosts(Ghosts& ghosts, const float* kernels, const float* scale, long features, long size, long columns) {
    ghosts.features = features, ghosts.size = size;
    ghosts.kernels.reset(features * size * columns), ghosts.scale.reset(features * columns), ghosts.nothing.reset(columns);
    std::memcpy(ghosts.kernels.get(), kernels, features * size * columns * 4);
    std::memcpy(ghosts.scale.get(), scale, features * columns * 4);
}

// bits, kind, clips, step, floor, least, most, less: native.py writes a place as these numbers.
constexpr int kNumbersOfPlace = 9;

Activation activation_of(const double* numbers, const float* shift) {
    Activation a;
    a.bits = static_cast<int>(numbers[0]), a.kind = static_cast<int>(numbers[1]);
    a.clip_low = static_cast<float>(numbers[2]), a.clip_high = static_cast<float>(numbers[3]);
    a.step = static_cast<float>(numbers[4]), a.floor = static_cast<float>(numbers[5]);
    a.least = static_cast<int>(numbers[6]), a.most = static_cast<int>(numbers[7]), a.less = static_cast<int>(numbers[8]);
    a.shift = shift;
    return a;
}

struct Job {
    const Weight* weight;
    const Codes* codes;  // one per thread
    float* y;  // (N, padded rows)
    long rows;
};

struct Dense {
    Job job;
    Activation activation;
    const float* x;
    long stride;
};

// A thread's share of the outputs.
void multiply(const Job& job, int thread, const Team& team) {
    const long vectors = job.weight->vectors;
    kernels().linear(*job.weight, job.codes[thread], job.rows, vectors * thread / team.size(),
                     vectors * (thread + 1) / team.size(), job.y, job.weight->padded_rows());
}

// body(row, thread) for every row, shared among threads.
template <typename Body>
void for_pieces(long rows, int threads, const Body& body) {
    struct Work {
        const Body& body;
        long rows;
    } work{body, rows};
    run_team(std::max(threads, 1), [](void* context, int thread, Team& team) {
        const Work& work = *static_cast<Work*>(context);
        const long last = work.rows * (thread + 1) / team.size();
        for (long row = work.rows * thread / team.size(); row < last; ++row) work.body(row, thread);
    }, &work);
}

// body(row) for every row.
template <typename Body>
void for_rows(long rows, int threads, const Body& body) {
    for_pieces(rows, threads, [&](long row, int) { body(row); });
}

constexpr long kBlock = 64;  // rows that are summed together, whatever the number of threads

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

int qb_version() { return 11; }

int qb_best_level() { return best_level(); }

int qb_level() { return level(); }

void qb_use_openmp(void* parallel, void* thread, void* threads) { use_openmp(parallel, thread, threads); }

void qb_set_level(int wanted) { set_level(static_cast<Level>(wanted)); }

void* qb_weight_new(int layout, const uint8_t* packed, int64_t rows, int64_t columns, int64_t planes, int64_t groups,
                    int64_t group_columns, const float* scale, const float* bias) try {
    return make_weight(static_cast<Layout>(layout), packed, rows, columns, planes, groups, group_columns, scale, bias)
            .release();
} catch (const std::bad_alloc&) {
    return nullptr;
}

void qb_weight_free(void* weight) { delete static_cast<Weight*>(weight); }

// packed (P, count, bytes): rows in runs, in the layout that the weight was made from.
int qb_weight_rows(const void* weight, int layout, int64_t first, int64_t count, int64_t run, int64_t step,
                   uint8_t* packed) try {
    packed_rows(*static_cast<const Weight*>(weight), static_cast<Layout>(layout), {first, count, run, step}, packed);
    return kDone;
} catch (const std::bad_alloc&) {
    return kNoMemory;
}

// out (N, O) int32: sums of the codes x (N, I) of one plane and group.
int qb_sums(const void* weight, int64_t plane, int64_t group, const int8_t* x, int64_t rows, int32_t* out) try {
    const Weight& w = *static_cast<const Weight*>(weight);
    const LaidRows laid(w, x, rows);
    Buffer<uint8_t> operand;
    Buffer<int32_t> sums(rows * w.padded_rows());
    kernels().sums(w, plane, group, laid.codes(w, nullptr, nullptr, operand), rows, sums.get());
    for (long row = 0; row < rows; ++row)
        std::memcpy(out + row * w.rows, sums.get() + row * w.padded_rows(), w.rows * 4);
    return kDone;
} catch (const std::bad_alloc&) {
    return kNoMemory;
}

// y (N, O) = linear_codes of codes x (N, I) with scale and offset (N).
int qb_linear(const void* weight, const int8_t* x, float* scale, float* offset, int64_t rows, float* y,
              int threads) try {
    const Weight& w = *static_cast<const Weight*>(weight);
    const LaidRows laid(w, x, rows);
    Buffer<float> wide(rows * w.padded_rows());
    threads = std::max(threads, 1);
    std::vector<Buffer<uint8_t>> operands(threads);
    std::vector<Codes> codes;
    for (auto& operand : operands) codes.push_back(laid.codes(w, scale, offset, operand));
    Job job{&w, codes.data(), wide.get(), rows};
    run_team(threads, [](void* context, int thread, Team& team) {
        multiply(*static_cast<Job*>(context), thread, team);
    }, &job);
    for (long row = 0; row < rows; ++row) std::memcpy(y + row * w.rows, wide.get() + row * w.padded_rows(), w.rows * 4);
    return kDone;
} catch (const std::bad_alloc&) {
    return kNoMemory;
}

// y (N, O) = the weight times rows x (N, I), `stride` floats apart, that become codes by a place.
int qb_dense(const void* weight, const double* place, const float* const* shift, const float* x, int64_t stride,
             int64_t rows, float* y, int threads) try {
    const Weight& w = *static_cast<const Weight*>(weight);
    const Activation activation = activation_of(place, shift[0]);
    threads = std::max(threads, 1);
    Buffer<int8_t> codes(rows * w.depth);
    Buffer<int32_t> sums(rows * w.groups);
    Buffer<float> scale(rows), offset(rows), wide(w.rows == w.padded_rows() ? 0 : rows * w.padded_rows());
    std::vector<Buffer<uint8_t>> operands(threads);
    std::vector<Codes> laid;
    for (auto& operand : operands) {
        operand.reset(kernels().operand(w, activation.alphabet()));
        laid.push_back({codes.get(), scale.get(), offset.get(), sums.get(), w.depth, w.groups, activation.alphabet(),
                        operand.get()});
    }
    Dense job{{&w, laid.data(), wide.count() ? wide.get() : y, rows}, activation, x, stride};
    run_team(threads, [](void* context, int thread, Team& team) {
        const Dense& d = *static_cast<Dense*>(context);
        const Weight& of = *d.job.weight;
        for (long row = d.job.rows * thread / team.size(); row < d.job.rows * (thread + 1) / team.size(); ++row) {
            const float* from = d.x + row * d.stride;
            kernels().quantize(from, of.columns, kernels().range(from, of.columns), d.activation, of.group_columns,
                               d.job.codes[thread], row);
        }
        team.barrier();
        multiply(d.job, thread, team);
    }, &job);
    if (wide.count())
        for (long row = 0; row < rows; ++row)
            std::memcpy(y + row * w.rows, wide.get() + row * w.padded_rows(), w.rows * 4);
    return kDone;
} catch (const std::bad_alloc&) {
    return kNoMemory;
}

// codes (N, I) int8, scale and offset (N) of x (N, I). real (N) or null: rows that it hides have a range of 0.
int qb_quantize(const float* x, const uint8_t* real, int64_t rows, int64_t columns, const double* place,
                const float* const* shift, int8_t* codes, float* scale, float* offset, int threads) try {
    Buffer<int32_t> sums(rows);
    const Codes out{codes, scale, offset, sums.get(), columns, 1, {}, nullptr};
    const Activation activation = activation_of(place, shift[0]);
    for_rows(rows, threads, [&](long row) {
        const float* numbers = x + row * columns;
        const Range range = real && !real[row] ? Range{0, 0} : kernels().range(numbers, columns);
        kernels().quantize(numbers, columns, range, activation, columns, out, row);
    });
    return kDone;
} catch (const std::bad_alloc&) {
    return kNoMemory;
}

void qb_gelu(float* x, int64_t rows, int64_t columns) {
    for (long row = 0; row < rows; ++row) kernels().gelu(x + row * columns, columns);
}

int qb_layer_norm(float* x, int64_t rows, int64_t columns, const float* weight, const float* bias, float epsilon) try {
    LayerNorm norm;
    set_norm(norm, weight, bias, epsilon, columns);
    for (long row = 0; row < rows; ++row) kernels().layer_norm(norm, nullptr, x + row * columns, columns);
    return kDone;
} catch (const std::bad_alloc&) {
    return kNoMemory;
}

// out (N, C) = y (N, C) with ghost features of kernels (F, k, C) and scale (F, C). places (N): of each row in sentences of
// `tokens` tokens one behind the other, ascending; tokens without a row are hidden.
int qb_ghosts(const float* y, const int64_t* places, int64_t rows, int64_t tokens, int64_t columns, int64_t features,
              int64_t size, const float* kernels, const float* scale, float* out, int threads) try {
    Ghosts ghosts;
    set_ghosts(ghosts, kernels, scale, features, size, columns);
    const std::vector<long> at(places, places + rows);
    std::vector<const float*> all(std::max(threads, 1) * size);
    for_pieces(rows, threads, [&](long row, int thread) {
        const float** taps = all.data() + thread * size;
        find_taps(ghosts, at.data(), rows, tokens, row, y, columns, taps);
        qbert::kernels().ghost(ghosts, taps, columns, out + row * columns);
    });
    return kDone;
} catch (const std::bad_alloc&) {
    return kNoMemory;
}

// Adds to of_y (B, T, C), of_kernels (F, k, C) and of_scale (F, C) what `gradient` (B, T, C) of y with its ghost features
// gives to them through the features. real (B, T), or null where no token is hidden; k is at most kMostTaps.
void qb_ghost_gradient(const float* gradient, const float* y, const uint8_t* real, int64_t sentences, int64_t tokens,
                       int64_t columns, int64_t features, int64_t size, const float* kernels, const float* scale,
                       float* of_y, float* of_kernels, float* of_scale, int threads) {
    const GhostGradient work{y, gradient, real, sentences, tokens, columns, features, size,
                             kernels, scale, of_y, of_kernels, of_scale};
    for_rows((columns + kLanes - 1) / kLanes, threads, [&](long vector) {
        qbert::kernels().ghost_gradient(work, vector * kLanes, std::min<long>(columns, (vector + 1) * kLanes));
    });
}

// context (T, D) of query, key, value (T, D); places of the three and of the probabilities.
int qb_attention(const float* query, const float* key, const float* value, int64_t tokens, int64_t size, float scaling,
                 const double* places, const float* const* shifts, float* context) try {
    Buffer<uint8_t> scratch(attention_scratch(tokens, size));
    Activation of[4];
    for (int i = 0; i < 4; ++i) of[i] = activation_of(places + i * kNumbersOfPlace, shifts[i]);
    kernels().attention({query, key, value, size, context, size, tokens, size, scaling, &of[0], &of[1], &of[2], &of[3],
                         scratch.get()});
    return kDone;
} catch (const std::bad_alloc&) {
    return kNoMemory;
}

// y (N, I) of x (N, I), without the numbers whose 32 random bits lie below `below`, the others times `factor`.
void qb_dropout(const float* x, int64_t rows, int64_t columns, uint64_t seed, uint32_t below, float factor, float* y,
                int threads) {
    const Dropout dropout{seed, below, factor};
    for_rows(rows, threads, [&](long row) {
        kernels().dropout(x + row * columns, columns, dropout, row, y + row * columns);
    });
}

// y (B, N, M), products of codes over `terms` columns, in place. of_rows: scale, offset or null, sum or null (B, N each);
// of_columns: scale, offset or null, and sum times scale or null (B, M each).
void qb_scale(float* y, int64_t batch, int64_t rows, int64_t columns, const float* const* of_rows,
              const float* const* of_columns, float terms, float factor, int threads) {
    for_rows(batch * rows, threads, [&](long row) {
        const auto number = [row](const float* numbers) { return numbers ? numbers[row] : 0.0f; };
        const auto line = [&](const float* numbers) { return numbers ? numbers + row / rows * columns : nullptr; };
        const Factors factors{number(of_rows[0]), number(of_rows[1]), number(of_rows[2]), terms, factor,
                              line(of_columns[0]), line(of_columns[1]), line(of_columns[2])};
        kernels().scale(factors, columns, y + row * columns);
    });
}

// y (N, O) of exact products of codes int32 (N, O): scale and offset (N) of the rows, scale (O), sum of codes times scale
// (O) and bias (O) of the columns. offset with sum, and bias: or null.
void qb_finish(const int32_t* products, int64_t rows, int64_t columns, const float* scale, const float* offset,
               const float* column_scale, const float* column_sum, const float* bias, float* y, int threads) {
    for_rows(rows, threads, [&](long row) {
        kernels().finish(products + row * columns, columns, scale[row], offset ? offset[row] : 0, column_scale,
                         column_sum, bias, y + row * columns);
    });
}

// by_column and by_row (N, O) bfloat16, and sums over rows (O) of gradient (N, O) itself and times row_offset, which may be
// null.
int qb_linear_gradient(const float* gradient, int64_t rows, int64_t columns, const float* row_scale,
                       const float* row_offset, const float* column_scale, uint16_t* by_column, uint16_t* by_row,
                       float* sum, float* offset_sum, int threads) try {
    const long blocks = (rows + kBlock - 1) / kBlock;
    Buffer<float> sums(2 * blocks * columns);
    const LinearGradient work{gradient, columns, row_scale, row_offset, column_scale, by_column, by_row};
    for_rows(blocks, threads, [&](long block) {
        float* of_block = sums.get() + 2 * block * columns;
        kernels().linear_gradient(work, block * kBlock, std::min<long>(rows, (block + 1) * kBlock), of_block,
                                  of_block + columns);
    });
    Buffer<double> totals(2 * columns);
    for (long block = 0; block < blocks; ++block)
        for (long i = 0; i < 2 * columns; ++i) totals[i] += sums[2 * block * columns + i];
    for (long i = 0; i < columns; ++i) sum[i] = totals[i], offset_sum[i] = totals[columns + i];
    return kDone;
} catch (const std::bad_alloc&) {
    return kNoMemory;
}

// Gradients of x (N, C), of the step and, unless shift (C) is null, of the shift, given that of x's quantized form.
int qb_step_gradient(const float* gradient, const float* x, const float* shift, int64_t rows, int64_t columns, float step,
                     float floor, float least, float most, float* of_x, float* of_step, float* of_shift,
                     int threads) try {
    const long blocks = (rows + kBlock - 1) / kBlock, width = shift ? columns : 0;
    Buffer<double> steps(blocks);
    Buffer<float> shifts(blocks * width);
    const StepGradient work{gradient, x, shift, columns, step, floor, least, most, of_x};
    for_rows(blocks, threads, [&](long block) {
        steps[block] = kernels().step_gradient(work, block * kBlock, std::min<long>(rows, (block + 1) * kBlock),
                                               shifts.get() + block * width);
    });
    double total = 0;
    Buffer<double> totals(width);
    for (long block = 0; block < blocks; ++block) {
        total += steps[block];
        for (long i = 0; i < width; ++i) totals[i] += shifts[block * width + i];
    }
    *of_step = total;
    for (long i = 0; i < width; ++i) of_shift[i] = totals[i];
    return kDone;
} catch (const std::bad_alloc&) {
    return kNoMemory;
}

// Probabilities and codes (N, I) of scores (N, I), codes after dropout with their scales (N).
void qb_softmax_codes(const float* scores, int64_t rows, int64_t columns, float levels, uint64_t seed, uint32_t below,
                      float factor, float* probabilities, float* codes, float* scale, int threads) {
    const Dropout dropout{seed, below, factor};
    for_rows(rows, threads, [&](long row) {
        const long at = row * columns;
        kernels().softmax_codes(scores + at, columns, levels, dropout, row, probabilities + at, codes + at, scale + row);
    });
}

// out (N, I), the gradient of the scores, from that of the probabilities after dropout.
void qb_softmax_gradient(const float* gradient, const float* probabilities, int64_t rows, int64_t columns,
                         uint64_t seed, uint32_t below, float factor, float* out, int threads) {
    const Dropout dropout{seed, below, factor};
    for_rows(rows, threads, [&](long row) {
        const long at = row * columns;
        kernels().softmax_gradient(gradient + at, probabilities + at, columns, dropout, row, out + at);
    });
}

void* qb_encoder_new(int64_t layers, int64_t hidden, int64_t heads, int64_t head_size, int64_t intermediate,
                     int function, float scaling) try {
    auto encoder = std::make_unique<Encoder>();
    encoder->hidden = hidden, encoder->heads = heads, encoder->head_size = head_size;
    encoder->intermediate = intermediate, encoder->function = static_cast<Function>(function);
    encoder->scaling = scaling;
    encoder->layers.resize(layers);
    return encoder.release();
} catch (const std::bad_alloc&) {
    return nullptr;
}

void qb_encoder_free(void* encoder) { delete static_cast<Encoder*>(encoder); }

// Takes the four weights: query, key and value of each head, attention output, up and down. Places are in the order of
// Place; shifts are null or one number for each column, of query, key and value for each of a head.
int qb_encoder_layer(void* encoder, int64_t index, const double* places, const float* const* shifts,
                     void* query_key_value, void* output, void* up, void* down, const float* attention_weight,
                     const float* attention_bias, const float* output_weight, const float* output_bias,
                     float epsilon) try {
    Encoder& e = *static_cast<Encoder*>(encoder);
    Layer& layer = e.layers[index];
    layer.query_key_value.reset(static_cast<Weight*>(query_key_value));
    layer.output.reset(static_cast<Weight*>(output));
    layer.up.reset(static_cast<Weight*>(up));
    layer.down.reset(static_cast<Weight*>(down));
    for (int i = 0; i < kPlaces; ++i) {
        if (shifts[i]) {
            const long columns = i == kInput || i == kHidden ? e.hidden
                                 : i == kContext             ? e.heads * e.head_size
                                 : i == kFeature             ? e.intermediate
                                                             : e.head_size;
            layer.shifts[i].reset(columns);
            std::memcpy(layer.shifts[i].get(), shifts[i], columns * 4);
        }
        layer.places[i] = activation_of(places + i * kNumbersOfPlace, layer.shifts[i].get());
    }
    set_norm(layer.after_attention, attention_weight, attention_bias, epsilon, e.hidden);
    set_norm(layer.after_feed_forward, output_weight, output_bias, epsilon, e.hidden);
    return kDone;
} catch (const std::bad_alloc&) {
    return kNoMemory;
}

// Ghost features of a layer's attention output, or with `after` 1 of its feed-forward output.
int qb_encoder_ghosts(void* encoder, int64_t index, int after, int64_t features, int64_t size, const float* kernels,
                      const float* scale) try {
    Encoder& e = *static_cast<Encoder*>(encoder);
    Layer& layer = e.layers[index];
    set_ghosts(after ? layer.feed_forward_ghosts : layer.attention_ghosts, kernels, scale, features, size, e.hidden);
    return kDone;
} catch (const std::bad_alloc&) {
    return kNoMemory;
}

// The tables stay the caller's and must outlive the encoder. sizes: V, rows of scale, G, columns of a group, rows of
// types and of positions, P.
int qb_encoder_embedding(void* encoder, int layout, const uint8_t* words, const float* scale, const int64_t* sizes,
                         const float* types, const float* positions, const float* weight, const float* bias,
                         float epsilon) try {
    Encoder& e = *static_cast<Encoder*>(encoder);
    auto embedding = std::make_unique<Embedding>();
    embedding->layout = static_cast<Layout>(layout);
    embedding->words = words, embedding->scale = scale, embedding->types = types, embedding->positions = positions;
    embedding->rows = sizes[0], embedding->scale_rows = sizes[1], embedding->groups = sizes[2];
    embedding->group_columns = sizes[3], embedding->type_rows = sizes[4], embedding->position_rows = sizes[5];
    embedding->planes = sizes[6];
    set_norm(embedding->norm, weight, bias, epsilon, e.hidden);
    e.embedding = std::move(embedding);
    return kDone;
} catch (const std::bad_alloc&) {
    return kNoMemory;
}

int qb_encoder_forward(const void* encoder, int64_t sentences, int64_t tokens, const uint8_t* mask,
                       const float* embedded, const int64_t* words, const int64_t* types, const int64_t* positions,
                       int64_t padding, float* output, int threads) try {
    return forward(*static_cast<const Encoder*>(encoder),
                   {sentences, tokens, mask, embedded, words, types, positions, padding, output}, threads);
} catch (const std::bad_alloc&) {
    return kNoMemory;
}

}  // extern "C"
#pragma GCC visibility pop
