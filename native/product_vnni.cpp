// Matrix products on 256-bit byte dot products, for CPUs that lack some of what product_avx512.cpp uses. They come in two
// encodings of the same instruction: of AVX-512 (Intel from Cascade Lake on) and of AVX-VNNI (Intel from Alder Lake on).

#include "qbert.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define QB_WIDE 8

namespace qbert {
namespace {

namespace of_avx512 {
#define QB_TARGET __attribute__((target("avx2,fma,avx512vl,avx512vnni")))
#define QB_DOT _mm256_dpbusd_epi32
#include "product_vnni.inl"
#undef QB_TARGET
#undef QB_DOT
}  // namespace of_avx512

#if defined(QBERT_AVXVNNI)
namespace of_avx2 {
#define QB_TARGET __attribute__((target("avx2,fma,avxvnni")))
#define QB_DOT _mm256_dpbusd_avx_epi32
#include "product_vnni.inl"
}  // namespace of_avx2
#endif

}  // namespace

const Kernels kVnniKernels = of_avx512::kKernels;
#if defined(QBERT_AVXVNNI)
const Kernels kAvxVnniKernels = of_avx2::kKernels;
#endif

}  // namespace qbert

#endif
