// Memory for the time of a call, from what is kept of freed outputs where it is large.
#pragma once

#include <stdlib.h>

#include <new>

#include "memory/output_cache.h"

namespace ernet::cpu {

class Scratch {
 public:
  Scratch() = default;
  // `bytes` of undefined memory, in place of what was there before.
  void* take(size_t bytes) {
    give();
    bytes_ = bytes;
    data_ = kept_ = take_map_buffer(&bytes_);
    if (kept_ == nullptr) data_ = malloc(bytes);
    if (data_ == nullptr) throw std::bad_alloc();
    return data_;
  }
  ~Scratch() { give(); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

 private:
  void give() {
    kept_ != nullptr ? give_map_buffer(kept_, bytes_) : free(data_);
    data_ = kept_ = nullptr;
  }

  void *data_ = nullptr, *kept_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace ernet::cpu
