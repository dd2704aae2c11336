// QK-norm and MaPE rotation on the CPU: the kernels, compiled for several instruction sets, and the choice among them.
//
// On x86 with GCC the text of the kernels is compiled for AVX-512, for AVX2 and as it is; elsewhere only as it is.
// (target_clones would be shorter, but leaves fmaf and rintf as scalar calls, which makes the angles 80 times slower.)
#include <cmath>
#include <cstring>

#include "qk_norm_mape.h"
#include "sincos.h"

#define MAPE_TEXT(x) #x
#define SIMD _Pragma("omp simd")
#define SIMD_SUM(x) _Pragma(MAPE_TEXT(omp simd reduction(+ : x)))

namespace megatron_lance {
namespace {

namespace plain {
#include "mape_cpu_kernels.h"
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MAPE_X86_LEVELS
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace avx2 {
#include "mape_cpu_kernels.h"
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
namespace avx512 {
#include "mape_cpu_kernels.h"
}
#pragma GCC pop_options
#endif

struct Kernels {
  void (*forward)(const Forward&, int64_t, int64_t);
  void (*backward)(const Backward&, int64_t, int64_t);
  void (*sum_partials)(const Backward&);
};

const Kernels& kernels() {
  static const Kernels chosen = [] {
#ifdef MAPE_X86_LEVELS
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (has_avx2 && has_avx512) return Kernels{avx512::forward, avx512::backward, avx512::sum_partials};
    if (has_avx2) return Kernels{avx2::forward, avx2::backward, avx2::sum_partials};
#endif
    return Kernels{plain::forward, plain::backward, plain::sum_partials};
  }();
  return chosen;
}

}  // namespace

void forward_cpu(const Forward& a, int64_t begin, int64_t end) { kernels().forward(a, begin, end); }
void backward_cpu(const Backward& a, int64_t begin, int64_t end) { kernels().backward(a, begin, end); }
void weight_gradients_cpu(const Backward& a) { kernels().sum_partials(a); }

}  // namespace megatron_lance
