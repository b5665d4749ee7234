// Looks at tensors with the scan kernel (ops).
#include "ops/look.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/scan.h"
#include "ops/dtype.h"

namespace mlpkit {
namespace {

constexpr int64_t kChunk = 1 << 16;  // elements a thread looks at at once
constexpr c10::DispatchKeySet kWrappers({c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::FuncTorchBatched,
                                         c10::DispatchKey::Functionalize, c10::DispatchKey::Python,
                                         c10::DispatchKey::ZeroTensor});

// The order of elements does not matter here.
at::Tensor dense(const at::Tensor& tensor) {
  if (tensor.is_cpu() && (tensor.is_contiguous() || tensor.is_non_overlapping_and_dense())) return tensor;
  const at::AutoDispatchBelowADInplaceOrView below;
  return tensor.to(at::kCPU).contiguous();
}

}  // namespace

bool plain(const at::Tensor& tensor) {
  if (!tensor.defined() || tensor.layout() != at::kStrided || tensor.is_nested() || tensor.is_meta()) return false;
  switch (tensor.scalar_type()) {
    case at::kDouble:
    case at::kFloat:
    case at::kBFloat16:
    case at::kHalf:
      return !tensor.key_set().has_any(kWrappers) && tensor.has_storage();
    default:
      return false;
  }
}

double peak(const at::Tensor& tensor) {
  const at::Tensor seen = dense(tensor);
  const Dtype dtype = dtype_of("watch", "the tensor", seen);
  const int64_t count = seen.numel(), chunks = (count + kChunk - 1) / kChunk, bytes = seen.element_size();
  const char* data = static_cast<const char*>(seen.const_data_ptr());
  std::vector<ScanResult> parts(chunks);
  at::parallel_for(0, chunks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      cpu::scan({dtype, data + i * kChunk * bytes, std::min(kChunk, count - i * kChunk), &parts[i]});
  });
  double largest = 0;
  for (const ScanResult& part : parts)
    largest = std::max(largest, part.finite ? part.absmax : std::numeric_limits<double>::infinity());
  return largest;
}

}  // namespace mlpkit
