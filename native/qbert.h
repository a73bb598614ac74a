// What the files of the engine share. Shapes: O output rows, I input columns, G scale groups, P planes, H heads,
// D head size, C hidden size.
//
// A vector is 16 output rows: one 512-bit register of int32 sums. A quad is 4 consecutive columns: what one byte dot
// product adds. A term is one group: the columns over which sums stay whole numbers before scales apply.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace qbert {

constexpr int kLanes = 16;       // output rows of a vector
constexpr float kTiny = 1e-30f;  // quantizers.TINY

constexpr long round_up(long value, long step) { return (value + step - 1) / step * step; }

// Memory aligned to a cache line, zeroed; throws std::bad_alloc.
template <typename T>
class Buffer {
 public:
    Buffer() = default;
    explicit Buffer(size_t count) { reset(count); }
    void reset(size_t count) {
        void* memory = nullptr;
        if (count > SIZE_MAX / sizeof(T) / 2 || posix_memalign(&memory, 64, (count ? count : 1) * sizeof(T)) != 0)
            throw std::bad_alloc();
        __builtin_memset(memory, 0, count * sizeof(T));
        data_.reset(static_cast<T*>(memory));
        count_ = count;
    }
    void grow(size_t count) {  // contents are lost
        if (count > count_) {
            data_.reset();
            count_ = 0;
            reset(count);
        }
    }
    T* get() const { return data_.get(); }
    T& operator[](size_t i) const { return data_.get()[i]; }
    size_t count() const { return count_; }

 private:
    struct Free {
        void operator()(T* memory) const { free(memory); }
    };
    std::unique_ptr<T, Free> data_;
    size_t count_ = 0;
};

// Layouts of a checkpoint, as packing.py draws them.
enum Layout { kTwoBit = 0, kDense = 1, kInt8 = 2, kOneBit = 3 };

// One weight in the kernels' layout. Stored codes are unsigned: code + zero, of 1 bit half of that.
struct Weight {
    int bits = 2;     // 8, 2 or 1 (code 1 for +1, 0 for -1)
    int zero = 1;     // 128, 1 or 1
    long rows = 0, columns = 0;
    long planes = 1, groups = 1;
    long group_columns = 0;  // columns of a group, the last may have fewer; a multiple of 16 if there is more than one
    long depth = 0;          // columns rounded up to 16, of which activation rows hold that many bytes
    long vectors = 0;        // O / 16 rounded up
    Buffer<uint8_t> codes;   // (P, vectors, depth * bits / 8 * 16): see packing.cpp
    Buffer<float> scale;     // (P, G, vectors * 16); of two planes half the sum of their scales, then half the difference
    Buffer<float> sums;      // (G, vectors * 16): sum of codes times scale, ops.scaled_code_sums
    Buffer<float> bias;      // (vectors * 16)

    long padded_rows() const { return vectors * kLanes; }
    long vector_bytes() const { return depth * bits * 2; }
};

struct Range {
    float low, high;
};

enum Kind { kAsymmetric = 0, kSymmetric = 1, kStep = 2, kSigns = 3 };

// Which codes there are; `signs`: -1 and +1 alone. It decides how codes are multiplied.
struct Alphabet {
    int least, most;
    bool signs;
};

// How the numbers of one place become codes: quantizers.ActivationQuantizer, PactQuantizer and LsqQuantizer.
struct Activation {
    int bits = 8;
    int kind = kAsymmetric;
    float clip_low = -__builtin_inff(), clip_high = __builtin_inff();  // numbers are held between them first
    float step = 1, floor = 0;  // of kStep: code = (x - floor) / step, held in [least, most], then less `less`
    int least = -128, most = 127, less = 0;
    const float* shift = nullptr;  // of kSigns: code +1 where x is at least its column's shift, otherwise -1

    Alphabet alphabet() const {
        if (kind == kSigns) return {-1, 1, true};
        if (kind == kStep) return {least - less, most - less, false};
        return {-(1 << (bits - 1)), (1 << (bits - 1)) - 1, false};
    }
};

