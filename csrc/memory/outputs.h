// Uninitialised tensors for the results of CPU operators.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstring>
#include <vector>

#include "memory/output_cache.h"

namespace ernet {

// Memory of PyTorch's allocator, without the dispatcher.
inline torch::stable::Tensor allocated_output(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                                              torch::headeronly::ScalarType type, size_t bytes) {
  AtenTensorHandle handle;
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  code, aoti_torch_device_type_cpu(), 0, &handle));
  torch::stable::Tensor tensor(handle);
  if (cpu::map_buffers_poisoned() && bytes > 0) std::memset(tensor.mutable_data_ptr(), 0xff, bytes);
  return tensor;
}

// Without the dispatcher, which takes longer than all of a small image's arithmetic. The memory of large results is
// that of others that were freed (memory/output_cache.h).
inline torch::stable::Tensor cpu_output(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                                        torch::headeronly::ScalarType type, size_t element_size) {
  size_t bytes = element_size;
  for (int64_t size : sizes) bytes *= static_cast<size_t>(size);
  size_t taken = bytes;
  if (void* const buffer = cpu::take_map_buffer(&taken)) {
    const auto give_back = [taken](void* data) { cpu::give_map_buffer(data, taken); };
    return torch::stable::from_blob(buffer, sizes, strides, torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                    type, give_back);
  }
  return allocated_output(sizes, strides, type, bytes);
}

inline torch::stable::Tensor cpu_output(const std::vector<int64_t>& sizes, torch::headeronly::ScalarType type,
                                        size_t element_size) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  return cpu_output(sizes, strides, type, element_size);
}

template <typename A> A* data_of(const torch::stable::Tensor& t) { return static_cast<A*>(t.mutable_data_ptr()); }

}  // namespace ernet
