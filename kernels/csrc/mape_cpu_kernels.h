// The CPU kernels.  mape_cpu.cpp includes this text once per instruction set, inside a namespace of its own; so it has no
// include guard and no includes.
//
// One pass over the rows: a row's angles are computed once and serve all its heads, each head is read and written once.
// The loops are plain and written to be vectorised by the compiler.

template <class To, class From>
MAPE_INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

struct BFloat16 {
  uint16_t raw;
};
struct Float16 {
  uint16_t raw;
};

MAPE_INLINE float widen(float x) { return x; }
MAPE_INLINE float widen(BFloat16 x) { return bits<float>(static_cast<uint32_t>(x.raw) << 16); }
MAPE_INLINE float widen(Float16 x) {
  // The exponent is rebased by a multiplication, which makes subnormals right too.
  const uint32_t magnitude = static_cast<uint32_t>(x.raw & 0x7fffu) << 13;
  const uint32_t special = magnitude >= 0x0f800000u ? 0x70000000u : 0u;
  const uint32_t finite = bits<uint32_t>(bits<float>(magnitude) * 0x1p112f);
  const uint32_t value = special ? (magnitude + special) : finite;
  return bits<float>(value | static_cast<uint32_t>(x.raw & 0x8000u) << 16);
}

template <class T>
MAPE_INLINE T narrow(float x);
template <>
MAPE_INLINE float narrow<float>(float x) {
  return x;
}
template <>
MAPE_INLINE BFloat16 narrow<BFloat16>(float x) {
  const uint32_t u = bits<uint32_t>(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
  return BFloat16{static_cast<uint16_t>(nan ? 0x7fc0u : rounded)};
}
template <>
MAPE_INLINE Float16 narrow<Float16>(float x) {
  const uint32_t u = bits<uint32_t>(x), magnitude = u & 0x7fffffffu;
  // Normal: round the mantissa to nearest even.  Subnormal: let an addition of 0.5 do the shift and the rounding.
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  const uint32_t subnormal = bits<uint32_t>(bits<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t infinite = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t value = magnitude >= 0x477ff000u ? infinite : finite;
  return Float16{static_cast<uint16_t>(value | (u >> 16 & 0x8000u))};
}

template <class T>
MAPE_INLINE void widen(const T* from, float* to, int n) {
  SIMD for (int i = 0; i < n; ++i) to[i] = widen(from[i]);
}

// Cosine and sine of one row, [d / 2] each.
MAPE_INLINE void row_angles(const Inputs& a, int64_t row, int half, float* cosine, float* sine) {
  const int begins[4] = {0, a.height_begin, a.width_begin, half};
  for (int axis = 0; axis < 3; ++axis) {
    const int position = a.positions[axis * a.position_axis + row];
    SIMD for (int i = begins[axis]; i < begins[axis + 1]; ++i) {
      sine_cosine(rotary_angle(position, a.inv_freq[i]), sine[i], cosine[i]);
    }
  }
}

// y = rotate(x / rms(x) * weight) of one head.
template <class T>
MAPE_INLINE void head_forward(const T* x, T* y, const float* weight, const float* cosine, const float* sine, int half,
                              float eps) {
  float squares = 0;
  SIMD_SUM(squares) for (int i = 0; i < 2 * half; ++i) squares += widen(x[i]) * widen(x[i]);
  const float scale = 1.0f / std::sqrt(squares / static_cast<float>(2 * half) + eps);
  SIMD for (int i = 0; i < half; ++i) {
    const float first = widen(x[i]) * scale * weight[i];
    const float second = widen(x[i + half]) * scale * weight[i + half];
    y[i] = narrow<T>(first * cosine[i] - second * sine[i]);
    y[i + half] = narrow<T>(second * cosine[i] + first * sine[i]);
  }
}

// dx of one head from dy; the weight gradient is added to `sum`.
template <class T>
MAPE_INLINE void head_backward(const T* x, const T* dy, T* dx, const float* weight, const float* cosine,
                               const float* sine, int half, float eps, float* sum) {
  float grad[kMaxHeadDim];  // of norm(x) * weight
  float squares = 0, product = 0;
  SIMD_SUM(squares) for (int i = 0; i < 2 * half; ++i) squares += widen(x[i]) * widen(x[i]);
  SIMD_SUM(product) for (int i = 0; i < half; ++i) {
    const float first = widen(dy[i]), second = widen(dy[i + half]);
    grad[i] = first * cosine[i] + second * sine[i];
    grad[i + half] = second * cosine[i] - first * sine[i];
    product += grad[i] * weight[i] * widen(x[i]) + grad[i + half] * weight[i + half] * widen(x[i + half]);
  }
  const float size = static_cast<float>(2 * half);
  const float scale = 1.0f / std::sqrt(squares / size + eps);
  const float along = scale * scale * product / size;
  SIMD for (int i = 0; i < 2 * half; ++i) {
    const float value = widen(x[i]);
    dx[i] = narrow<T>(scale * (grad[i] * weight[i] - value * along));
    sum[i] += grad[i] * (value * scale);
  }
}

template <class T, int kDim>
MAPE_INLINE void forward_rows(const Forward& a, int64_t begin, int64_t end) {
  const int d = kDim ? kDim : a.head_dim, half = d / 2;
  float cosine[kMaxHeadDim / 2], sine[kMaxHeadDim / 2], query_weight[kMaxHeadDim], key_weight[kMaxHeadDim];
  widen(static_cast<const T*>(a.query_weight), query_weight, d);
  widen(static_cast<const T*>(a.key_weight), key_weight, d);
  for (int64_t row = begin; row < end; ++row) {
    row_angles(a, row, half, cosine, sine);
    for (int group = 0; group < a.groups; ++group) {
      const T* x = static_cast<const T*>(a.qkv) + row * a.qkv_row + group * a.qkv_group;
      T* query = static_cast<T*>(a.query) + row * a.query_row + int64_t{group} * a.query_heads * d;
      for (int head = 0; head < a.query_heads; ++head) {
        head_forward(x + (a.query_offset + head) * d, query + head * d, query_weight, cosine, sine, half, a.eps);
      }
      x += a.group_heads * d;
      T* key = static_cast<T*>(a.key) + row * a.key_value_row + group * d;
      head_forward(x, key, key_weight, cosine, sine, half, a.eps);
      std::memcpy(static_cast<T*>(a.value) + row * a.key_value_row + group * d, x + d, sizeof(T) * d);
    }
  }
}

// One row; the weight gradients of its heads are summed first, so that float32 sums stay short.
template <class T>
MAPE_INLINE void backward_row(const Backward& a, int64_t row, int d, const float* query_weight,
                              const float* key_weight, float* sums) {
  const int half = d / 2;
  float cosine[kMaxHeadDim / 2], sine[kMaxHeadDim / 2], row_sums[2 * kMaxHeadDim] = {};
  row_angles(a, row, half, cosine, sine);
  for (int group = 0; group < a.groups; ++group) {
    const T* x = static_cast<const T*>(a.qkv) + row * a.qkv_row + group * a.qkv_group;
    T* dx = static_cast<T*>(a.d_qkv) + (row * a.groups + group) * (a.group_heads + 2) * d;
    const T* d_query = static_cast<const T*>(a.d_query) + row * a.d_query_row + int64_t{group} * a.query_heads * d;
    for (int head = 0; head < a.group_heads; ++head, x += d, dx += d) {
      if (head < a.query_offset || head >= a.query_offset + a.query_heads) {
        std::memset(dx, 0, sizeof(T) * d);
        continue;
      }
      head_backward(x, d_query + (head - a.query_offset) * d, dx, query_weight, cosine, sine, half, a.eps, row_sums);
    }
    const T* d_key = static_cast<const T*>(a.d_key) + row * a.d_key_value_row + group * d;
    head_backward(x, d_key, dx, key_weight, cosine, sine, half, a.eps, row_sums + d);
    std::memcpy(dx + d, static_cast<const T*>(a.d_value) + row * a.d_key_value_row + group * d, sizeof(T) * d);
  }
  SIMD for (int i = 0; i < 2 * d; ++i) sums[i] += row_sums[i];
}

template <class T, int kDim>
MAPE_INLINE void backward_rows(const Backward& a, int64_t begin, int64_t end) {
  const int d = kDim ? kDim : a.head_dim;
  float query_weight[kMaxHeadDim], key_weight[kMaxHeadDim];
  widen(static_cast<const T*>(a.query_weight), query_weight, d);
  widen(static_cast<const T*>(a.key_weight), key_weight, d);
  for (int64_t partial = begin; partial < end; ++partial) {
    float sums[2 * kMaxHeadDim] = {};
    const int64_t first = partial * kPartialRows;
    const int64_t last = first + kPartialRows < a.rows ? first + kPartialRows : a.rows;
    for (int64_t row = first; row < last; ++row) backward_row<T>(a, row, d, query_weight, key_weight, sums);
    std::memcpy(a.partials + partial * 2 * d, sums, sizeof(float) * 2 * d);
  }
}

template <class T>
void weight_gradients(const Backward& a) {
  const int d = a.head_dim;
  double sums[2 * kMaxHeadDim] = {};
  for (int64_t partial = 0; partial < partial_count(a.rows); ++partial) {
    SIMD for (int i = 0; i < 2 * d; ++i) sums[i] += a.partials[partial * 2 * d + i];
  }
  for (int i = 0; i < d; ++i) {
    static_cast<T*>(a.d_query_weight)[i] = narrow<T>(static_cast<float>(sums[i]));
    static_cast<T*>(a.d_key_weight)[i] = narrow<T>(static_cast<float>(sums[d + i]));
  }
}

// Runs `run` with the element type and the head size, 128, the usual one, being a constant.
template <class Run>
void dispatch(const Inputs& a, const Run& run) {
  const bool usual = a.head_dim == 128;
  switch (a.element) {
    case Element::kFloat32: return usual ? run.template operator()<float, 128>() : run.template operator()<float, 0>();
    case Element::kBFloat16:
      return usual ? run.template operator()<BFloat16, 128>() : run.template operator()<BFloat16, 0>();
    case Element::kFloat16:
      return usual ? run.template operator()<Float16, 128>() : run.template operator()<Float16, 0>();
  }
}

void forward(const Forward& a, int64_t begin, int64_t end) {
  dispatch(a, [&]<class T, int kDim>() { forward_rows<T, kDim>(a, begin, end); });
}

void backward(const Backward& a, int64_t begin, int64_t end) {
  dispatch(a, [&]<class T, int kDim>() { backward_rows<T, kDim>(a, begin, end); });
}

void sum_partials(const Backward& a) {
  dispatch(a, [&]<class T, int kDim>() { weight_gradients<T>(a); });
}
