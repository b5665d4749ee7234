// Which memory a thread may touch, and when: allocations, shared memory and its history, copies under way (emulation).
#include <algorithm>

#include "block.h"

namespace mlpkit::device {

void forget(uint32_t schedule);
const char* message();

namespace {

constexpr int kMostShared = 227 * 1024;  // of a block, on Hopper
constexpr int kArena = 512 * 1024, kGuard = 1024;
constexpr unsigned char kGuardByte = 0xA5, kPoison = 0xFF;

struct Range {
  uintptr_t begin, end;
  bool writable;
};

// An access of the past. fence and clock: of the thread's warp, at that time.
struct Access {
  uint32_t clock = 0, fence = 0;
  int32_t thread = -1;
};

enum class State : uint8_t { unwritten, written, in_flight };

struct Byte {  // its last write, and the last reads of two warps
  Access write, reads[2];
  State state = State::unwritten;
};

struct Array {
  const void* tag;
  int begin, bytes;  // in the arena
};

std::vector<Range> allocations;
int limit = kMostShared, processors = 3;
alignas(1024) unsigned char arena[kArena];
std::vector<Byte> history(kArena);
std::vector<Array> arrays;  // the first is dynamic shared memory
int arena_used = 0;

Access now(uint32_t thread) {
  const Warp& warp = warp_of(thread);
  return {warp.clock[thread / kWarp], warp.fence, static_cast<int32_t>(thread)};
}

bool in_order(const Access& before, uint32_t thread) {
  if (before.thread < 0 || before.thread == static_cast<int32_t>(thread)) return true;
  const uint32_t warp = before.thread / kWarp;
  if (warp == thread / kWarp) return warp_of(thread).fence > before.fence;
  return warp_of(thread).clock[warp] > before.clock;
}

void check_byte(Byte& byte, uint32_t thread, bool writes) {
  const std::string other = " by thread ";
  if (byte.state == State::in_flight) fail("shared memory is used before its cp.async was waited for");
  if (!writes && byte.state == State::unwritten) fail("read of shared memory that nobody wrote");
  if (!in_order(byte.write, thread))
    fail(std::string(writes ? "write" : "read") + " of shared memory with no barrier after its write" + other +
         std::to_string(byte.write.thread));
  if (writes) {
    for (const Access& read : byte.reads)
      if (!in_order(read, thread))
        fail("write of shared memory with no barrier after its read" + other + std::to_string(read.thread));
    byte.write = now(thread);
    byte.reads[0] = byte.reads[1] = Access{};
    byte.state = State::written;
  } else {
    const bool same_warp = byte.reads[0].thread / kWarp == static_cast<int32_t>(thread) / kWarp;
    if (byte.reads[0].thread >= 0 && !same_warp) byte.reads[1] = byte.reads[0];
    byte.reads[0] = now(thread);
  }
}

Array& add_array(const void* tag, int bytes) {
  const int begin = arena_used + kGuard;
  arena_used = begin + (bytes + kGuard - 1) / kGuard * kGuard;
  if (arena_used + kGuard > kArena) fail("static shared memory is used up");
  std::fill(arena + begin, arena + begin + bytes, kPoison);
  std::fill(arena + begin + bytes, arena + arena_used + kGuard, kGuardByte);
  std::fill(history.begin() + begin, history.begin() + begin + bytes, Byte{});
  arrays.push_back({tag, begin, bytes});
  return arrays.back();
}

bool is_shared(uintptr_t address) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(arena);
  return address >= begin && address < begin + kArena;
}

const Array* array_of(int begin, int bytes) {
  for (const Array& array : arrays)
    if (begin >= array.begin && begin + bytes <= array.begin + array.bytes) return &array;
  return nullptr;
}

int place_in_arena(const void* address, int bytes, const char* what) {
  const int begin = static_cast<int>(static_cast<const unsigned char*>(address) - arena);
  if (!is_shared(reinterpret_cast<uintptr_t>(address)) || !array_of(begin, bytes))
    fail(std::string(what) + " of " + std::to_string(bytes) + " bytes outside every shared array");
  return begin;
}

void check_global(uintptr_t begin, int bytes, bool writes) {
  for (const Range& range : allocations)
    if (begin >= range.begin && begin + bytes <= range.end && (range.writable || !writes)) return;
  fail(std::string(writes ? "write" : "read") + " of " + std::to_string(bytes) + " bytes outside every allocation");
}

}  // namespace

