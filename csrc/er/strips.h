// All passes and the algebra of an operator strip of channels by strip of channels, or over whole maps.
#pragma once

#include <algorithm>

#include "er/channel_vectors.h"
#include "er/passes.h"

namespace ernet {

// Runs `steps` for every strip, or for whole maps: null. Fewer strips than threads would leave some without work.
template <typename Steps>
void over_strips(const MapShape& shape, int64_t num_maps, int64_t element_size, const Steps& steps) {
  const int64_t width = cpu::strip_channels(shape, num_maps, element_size);
  const int64_t strips = (shape.C + width - 1) / width;
  if (strips < std::max<int64_t>(2, torch::stable::get_num_threads())) return steps(nullptr);
  const int64_t elements = width * shape.N * shape.P * num_maps;
  torch::stable::parallel_for(0, strips, std::max<int64_t>(1, kGrainElements / elements),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t i = begin; i < end; ++i) {
                                  const Strip strip{i * width, std::min(shape.C, (i + 1) * width)};
                                  steps(&strip);
                                }
                              });
}

template <typename Pass>
void over(const Strip* strip, const Pass& pass) {
  strip == nullptr ? pass.whole() : pass.strip(*strip);
}

// work(begin, end) on the C-vectors of the strip; on all of them by several threads where `rows` values a channel pay.
template <typename Work>
void over_vectors(const Strip* strip, int64_t channels, int64_t rows, const Work& work) {
  strip == nullptr ? over_channels(channels, rows, work) : work(strip->begin, strip->end);
}

}  // namespace ernet
