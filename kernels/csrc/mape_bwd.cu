// Backward: every dQKV element is written once; weight gradients are summed in a fixed order, without atomics.
//
// The normalisation scale is recomputed: x is needed again anyway, so its sum of squares costs arithmetic that hides
// behind memory, while saving it would cost bytes in both passes.  Its sum travels in the same reduction as the
// product of gradient and x.
#include "mape_common.cuh"

namespace megatron_lance {
namespace {

constexpr int kRows = kPartialRows / kWarps;  // per warp; a block makes one partial sum

// What one head kind (q or k) has in common.
template <class T>
struct Gradient {
  Heads<const T> x;
  Heads<const T> dy;
  Heads<T> dx;
  int heads;
};

// dx of heads; adds this lane's part of the weight gradient to the sums.
template <class T, int kVec, int kTeam>
__device__ __forceinline__ void backward_heads(const Lane<T, kVec, kTeam>& lane, const Gradient<T>& g, int rows,
                                               const float (&weight_first)[kVec], const float (&weight_second)[kVec],
                                               const float* table, float inv_size, float eps,
                                               float (&sum_first)[kVec], float (&sum_second)[kVec]) {
  for (Walk walk(lane.team, g.heads, lane.teams); walk.row < rows; walk.next()) {
    float x_first[kVec], x_second[kVec], g_first[kVec], g_second[kVec];
    float squares = 0.0f, product = 0.0f;
    if (lane.active) {
      const Halves<T, kVec> x = lane.load_halves(g.x.at(walk)), dy = lane.load_halves(g.dy.at(walk));
      float cosine[kVec], sine[kVec];
      const float* angles = table + 2 * walk.row * lane.half + lane.at;
      load_floats(angles, cosine);
      load_floats(angles + lane.half, sine);
      widen(x.first, x_first);
      widen(x.second, x_second);
      widen(dy.first, g_first);
      widen(dy.second, g_second);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const float a = g_first[i], b = g_second[i];
        g_first[i] = a * cosine[i] + b * sine[i];
        g_second[i] = b * cosine[i] - a * sine[i];
        squares = fmaf(x_first[i], x_first[i], fmaf(x_second[i], x_second[i], squares));
        product = fmaf(g_first[i] * weight_first[i], x_first[i],
                       fmaf(g_second[i] * weight_second[i], x_second[i], product));
      }
    }
    squares = lane.sum(squares);
    product = lane.sum(product);
    if (!lane.active) continue;
    const float scale = rsqrtf(fmaf(squares, inv_size, eps));
    const float along = scale * scale * product * inv_size;
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      sum_first[i] = fmaf(g_first[i], x_first[i] * scale, sum_first[i]);
      sum_second[i] = fmaf(g_second[i], x_second[i] * scale, sum_second[i]);
      g_first[i] = scale * (g_first[i] * weight_first[i] - x_first[i] * along);
      g_second[i] = scale * (g_second[i] * weight_second[i] - x_second[i] * along);
    }
    lane.store_halves(g.dx.at(walk), {narrow<T>(g_first), narrow<T>(g_second)});
  }
}

// Writes the block's sum over teams and warps to `out` [d]; the whole block calls.
template <class T, int kVec, int kTeam>
__device__ __forceinline__ void block_sum(const Lane<T, kVec, kTeam>& lane, float (&first)[kVec], float (&second)[kVec],
                                          float* scratch, float* out) {
  for (int offset = lane.width; offset < 32; offset *= 2) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      first[i] += __shfl_xor_sync(0xffffffffu, first[i], offset);
      second[i] += __shfl_xor_sync(0xffffffffu, second[i], offset);
    }
  }
  const int d = 2 * lane.half;
  if (lane.team == 0 && lane.active) {
    float* mine = scratch + threadIdx.x / 32 * d + lane.at;
#pragma unroll
    for (int i = 0; i < kVec; ++i) mine[i] = first[i], mine[i + lane.half] = second[i];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < d; i += kThreads) {
    float sum = scratch[i];
    for (int warp = 1; warp < kWarps; ++warp) sum += scratch[warp * d + i];
    out[i] = sum;
  }
  __syncthreads();
}

// Zeros for the query heads of a group that belong to other ranks.
template <class T, int kVec, int kTeam>
__device__ __forceinline__ void zero_heads(const Lane<T, kVec, kTeam>& lane, Heads<T> to, int heads, int rows) {
  if (!lane.active) return;
  float zeros[kVec] = {};
  for (Walk walk(lane.team, heads, lane.teams); walk.row < rows; walk.next()) {
    lane.store_halves(to.at(walk), {narrow<T>(zeros), narrow<T>(zeros)});
  }
}

