// How kernels are launched and what ties them: a kernel may begin before those in front of it have
// ended (programmatic dependent launch), and blocks may form clusters.
#pragma once

#include <cuda_runtime.h>

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

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// What lies at an address of this block's shared memory, in that of another block of the cluster.
__device__ __forceinline__ uint32_t cluster_address(uint32_t own, int block) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(own), "r"(block));
  return there;
}

__device__ __forceinline__ float2 load_cluster2(uint32_t own, int block) {
  float2 x;
  asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];"
               : "=f"(x.x), "=f"(x.y)
               : "r"(cluster_address(own, block))
               : "memory");
  return x;
}

__device__ __forceinline__ float4 load_cluster4(uint32_t own, int block) {
  float4 x;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(cluster_address(own, block))
               : "memory");
  return x;
}
#endif

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
    // Clusters of more than 8 blocks, where the GPU allows them.
    if (hopper_) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
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
