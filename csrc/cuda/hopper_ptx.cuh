// Hopper instructions that CUDA C++ has no names for: barriers, bulk copies, warpgroup products.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "barrier.cuh"
#include "fragments.cuh"
#include "maps.cuh"

namespace stof {

__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

template <int N>
__device__ __forceinline__ void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ __forceinline__ void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void store_box(const CUtensorMap* map, const void* from, int column, int row,
                                          int head, int batch) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
               "r"(shared_address(from)), "r"(column), "r"(row), "r"(head), "r"(batch)
               : "memory");
}

// Waits until the boxes that this thread stores have been read from shared memory, but for those of the last
// `Pending` such calls.
template <int Pending = 0>
__device__ __forceinline__ void wait_boxes_read() {
  asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}

__device__ __forceinline__ void load_bytes(void* to, const void* from, int bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// Keeps the compiler from moving accesses to accumulators over a wait.
template <int N>
__device__ __forceinline__ void pin(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

// Descriptor of a tile in shared memory whose rows of 128 bytes are swizzled in groups of 8 rows.
// far: bytes from one chunk of 64 columns to the next, where a transposed operand has several.
__device__ __forceinline__ uint64_t tile_descriptor(const void* tile, int far) {
  const uint64_t address = (shared_address(tile) & 0x3ffff) >> 4;
  return address | (uint64_t)(far >> 4) << 16 | (uint64_t)(1024 >> 4) << 32 | 1ull << 62;
}

// Four 8 x 8 matrices of 2-byte elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&x)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row)));
}

__device__ __forceinline__ void store_matrices(void* row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(a),
               "r"(b), "r"(c), "r"(d)
               : "memory");
}

// A warp's 16 rows of accumulators, `first` on, into chunks of 64 columns as the copy engine stores them.
template <typename T, int N, int Chunks>
__device__ __forceinline__ void write_rows(T (&to)[Chunks][64][64], int first, const float (&x)[N]) {
  static_assert(N == 32 * Chunks);
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
    const float* y = x + 8 * j;
    store_matrices(&to[j / 4][first + lane % 16][((j % 4 * 2 + lane / 16) ^ (lane % 8)) * 8], pack<T>(y[0], y[1]),
                   pack<T>(y[2], y[3]), pack<T>(y[4], y[5]), pack<T>(y[6], y[7]));
  }
}

#define STOF_ACC8(d, i)                                                                              \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]),        \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define STOF_ACC32(d, i) STOF_ACC8(d, i), STOF_ACC8(d, i + 8), STOF_ACC8(d, i + 16), STOF_ACC8(d, i + 24)
#define STOF_LIST8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define STOF_LIST32                                                                                  \
  STOF_LIST8                                                                                         \
  ", %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, "  \
  "%27, %28, %29, %30, %31"
#define STOF_LIST64                                                                                  \
  STOF_LIST32                                                                                        \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "     \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define STOF_LIST96                                                                                  \
  STOF_LIST64                                                                                        \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, "     \
  "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"

// d[64 x 2 M] (+)= a b^T, 16 columns deep; both in shared memory, columns contiguous. Transposed: b's rows are.
template <typename T, bool Transposed = false, int M>
__device__ __forceinline__ void product_ss(float (&d)[M], uint64_t a, uint64_t b, bool add) {
#define STOF_SS(n, type, list, ia, ib, iadd, itrans, ...)                                            \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " iadd ", 0;\n"                                     \
               "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" list              \
               "}, " ia ", " ib ", p, 1, 1, 0, " itrans ";\n}\n"                                     \
               : __VA_ARGS__                                                                         \
               : "l"(a), "l"(b), "r"((int)add), "n"((int)Transposed))
#define STOF_SS_OF(type)                                                                             \
  if constexpr (M == 8)                                                                              \
    STOF_SS("16", type, STOF_LIST8, "%8", "%9", "%10", "%11", STOF_ACC8(d, 0));                      \
  else if constexpr (M == 32)                                                                        \
    STOF_SS("64", type, STOF_LIST32, "%32", "%33", "%34", "%35", STOF_ACC32(d, 0));                  \
  else if constexpr (M == 64)                                                                        \
    STOF_SS("128", type, STOF_LIST64, "%64", "%65", "%66", "%67", STOF_ACC32(d, 0),                  \
            STOF_ACC32(d, 32));                                                                      \
  else                                                                                               \
    STOF_SS("192", type, STOF_LIST96, "%96", "%97", "%98", "%99", STOF_ACC32(d, 0),                  \
            STOF_ACC32(d, 32), STOF_ACC32(d, 64));
  static_assert(M == 8 || M == 32 || M == 64 || M == 96);
  if constexpr (std::is_same_v<T, __half>) {
    STOF_SS_OF("f16");
  } else {
    STOF_SS_OF("bf16");
  }
#undef STOF_SS_OF
#undef STOF_SS
}

// The same with a in registers.
template <typename T>
__device__ __forceinline__ void product_rs(float (&d)[32], const uint32_t* a, uint64_t b, bool add) {
#define STOF_RS(type)                                                                                \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                                          \
               "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" STOF_LIST32          \
               "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}\n"                                      \
               : STOF_ACC32(d, 0)                                                                    \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add))
  if constexpr (std::is_same_v<T, __half>)
    STOF_RS("f16");
  else
    STOF_RS("bf16");
#undef STOF_RS
}

// d[64 x N] += a b, 16 rows of b deep; a in registers, b in shared memory with contiguous columns.
template <typename T, int N>
__device__ __forceinline__ void product_rs(float (&d)[N / 2], const uint32_t* a, uint64_t b) {
#define STOF_RS(n, type, list, a0, a1, a2, a3, at, ...)                                              \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" list              \
               "}, {" a0 ", " a1 ", " a2 ", " a3 "}, " at ", 1, 1, 1, 1;\n"                          \
               : __VA_ARGS__                                                                         \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
  if constexpr (N == 64) {
    if constexpr (std::is_same_v<T, __half>)
      STOF_RS("64", "f16", STOF_LIST32, "%32", "%33", "%34", "%35", "%36", STOF_ACC32(d, 0));
    else
      STOF_RS("64", "bf16", STOF_LIST32, "%32", "%33", "%34", "%35", "%36", STOF_ACC32(d, 0));
  } else {
    static_assert(N == 128);
    if constexpr (std::is_same_v<T, __half>)
      STOF_RS("128", "f16", STOF_LIST64, "%64", "%65", "%66", "%67", "%68", STOF_ACC32(d, 0),
              STOF_ACC32(d, 32));
    else
      STOF_RS("128", "bf16", STOF_LIST64, "%64", "%65", "%66", "%67", "%68", STOF_ACC32(d, 0),
              STOF_ACC32(d, 32));
  }
#undef STOF_RS
}

}  // namespace stof
