// What the parts of the emulator know of the running block (emulation).
#pragma once
#include <array>
#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "cuda/device.h"

namespace mlpkit::device {

constexpr int kMostWarps = 32, kBarriers = 16;

// A copy that cp.async was given and that has not landed. `group`: how many groups its thread had committed.
struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes, valid, group;
};

struct Thread {
  void* context = nullptr;
  char* stack = nullptr;
  bool done = false;
  const char* waits_for = nullptr;
  std::deque<Copy> copies;
  int groups = 0;  // of copies committed
};

// clock[w]: the last barrier of warp w that this one has seen; its own counts its barriers. Two accesses of different
// warps are in order if the later one's warp has seen a barrier that follows the earlier one. fence counts the points
// at which the lanes of the warp have seen each other's accesses.
struct Warp {
  std::array<uint32_t, kMostWarps> clock{};
  uint32_t fence = 0;
  int arrived = 0, turn = 0;
  const char* meets_at = nullptr;
  uint32_t given[2][kWarp][16];  // by parity: a lane can be one meeting ahead of another, never two
};

struct Block {
  uint32_t index = 0, count = 0;
  int threads = 0, shared_bytes = 0;
  std::vector<Thread> thread;
  std::vector<Warp> warp;
};

extern Block block;
extern uint32_t current;  // the running thread

inline Warp& warp_of(uint32_t thread) { return block.warp[thread / kWarp]; }

// Stops the run; the running thread does not return.
void fail(const std::string& what);
// Waits until every lane has come here with its words; the last one calls finish. What all gave is then in the result.
using Given = uint32_t[kWarp][16];
const Given& meet(const char* what, const void* words, int bytes, void (*finish)(Given&) = nullptr);
uint32_t random_number();

// memory.cpp
void begin_block_memory();
bool end_block_memory();
void check_of(uint32_t thread, const void* address, int bytes, bool writes);
void end_thread_memory();
std::string describe(uint32_t thread);

}  // namespace mlpkit::device
