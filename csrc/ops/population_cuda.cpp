// A CUDA device for populations (ops): memory of torch's allocator, launches side by side on streams of its pool.
#include "cuda/population.h"

#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <vector>

#include "ops/population_backend.h"

namespace mlpkit {
namespace {

const char* text_of(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

int attribute(int device, cudaDeviceAttr which) {
  int value = 0;
  return cudaDeviceGetAttribute(&value, which, device) == cudaSuccess ? value : 0;
}

const char* obstacle(int device) {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || device >= count) {
    cudaGetLastError();  // it is reported here, and must not surface later
    return "there is no such CUDA device";
  }
  const int capability =
      10 * attribute(device, cudaDevAttrComputeCapabilityMajor) + attribute(device, cudaDevAttrComputeCapabilityMinor);
  if (capability < 80 || capability < MLPKIT_CUDA_MINIMUM)
    return "its compute capability is too low; populations need 8.0, and a build of mlpkit that includes the device";
  return nullptr;
}

cuda::MemberDevice describe(int device) {
  return {attribute(device, cudaDevAttrMultiProcessorCount), attribute(device, cudaDevAttrMaxSharedMemoryPerBlockOptin),
          attribute(device, cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
}

void* allocate(int device, int64_t bytes) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  try {
    return c10::cuda::CUDACachingAllocator::raw_alloc(static_cast<size_t>(bytes));
  } catch (const c10::OutOfMemoryError&) {
    return nullptr;
  }
}

void release(int device, void* memory) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  c10::cuda::CUDACachingAllocator::raw_delete(memory);
}

const char* copy(int device, void* to, const void* from, int64_t bytes, bool to_device) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream().stream();
  const cudaMemcpyKind kind = to_device ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost;
  const cudaError_t error = cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), kind, stream);
  return text_of(error == cudaSuccess ? cudaStreamSynchronize(stream) : error);
}

// All memory was written by copies that were waited for, so that any stream may read it; and all launches are waited
// for, so that it may be given back.
template <class Launch>
const char* run(int device, const Launch* launches, int count, cudaError_t (*launch)(const Launch&, cudaStream_t)) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  std::vector<c10::cuda::CUDAStream> streams;
  cudaError_t error = cudaSuccess;
  for (int i = 0; i < count && error == cudaSuccess; ++i) {
    streams.push_back(c10::cuda::getStreamFromPool(false, static_cast<c10::DeviceIndex>(device)));
    error = launch(launches[i], streams.back().stream());
  }
  for (const c10::cuda::CUDAStream& stream : streams) {
    const cudaError_t found = cudaStreamSynchronize(stream.stream());
    if (error == cudaSuccess) error = found;
  }
  return text_of(error);
}

const PopulationBackend kDevice = {
    obstacle,
    describe,
    allocate,
    release,
    copy,
    [](int device, const cuda::MemberLaunch* launches, int count) {
      return run(device, launches, count, cuda::train_members);
    },
    [](int device, const cuda::MemberOutputs* launches, int count) {
      return run(device, launches, count, cuda::predict_members);
    },
};

[[maybe_unused]] const bool offered = [] {
  population_backend() = &kDevice;
  return true;
}();

}  // namespace
}  // namespace mlpkit