int shared_memory_limit() { return limit; }
int multiprocessors() { return processors; }

void begin_block_memory() {
  arrays.clear();
  arena_used = 0;
  std::fill(arena, arena + kGuard, kGuardByte);
  add_array(nullptr, block.shared_bytes);
}

bool end_block_memory() {
  int at = 0;
  for (const Array& array : arrays) {
    for (; at < array.begin; ++at)
      if (arena[at] != kGuardByte) return false;
    at += array.bytes;
  }
  return std::all_of(arena + at, arena + arena_used + kGuard, [](unsigned char byte) { return byte == kGuardByte; });
}

unsigned char* shared_memory() { return arena + arrays[0].begin; }

void* static_shared(const void* tag, int bytes) {
  for (const Array& array : arrays)
    if (array.tag == tag) return arena + array.begin;
  return arena + add_array(tag, bytes).begin;
}

void check_of(uint32_t thread, const void* address, int bytes, bool writes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
  if (begin % bytes) fail("access of " + std::to_string(bytes) + " bytes is not aligned");
  if (!is_shared(begin)) return check_global(begin, bytes, writes);
  const int first = place_in_arena(address, bytes, writes ? "write" : "read");
  for (int i = first; i < first + bytes; ++i) check_byte(history[i], thread, writes);
}
void check(const void* address, int bytes, bool writes) { check_of(current, address, bytes, writes); }

void copy_later(void* to, const void* from, int bytes, int valid) {
  const int first = place_in_arena(to, bytes, "cp.async");
  if (reinterpret_cast<uintptr_t>(to) % bytes || (valid && reinterpret_cast<uintptr_t>(from) % bytes))
    fail("cp.async of " + std::to_string(bytes) + " bytes is not aligned");
  if (valid) check_global(reinterpret_cast<uintptr_t>(from), bytes, false);
  for (int i = first; i < first + bytes; ++i) {
    check_byte(history[i], current, true);
    history[i].state = State::in_flight;
    arena[i] = kPoison;
  }
  Thread& thread = block.thread[current];
  thread.copies.push_back({arena + first, static_cast<const unsigned char*>(from), bytes, valid, thread.groups});
}

void commit_copies() { ++block.thread[current].groups; }

void land(int groups_in_flight) {
  Thread& thread = block.thread[current];
  while (!thread.copies.empty() && thread.copies.front().group < thread.groups - groups_in_flight) {
    const Copy& copy = thread.copies.front();
    std::copy(copy.from, copy.from + copy.valid, copy.to);
    std::fill(copy.to + copy.valid, copy.to + copy.bytes, static_cast<unsigned char>(0));
    for (int i = 0; i < copy.bytes; ++i) {
      Byte& byte = history[copy.to - arena + i];
      byte.state = State::written;
      byte.write = now(current);
    }
    thread.copies.pop_front();
  }
}

void end_thread_memory() {
  if (!block.thread[current].copies.empty()) fail("a thread ends while its cp.async is under way");
}

}  // namespace mlpkit::device

extern "C" {

// Another device: its multiprocessors and the shared memory that a block may have.
void emulator_device(int multiprocessors, int shared_bytes) {
  mlpkit::device::processors = multiprocessors;
  mlpkit::device::limit = shared_bytes;
}

// A run begins: no allocation, no error, a schedule of its own.
void emulator_begin(uint32_t schedule) {
  mlpkit::device::allocations.clear();
  mlpkit::device::forget(schedule);
}

void emulator_allow(const void* begin, int64_t bytes, int writable) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(begin);
  mlpkit::device::allocations.push_back({address, address + static_cast<uintptr_t>(bytes), writable != 0});
}

const char* emulator_error() { return mlpkit::device::message(); }

}  // extern "C"
