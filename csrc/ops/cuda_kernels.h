// Which CUDA kernels the ops may take: two switches for all of them, visible and forceable (ops). They exist in builds
// without CUDA too, where nothing asks for them.
#pragma once
#include <string>

namespace mlpkit {

// proven: those that a results file of a real device stands for. all: also those that were only compiled, read as
// machine code and emulated so far.
enum class CudaKernels : int { proven, all };

// The choice in force: proven, unless MLPKIT_CUDA_KERNELS or force_cuda_kernels says otherwise. Throws
// std::invalid_argument when the variable names neither.
CudaKernels cuda_kernels();
const char* cuda_kernels_name(CudaKernels);
// Throws std::invalid_argument when the name is unknown.
void force_cuda_kernels(const std::string& name);

// How layers multiply matrices of float32. torch: by torch's own products, so as
// torch.backends.cuda.matmul.fp32_precision says. split: by cuda/split_product.h where that can and pays.
enum class Fp32Products : int { torch, split };

// torch, unless MLPKIT_FP32_PRECISION or set_fp32_products says otherwise; throws as above. split is called "3xtf32".
Fp32Products fp32_products();
const char* fp32_products_name(Fp32Products);
void set_fp32_products(const std::string& name);

}  // namespace mlpkit
