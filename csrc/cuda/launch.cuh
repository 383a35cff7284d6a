// Programmatic dependent launch: a kernel may begin before those in front of it have ended.
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
    early_ = attributes.ptxVersion >= 90;
    if (device < kDevices) ready_[device] = true;
    return cudaSuccess;
  }

  template <typename... A>
  cudaError_t launch(void (*kernel)(A...), dim3 grid, int threads, int bytes, cudaStream_t stream, const A&... given) {
    cudaLaunchAttribute early;
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3((unsigned)threads);
    config.dynamicSmemBytes = (size_t)bytes;
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = early_;
    return cudaLaunchKernelEx(&config, kernel, given...);
  }

 private:
  static constexpr int kDevices = 64;
  bool ready_[kDevices] = {}, early_ = false;
};

}  // namespace stof
