// The scheduler behind the emulated device.h: the threads of a block as fibers, in random order between the points at
// which they meet (emulation).
#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <algorithm>
#include <numeric>
#include <random>

#include "block.h"

#if defined(__x86_64__)
extern "C" void mlpkit_emulator_switch(void** from, void* to);
// Saves what a call must preserve on this stack and takes it from the other one: 20 ns, ucontext needs 600.
asm(R"(
.text
.type mlpkit_emulator_switch, @function
mlpkit_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size mlpkit_emulator_switch, .-mlpkit_emulator_switch
)");
#endif

namespace mlpkit::device {

Block block;
uint32_t current = 0;

namespace {

constexpr size_t kStackBytes = 256 * 1024, kPage = 4096;

struct Barrier {
  int expected = 0;
  std::vector<uint32_t> waiting;
};

std::string error;
std::mt19937 random_source;
Barrier barriers[kBarriers];
std::vector<uint32_t> ready;
std::vector<char*> stacks;
const std::function<void()>* body;

#if defined(__x86_64__)
void* scheduler;
void to_scheduler() { mlpkit_emulator_switch(&block.thread[current].context, scheduler); }
void to_thread(Thread& thread) { mlpkit_emulator_switch(&scheduler, thread.context); }
void prepare(Thread& thread, void (*entry)()) {
  void** top = reinterpret_cast<void**>(thread.stack + kStackBytes);
  top[-2] = reinterpret_cast<void*>(entry);  // where the first switch returns to
  thread.context = top - 8;
}
#else
ucontext_t scheduler;
std::vector<ucontext_t> contexts;
void to_scheduler() { swapcontext(static_cast<ucontext_t*>(block.thread[current].context), &scheduler); }
void to_thread(Thread& thread) { swapcontext(&scheduler, static_cast<ucontext_t*>(thread.context)); }
void prepare(Thread& thread, void (*entry)()) {
  contexts.resize(kMostWarps * kWarp);
  ucontext_t& context = contexts[&thread - block.thread.data()];
  getcontext(&context);
  context.uc_stack.ss_sp = thread.stack;
  context.uc_stack.ss_size = kStackBytes;
  makecontext(&context, entry, 0);
  thread.context = &context;
}
#endif

void run_thread() {
  (*body)();
  end_thread_memory();
  block.thread[current].done = true;
  to_scheduler();
}

char* stack_of(size_t thread) {
  while (stacks.size() <= thread) {
    void* memory =
        mmap(nullptr, kStackBytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    mprotect(memory, kPage, PROT_NONE);
    stacks.push_back(static_cast<char*>(memory) + kPage);
  }
  return stacks[thread];
}

std::vector<uint32_t> shuffled(uint32_t count) {
  std::vector<uint32_t> order(count);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random_source);
  return order;
}

void wait(const char* what) {
  block.thread[current].waits_for = what;
  to_scheduler();
  block.thread[current].waits_for = nullptr;
}

// Every warp of these threads has now seen what the others did before.
void join_clocks(const std::vector<uint32_t>& threads) {
  std::array<uint32_t, kMostWarps> latest{};
  std::vector<uint32_t> warps;
  for (const uint32_t thread : threads)
    if (std::find(warps.begin(), warps.end(), thread / kWarp) == warps.end()) warps.push_back(thread / kWarp);
  for (const uint32_t warp : warps) {
    ++block.warp[warp].clock[warp];
    for (int i = 0; i < kMostWarps; ++i) latest[i] = std::max(latest[i], block.warp[warp].clock[i]);
  }
  for (const uint32_t warp : warps) {
    block.warp[warp].clock = latest;
    ++block.warp[warp].fence;
  }
}

void start_block(uint32_t index) {
  block.index = index;
  block.thread.assign(block.threads, Thread{});
  block.warp.assign(block.threads / kWarp, Warp{});
  for (Barrier& barrier : barriers) barrier = Barrier{};
  for (int i = 0; i < block.threads; ++i) {
    block.thread[i].stack = stack_of(i);
    prepare(block.thread[i], run_thread);
  }
  ready = shuffled(block.threads);
  begin_block_memory();
}

std::string who_waits() {
  for (int i = 0; i < block.threads; ++i)
    if (!block.thread[i].done)
      return describe(i) + " waits at " + block.thread[i].waits_for + " for threads that never come";
  return "";
}

bool run_block(uint32_t index) {
  start_block(index);
  while (!ready.empty()) {
    const size_t pick = random_number() % ready.size();
    current = ready[pick];
    ready[pick] = ready.back();
    ready.pop_back();
    to_thread(block.thread[current]);
    if (!error.empty()) return false;
  }
  error = who_waits();
  if (error.empty() && !end_block_memory()) error = "a guard zone of shared memory was written over";
  return error.empty();
}

}  // namespace

uint32_t random_number() { return static_cast<uint32_t>(random_source()); }

std::string describe(uint32_t thread) {
  return "block " + std::to_string(block.index) + ", thread " + std::to_string(thread);
}

void fail(const std::string& what) {
  if (error.empty()) error = what + " (" + describe(current) + ")";
  to_scheduler();
}

const Given& meet(const char* what, const void* words, int bytes, void (*finish)(Given&)) {
  Warp& warp = warp_of(current);
  const uint32_t first = current / kWarp * kWarp;
  Given& given = warp.given[warp.turn & 1];
  if (warp.arrived && warp.meets_at != what)
    fail(std::string("lanes of a warp meet at ") + what + " and at " + warp.meets_at);
  warp.meets_at = what;
  if (bytes) memcpy(given[current % kWarp], words, bytes);
  if (++warp.arrived < kWarp) {
    wait(what);
    return given;
  }
  warp.arrived = 0;
  ++warp.turn;
  if (finish) finish(given);
  for (uint32_t thread = first; thread < first + kWarp; ++thread)
    if (thread != current) ready.push_back(thread);
  return given;
}

uint32_t block_index() { return block.index; }
uint32_t blocks() { return block.count; }
uint32_t thread_index() { return current; }

uint64_t exchange(uint64_t bits, uint32_t from_lane) {
  if (from_lane >= kWarp) fail("shuffle from lane " + std::to_string(from_lane));
  uint64_t of_lane;
  memcpy(&of_lane, meet("a shuffle", &bits, sizeof(bits))[from_lane], sizeof(of_lane));
  return of_lane;
}

void vote(const char* what, uint32_t value, uint32_t (&all)[kWarp]) {
  const Given& given = meet(what, &value, sizeof(value));
  for (int lane = 0; lane < kWarp; ++lane) all[lane] = given[lane][0];
}

void sync_warp() {
  meet("a warp's barrier", nullptr, 0, [](Given&) { ++warp_of(current).fence; });
}

void sync_part(int barrier, int threads) {
  if (barrier < 0 || barrier >= kBarriers || threads <= 0 || threads % kWarp || threads > block.threads)
    fail("barrier " + std::to_string(barrier) + " of " + std::to_string(threads) + " threads");
  Barrier& here = barriers[barrier];
  if (here.waiting.empty()) here.expected = threads;
  if (here.expected != threads) fail("threads disagree about how many a barrier waits for");
  here.waiting.push_back(current);
  if (static_cast<int>(here.waiting.size()) < threads) return wait("a barrier");
  join_clocks(here.waiting);
  for (const uint32_t thread : here.waiting)
    if (thread != current) ready.push_back(thread);
  here.waiting.clear();
}
void sync() { sync_part(0, block.threads); }

cudaError_t run(const Grid& grid, const std::function<void()>& thread_body) {
  if (grid.threads <= 0 || grid.threads % kWarp || grid.threads > kMostWarps * kWarp) {
    error = "the emulator runs whole warps, " + std::to_string(kMostWarps) + " at most";
    return cudaErrorInvalidConfiguration;
  }
  if (grid.shared_bytes < 0 || grid.shared_bytes > shared_memory_limit()) {
    error = std::to_string(grid.shared_bytes) + " bytes of shared memory for a block";
    return cudaErrorInvalidValue;
  }
  body = &thread_body;
  block.count = static_cast<uint32_t>(grid.blocks);
  block.threads = grid.threads;
  block.shared_bytes = grid.shared_bytes;
  for (const uint32_t next : shuffled(block.count))
    if (!run_block(next)) return cudaErrorLaunchFailure;
  return cudaSuccess;
}

void forget(uint32_t schedule) {
  error.clear();
  random_source.seed(schedule);
}
const char* message() { return error.c_str(); }

}  // namespace mlpkit::device