// Quantized rows: codes (N, depth) int8, the pad 0; scale and offset (N), sums of codes (N, G).
struct Codes {
    int8_t* codes;
    float* scale;
    float* offset;
    int32_t* sums;
    long depth;
    long groups;
    Alphabet alphabet;
    uint8_t* operand;  // Kernels::operand bytes of a thread's own
};

struct LayerNorm {
    Buffer<float> weight, bias;
    float epsilon = 0;
};

// Ghost features after one output matrix: kernels over k tokens, the middle one at the token itself, then ReLU.
struct Ghosts {
    long features = 0, size = 0;  // F, k; no features: nothing is added
    Buffer<float> kernels;        // (F, k, C)
    Buffer<float> scale;          // (F, C)
    Buffer<float> nothing;        // (C) zeros: a token that is hidden or beyond the sentence
};

// A batch (B, T, C) of tokens with ghost features, and the gradients that training needs.
struct GhostGradient {
    const float *y, *gradient;  // of the sum that has the features
    const uint8_t* real;        // (B, T), or null: all tokens are
    long sentences, tokens, columns, features, size;
    const float *kernels, *scale;         // (F, k, C), (F, C)
    float *of_y, *of_kernels, *of_scale;  // are added to
};
constexpr long kMostTaps = 15;  // of a gradient

// Attention of one head of one sentence.
struct Head {
    const float* query;  // (tokens, stride) floats; key and value alike
    const float* key;
    const float* value;
    long stride;
    float* context;  // (tokens, context_stride)
    long context_stride;
    long tokens, size;
    float scaling;
    const Activation *of_query, *of_key, *of_value, *of_probability;
    uint8_t* scratch;  // attention_scratch(tokens, size) bytes, aligned
};

// Dropout of training: numbers whose 32 bits, drawn from the seed, lie below `below` become 0, others grow by a factor.
struct Dropout {
    uint64_t seed;
    uint32_t below;
    float factor;
};

// The gradient (N, O) of a linear layer's output, as the products of its backward pass take it.
struct LinearGradient {
    const float* gradient;
    long columns;                         // O
    const float *row_scale, *row_offset;  // (N) of the input's codes, the second may be null
    const float* column_scale;            // (O) of the weight's codes
    uint16_t *by_column, *by_row;         // (N, O) bfloat16, the gradient times column_scale and times row_scale
};

// The gradient (N, C) of what a learned step made of x (N, C): codes (x - floor) / step in [least, most], or of x - shift
// the signs.
struct StepGradient {
    const float *gradient, *x, *shift;  // (C), or null: no signs
    long columns;
    float step, floor, least, most;
    float* of_x;
};

// What turns a row of a product of codes over `terms` columns into numbers: its scale, its offset and the sum of its
// codes; the scales (M) of the columns, their offsets or null, and, null if rows have no offset, sums times scale.
struct Factors {
    float scale, offset, sum, terms, factor;
    const float *column_scale, *column_offset, *column_sum;
};

