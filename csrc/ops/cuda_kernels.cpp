// The choices of CUDA kernels (ops).
#include "ops/cuda_kernels.h"

#include <array>
#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace mlpkit {
namespace {

using Names = std::array<const char*, 2>;
constexpr Names kKernels{"proven", "all"}, kProducts{"torch", "3xtf32"};

int from_name(const Names& names, const std::string& name, const char* source) {
  for (size_t i = 0; i < names.size(); ++i)
    if (name == names[i]) return static_cast<int>(i);
  throw std::invalid_argument(std::string(source) + " is '" + name + "'; it must be " + names[0] + " or " + names[1]);
}

// The first of the names, unless the environment says otherwise.
int initial(const Names& names, const char* variable) {
  const char* name = std::getenv(variable);
  return name && *name ? from_name(names, name, variable) : 0;
}

std::atomic<int>& kernels() {
  static std::atomic<int> value{initial(kKernels, "MLPKIT_CUDA_KERNELS")};
  return value;
}
std::atomic<int>& products() {
  static std::atomic<int> value{initial(kProducts, "MLPKIT_FP32_PRECISION")};
  return value;
}

}  // namespace

CudaKernels cuda_kernels() { return static_cast<CudaKernels>(kernels().load(std::memory_order_relaxed)); }
const char* cuda_kernels_name(CudaKernels choice) { return kKernels[static_cast<int>(choice)]; }
void force_cuda_kernels(const std::string& name) { kernels() = from_name(kKernels, name, "cuda kernels"); }

Fp32Products fp32_products() { return static_cast<Fp32Products>(products().load(std::memory_order_relaxed)); }
const char* fp32_products_name(Fp32Products choice) { return kProducts[static_cast<int>(choice)]; }
void set_fp32_products(const std::string& name) {
  products() = from_name(kProducts, name, "set_fp32_precision: precision");
}

}  // namespace mlpkit
