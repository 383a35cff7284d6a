// The copy engine of Hopper and later: descriptions of tensors, and boxes of them.
#pragma once

#include <cuda.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "barrier.cuh"
#include "problem.h"

namespace stof {

// Barrier inits, or shared memory that ordinary stores wrote, before the copy engine uses them.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// One box of a tensor [batch, head, row, column].
__device__ __forceinline__ void load_box(void* to, const CUtensorMap* map, uint64_t* barrier, int column,
                                         int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

// The same for several blocks of a cluster, those of `mask`: each gets it where `to` lies, and its barrier
// where `barrier` does.
__device__ __forceinline__ void load_box_to_all(void* to, const CUtensorMap* map, uint64_t* barrier, int column, int row,
                                                int head, int batch, int mask) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(head), "r"(batch), "h"((uint16_t)mask)
      : "memory");
}

using Encode = decltype(&cuTensorMapEncodeTiled);

inline Encode find_encode() {
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result) !=
        cudaSuccess)
      found = nullptr;
    return reinterpret_cast<Encode>(found);
  }();
  return encode;
}

constexpr const char* kNoEncode = "the CUDA driver has no cuTensorMapEncodeTiled: it is older than CUDA 12";
constexpr const char* kNoMap =
    "query, key or value cannot be described to the copy engine: strides must be multiples of 16 bytes";

// A map of [batch, head, row, column] whose boxes are box_rows x Columns elements, swizzled by the bytes of a row.
// Promotion to 256 bytes costs what only streams 8 % of device memory's throughput, sparse masks up to 10 %.
template <typename T, int Columns = 64>
bool make_map(CUtensorMap& map, Encode encode, const void* data, const Strides3& strides, int64_t columns,
              int64_t rows, int64_t heads, int64_t batch, int box_rows) {
  const auto type = std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const cuuint64_t sizes[4] = {(cuuint64_t)columns, (cuuint64_t)rows, (cuuint64_t)heads, (cuuint64_t)batch};
  auto bytes = [](int64_t stride, int64_t size) { return size == 1 ? 16 : (cuuint64_t)stride * sizeof(T); };
  const cuuint64_t far[3] = {bytes(strides.row, rows), bytes(strides.head, heads), bytes(strides.batch, batch)};
  const cuuint32_t box[4] = {Columns, (cuuint32_t)box_rows, 1, 1}, one[4] = {1, 1, 1, 1};
  static_assert(Columns == 64 || Columns == 32);
  const auto swizzle = Columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  return encode(&map, type, 4, const_cast<void*>(data), sizes, far, box, one, CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace stof