// One compiled path. Every path gives the same bits, but the sums in gradients of softmax and ghost features.
struct Kernels {
    // Bytes in which a product with such codes keeps the form of x that it multiplies.
    long (*operand)(const Weight&, const Alphabet&);
    // out (N, padded rows): exact sums of the codes of one plane and group.
    void (*sums)(const Weight&, long plane, long group, const Codes& x, long rows, int32_t* out);
    // y (N, stride), of vectors [first, last) = bias + the sum over terms of offset * sums + products * (scale * scale), of
    // two planes (a + b) * (scale * scale) + (a - b) * (scale * second scale): ops.add_products.
    void (*linear)(const Weight&, const Codes& x, long rows, long first, long last, float* y, long stride);
    void (*quantize)(const float* x, long n, Range range, const Activation&, long group_columns, const Codes& out, long row);
    Range (*range)(const float* x, long n);
    Range (*gelu)(float* x, long n);
    Range (*relu)(float* x, long n);
    Range (*layer_norm)(const LayerNorm&, const float* y, float* x, long n);  // x = norm(y + x), y may be null
    void (*attention)(const Head&);
    // out (n) = taps[k / 2] + the sum over features of scale * relu(the sum over k of kernel * taps[k]).
    void (*ghost)(const Ghosts&, const float* const* taps, long n, float* out);
    void (*ghost_gradient)(const GhostGradient&, long first, long last);  // of channels [first, last)
    void (*dropout)(const float* x, long n, const Dropout&, long row, float* y);
    void (*scale)(const Factors&, long n, float* y);
    // y (n) = products * (scale * column_scale) + (offset * column_sum + bias): ops.add_products. column_sum, bias: or null.
    void (*finish)(const int32_t* products, long n, float scale, float offset, const float* column_scale,
                   const float* column_sum, const float* bias, float* y);
    // Of rows [first, last), whose gradient, and gradient times row_offset, are added to sum and offset_sum (O).
    void (*linear_gradient)(const LinearGradient&, long first, long last, float* sum, float* offset_sum);
    // Of rows [first, last): of_x; returns the step's, and of_shift (C) of signs is added to.
    double (*step_gradient)(const StepGradient&, long first, long last, float* of_shift);
    void (*softmax_codes)(const float* scores, long n, float levels, const Dropout&, long row, float* probabilities,
                          float* codes, float* scale);
    void (*softmax_gradient)(const float* gradient, const float* probabilities, long n, const Dropout&, long row,
                             float* out);
};

#if defined(__aarch64__)
enum Level { kScalar = 0, kNeon = 1 };
#else
enum Level { kScalar = 0, kAvx2 = 1, kVnni = 2, kAvx512 = 3 };
#endif

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels, kVnniKernels, kAvxVnniKernels, kAvx512Kernels;
#if __GNUC__ >= 11 || __clang_major__ >= 12
#define QBERT_AVXVNNI  // kAvxVnniKernels are there: older compilers know no AVX-VNNI
#endif
#elif defined(__aarch64__)
extern const Kernels kNeonKernels;
#endif

Level best_level();     // of this CPU, under QBERT_CPU
Level level();          // in use
void set_level(Level);  // the best that this CPU has up to it and to best_level()
const Kernels& kernels();

// packing.cpp
std::unique_ptr<Weight> make_weight(Layout, const uint8_t* packed, long rows, long columns, long planes, long groups,
                                    long group_columns, const float* scale, const float* bias);
// Rows in runs, `step` from the first of a run to the first of the next.
struct Rows {
    long first, count, run, step;
};
// Rows in the layout that the weight was made from: (P, count, bytes).
void packed_rows(const Weight&, Layout, const Rows&, uint8_t* packed);
void unpack_row(Layout, const uint8_t* packed, long columns, int8_t* codes);
long packed_row_bytes(Layout, long columns);

// threads.cpp
class Team {
 public:
    Team(int size) : size_(size) {}
    int size() const { return __atomic_load_n(&size_, __ATOMIC_RELAXED); }
    void resize(int size) { __atomic_store_n(&size_, size, __ATOMIC_RELAXED); }  // before the first barrier
    void barrier();  // all threads of the team

 private:
    int size_;
    alignas(64) int arrived_ = 0;
    alignas(64) int generation_ = 0;
};
// GOMP_parallel, omp_get_thread_num and omp_get_num_threads of the runtime that torch uses.
void use_openmp(void* parallel, void* thread, void* threads);
// Runs body(context, thread, team) on up to `threads` threads, this one included. Which threads are there never
// changes an answer: a pool in use elsewhere leaves the caller alone with the work.
void run_team(int threads, void (*body)(void* context, int thread, Team& team), void* context);

long attention_scratch(long tokens, long size);

}  // namespace qbert
