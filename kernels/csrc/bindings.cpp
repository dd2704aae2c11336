// Schema of the ops, checks of their arguments, and their CPU and CUDA implementations.
//
// Only torch's stable ABI is used, so one binary serves torch 2.11 and later, with or without CUDA.  The fake kernels
// and the autograd formula are registered in megatron_lance/ops/qk_norm_mape.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "qk_norm_mape.h"

#ifdef MEGATRON_LANCE_CUDA
// Weak: a torch without CUDA lacks it, and the library must load there too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace megatron_lance {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrainElements = 32768;  // fewest elements worth a thread

Element element_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Element::kFloat32;
    case ScalarType::BFloat16: return Element::kBFloat16;
    case ScalarType::Half: return Element::kFloat16;
    default: break;
  }
  STD_TORCH_CHECK(false, "qk_norm_mape: qkv must be float32, bfloat16 or float16; cast it");
}

bool is_beside(const Tensor& x, const Tensor& qkv) {
  return x.is_cuda() == qkv.is_cuda() && x.get_device_index() == qkv.get_device_index();
}

void check_like(const Tensor& x, const Tensor& qkv, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == qkv.scalar_type() && is_beside(x, qkv),
                  "qk_norm_mape: ", name, " must have the type and the device of qkv; cast or move it");
}

// A [d] vector of the given type beside qkv.
void check_vector(const Tensor& x, const Tensor& qkv, int64_t size, const char* name) {
  STD_TORCH_CHECK(x.dim() == 1 && x.size(0) == size && x.is_contiguous() && is_beside(x, qkv),
                  "qk_norm_mape: ", name, " must be a contiguous vector of ", size, " beside qkv");
}

// The widest access in bytes that a GPU thread makes: 16, or 8 where half a head is no multiple of 16 bytes.
int64_t access_bytes(const Inputs& a) {
  return a.element == Element::kFloat32 || a.head_dim % 16 == 0 ? 16 : 8;
}

bool is_aligned(const Tensor& x, int64_t bytes) {
  if (!x.is_cuda()) return true;  // the CPU kernel reads anything
  bool aligned = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % bytes == 0;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) {
    aligned &= x.size(i) < 2 || x.stride(i) * static_cast<int64_t>(x.element_size()) % bytes == 0;
  }
  return aligned;
}

void check_aligned(const Tensor& x, const Inputs& a, const char* name) {
  STD_TORCH_CHECK(is_aligned(x, access_bytes(a)), "qk_norm_mape: ", name, " must be aligned to ", access_bytes(a),
                  " bytes in every row; copy it");
}

Inputs read_inputs(const Tensor& qkv, const Tensor& positions, const Tensor& inv_freq, const Tensor& query_weight,
                   const Tensor& key_weight, const std::vector<int64_t>& sections, int64_t query_heads,
                   int64_t query_offset, double eps) {
  const int64_t d = query_weight.dim() == 1 ? query_weight.size(0) : 0;
  STD_TORCH_CHECK(d >= 8 && d <= kMaxHeadDim && d % 8 == 0, "qk_norm_mape: head_dim ", d,
                  ": must be a multiple of 8 up to ", kMaxHeadDim);
  STD_TORCH_CHECK(qkv.dim() == 3 && qkv.size(1) > 0 && qkv.size(2) % d == 0 && qkv.size(2) / d > 2 &&
                      qkv.stride(2) == 1,
                  "qk_norm_mape: qkv must be [rows, groups, (query heads + 2) * ", d, "] with a compact last dimension");
  const int64_t heads = qkv.size(2) / d - 2;
  STD_TORCH_CHECK(query_heads > 0 && query_offset >= 0 && query_heads <= heads && query_offset <= heads - query_heads,
                  "qk_norm_mape: ", query_heads, " query heads from ", query_offset, " on, but a group has ", heads);
  STD_TORCH_CHECK(positions.dim() == 2 && positions.size(0) == 3 && positions.size(1) == qkv.size(0) &&
                      positions.scalar_type() == ScalarType::Int && is_beside(positions, qkv) &&
                      (positions.size(1) < 2 || positions.stride(1) == 1),
                  "qk_norm_mape: positions must be int32 [3, ", qkv.size(0), "] beside qkv, rows compact");
  STD_TORCH_CHECK(inv_freq.scalar_type() == ScalarType::Float, "qk_norm_mape: inv_freq must be float32");
  check_vector(inv_freq, qkv, d / 2, "inv_freq");
  check_vector(query_weight, qkv, d, "query_weight");
  check_vector(key_weight, qkv, d, "key_weight");
  check_like(query_weight, qkv, "query_weight");
  check_like(key_weight, qkv, "key_weight");
  STD_TORCH_CHECK(sections.size() == 3 && sections[0] >= 0 && sections[1] >= 0 && sections[0] <= d / 2 &&
                      sections[1] <= d / 2 - sections[0] && sections[2] == d / 2 - sections[0] - sections[1],
                  "qk_norm_mape: three sections that sum to ", d / 2);

  Inputs a{};
  a.element = element_of(qkv);
  a.qkv = qkv.const_data_ptr();
  a.positions = positions.const_data_ptr<int32_t>();
  a.inv_freq = inv_freq.const_data_ptr<float>();
  a.query_weight = query_weight.const_data_ptr();
  a.key_weight = key_weight.const_data_ptr();
  a.rows = qkv.size(0);
  a.qkv_row = qkv.stride(0);
  a.qkv_group = qkv.stride(1);
  a.position_axis = positions.stride(0);
  a.groups = static_cast<int>(qkv.size(1));
  a.group_heads = static_cast<int>(heads);
  a.query_heads = static_cast<int>(query_heads);
  a.query_offset = static_cast<int>(query_offset);
  a.head_dim = static_cast<int>(d);
  a.height_begin = static_cast<int>(sections[0]);
  a.width_begin = static_cast<int>(sections[0] + sections[1]);
  a.eps = static_cast<float>(eps);
  check_aligned(qkv, a, "qkv");
  check_aligned(query_weight, a, "query_weight");
  check_aligned(key_weight, a, "key_weight");
  return a;
}

