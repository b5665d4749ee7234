// census: schema and CPU kernel; one row of results for each tensor of a list (ops).
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "ops/census.h"
#include "ops/dtype.h"

namespace mlpkit {
namespace {

using CensusTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

constexpr int64_t kColumns = sizeof(CensusCounts) / sizeof(int64_t);
constexpr int64_t kChunk = 1 << 16;  // elements a thread takes at once

// Adds the census of a later range, which begins at element `offset`.
void merge(CensusResult& total, const CensusResult& part, int64_t offset) {
  CensusCounts& sum = total.counts;
  const CensusCounts& more = part.counts;
  sum.nan += more.nan;
  sum.posinf += more.posinf;
  sum.neginf += more.neginf;
  sum.zero += more.zero;
  sum.subnormal += more.subnormal;
  sum.above_fp16_max += more.above_fp16_max;
  sum.below_fp16_min += more.below_fp16_min;
  if (sum.first < 0 && more.first >= 0) sum.first = offset + more.first;
  total.absmax = std::max(total.absmax, part.absmax);
  if (part.min_nonzero > 0)
    total.min_nonzero = total.min_nonzero > 0 ? std::min(total.min_nonzero, part.min_nonzero) : part.min_nonzero;
  for (int bin = 0; bin < kHistogramBins; ++bin) total.histogram[bin] += part.histogram[bin];
}

}  // namespace

CensusResult census_of(const at::Tensor& tensor, bool histogram) {
  const at::Tensor dense = tensor.contiguous();
  const Dtype dtype = dtype_of("census", "the tensor", dense);
  const int64_t count = dense.numel(), chunks = (count + kChunk - 1) / kChunk;
  const char* data = static_cast<const char*>(dense.const_data_ptr());
  std::vector<CensusResult> parts(chunks);
  at::parallel_for(0, chunks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      cpu::census({dtype, data + i * kChunk * dense.element_size(), std::min(kChunk, count - i * kChunk), histogram,
                   &parts[i]});
  });
  CensusResult total{};
  total.counts.first = -1;
  for (int64_t i = 0; i < chunks; ++i) merge(total, parts[i], i * kChunk);
  return total;
}

namespace {

CensusTensors census_cpu(const at::TensorList tensors, bool histogram) {
  const int64_t rows = static_cast<int64_t>(tensors.size());
  const auto options = at::TensorOptions().device(at::kCPU);
  at::Tensor counts = at::empty({rows, kColumns}, options.dtype(at::kLong));
  at::Tensor extremes = at::empty({rows, 2}, options.dtype(at::kDouble));
  at::Tensor bins = at::empty({rows, histogram ? kHistogramBins : 0}, options.dtype(at::kLong));
  for (int64_t row = 0; row < rows; ++row) {
    const CensusResult result = census_of(tensors[row], histogram);
    std::memcpy(counts.mutable_data_ptr<int64_t>() + row * kColumns, &result.counts, sizeof(CensusCounts));
    double* both = extremes.mutable_data_ptr<double>() + row * 2;
    both[0] = result.absmax;
    both[1] = result.min_nonzero;
    if (histogram)
      std::memcpy(bins.mutable_data_ptr<int64_t>() + row * kHistogramBins, result.histogram, sizeof(result.histogram));
  }
  return {counts, extremes, bins};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mlpkit, m) {
  // counts: int64 [tensors, 8], the fields of CensusCounts; extremes: float64 [tensors, 2], absmax and min_nonzero;
  // bins: int64 [tensors, 64], or [tensors, 0] where no histogram is asked for.
  m.def("census(Tensor[] tensors, bool histogram=False) -> (Tensor counts, Tensor extremes, Tensor bins)");
}

TORCH_LIBRARY_IMPL(mlpkit, CPU, m) { m.impl("census", census_cpu); }

}  // namespace mlpkit
