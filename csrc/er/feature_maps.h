// Feature maps and per-channel vectors as the ER operators take and return them: checks, layouts, memory.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "er/cache_shares.h"
#include "er/channel_vectors.h"
#include "er/kernels.h"
#include "er/streaming.h"
#include "memory/outputs.h"

namespace ernet {

using cpu::MapShape;
using cpu::Storage;

constexpr int64_t kGrainElements = 32768;  // below this, a second thread costs more than it brings

inline Storage storage_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Storage::f32;
    case ScalarType::Double: return Storage::f64;
    case ScalarType::BFloat16: return Storage::bf16;
    case ScalarType::Half: return Storage::f16;
    default: STD_TORCH_CHECK(false, "ernet: ", name, " must be float32, float64, bfloat16 or float16");
  }
  return Storage::f32;
}

inline ScalarType acc_type(Storage storage) { return storage == Storage::f64 ? ScalarType::Double : ScalarType::Float; }

inline bool is_channels_last(const Tensor& t) {
  int64_t stride = 1;
  for (int64_t d : {1, 3, 2, 0}) {
    if (t.size(d) != 1 && t.stride(d) != stride) return false;
    stride *= t.size(d);
  }
  return true;
}

// True if memory runs [N][C][H][W]; the layouts coincide where C or H * W is 1. Empty tensors are of any layout.
inline bool is_planar(const Tensor& t) { return t.is_contiguous() || t.numel() == 0; }

// Maps of one operator have one shape, dtype, device and one dense layout.
struct MapChecker {
  const Tensor& first;
  bool planar, channels_last;

  MapChecker(const Tensor& map, const char* name) : first(map) {
    STD_TORCH_CHECK(map.dim() == 4, "ernet: ", name, " must have 4 dimensions [N, C, H, W]; got ", shape_text(map));
    STD_TORCH_CHECK(map.is_cpu(), "ernet: ", name, " must be on the CPU here");
    planar = is_planar(map);
    channels_last = map.numel() == 0 || is_channels_last(map);
  }

  void add(const Tensor& map, const char* name) {
    STD_TORCH_CHECK(sizes_of(map) == sizes_of(first), "ernet: all maps must have one shape; ", name, " has ",
                    shape_text(map), ", expected ", shape_text(first));
    STD_TORCH_CHECK(map.scalar_type() == first.scalar_type(), "ernet: all maps must have one dtype; ", name,
                    " differs");
    STD_TORCH_CHECK(map.is_cpu(), "ernet: all maps must be on one device; ", name, " is not on the CPU");
    planar = planar && is_planar(map);
    channels_last = channels_last && (map.numel() == 0 || is_channels_last(map));
  }

  MapShape shape(bool per_sample) const {
    STD_TORCH_CHECK(planar || channels_last,
                    "ernet: all maps must be dense in one layout, contiguous or channels-last. Call .contiguous() or "
                    ".contiguous(memory_format=torch.channels_last) on the others");
    const int64_t pixels = first.size(2) * first.size(3);
    const bool by_pixel = channels_last && (!planar || pixels == 1);  // runs of channels, where both describe the map
    return {first.size(0), first.size(1), pixels, by_pixel, per_sample};
  }
};

inline MapChecker checked_maps(const std::vector<Tensor>& maps) {
  STD_TORCH_CHECK(!maps.empty(), "ernet: maps must hold at least one map");
  MapChecker checker(maps[0], "maps[0]");
  for (size_t i = 1; i < maps.size(); ++i) checker.add(maps[i], ("maps[" + std::to_string(i) + "]").c_str());
  return checker;
}

// Checks a coefficient tensor against `sizes` and returns its data.
inline const void* coefficients(const Tensor& t, const char* name, const std::vector<int64_t>& sizes, Storage storage) {
  check_vector(t, name, sizes);
  STD_TORCH_CHECK(
      t.scalar_type() == acc_type(storage), "ernet: ", name, " must be ",
      storage == Storage::f64 ? "float64 for float64 maps" : "float32 for float32, bfloat16 and float16 maps");
  return t.const_data_ptr();
}

inline std::vector<int64_t> channel_sizes(const MapShape& s) {
  return s.per_sample ? std::vector<int64_t>{s.N, s.C} : std::vector<int64_t>{s.C};
}

inline std::vector<const void*> pointers(const std::vector<Tensor>& maps) {
  std::vector<const void*> result;
  result.reserve(maps.size());
  for (const Tensor& map : maps) result.push_back(map.const_data_ptr());
  return result;
}

inline int64_t grain(const MapShape& shape, int64_t num_maps, bool reduction) {
  const int64_t items = kGrainElements / (cpu::item_elements(shape, reduction) * (num_maps > 0 ? num_maps : 1));
  return items > 0 ? items : 1;
}

inline Tensor like_channels(const Tensor& map, const std::vector<int64_t>& sizes, Storage storage) {
  return torch::stable::new_empty(map, sizes, acc_type(storage));
}

// An uninitialised map like `map`, which is dense. The memory of large ones is that of others that were freed.
inline Tensor empty_map_like(const Tensor& map) {
  size_t bytes = static_cast<size_t>(map.numel()) * static_cast<size_t>(map.element_size());
  void* const buffer = cpu::take_map_buffer(&bytes);
  if (buffer == nullptr) return torch::stable::empty_like(map);
  const auto give_back = [bytes](void* data) { cpu::give_map_buffer(data, bytes); };
  return torch::stable::from_blob(buffer, map.sizes(), map.strides(), map.device(), map.scalar_type(), give_back);
}

// True if an output like `map` is to be written with non-temporal stores.
inline bool streams(const Tensor& map) {
  const int64_t bytes = map.numel() * static_cast<int64_t>(map.element_size());
  return bytes >= cache_sizes().second && bytes >= cpu::streaming().stores;  // only large maps have the machine probed
}

}  // namespace ernet