// What lies behind the rows of q ([heads, d]) or of keys and values ([2, heads, d]) must be compact; rows may be any
// distance apart, so that slices of larger buffers can be read and written.
bool rows_compact(const Tensor& x) {
  int64_t step = 1;
  for (int64_t i = x.dim() - 1; i > 0; step *= x.size(i--)) {
    if (x.size(i) > 1 && x.stride(i) != step) return false;
  }
  return true;
}

void check_shape(const Tensor& x, const Tensor& qkv, const std::vector<int64_t>& shape, const char* name) {
  bool same = x.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = x.size(static_cast<int64_t>(i)) == shape[i];
  STD_TORCH_CHECK(same, "qk_norm_mape: ", name, " has the wrong shape for qkv");
  check_like(x, qkv, name);
}

std::vector<int64_t> query_shape(const Inputs& a) { return {a.rows, int64_t{a.groups} * a.query_heads, a.head_dim}; }
std::vector<int64_t> key_value_shape(const Inputs& a) { return {a.rows, 2, a.groups, a.head_dim}; }

void check_output(const Tensor& x, const Tensor& qkv, const Inputs& a, const std::vector<int64_t>& shape,
                  const char* name) {
  check_shape(x, qkv, shape, name);
  STD_TORCH_CHECK(rows_compact(x), "qk_norm_mape: the heads of a row of ", name, " must be compact");
  check_aligned(x, a, name);
}

// An incoming gradient, copied if its rows are laid out otherwise (expanded, transposed or not aligned).
Tensor compact_gradient(const Tensor& x, const Tensor& qkv, const Inputs& a, const std::vector<int64_t>& shape,
                        const char* name) {
  check_shape(x, qkv, shape, name);
  const Tensor y = rows_compact(x) ? x : torch::stable::contiguous(x);
  return is_aligned(y, access_bytes(a)) ? y : torch::stable::clone(y);
}

template <class T>
T* offset_by(T* data, const Inputs& a, int64_t elements) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return static_cast<Byte*>(data) + elements * (a.element == Element::kFloat32 ? 4 : 2);
}

#ifdef MEGATRON_LANCE_CUDA
void* current_stream(const Tensor& x) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "qk_norm_mape: this torch was built without CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return stream;
}

void check_launch(const char* error) {
  STD_TORCH_CHECK(error == nullptr, "qk_norm_mape: CUDA: ", error ? error : "");
}
#endif

void run_forward(const Forward& a, [[maybe_unused]] const Tensor& qkv) {
  if (a.rows == 0) return;
#ifdef MEGATRON_LANCE_CUDA
  if (qkv.is_cuda()) return check_launch(megatron_lance_forward_cuda(&a, qkv.get_device_index(), current_stream(qkv)));
#endif
  const int64_t grain = kGrainElements / (int64_t{a.groups} * (a.query_heads + 2) * a.head_dim) + 1;
  torch::stable::parallel_for(0, a.rows, grain, [&](int64_t begin, int64_t end) { forward_cpu(a, begin, end); });
}

void run_backward(const Backward& a, [[maybe_unused]] const Tensor& qkv) {
#ifdef MEGATRON_LANCE_CUDA
  if (qkv.is_cuda()) return check_launch(megatron_lance_backward_cuda(&a, qkv.get_device_index(), current_stream(qkv)));
#endif
  torch::stable::parallel_for(0, partial_count(a.rows), 1,
                              [&](int64_t begin, int64_t end) { backward_cpu(a, begin, end); });
  weight_gradients_cpu(a);
}

