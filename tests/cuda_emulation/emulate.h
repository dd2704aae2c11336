// Runs CUDA kernels on the CPU, every lane a coroutine, so that their logic is tested where there is no GPU.
//
// Blocks run one after another.  A lane runs until it waits at a barrier or a shuffle; lanes named in a shuffle's mask
// must all come, a deadlock, a lane outside its own mask or a write past the shared memory aborts, a misaligned access
// traps (compiled so by build.py).  Timing, memory ordering and the hardware's rounding of rsqrt are not emulated.
#pragma once

#include <cuda_runtime.h>
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#undef __device__
#undef __forceinline__
#undef __global__
#undef __host__
#undef __launch_bounds__
#undef __shared__
#define __device__
#define __forceinline__ inline
#define __global__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static

namespace emulation {

struct Index {
  unsigned x, y;
};
struct Lane {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(65536);
  Index index;
  bool done = false;
};
struct Barrier {
  int arrived = 0;
  long generation = 0;
};

inline Index thread, block;
inline std::vector<std::unique_ptr<Lane>> lanes;
inline Lane* current;
inline ucontext_t scheduler;
inline std::map<std::pair<unsigned, unsigned>, Barrier> barriers;  // by warp and mask
inline Barrier block_barrier;
inline std::vector<float4> shared;
inline float slots[1024];
inline std::function<void()> kernel;
inline unsigned width;
inline std::mutex one_launch;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulation: block %u thread %u,%u: %s\n", block.x, thread.x, thread.y, what);
  std::abort();
}
inline unsigned linear() { return thread.y * width + thread.x; }
inline void leave() { swapcontext(&current->context, &scheduler); }
inline void wait(Barrier& barrier, int count) {
  const long generation = barrier.generation;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  while (barrier.generation == generation) leave();
}
inline void enter() {
  kernel();
  current->done = true;
  leave();
}

inline void run_block(unsigned threads) {
  lanes.clear();
  barriers.clear();
  block_barrier = {};
  for (unsigned i = 0; i < threads; ++i) {
    auto lane = std::make_unique<Lane>();
    lane->index = {i % width, i / width};
    getcontext(&lane->context);
    lane->context.uc_stack.ss_sp = lane->stack.data();
    lane->context.uc_stack.ss_size = lane->stack.size();
    makecontext(&lane->context, enter, 0);
    lanes.push_back(std::move(lane));
  }
  unsigned running = threads;
  for (long rounds = 0; running > 0; ++rounds) {
    if (rounds > 1000000) fail("deadlock");
    for (auto& lane : lanes) {
      if (lane->done) continue;
      current = lane.get();
      thread = lane->index;
      swapcontext(&scheduler, &lane->context);
      running -= lane->done;
    }
  }
}

inline void launch(unsigned blocks, dim3 threads, size_t shared_bytes, std::function<void()> body) {
  const std::lock_guard lock(one_launch);
  kernel = std::move(body);
  width = threads.x;
  for (block = {0, 0}; block.x < blocks; ++block.x) {
    shared.assign(shared_bytes / sizeof(float4) + 1, float4{NAN, NAN, NAN, NAN});  // with a guard behind it
    run_block(threads.x * threads.y);
    if (!std::isnan(shared.back().x)) fail("write past the shared memory");
  }
}

}  // namespace emulation

#define threadIdx emulation::thread
#define blockIdx emulation::block

inline void __syncthreads() { emulation::wait(emulation::block_barrier, static_cast<int>(emulation::lanes.size())); }
inline void __syncwarp() { emulation::wait(emulation::barriers[{emulation::linear() / 32, 0}], 32); }
inline float __shfl_xor_sync(unsigned mask, float x, int offset) {
  const unsigned me = emulation::linear(), from = me ^ static_cast<unsigned>(offset);
  if (!(mask >> me % 32 & 1u) || !(mask >> from % 32 & 1u)) emulation::fail("lane outside its mask");
  emulation::Barrier& barrier = emulation::barriers[{me / 32, mask}];
  const int count = __builtin_popcount(mask);
  emulation::slots[me] = x;
  emulation::wait(barrier, count);
  const float y = emulation::slots[from];
  emulation::wait(barrier, count);
  return y;
}
template <class Words>
Words __ldcs(const Words* from) {
  return *from;
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
extern "C" {
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
}
