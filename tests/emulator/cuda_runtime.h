// Enough of CUDA to run kernels on the CPU, so that their logic is tested where there is no GPU. The
// threads of a block are fibers of one thread, which take turns where they wait for each other: at
// barriers and in the functions of a whole warp. Blocks run one after the other.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
inline const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  *device = host;
  return cudaSuccess;
}

namespace emulator {

constexpr size_t kStack = 1 << 17;

struct Barrier {
  int waiting = 0, members = 0, sum[2] = {};
  unsigned generation = 0;
};

struct Warp {
  Barrier barrier;
  uint64_t values[2][32];
};

struct Fiber {
  ucontext_t start;
  jmp_buf at;
  bool started = false, done = false;
  std::unique_ptr<char[]> stack{new char[kStack]};
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barrier;
  std::function<void()> kernel;
  jmp_buf scheduler;
  unsigned current = 0;
};
inline Block* block;
inline dim3 grid, block_index, block_size;

inline void yield() {
  if (!_setjmp(block->fibers[block->current].at)) _longjmp(block->scheduler, 1);
}

// Waits for all members; returns the generation that has ended.
inline unsigned arrive(Barrier& b, int value = 0) {
  const unsigned mine = b.generation;
  b.sum[mine % 2] += value;
  if (++b.waiting == b.members) {
    b.waiting = 0;
    b.sum[(mine + 1) % 2] = 0;
    ++b.generation;
  }
  while (b.generation == mine) yield();
  return mine;
}

inline Warp& warp() { return block->warps[block->current / 32]; }

// The values that all lanes of the warp gave.
inline const uint64_t* exchange(uint64_t value) {
  Warp& w = warp();
  w.values[w.barrier.generation % 2][block->current % 32] = value;
  return w.values[arrive(w.barrier) % 2];
}

template <typename T>
T shuffle(T value, int from) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(bits)[from];
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline void enter() {
  block->kernel();
  block->fibers[block->current].done = true;
  _longjmp(block->scheduler, 1);
}

inline void run_block(Block& b) {
  block = &b;
  for (Fiber& fiber : b.fibers) fiber.started = fiber.done = false;
  b.barrier = Barrier{0, (int)b.fibers.size()};
  for (Warp& w : b.warps) w.barrier = Barrier{0, 32};
  for (bool running = true; running;) {
    running = false;
    for (b.current = 0; b.current < b.fibers.size(); ++b.current) {
      Fiber& fiber = b.fibers[b.current];
      if (fiber.done) continue;
      running = true;
      if (_setjmp(b.scheduler)) continue;
      if (fiber.started) _longjmp(fiber.at, 1);
      fiber.started = true;
      getcontext(&fiber.start);
      fiber.start.uc_stack = {fiber.stack.get(), 0, kStack};
      fiber.start.uc_link = nullptr;
      makecontext(&fiber.start, enter, 0);
      setcontext(&fiber.start);
    }
  }
}

}  // namespace emulator

#define gridDim emulator::grid
#define blockIdx emulator::block_index
#define blockDim emulator::block_size
#define threadIdx (dim3(emulator::block->current, 0, 0))

template <typename... P>
cudaError_t cudaLaunchKernel(void (*kernel)(P...), dim3 grid, dim3 size, void** list, size_t,
                             cudaStream_t) {
  if (size.x % 32 || size.x == 0 || grid.x == 0) return cudaErrorInvalidValue;
  emulator::Block block;
  block.fibers = std::vector<emulator::Fiber>(size.x);
  block.warps.resize(size.x / 32);
  block.kernel = [&] {
    [&]<size_t... i>(std::index_sequence<i...>) {
      kernel(*static_cast<P*>(list[i])...);
    }(std::index_sequence_for<P...>{});
  };
  emulator::grid = grid;
  emulator::block_size = size;
  // Backwards, so that nothing relies on the order of blocks.
  for (unsigned i = grid.x; i-- > 0;) {
    emulator::block_index = dim3(i, 0, 0);
    emulator::run_block(block);
  }
  return cudaSuccess;
}

inline void __syncthreads() { emulator::arrive(emulator::block->barrier); }
inline int __syncthreads_count(int x) {
  emulator::Barrier& b = emulator::block->barrier;
  return b.sum[emulator::arrive(b, x != 0) % 2];
}
template <typename T>
T __shfl_sync(unsigned, T x, int lane) {
  return emulator::shuffle(x, lane);
}
template <typename T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  return emulator::shuffle(x, (int)(emulator::block->current % 32) ^ mask);
}
template <typename T>
T __shfl_up_sync(unsigned, T x, int by) {
  const int lane = (int)(emulator::block->current % 32);
  return emulator::shuffle(x, lane >= by ? lane - by : lane);
}
inline unsigned __ballot_sync(unsigned, int x) {
  const uint64_t* values = emulator::exchange(x != 0);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= (unsigned)values[lane] << lane;
  return bits;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }

template <typename T>
T atomicAdd(T* at, std::type_identity_t<T> x) {
  return std::exchange(*at, *at + x);
}
template <typename T>
T atomicOr(T* at, std::type_identity_t<T> x) {
  return std::exchange(*at, *at | x);
}
template <typename T>
T atomicMin(T* at, std::type_identity_t<T> x) {
  return std::exchange(*at, std::min(*at, x));
}
template <typename T>
T atomicCAS(T* at, std::type_identity_t<T> old, std::type_identity_t<T> x) {
  return *at == old ? std::exchange(*at, x) : *at;
}
