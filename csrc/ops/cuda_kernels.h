// Which CUDA kernels the ops may take: one switch for all of them, visible and forceable (ops). It exists in builds
// without CUDA too, where nothing asks for it.
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

}  // namespace mlpkit
