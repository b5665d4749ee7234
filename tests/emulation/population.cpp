// An emulated device for populations: the backend of ops/population_backend.h over the host's own memory (emulation).
#include "ops/population_backend.h"

#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#include "cuda/population.h"

using namespace mlpkit;

extern "C" {
void emulator_begin(uint32_t schedule);
void emulator_allow(const void* begin, int64_t bytes, int writable);
const char* emulator_error();
void emulator_device(int multiprocessors, int shared_bytes);
}

namespace {

constexpr int64_t kGuard = 64;

uint32_t schedule = 0;
int processors = 3, shared_of_block = 227 * 1024;
int64_t launches = 0;
std::map<void*, int64_t> memory;
std::string error;

void* allocate(int, int64_t bytes) {
  // Full of NaN, so that a number read before it is written shows.
  void* taken = std::aligned_alloc(256, (bytes + 255) / 256 * 256 + kGuard * 4);
  std::memset(taken, 0xff, (bytes + 255) / 256 * 256 + kGuard * 4);
  memory[taken] = bytes;
  return taken;
}
void release(int, void* taken) {
  memory.erase(taken);
  std::free(taken);
}
const char* copy(int, void* to, const void* from, int64_t bytes, bool) {
  std::memcpy(to, from, bytes);
  return nullptr;
}

template <class Launch>
const char* run(const Launch* queue, int count, cudaError_t (*launch)(const Launch&, cudaStream_t)) {
  for (int i = 0; i < count; ++i) {
    ++launches;
    emulator_begin(++schedule);
    for (const auto& [begin, bytes] : memory) emulator_allow(begin, bytes, 1);
    if (launch(queue[i], nullptr) == cudaSuccess) continue;
    error = emulator_error();
    return error.c_str();
  }
  return nullptr;
}

const PopulationBackend kBackend = {
    [](int device) -> const char* { return device == 0 ? nullptr : "there is no such device"; },
    [](int) { return cuda::MemberDevice{processors, shared_of_block, shared_of_block + 1024}; },
    allocate,
    release,
    copy,
    [](int, const cuda::MemberLaunch* queue, int count) { return run(queue, count, cuda::train_members); },
    [](int, const cuda::MemberOutputs* queue, int count) { return run(queue, count, cuda::predict_members); },
};

}  // namespace

extern "C" {

const void* emulated_population_device(int multiprocessors, int shared_bytes) {
  processors = multiprocessors;
  shared_of_block = shared_bytes;
  emulator_device(multiprocessors, shared_bytes);
  return &kBackend;
}
int64_t emulated_population_launches() { return launches; }
// Warps, rows of a pass, resident blocks, whether gradients lie in shared memory, bytes of shared memory; 1 if nothing
// fits.
int emulated_population_plan(int single, int layers, const int* widths, int batch, int keeps_slopes, int moments,
                             int multiprocessors, int shared_bytes, int* found) {
  cuda::MemberShape shape{};
  shape.dtype = single ? Dtype::float32 : Dtype::bfloat16;
  shape.layers = layers;
  for (int i = 0; i <= layers; ++i) shape.widths[i] = widths[i];
  shape.batch = batch;
  shape.keeps_slopes = keeps_slopes != 0;
  shape.moments = moments;
  cuda::MemberPlan plan{};
  if (!cuda::plan_member(shape, {multiprocessors, shared_bytes, shared_bytes + 1024}, plan)) return 1;
  const int numbers[] = {plan.warps, plan.rows, plan.resident, plan.gradients >= 0, plan.shared_bytes};
  for (int i = 0; i < 5; ++i) found[i] = numbers[i];
  return 0;
}

}  // extern "C"
