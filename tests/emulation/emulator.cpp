// The scheduler behind the emulated device.h: 32 fibers a warp, run in random order between shuffles (emulation).
#include <ucontext.h>

#include <algorithm>

#include <cstdint>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cuda/device.h"

namespace mlpkit::device {
namespace {

constexpr size_t kStackBytes = 256 * 1024;

struct Allocation {
  uintptr_t begin, end;
  bool writable;
};

struct Lane {
  ucontext_t context;
  std::unique_ptr<char[]> stack = std::make_unique<char[]>(kStackBytes);
  int arrived = 0;  // shuffles that the lane has come to
  bool done = false;
};

std::vector<Allocation> allocations;
std::string error;
std::mt19937 random_source;
Lane lanes[kWarp];
ucontext_t scheduler;
const std::function<void()>* body;
uint64_t slots[2][kWarp];  // by parity: a lane can be one shuffle ahead of another, never two
int completed = 0;         // shuffles that all lanes have come to
uint32_t block = 0, first_thread = 0, lane = 0;

void fail(const std::string& what) {
  if (error.empty())
    error = what + " (block " + std::to_string(block) + ", thread " + std::to_string(first_thread + lane) + ")";
  swapcontext(&lanes[lane].context, &scheduler);
}

void run_lane() {
  (*body)();
  lanes[lane].done = true;
}

std::vector<uint32_t> shuffled(uint32_t count) {
  std::vector<uint32_t> order(count);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random_source);
  return order;
}

bool run_warp() {
  completed = 0;
  for (Lane& fiber : lanes) {
    fiber.arrived = 0;
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, run_lane, 0);
  }
  for (;;) {
    int done = 0, waiting = 0;
    for (const uint32_t next : shuffled(kWarp)) {
      lane = next;
      if (!lanes[lane].done && lanes[lane].arrived == completed) swapcontext(&scheduler, &lanes[lane].context);
      if (!error.empty()) return false;
      done += lanes[next].done;
      waiting += !lanes[next].done;
    }
    if (done == kWarp) return true;
    if (waiting == kWarp) {
      ++completed;
    } else {
      error = "some lanes wait at a shuffle that others never come to (block " + std::to_string(block) + ")";
      return false;
    }
  }
}

}  // namespace

uint32_t block_index() { return block; }
uint32_t thread_index() { return first_thread + lane; }

uint64_t exchange(uint64_t bits, uint32_t from_lane) {
  if (from_lane >= kWarp) fail("shuffle from lane " + std::to_string(from_lane));
  const uint32_t me = lane;
  const int turn = lanes[me].arrived++;
  slots[turn & 1][me] = bits;
  swapcontext(&lanes[me].context, &scheduler);
  return slots[turn & 1][from_lane];
}

void check(const void* address, int bytes, bool writes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
  if (begin % bytes) fail("access of " + std::to_string(bytes) + " bytes is not aligned");
  for (const Allocation& allocation : allocations)
    if (begin >= allocation.begin && begin + bytes <= allocation.end && (allocation.writable || !writes)) return;
  fail(std::string(writes ? "write" : "read") + " of " + std::to_string(bytes) + " bytes outside every allocation");
}

bool run(int64_t blocks, int threads, const std::function<void()>& thread_body) {
  if (threads % kWarp) {
    error = "the emulator runs whole warps";
    return false;
  }
  body = &thread_body;
  for (const uint32_t next_block : shuffled(static_cast<uint32_t>(blocks)))
    for (const uint32_t warp : shuffled(threads / kWarp)) {
      block = next_block;
      first_thread = warp * kWarp;
      if (!run_warp()) return false;
    }
  return true;
}

}  // namespace mlpkit::device

extern "C" {

// A run begins: no allocation, no error, a schedule of its own.
void emulator_begin(uint32_t schedule) {
  mlpkit::device::allocations.clear();
  mlpkit::device::error.clear();
  mlpkit::device::random_source.seed(schedule);
}

void emulator_allow(const void* begin, int64_t bytes, int writable) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(begin);
  mlpkit::device::allocations.push_back({address, address + static_cast<uintptr_t>(bytes), writable != 0});
}

const char* emulator_error() { return mlpkit::device::error.c_str(); }

}  // extern "C"
