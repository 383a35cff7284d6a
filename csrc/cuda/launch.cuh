// How kernels are launched and what ties them: a kernel may begin before those in front of it have
// ended (programmatic dependent launch), and blocks may form clusters.
#pragma once

#include <cuda_runtime.h>

#include "barrier.cuh"

namespace stof {

// Waits for the kernels in front of this one, where it was launched before they ended.
__device__ __forceinline__ void await_kernels_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel be launched once every block has come here or ended.
__device__ __forceinline__ void launch_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Blocks of the cluster that this one is part of.
__device__ __forceinline__ int blocks_of_cluster() {
#if __CUDA_ARCH__ >= 900
  int n;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(n));
  return n;
#else
  return 1;
#endif
}

// A barrier of all threads of a cluster, after which their barriers are ready (fence_barrier_init) and what
// they have read may be overwritten. It does not show what they wrote: a release would wait until the whole
// GPU sees that.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Writes to where `x` and `y` lie in another block's shared memory; the barrier there counts the bytes.
__device__ __forceinline__ void send(const float4* x, const float2* y, const uint64_t* barrier, int block, float4 a,
                                     float2 b) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .b32 x, y, barrier;\n"
      "mapa.shared::cluster.u32 x, %0, %3;\n"
      "mapa.shared::cluster.u32 y, %1, %3;\n"
      "mapa.shared::cluster.u32 barrier, %2, %3;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [x], {%4, %5, %6, %7}, [barrier];\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [y], {%8, %9}, [barrier];\n"
      "}\n" ::"r"(shared_address(x)),
      "r"(shared_address(y)), "r"(shared_address(barrier)), "r"(block), "f"(a.x), "f"(a.y), "f"(a.z), "f"(a.w),
      "f"(b.x), "f"(b.y)
      : "memory");
#endif
}

__device__ __forceinline__ void send(const float4* x, const uint64_t* barrier, int block, float4 a) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .b32 x, barrier;\n"
      "mapa.shared::cluster.u32 x, %0, %2;\n"
      "mapa.shared::cluster.u32 barrier, %1, %2;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [x], {%3, %4, %5, %6}, [barrier];\n"
      "}\n" ::"r"(shared_address(x)),
      "r"(shared_address(barrier)), "r"(block), "f"(a.x), "f"(a.y), "f"(a.z), "f"(a.w)
      : "memory");
#endif
}

// Makes a kernel ready on a device once, and says how it is launched.
class Launcher {
 public:
  template <typename... A>
  cudaError_t prepare(void (*kernel)(A...), int64_t device, int bytes) {
    if (device < kDevices && ready_[device]) return cudaSuccess;
    cudaFuncAttributes attributes;
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess) return error;
    // Code made for an older architecture does not wait for the kernels in front of it.
    hopper_ = attributes.ptxVersion >= 90;
    if (device < kDevices) ready_[device] = true;
    return cudaSuccess;
  }

  // Whether the kernel may use what Hopper brought.
  bool is_hopper() const { return hopper_; }

  // cluster: blocks along x that form one.
  template <typename... A>
  cudaError_t launch(void (*kernel)(A...), dim3 grid, int threads, int bytes, int cluster, cudaStream_t stream,
                     const A&... given) {
    cudaLaunchAttribute attributes[2];
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = (unsigned)cluster;
    attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3((unsigned)threads);
    config.dynamicSmemBytes = (size_t)bytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = hopper_ ? 1 + (cluster > 1) : 0;
    return cudaLaunchKernelEx(&config, kernel, given...);
  }

 private:
  static constexpr int kDevices = 64;
  bool ready_[kDevices] = {}, hopper_ = false;
};

}  // namespace stof
