// The kernels as a torch op, on torch's stable ABI: one build serves torch 2.11 and later, with and
// without CUDA. It knows no kernel, only the C function that every kernel library exports
// (problem.h); nothing here needs CUDA's compiler or headers.
//
// A call costs microseconds and the kernels not many more, so arguments are taken from the stack as
// they are, instead of through torch::stable::Tensor, which allocates for each.
#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <string>
#include <utility>

#include "problem.h"

extern "C" {
// Weak: the CPU build of torch does not have them.
__attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                        void** stream);
__attribute__((weak)) AOTITorchError aoti_torch_cuda_caching_allocator_raw_alloc(uint64_t bytes,
                                                                                 void** memory);
__attribute__((weak)) AOTITorchError aoti_torch_cuda_caching_allocator_raw_delete(void* memory);
// Weak: torch 2.13 and later have it.
__attribute__((weak)) const char* torch_exception_get_what_without_backtrace();
}

namespace {

using Run = const char* (*)(const stof::Problem*, void* stream);

// The stable ABI loses the type of an exception. Callers that retry with a smaller batch look for
// the words "CUDA out of memory.", which torch's own message has and ours must have.
constexpr const char* kAllocate = "allocate memory: CUDA out of memory.";

void check(AOTITorchError error, const char* what) {
  if (error == AOTI_TORCH_SUCCESS) return;
  if (torch_exception_get_what_without_backtrace)
    throw std::runtime_error(torch_exception_get_what_without_backtrace());
  throw std::runtime_error(std::string("stof_cuda::run: torch could not ") + what);
}

class Tensor {
 public:
  explicit Tensor(AtenTensorHandle handle = nullptr) : handle_(handle) {}
  Tensor(Tensor&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }
  static Tensor empty(int64_t dims, const int64_t* sizes, int32_t dtype, int32_t device_type,
                      int32_t device) {
    int64_t strides[4];
    for (int64_t i = dims - 1, stride = 1; i >= 0; stride *= sizes[i--]) strides[i] = stride;
    AtenTensorHandle handle = nullptr;
    check(aoti_torch_empty_strided(dims, sizes, strides, dtype, device_type, device, &handle),
          kAllocate);
    return Tensor(handle);
  }
  void* data() const {
    void* pointer = nullptr;
    check(aoti_torch_get_data_ptr(handle_, &pointer), "give a tensor's address");
    return pointer;
  }
  const void* const_data() const {
    const void* pointer = nullptr;
    if (handle_) check(torch_get_const_data_ptr(handle_, &pointer), "give a tensor's address");
    return pointer;
  }
  AtenTensorHandle get() const { return handle_; }
  StableIValue release() { return torch::stable::detail::from(std::exchange(handle_, nullptr)); }
  StableIValue release_optional() {
    std::optional<AtenTensorHandle> given;
    if (handle_) given = std::exchange(handle_, nullptr);
    return torch::stable::detail::from(given);
  }

 private:
  AtenTensorHandle handle_;
};

Tensor take(StableIValue value) {
  return Tensor(torch::stable::detail::to<AtenTensorHandle>(value));
}

Tensor take_optional(StableIValue value) {
  return Tensor(
      torch::stable::detail::to<std::optional<AtenTensorHandle>>(value).value_or(nullptr));
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t device) {
    int32_t current = -1;
    check(aoti_torch_get_current_device_index(&current), "name the current device");
    if (current != device)
      check(aoti_torch_create_device_guard(device, &guard_), "change the device");
  }
  DeviceGuard(const DeviceGuard&) = delete;
  ~DeviceGuard() {
    if (guard_) aoti_torch_delete_device_guard(guard_);
  }

 private:
  DeviceGuardHandle guard_ = nullptr;
};

// From the caching allocator of the current device, for work on the current stream.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) {
    if (bytes > 0)
      check(aoti_torch_cuda_caching_allocator_raw_alloc((uint64_t)bytes, &memory_), kAllocate);
  }
  Workspace(const Workspace&) = delete;
  ~Workspace() {
    if (memory_) aoti_torch_cuda_caching_allocator_raw_delete(memory_);
  }
  float* data() const { return static_cast<float*>(memory_); }

 private:
  void* memory_ = nullptr;
};

// Takes the arguments from the stack and leaves the results there.
void run(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor query = take(stack[0]), key = take(stack[1]), value = take(stack[2]);
  const Tensor kv_valid = take_optional(stack[3]), bias = take_optional(stack[4]),
               sinks = take_optional(stack[5]), row_start = take_optional(stack[6]),
               col_start = take_optional(stack[7]);
  const auto function = reinterpret_cast<Run>(stack[8]);
  stof::Problem problem = *reinterpret_cast<const stof::Problem*>(stack[9]);

  int32_t dtype = 0, type = 0, device = 0;
  check(aoti_torch_get_dtype(query.get(), &dtype), "name a dtype");
  check(aoti_torch_get_device_type(query.get(), &type), "name a device");
  check(aoti_torch_get_device_index(query.get(), &device), "name a device");
  const DeviceGuard guard(device);
  const int64_t out_sizes[] = {problem.batch, problem.q_len, problem.heads, problem.value_dim};
  const int64_t lse_sizes[] = {problem.batch, problem.heads, problem.q_len};
  Tensor out = Tensor::empty(4, out_sizes, dtype, type, device);
  Tensor lse;
  if (problem.with_lse) lse = Tensor::empty(3, lse_sizes, aoti_torch_dtype_float32(), type, device);
  const Workspace workspace(problem.workspace_bytes);
  void* stream = nullptr;
  check(aoti_torch_get_current_cuda_stream(device, &stream), "name the current stream");

  problem.query = query.const_data();
  problem.key = key.const_data();
  problem.value = value.const_data();
  problem.out = out.data();
  problem.lse = problem.with_lse ? static_cast<float*>(lse.data()) : nullptr;
  problem.workspace = workspace.data();
  problem.kv_valid = static_cast<const uint64_t*>(kv_valid.const_data());
  problem.bias = bias.const_data();
  problem.sinks = static_cast<const float*>(sinks.const_data());
  problem.row_start = static_cast<const int64_t*>(row_start.const_data());
  problem.col_start = static_cast<const int64_t*>(col_start.const_data());
  if (const char* message = function(&problem, stream)) throw std::runtime_error(message);
  stack[0] = out.release();
  stack[1] = lse.release_optional();
}

}  // namespace

STABLE_TORCH_LIBRARY(stof_cuda, library) {
  library.def(
      "run(Tensor query, Tensor key, Tensor value, Tensor? kv_valid, Tensor? bias, Tensor? sinks, "
      "Tensor? row_start, Tensor? col_start, int function, int problem) -> (Tensor, Tensor?)");
}

STABLE_TORCH_LIBRARY_IMPL(stof_cuda, CUDA, library) { library.impl("run", run); }
