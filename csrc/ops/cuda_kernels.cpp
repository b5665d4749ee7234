// The choice of CUDA kernels (ops).
#include "ops/cuda_kernels.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace mlpkit {
namespace {

CudaKernels from_name(const std::string& name, const char* source) {
  for (const CudaKernels kernels : {CudaKernels::proven, CudaKernels::all})
    if (name == cuda_kernels_name(kernels)) return kernels;
  throw std::invalid_argument(std::string(source) + " is '" + name + "'; it must be proven or all");
}

std::atomic<int>& current() {
  const auto initial = [] {
    const char* name = std::getenv("MLPKIT_CUDA_KERNELS");
    return name && *name ? from_name(name, "MLPKIT_CUDA_KERNELS") : CudaKernels::proven;
  };
  static std::atomic<int> value{static_cast<int>(initial())};
  return value;
}

}  // namespace

CudaKernels cuda_kernels() { return static_cast<CudaKernels>(current().load(std::memory_order_relaxed)); }
const char* cuda_kernels_name(CudaKernels kernels) { return kernels == CudaKernels::all ? "all" : "proven"; }
void force_cuda_kernels(const std::string& name) { current() = static_cast<int>(from_name(name, "cuda kernels")); }

}  // namespace mlpkit
