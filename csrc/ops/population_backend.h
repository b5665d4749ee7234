// A device that populations are trained on, as the engine of population_device.h sees it: memory and launches (ops). It
// exists in builds without CUDA too, where nobody offers one. Plain functions of plain data: the tests offer an
// emulated device.
#pragma once
#include "cuda/population_job.h"

namespace mlpkit {

struct PopulationBackend {
  // Nullptr, or why this device cannot be taken.
  const char* (*obstacle)(int device);
  cuda::MemberDevice (*describe)(int device);
  // Memory of the device; nullptr: there is none left.
  void* (*allocate)(int device, int64_t bytes);
  void (*release)(int device, void* memory);
  // To the device or back, after all that was launched; waits for it.
  const char* (*copy)(int device, void* to, const void* from, int64_t bytes, bool to_device);
  // Runs launches side by side and waits for all of them. Nullptr, or what went wrong.
  const char* (*train)(int device, const cuda::MemberLaunch* launches, int count);
  const char* (*predict)(int device, const cuda::MemberOutputs* launches, int count);
};

// What CUDA builds and tests put there; nullptr otherwise.
const PopulationBackend*& population_backend();

}  // namespace mlpkit
