// census on a CUDA device: all tensors of a list in one launch, 128 at most; nothing waits for it (ops).
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "cuda/census.h"
#include "ops/cuda_kernels.h"
#include "ops/dtype.h"

namespace mlpkit {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> census_cuda(const at::TensorList tensors, bool histogram) {
  TORCH_CHECK_NOT_IMPLEMENTED(cuda_kernels() == CudaKernels::all,
                              "census: the CUDA kernel waits for its proof on a device; MLPKIT_CUDA_KERNELS=all takes "
                              "it, or move the tensors to the CPU");
  const at::Device device = tensors[0].device();
  const c10::cuda::CUDAGuard guard(device);
  const at::AutoDispatchBelowADInplaceOrView below;
  const int64_t rows = static_cast<int64_t>(tensors.size());
  const auto options = at::TensorOptions().device(device);
  at::Tensor counts = at::empty({rows, 8}, options.dtype(at::kLong));
  at::Tensor extremes = at::empty({rows, 2}, options.dtype(at::kDouble));
  at::Tensor bins = at::zeros({rows, histogram ? kHistogramBins : 0}, options.dtype(at::kLong));
  constexpr int64_t words = sizeof(cuda::CensusTally) / 8;
  const at::Tensor tally = at::zeros({rows * words + 1}, options.dtype(at::kLong));
  auto* tallies = reinterpret_cast<cuda::CensusTally*>(tally.mutable_data_ptr<int64_t>());
  for (int64_t begin = 0; begin < rows; begin += cuda::kCensusTensors) {
    cuda::CensusArgs args{};
    args.tensors = static_cast<int32_t>(std::min<int64_t>(rows - begin, cuda::kCensusTensors));
    args.histogram = histogram;
    args.counts = counts.mutable_data_ptr<int64_t>() + 8 * begin;
    args.extremes = extremes.mutable_data_ptr<double>() + 2 * begin;
    args.bins =
        reinterpret_cast<uint64_t*>(bins.mutable_data_ptr<int64_t>()) + (histogram ? kHistogramBins * begin : 0);
    args.tally = tallies + begin;
    args.finished = reinterpret_cast<uint32_t*>(tallies + rows);
    std::vector<at::Tensor> dense;
    for (int32_t i = 0; i < args.tensors; ++i) {
      const at::Tensor& tensor = tensors[begin + i];
      TORCH_CHECK_VALUE(tensor.device() == device, "census: tensors are on ", device, " and on ", tensor.device(),
                        "; one call takes one device");
      dense.push_back(tensor.contiguous());
      args.tensor[i] = {dense.back().const_data_ptr(), dense.back().numel(), 0,
                        dtype_of("census", "the tensor", dense.back())};
    }
    C10_CUDA_CHECK(cuda::census(args, c10::cuda::getCurrentCUDAStream().stream()));
  }
  return {counts, extremes, bins};
}

}  // namespace

TORCH_LIBRARY_IMPL(mlpkit, CUDA, m) { m.impl("census", census_cuda); }

}  // namespace mlpkit