template <class T, int kVec, int kTeam>
__global__ void __launch_bounds__(kThreads, 4) backward_kernel(const Backward a) {
  extern __shared__ float4 shared[];
  const int warp = threadIdx.x / 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kPartialRows + warp * kRows;
  const int rows = static_cast<int>(max(int64_t{0}, min(int64_t{kRows}, a.rows - row)));
  const Lane<T, kVec, kTeam> lane(a.head_dim);
  const int64_t d = a.head_dim, group_size = (a.group_heads + 2) * d, row_size = a.groups * group_size;
  const float inv_size = 1.0f / static_cast<float>(a.head_dim);
  float* scratch = reinterpret_cast<float*>(shared);
  float* table = scratch + (kWarps + warp * kRows) * a.head_dim;
  float* partial = a.partials + static_cast<int64_t>(blockIdx.x) * 2 * d;
  fill_angles(a, row, rows, table);

  const T* qkv = static_cast<const T*>(a.qkv) + row * a.qkv_row;
  T* d_qkv = static_cast<T*>(a.d_qkv) + row * row_size;
  float first[kVec], second[kVec], sum_first[kVec] = {}, sum_second[kVec] = {};
  lane.load_weight(a.query_weight, first, second);
  const T* d_query = static_cast<const T*>(a.d_query) + row * a.d_query_row;
  for (int group = 0; group < a.groups; ++group) {
    const Heads<T> dx{d_qkv + group * group_size, row_size, d};
    const Gradient<T> g{{qkv + group * a.qkv_group + a.query_offset * d, a.qkv_row, d},
                        {d_query + group * a.query_heads * d, a.d_query_row, d},
                        {dx.base + a.query_offset * d, row_size, d},
                        a.query_heads};
    backward_heads(lane, g, rows, first, second, table, inv_size, a.eps, sum_first, sum_second);
    const int after = a.query_offset + a.query_heads;
    if (a.query_offset > 0) zero_heads(lane, dx, a.query_offset, rows);
    if (after < a.group_heads) {
      zero_heads(lane, Heads<T>{dx.base + after * d, row_size, d}, a.group_heads - after, rows);
    }
  }
  block_sum(lane, sum_first, sum_second, scratch, partial);

#pragma unroll
  for (int i = 0; i < kVec; ++i) sum_first[i] = sum_second[i] = 0.0f;
  lane.load_weight(a.key_weight, first, second);
  const Gradient<T> g{{qkv + a.group_heads * d, a.qkv_row, a.qkv_group},
                      {static_cast<const T*>(a.d_key) + row * a.d_key_value_row, a.d_key_value_row, d},
                      {d_qkv + a.group_heads * d, row_size, group_size},
                      a.groups};
  backward_heads(lane, g, rows, first, second, table, inv_size, a.eps, sum_first, sum_second);
  copy_heads(lane, Heads<const T>{static_cast<const T*>(a.d_value) + row * a.d_key_value_row, a.d_key_value_row, d},
             Heads<T>{g.dx.base + d, row_size, group_size}, a.groups, rows);
  block_sum(lane, sum_first, sum_second, scratch, partial + d);
}

constexpr int kColumns = 8, kLines = 128;

// Sums the partials: a line of threads takes every kLines-th one, in double, then the lines are added as a tree.
template <class T>
__global__ void __launch_bounds__(kColumns* kLines) weight_kernel(const Backward a, int64_t partials) {
  __shared__ double sums[kLines][kColumns];
  const int column = blockIdx.x * kColumns + threadIdx.x, columns = 2 * a.head_dim;
  double sum = 0.0;
#pragma unroll 8
  for (int64_t i = threadIdx.y; i < partials; i += kLines) sum += static_cast<double>(a.partials[i * columns + column]);
  sums[threadIdx.y][threadIdx.x] = sum;
  for (int lines = kLines / 2; lines > 0; lines /= 2) {
    __syncthreads();
    if (threadIdx.y < lines) sums[threadIdx.y][threadIdx.x] += sums[threadIdx.y + lines][threadIdx.x];
  }
  if (threadIdx.y > 0) return;
  T* out = static_cast<T*>(column < a.head_dim ? a.d_query_weight : a.d_key_weight);
  out[column % a.head_dim] = static_cast<T>(static_cast<float>(sums[0][threadIdx.x]));
}

struct LaunchBackward {
  const Backward& a;
  cudaStream_t stream;
  template <class T, int kVec, int kTeam>
  void operator()() const {
    const int64_t blocks = partial_count(a.rows);
    const size_t shared_bytes = sizeof(float) * (kWarps + kPartialRows) * a.head_dim;
    if (blocks > 0) {
      backward_kernel<T, kVec, kTeam><<<static_cast<unsigned>(blocks), kThreads, shared_bytes, stream>>>(a);
    }
    weight_kernel<T><<<2 * a.head_dim / kColumns, dim3(kColumns, kLines), 0, stream>>>(a, blocks);
  }
};

}  // namespace
}  // namespace megatron_lance

const char* megatron_lance_backward_cuda(const megatron_lance::Backward* a, int device, void* stream) {
  using namespace megatron_lance;
  return on_device(device, [&] { dispatch(*a, LaunchBackward{*a, static_cast<cudaStream_t>(stream)}); });
}
