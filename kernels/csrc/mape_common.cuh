// What the forward and the backward kernel share: element types, wide accesses, the walk over heads, angle tables.
//
// Threads: a warp owns some rows.  G of its lanes, a team, work on one head: lane j of a team holds the kVec elements
// [j * kVec, (j + 1) * kVec) of the first half of the head and the same of the second half, so a pair that is rotated
// together lies in one thread, and every access is kVec elements wide (16 bytes; 8 where half a head is no multiple of
// 16 bytes).  The teams of a warp walk over all (row, head) pairs of the warp's rows.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "qk_norm_mape.h"
#include "sincos.h"

namespace megatron_lance {

constexpr int kWarps = 4;  // per block
constexpr int kThreads = 32 * kWarps;

template <int kBytes>
struct Words;
template <>
struct Words<16> {
  using type = uint4;
};
template <>
struct Words<8> {
  using type = uint2;
};

// kVec elements as they lie in memory.
template <class T, int kVec>
union Packed {
  typename Words<kVec * sizeof(T)>::type words;
  T elements[kVec];
  __device__ Packed() {}
};

// Streamed: read once, so it need not stay in the cache.
template <class T, int kVec>
__device__ __forceinline__ Packed<T, kVec> load_streamed(const T* from) {
  Packed<T, kVec> packed;
  packed.words = __ldcs(reinterpret_cast<const decltype(packed.words)*>(from));
  return packed;
}

template <class T, int kVec>
__device__ __forceinline__ Packed<T, kVec> load(const T* from) {
  Packed<T, kVec> packed;
  packed.words = *reinterpret_cast<const decltype(packed.words)*>(from);
  return packed;
}

template <class T, int kVec>
__device__ __forceinline__ void store(T* to, const Packed<T, kVec>& packed) {
  *reinterpret_cast<decltype(packed.words)*>(to) = packed.words;
}

__device__ __forceinline__ void widen_pair(const float* from, float& a, float& b) { a = from[0], b = from[1]; }
__device__ __forceinline__ void widen_pair(const __nv_bfloat16* from, float& a, float& b) {
  const float2 pair = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(from));
  a = pair.x, b = pair.y;
}
__device__ __forceinline__ void widen_pair(const __half* from, float& a, float& b) {
  const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(from));
  a = pair.x, b = pair.y;
}
__device__ __forceinline__ void narrow_pair(float a, float b, float* to) { to[0] = a, to[1] = b; }
__device__ __forceinline__ void narrow_pair(float a, float b, __nv_bfloat16* to) {
  *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(a, b);
}
__device__ __forceinline__ void narrow_pair(float a, float b, __half* to) {
  *reinterpret_cast<__half2*>(to) = __floats2half2_rn(a, b);
}

template <class T, int kVec>
__device__ __forceinline__ void widen(const Packed<T, kVec>& packed, float (&to)[kVec]) {
#pragma unroll
  for (int i = 0; i < kVec; i += 2) widen_pair(&packed.elements[i], to[i], to[i + 1]);
}

template <class T, int kVec>
__device__ __forceinline__ Packed<T, kVec> narrow(const float (&from)[kVec]) {
  Packed<T, kVec> packed;
#pragma unroll
  for (int i = 0; i < kVec; i += 2) narrow_pair(from[i], from[i + 1], &packed.elements[i]);
  return packed;
}

template <int kVec>
__device__ __forceinline__ void load_floats(const float* from, float (&to)[kVec]) {
#pragma unroll
  for (int i = 0; i < kVec; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(from + i);
    to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
  }
}

// Both halves of a head, this lane's part.
template <class T, int kVec>
struct Halves {
  Packed<T, kVec> first, second;
};

// Where a lane stands: in its team, and its team in the warp.  kTeam = 0: the width is known only at run time.
template <class T, int kVec, int kTeam>
struct Lane {
  int half;       // d / 2
  int width;      // lanes of a team, a power of two
  int teams;      // of a warp
  int team;       // of this lane
  int at;         // this lane's first element within a half
  bool active;    // false for the lanes of a team beyond half / kVec
  unsigned mask;  // lanes of this team

  __device__ explicit Lane(int head_dim) : half(head_dim / 2) {
    const int lane = threadIdx.x % 32;
    width = kTeam;
    if (kTeam == 0) {
      width = 1;
      while (width * kVec < half) width *= 2;
    }
    teams = 32 / width;
    team = lane / width;
    at = lane % width * kVec;
    active = kTeam != 0 || at < half;
    mask = width == 32 ? 0xffffffffu : ((1u << width) - 1u) << (team * width);
  }

