// Prints digests of what the engine's C interface answers to numbers that depend on nothing but their position, so that
// two machines can be compared. Argument: the level. Codes are also checked against plain sums.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

extern "C" {
void qb_set_level(int);
int qb_level();
void* qb_weight_new(int, const uint8_t*, int64_t, int64_t, int64_t, int64_t, int64_t, const float*, const float*);
void qb_weight_free(void*);
int qb_sums(const void*, int64_t, int64_t, const int8_t*, int64_t, int32_t*);
int qb_dense(const void*, const double*, const float* const*, const float*, int64_t, int64_t, float*, int);
void qb_gelu(float*, int64_t, int64_t);
int qb_layer_norm(float*, int64_t, int64_t, const float*, const float*, float);
int qb_attention(const float*, const float*, const float*, int64_t, int64_t, float, const double*, const float* const*,
                 float*);
int qb_ghosts(const float*, const int64_t*, int64_t, int64_t, int64_t, int64_t, int64_t, const float*, const float*,
              float*);
}

static uint64_t state = 1;

static uint32_t next() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 33);
}

static std::vector<float> floats(long count) {
    std::vector<float> x(count);
    for (float& v : x) v = static_cast<float>(static_cast<int>(next() % 65536) - 32768) / 8192;
    return x;
}

template <typename T>
static void print(const char* name, const std::vector<T>& values) {
    uint64_t hash = 14695981039346656037u;
    for (const T& value : values) {
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        hash = (hash ^ (bits == 0x80000000u ? 0 : bits)) * 1099511628211u;
    }
    std::printf("%s %016llx\n", name, static_cast<unsigned long long>(hash));
}

int main(int, char** arguments) {
    qb_set_level(arguments[1][0] - '0');
    if (qb_level() != arguments[1][0] - '0') return 2;
    const float* none[4] = {};
    const double dynamic[9] = {8, 0, -1e30, 1e30, 1, 0, 0, 0, 0};
    for (int layout = 0; layout < 4; ++layout)
        for (long shape = 0; shape < 40; ++shape) {
            const long rows = 1 + next() % 6, outputs = 1 + next() % 50, columns = 1 + next() % 140;
            const long bytes = layout == 0 ? (columns + 3) / 4 : layout == 1 ? (columns + 4) / 5
                               : layout == 2 ? columns + 1 : (columns + 7) / 8;
            std::vector<uint8_t> packed(outputs * bytes);
            std::vector<int> codes(outputs * columns);
            for (long o = 0; o < outputs; ++o)
                for (long c = columns - 1; c >= 0; --c) {
                    const int code = layout == 2   ? static_cast<int>(next() % 255) - 127
                                     : layout == 3 ? static_cast<int>(next() % 2) * 2 - 1
                                                   : static_cast<int>(next() % 3) - 1;
                    uint8_t* row = packed.data() + o * bytes;
                    codes[o * columns + c] = code;
                    if (layout == 0) row[c / 4] |= (code + 1) << c % 4 * 2;
                    else if (layout == 1) row[c / 5] = row[c / 5] * 3 + (code + 1);
                    else if (layout == 2) row[c] = static_cast<uint8_t>(code);
                    else row[c / 8] |= (code + 1) / 2 << c % 8;
                }
            const std::vector<float> scale = floats(outputs), bias = floats(outputs), x = floats(rows * columns);
            void* weight = qb_weight_new(layout, packed.data(), outputs, columns, 1, 1, columns, scale.data(), bias.data());
            std::vector<int8_t> of_x(rows * columns);
            for (int8_t& code : of_x) code = static_cast<int8_t>(next());
            std::vector<int32_t> sums(rows * outputs);
            qb_sums(weight, 0, 0, of_x.data(), rows, sums.data());
            for (long r = 0; r < rows; ++r)
                for (long o = 0; o < outputs; ++o) {
                    int expected = 0;
                    for (long c = 0; c < columns; ++c) expected += of_x[r * columns + c] * codes[o * columns + c];
                    if (sums[r * outputs + o] != expected) return 1;
                }
            std::vector<float> y(rows * outputs);
            qb_dense(weight, dynamic, none, x.data(), columns, rows, y.data(), 1);
            print("linear", y);
            qb_weight_free(weight);
        }
    for (long columns : {1, 16, 47, 768}) {
        std::vector<float> x = floats(9 * columns), weight = floats(columns), bias = floats(columns);
        qb_gelu(x.data(), 9, columns);
        print("gelu", x);
        qb_layer_norm(x.data(), 9, columns, weight.data(), bias.data(), 1e-12f);
        print("norm", x);
        const std::vector<int64_t> places = {0, 1, 3, 4, 5, 6, 7, 9, 10};
        const std::vector<float> kernels = floats(2 * 3 * columns), scale = floats(2 * columns);
        std::vector<float> out(9 * columns);
        qb_ghosts(x.data(), places.data(), 9, 6, columns, 2, 3, kernels.data(), scale.data(), out.data());
        print("ghosts", out);
    }
    for (long tokens : {1, 7, 33}) {
        double places[36];
        for (int i = 0; i < 4; ++i) std::memcpy(places + i * 9, dynamic, sizeof dynamic);
        const std::vector<float> q = floats(tokens * 20), k = floats(tokens * 20), v = floats(tokens * 20);
        std::vector<float> context(tokens * 20);
        qb_attention(q.data(), k.data(), v.data(), tokens, 20, 0.25f, places, none, context.data());
        print("attention", context);
    }
}