void qk_norm_mape_out(Tensor qkv, Tensor positions, Tensor inv_freq, Tensor query_weight, Tensor key_weight,
                      std::vector<int64_t> sections, int64_t query_heads, int64_t query_offset, double eps, Tensor query,
                      Tensor key_value) {
  Forward a{};
  static_cast<Inputs&>(a) =
      read_inputs(qkv, positions, inv_freq, query_weight, key_weight, sections, query_heads, query_offset, eps);
  check_output(query, qkv, a, query_shape(a), "query");
  check_output(key_value, qkv, a, key_value_shape(a), "key_value");
  a.query = query.mutable_data_ptr();
  a.key = key_value.mutable_data_ptr();
  a.value = offset_by(a.key, a, int64_t{a.groups} * a.head_dim);
  a.query_row = query.stride(0);
  a.key_value_row = key_value.stride(0);
  run_forward(a, qkv);
}

std::tuple<Tensor, Tensor> qk_norm_mape(Tensor qkv, Tensor positions, Tensor inv_freq, Tensor query_weight,
                                        Tensor key_weight, std::vector<int64_t> sections, int64_t query_heads,
                                        int64_t query_offset, double eps) {
  const Inputs a =
      read_inputs(qkv, positions, inv_freq, query_weight, key_weight, sections, query_heads, query_offset, eps);
  Tensor query = torch::stable::new_empty(qkv, query_shape(a));
  Tensor key_value = torch::stable::new_empty(qkv, key_value_shape(a));
  qk_norm_mape_out(qkv, positions, inv_freq, query_weight, key_weight, sections, query_heads, query_offset, eps, query,
                   key_value);
  return {query, key_value};
}

std::tuple<Tensor, Tensor, Tensor> qk_norm_mape_backward(Tensor d_query, Tensor d_key_value, Tensor qkv,
                                                         Tensor positions, Tensor inv_freq, Tensor query_weight,
                                                         Tensor key_weight, std::vector<int64_t> sections,
                                                         int64_t query_heads, int64_t query_offset, double eps) {
  Backward a{};
  static_cast<Inputs&>(a) =
      read_inputs(qkv, positions, inv_freq, query_weight, key_weight, sections, query_heads, query_offset, eps);
  const Tensor from_query = compact_gradient(d_query, qkv, a, query_shape(a), "d_query");
  const Tensor from_key_value = compact_gradient(d_key_value, qkv, a, key_value_shape(a), "d_key_value");
  const std::vector<int64_t> qkv_shape{a.rows, a.groups, int64_t{a.group_heads + 2} * a.head_dim};
  const std::vector<int64_t> partial_shape{partial_count(a.rows), 2, a.head_dim};
  const std::vector<int64_t> weight_shape{a.head_dim};
  Tensor d_qkv = torch::stable::new_empty(qkv, qkv_shape);
  Tensor partials = torch::stable::new_empty(qkv, partial_shape, ScalarType::Float);
  Tensor d_query_weight = torch::stable::new_empty(query_weight, weight_shape);
  Tensor d_key_weight = torch::stable::new_empty(key_weight, weight_shape);
  a.d_query = from_query.const_data_ptr();
  a.d_key = from_key_value.const_data_ptr();
  a.d_value = offset_by(a.d_key, a, int64_t{a.groups} * a.head_dim);
  a.d_query_row = from_query.stride(0);
  a.d_key_value_row = from_key_value.stride(0);
  a.d_qkv = d_qkv.mutable_data_ptr();
  a.partials = partials.mutable_data_ptr<float>();
  a.d_query_weight = d_query_weight.mutable_data_ptr();
  a.d_key_weight = d_key_weight.mutable_data_ptr();
  run_backward(a, qkv);
  return {d_qkv, d_query_weight, d_key_weight};
}

#define MAPE_ARGUMENTS                                                                                     \
  "Tensor qkv, Tensor positions, Tensor inv_freq, Tensor query_weight, Tensor key_weight, int[] sections, " \
  "int query_heads, int query_offset, float eps"

STABLE_TORCH_LIBRARY(megatron_lance, m) {
  m.def("qk_norm_mape(" MAPE_ARGUMENTS ") -> (Tensor, Tensor)");
  m.def("qk_norm_mape_out(" MAPE_ARGUMENTS ", Tensor(a!) query, Tensor(b!) key_value) -> ()");
  m.def("qk_norm_mape_backward(Tensor d_query, Tensor d_key_value, " MAPE_ARGUMENTS ") -> (Tensor, Tensor, Tensor)");
}

#define MAPE_IMPLEMENTATIONS(m)                                     \
  m.impl("qk_norm_mape", TORCH_BOX(&qk_norm_mape));                 \
  m.impl("qk_norm_mape_out", TORCH_BOX(&qk_norm_mape_out));         \
  m.impl("qk_norm_mape_backward", TORCH_BOX(&qk_norm_mape_backward))

STABLE_TORCH_LIBRARY_IMPL(megatron_lance, CPU, m) { MAPE_IMPLEMENTATIONS(m); }
#ifdef MEGATRON_LANCE_CUDA
STABLE_TORCH_LIBRARY_IMPL(megatron_lance, CUDA, m) { MAPE_IMPLEMENTATIONS(m); }
#endif

}  // namespace
}  // namespace megatron_lance