  // The sum over the team, in all its lanes; the same order whatever the lane.
  __device__ __forceinline__ float sum(float x) const {
    if constexpr (kTeam != 0) {
#pragma unroll
      for (int offset = kTeam / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(mask, x, offset);
    } else {
      for (int offset = width / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(mask, x, offset);
    }
    return x;
  }

  __device__ __forceinline__ Halves<T, kVec> load_halves(const T* head) const {
    return {load_streamed<T, kVec>(head + at), load_streamed<T, kVec>(head + at + half)};
  }
  __device__ __forceinline__ void store_halves(T* head, const Halves<T, kVec>& x) const {
    store<T, kVec>(head + at, x.first);
    store<T, kVec>(head + at + half, x.second);
  }
  __device__ __forceinline__ void load_weight(const void* weight, float (&first)[kVec], float (&second)[kVec]) const {
    const T* w = static_cast<const T*>(weight) + (active ? at : 0);
    widen(load<T, kVec>(w), first);
    widen(load<T, kVec>(w + half), second);
  }
};

// The (row, head) pairs of some rows that one team takes: every teams-th one.
struct Walk {
  int row = 0;
  int head;
  int heads;
  int step;

  __device__ Walk(int first, int heads, int step) : head(first), heads(heads), step(step) { wrap(); }
  __device__ __forceinline__ void next() {
    head += step;
    wrap();
  }
  __device__ __forceinline__ void wrap() {
    while (head >= heads) head -= heads, ++row;
  }
};

// Heads of some rows in memory.
template <class T>
struct Heads {
  T* base;
  int64_t row_stride;
  int64_t head_stride;
  __device__ __forceinline__ T* at(const Walk& walk) const {
    return base + walk.row * row_stride + walk.head * head_stride;
  }
};

// Cosines and sines of a warp's rows, [rows, 2, d / 2] in shared memory; the whole warp calls.
__device__ __forceinline__ void fill_angles(const Inputs& a, int64_t first_row, int rows, float* table) {
  const int half = a.head_dim / 2;
  for (int row = 0; row < rows; ++row) {
    const int32_t* positions = a.positions + first_row + row;
    const int temporal = positions[0], height = positions[a.position_axis], width = positions[2 * a.position_axis];
    for (int i = threadIdx.x % 32; i < half; i += 32) {
      const int position = i < a.height_begin ? temporal : i < a.width_begin ? height : width;
      float* cosine = table + (2 * row) * half + i;
      sine_cosine(rotary_angle(position, a.inv_freq[i]), cosine[half], cosine[0]);
    }
  }
  __syncwarp();
}

// Copies heads unchanged.
template <class T, int kVec, int kTeam>
__device__ __forceinline__ void copy_heads(const Lane<T, kVec, kTeam>& lane, Heads<const T> from, Heads<T> to,
                                           int heads, int rows) {
  if (!lane.active) return;
  for (Walk walk(lane.team, heads, lane.teams); walk.row < rows; walk.next()) {
    lane.store_halves(to.at(walk), lane.load_halves(from.at(walk)));
  }
}

// Runs `launch.template operator()<T, kVec, kTeam>()` for an element type and head size.
template <class Launch>
void dispatch(const Inputs& a, const Launch& launch) {
  const bool usual = a.head_dim == 128, wide = a.head_dim % 16 == 0;
  switch (a.element) {
    case Element::kFloat32:
      usual ? launch.template operator()<float, 4, 16>() : launch.template operator()<float, 4, 0>();
      break;
    case Element::kBFloat16:
      usual  ? launch.template operator()<__nv_bfloat16, 8, 8>()
      : wide ? launch.template operator()<__nv_bfloat16, 8, 0>()
             : launch.template operator()<__nv_bfloat16, 4, 0>();
      break;
    case Element::kFloat16:
      usual  ? launch.template operator()<__half, 8, 8>()
      : wide ? launch.template operator()<__half, 8, 0>()
             : launch.template operator()<__half, 4, 0>();
      break;
  }
}

// Calls `run` with a device current; the CUDA error of its launches as text, or null.
template <class Run>
const char* on_device(int device, const Run& run) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess && before != device) error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    run();
    error = cudaGetLastError();
    if (before != device) cudaSetDevice(before);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace megatron_lance
