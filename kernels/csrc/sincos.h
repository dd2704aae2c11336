// Sine and cosine of rotary angles, the same arithmetic on CPU and GPU (so a CPU test of it is a test of both).
//
// The angle is reduced by a multiple k of pi/2 in three fused multiply-adds.  pi/2 = kHigh + kMiddle + kLow with 24
// bits each, and |k * kHigh - x| is a small multiple of 2^-24, so the first step is exact for |x| < 2^20 and the
// other two round once each.  Polynomials are least-maximum fits on +-(pi/4 + 0.03), which leaves room for the rounding
// of k.  Error below 2 units in the last place, below 2^-23 absolute.  No branches: it vectorises.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define MAPE_INLINE __host__ __device__ __forceinline__
#else
#define MAPE_INLINE inline __attribute__((always_inline))
#endif

namespace megatron_lance {

// The angle of a position, rounded to float32 as the product of two float32 values: never fused into what follows.
MAPE_INLINE float rotary_angle(int position, float inv_freq) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(static_cast<float>(position), inv_freq);
#else
  return static_cast<float>(position) * inv_freq;
#endif
}

MAPE_INLINE void sine_cosine(float x, float& sine, float& cosine) {
  constexpr float kTwoOverPi = 0x1.45f306p-1f;
  constexpr float kHigh = 0x1.921fb6p+0f, kMiddle = -0x1.777a5cp-25f, kLow = -0x1.ee59dap-50f;
  const float k = rintf(x * kTwoOverPi);
  const float r = fmaf(k, -kLow, fmaf(k, -kMiddle, fmaf(k, -kHigh, x)));
  const float z = r * r;
  const float s = fmaf(fmaf(fmaf(fmaf(0x1.6c7514p-19f, z, -0x1.a00df2p-13f), z, 0x1.111106p-7f), z, -0x1.555556p-3f),
                       z * r, r);
  const float c =
      fmaf(fmaf(fmaf(fmaf(0x1.9989dap-16f, z, -0x1.6c0ae8p-10f), z, 0x1.555548p-5f), z, -0.5f), z, 1.0f);
  const int quadrant = static_cast<int>(k);
  const float s_or_c = quadrant & 1 ? c : s;
  const float c_or_s = quadrant & 1 ? s : c;
  sine = quadrant & 2 ? -s_or_c : s_or_c;
  cosine = (quadrant + 1) & 2 ? -c_or_s : c_or_s;
}

}  // namespace megatron_lance
