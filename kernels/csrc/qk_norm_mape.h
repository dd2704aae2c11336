// Arguments of the QK-norm + MaPE kernels: plain values, shared by the CPU and the CUDA kernels and their bindings.
//
// Shapes: r rows, g groups (key/value heads), n query heads per group in qkv, of which `query_heads` from `query_offset`
// on are taken, d channels per head.  Strides are in elements; the last dimension of every tensor is compact.
#pragma once

#include <cstdint>

namespace megatron_lance {

enum class Element : int { kFloat32, kBFloat16, kFloat16 };

struct Inputs {
  const void* qkv;           // [r, g, (n + 2) * d]: per group n query heads, the key head, the value head
  const int32_t* positions;  // [3, r]: temporal, height, width
  const float* inv_freq;     // [d / 2]
  const void* query_weight;  // [d], of qkv's type, as key_weight
  const void* key_weight;    // [d]
  int64_t rows;
  int64_t qkv_row;        // stride
  int64_t qkv_group;      // stride
  int64_t position_axis;  // stride
  int groups;
  int group_heads;   // n
  int query_heads;   // per group
  int query_offset;  // within a group
  int head_dim;
  int height_begin;  // first frequency of the height axis
  int width_begin;   // first frequency of the width axis
  float eps;
  Element element;
};

struct Forward : Inputs {
  void* query;  // [r, g * query_heads, d]
  void* key;    // [r, g, d]
  void* value;  // [r, g, d]
  int64_t query_row;      // stride
  int64_t key_value_row;  // stride
};

struct Backward : Inputs {
  const void* d_query;
  const void* d_key;
  const void* d_value;
  int64_t d_query_row;
  int64_t d_key_value_row;
  void* d_qkv;      // compact; every element is written, zeros for query heads that were not taken
  float* partials;  // [partial_count(r), 2, d]: sums for the query and the key weight over kPartialRows rows each
  void* d_query_weight;
  void* d_key_weight;
};

// Rows summed into one partial weight gradient.  It depends on nothing but the row count, so that neither the number
// of threads nor the GPU at hand changes a bit of the result.
constexpr int kPartialRows = 16;
constexpr int64_t partial_count(int64_t rows) { return (rows + kPartialRows - 1) / kPartialRows; }

constexpr int kMaxHeadDim = 256;

// CPU: rows [begin, end) of the forward pass; partials [begin, end) of the backward pass with their rows; the sum of
// all partials.
void forward_cpu(const Forward& arguments, int64_t begin, int64_t end);
void backward_cpu(const Backward& arguments, int64_t begin, int64_t end);
void weight_gradients_cpu(const Backward& arguments);

}  // namespace megatron_lance

// CUDA: launch on a stream of a device; the CUDA error as text, or null.
extern "C" {
const char* megatron_lance_forward_cuda(const megatron_lance::Forward* arguments, int device, void* stream);
const char* megatron_lance_backward_cuda(const megatron_lance::Backward* arguments, int device, void* stream);
}
