// Forward: every head of q, k and v is read once from the interleaved QKV and written once where attention wants it.
#include "mape_common.cuh"

namespace megatron_lance {
namespace {

constexpr int kRows = 4;  // per warp

// Normalises and rotates heads; the next head is fetched while this one is worked on.
template <class T, int kVec, int kTeam>
__device__ __forceinline__ void norm_rotate(const Lane<T, kVec, kTeam>& lane, Heads<const T> from, Heads<T> to,
                                            int heads, int rows, const float (&weight_first)[kVec],
                                            const float (&weight_second)[kVec], const float* table, float inv_size,
                                            float eps) {
  Walk walk(lane.team, heads, lane.teams);
  if (walk.row >= rows) return;
  Halves<T, kVec> x;
  if (lane.active) x = lane.load_halves(from.at(walk));
  while (walk.row < rows) {
    const Walk here = walk;
    const Halves<T, kVec> now = x;
    walk.next();
    if (lane.active && walk.row < rows) x = lane.load_halves(from.at(walk));

    float first[kVec], second[kVec];
    float squares = 0.0f;
    if (lane.active) {
      widen(now.first, first);
      widen(now.second, second);
#pragma unroll
      for (int i = 0; i < kVec; ++i) squares = fmaf(first[i], first[i], fmaf(second[i], second[i], squares));
    }
    const float scale = rsqrtf(fmaf(lane.sum(squares), inv_size, eps));
    if (!lane.active) continue;

    float cosine[kVec], sine[kVec];
    const float* angles = table + 2 * here.row * lane.half + lane.at;
    load_floats(angles, cosine);
    load_floats(angles + lane.half, sine);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const float a = first[i] * scale * weight_first[i], b = second[i] * scale * weight_second[i];
      first[i] = a * cosine[i] - b * sine[i];
      second[i] = b * cosine[i] + a * sine[i];
    }
    lane.store_halves(to.at(here), {narrow<T>(first), narrow<T>(second)});
  }
}

template <class T, int kVec, int kTeam>
__global__ void __launch_bounds__(kThreads) forward_kernel(const Forward a) {
  extern __shared__ float4 shared[];
  const int warp = threadIdx.x / 32;
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kWarps + warp) * kRows;
  if (row >= a.rows) return;
  const int rows = a.rows - row < kRows ? static_cast<int>(a.rows - row) : kRows;
  const Lane<T, kVec, kTeam> lane(a.head_dim);
  const int64_t d = a.head_dim;
  const float inv_size = 1.0f / static_cast<float>(a.head_dim);
  float* table = reinterpret_cast<float*>(shared) + warp * kRows * a.head_dim;
  fill_angles(a, row, rows, table);

  const T* qkv = static_cast<const T*>(a.qkv) + row * a.qkv_row;
  float first[kVec], second[kVec];
  lane.load_weight(a.query_weight, first, second);
  for (int group = 0; group < a.groups; ++group) {
    norm_rotate(lane, Heads<const T>{qkv + group * a.qkv_group + a.query_offset * d, a.qkv_row, d},
                Heads<T>{static_cast<T*>(a.query) + row * a.query_row + group * a.query_heads * d, a.query_row, d},
                a.query_heads, rows, first, second, table, inv_size, a.eps);
  }
  lane.load_weight(a.key_weight, first, second);
  const Heads<const T> keys{qkv + a.group_heads * d, a.qkv_row, a.qkv_group};
  norm_rotate(lane, keys, Heads<T>{static_cast<T*>(a.key) + row * a.key_value_row, a.key_value_row, d}, a.groups, rows, first,
              second, table, inv_size, a.eps);
  copy_heads(lane, Heads<const T>{keys.base + d, a.qkv_row, a.qkv_group},
             Heads<T>{static_cast<T*>(a.value) + row * a.key_value_row, a.key_value_row, d}, a.groups, rows);
}

struct LaunchForward {
  const Forward& a;
  cudaStream_t stream;
  template <class T, int kVec, int kTeam>
  void operator()() const {
    const int64_t blocks = (a.rows + kWarps * kRows - 1) / (kWarps * kRows);
    const size_t shared_bytes = sizeof(float) * kWarps * kRows * a.head_dim;
    forward_kernel<T, kVec, kTeam><<<static_cast<unsigned>(blocks), kThreads, shared_bytes, stream>>>(a);
  }
};

}  // namespace
}  // namespace megatron_lance

const char* megatron_lance_forward_cuda(const megatron_lance::Forward* a, int device, void* stream) {
  using namespace megatron_lance;
  return on_device(device, [&] { dispatch(*a, LaunchForward{*a, static_cast<cudaStream_t>(stream)}); });
}
