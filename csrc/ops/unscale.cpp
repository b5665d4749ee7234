// unscale: chunks of all gradients side by side (ops).
#include "ops/unscale.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <limits>

#include "cpu/guarded_update.h"
#include "ops/dtype.h"

namespace mlpkit {
namespace {

constexpr int64_t kChunk = 1 << 15;  // elements of one gradient that a thread takes at once

struct Chunk {
  size_t gradient;
  int64_t begin, count;
};

double largest_of(const RangeCensus& part) {
  return part.first >= 0 ? std::numeric_limits<double>::infinity() : part.absmax;
}

}  // namespace

bool can_unscale(const at::Tensor& gradient) {
  const at::ScalarType dtype = gradient.scalar_type();
  const bool known = dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kDouble;
  return known && gradient.is_cpu() && gradient.layout() == at::kStrided && gradient.is_non_overlapping_and_dense() &&
         !gradient.is_neg() && !gradient.unsafeGetTensorImpl()->is_python_dispatch();
}

std::vector<double> unscale(const std::vector<at::Tensor>& gradients, float factor) {
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < gradients.size(); ++i) {
    const int64_t count = gradients[i].numel();
    for (int64_t begin = 0; begin < count; begin += kChunk)
      chunks.push_back({i, begin, std::min(kChunk, count - begin)});
  }
  if (factor != 1)
    for (const at::Tensor& gradient : gradients) gradient.unsafeGetTensorImpl()->mutable_data();  // a lazy copy ends
  std::vector<double> parts(chunks.size());
  const auto work = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Chunk& chunk = chunks[i];
      const at::Tensor& gradient = gradients[chunk.gradient];
      const char* data = static_cast<const char*>(gradient.const_data_ptr());
      RangeCensus found;
      CensusOfRange args{dtype_of("unscale", "a gradient", gradient), data + chunk.begin * gradient.element_size(),
                         chunk.count, 1.0, &found};
      if (factor != 1) {
        args.to = const_cast<void*>(args.data);
        args.factor = factor;
      }
      cpu::census_of_range(args);
      parts[i] = largest_of(found);
    }
  };
  if (chunks.size() < 4)
    work(0, static_cast<int64_t>(chunks.size()));
  else
    at::parallel_for(0, static_cast<int64_t>(chunks.size()), 2, work);
  std::vector<double> largest(gradients.size(), 0);
  for (size_t i = 0; i < chunks.size(); ++i)
    largest[chunks[i].gradient] = std::max(largest[chunks[i].gradient], parts[i]);
  for (const at::Tensor& gradient : gradients)
    if (factor != 1 && !gradient.is_inference()) gradient.unsafeGetTensorImpl()->bump_version();
  return largest;
}

}  // namespace mlpkit
