// Small kernels with one mistake each, and plain products: what the emulator must notice and what it must compute
// (emulation).
#include "core/dtype.h"
#include "cuda/device.h"

using namespace mlpkit;

namespace {

enum Mistake : int {
  none,
  no_barrier,
  no_warp_barrier,
  read_past_shared,
  read_past_global,
  write_past_global,
  read_unwritten,
  no_wait_for_copy,
  no_barrier_after_copy,
  copy_over_what_is_read,
  copy_left_under_way,
  barrier_missed,
  shuffle_missed,
  lanes_apart,
  misaligned,
  raw_write_past_shared
};

constexpr int kThreads = 64;

// Every thread passes a number to the thread across, through shared memory: to[i] = from[63 - i] + 1.
MLPKIT_KERNEL(kThreads, 1)
pass_across(int mistake, const float* from, float* to) {
  MLPKIT_SHARED(float, numbers, kThreads);
  const uint32_t me = device::thread_index();
  float number;
  device::load(from + me + (mistake == read_past_global ? 1 : 0), number);
  device::store(numbers + me, number);
  if (mistake != no_barrier) device::sync();
  device::load(numbers + kThreads - 1 - me + (mistake == read_past_shared ? 1 : 0), number);
  if (mistake == barrier_missed && me == 5) return;
  device::sync();
  if (mistake == raw_write_past_shared) numbers[kThreads] = 0;
  device::store(to + me + (mistake == write_past_global ? 1 : 0), number + 1);
}

// The same within each warp, and by a tree of named barriers and warps' own.
MLPKIT_KERNEL(kThreads, 1)
pass_in_warp(int mistake, const float* from, float* to) {
  float* numbers = reinterpret_cast<float*>(device::shared_memory());
  const uint32_t me = device::thread_index(), lane = me % device::kWarp, across = me - lane + device::kWarp - 1 - lane;
  float number;
  device::load(from + me, number);
  if (mistake != read_unwritten || me != 7) device::store(numbers + me, number);
  if (mistake != no_warp_barrier) device::sync_warp();
  if (mistake == lanes_apart && lane == 3) device::ballot(true);
  if (mistake == shuffle_missed && lane == 3) return;
  number = device::shuffle(number, 0);
  device::load(numbers + across, number);
  device::sync_part(1 + me / device::kWarp, device::kWarp);
  device::store(numbers + me, number + 1);
  device::load(numbers + me, number);
  device::store(to + me, number);
}

// 16 bytes a thread by cp.async, in two groups.
MLPKIT_KERNEL(kThreads, 1)
pass_by_copies(int mistake, const float* from, float* to) {
  float* numbers = reinterpret_cast<float*>(device::shared_memory());
  const uint32_t me = device::thread_index(), across = kThreads - 1 - me;
  constexpr int half = 4 * kThreads;
  device::copy16_async(numbers + 4 * me, from + 4 * me + (mistake == misaligned ? 1 : 0));
  device::commit_copies();
  device::copy16_async(numbers + half + 4 * me, from, false);
  device::commit_copies();
  float piece[4];
  if (mistake != no_wait_for_copy) device::wait_for_copies<1>();
  if (mistake != no_barrier_after_copy) device::sync();
  device::load16(numbers + 4 * across, piece);
  if (mistake != copy_left_under_way) device::wait_for_copies<0>();
  device::sync();
  float zero[4] = {};
  if (mistake != copy_left_under_way) device::load16(numbers + half + 4 * across, zero);
  if (mistake == copy_over_what_is_read) {
    device::copy16_async(numbers + half + 4 * me, from + 4 * me);
    device::commit_copies();
    device::wait_for_copies<0>();
  }
  for (int i = 0; i < 4; ++i) piece[i] += zero[i] + 1;
  device::store16(to + 4 * me, piece);
}

// c = a b + c for one warp: a [16, 16], b [16, 8] row by row if `by_rows` (else its transpose), c [16, 8].
template <class T>
MLPKIT_KERNEL(device::kWarp, 1)
multiply(const T* a, const T* b, float* c, bool by_rows, bool one_at_a_time) {
  MLPKIT_SHARED(T, left, 256);
  MLPKIT_SHARED(T, right, 128);
  const uint32_t lane = device::thread_index(), group = lane / 4, pair = lane % 4 * 2;
  device::store_bits16(left + 8 * lane, device::load_bits16(a + 8 * lane));
  if (lane < 16) device::store_bits16(right + 8 * lane, device::load_bits16(b + 8 * lane));
  device::sync_warp();
  uint32_t of_a[4], of_b[2], one[1];
  if (one_at_a_time) {
    for (int i = 0; i < 4; ++i) {
      device::load_matrices<false>(left + 16 * (i % 2 * 8 + lane % 8) + i / 2 * 8, one);
      of_a[i] = one[0];
    }
  } else {
    device::load_matrices<false>(left + 16 * (lane % 16) + lane / 16 * 8, of_a);
  }
  if (by_rows)
    device::load_matrices<true>(right + 8 * (lane % 16), of_b);
  else
    device::load_matrices<false>(right + 16 * (lane % 8) + lane / 8 % 2 * 8, of_b);
  float sums[4];
  for (int i = 0; i < 4; ++i) device::load(c + 8 * (group + i / 2 * 8) + pair + i % 2, sums[i]);
  device::multiply_add(sums, of_a, of_b, T{});
  for (int i = 0; i < 4; ++i) device::store(c + 8 * (group + i / 2 * 8) + pair + i % 2, sums[i]);
}

// c = a b + c for one warp in tf32: a [16, 8], b [8, 8], c [16, 8].
MLPKIT_KERNEL(device::kWarp, 1)
multiply_tf32(const float* a, const float* b, float* c) {
  const uint32_t lane = device::thread_index(), group = lane / 4, column = lane % 4;
  uint32_t of_a[4], of_b[2];
  for (int i = 0; i < 4; ++i) of_a[i] = device::load4(a + 8 * (group + i % 2 * 8) + column + i / 2 * 4);
  for (int i = 0; i < 2; ++i) of_b[i] = device::load4(b + 8 * (column + i * 4) + group);
  float sums[4];
  for (int i = 0; i < 4; ++i) device::load(c + 8 * (group + i / 2 * 8) + 2 * column + i % 2, sums[i]);
  device::multiply_add_tf32(sums, of_a, of_b);
  for (int i = 0; i < 4; ++i) device::store(c + 8 * (group + i / 2 * 8) + 2 * column + i % 2, sums[i]);
}

// to = {ballot of odd numbers, sum, largest, or} of the warp's numbers, and how many blocks there were in all.
MLPKIT_KERNEL(device::kWarp, 1)
vote(const uint32_t* from, uint32_t* to) {
  uint32_t number;
  device::load(from + device::thread_index(), number);
  const uint32_t found[4] = {device::ballot(number % 2), device::reduce_add(number), device::reduce_max(number),
                             device::reduce_or(number)};
  if (device::thread_index() != 0) return;
  for (int i = 0; i < 4; ++i) device::store(to + i, found[i]);
  device::fence();
  device::atomic_add(to + 4, 1);
}

}  // namespace

extern "C" {

int emulate_pass(int kernel, int mistake, const float* from, float* to) {
  const device::Grid grid{1, kThreads, kernel == 0 ? 0 : 8 * kThreads * static_cast<int>(sizeof(float))};
  const auto body = kernel == 0 ? pass_across : kernel == 1 ? pass_in_warp : pass_by_copies;
  return device::launch(body, grid, nullptr, mistake, from, to);
}

int emulate_multiply(int dtype, const void* a, const void* b, float* c, int by_rows, int one_at_a_time) {
  const device::Grid grid{1, device::kWarp};
  const bool rows = by_rows, one = one_at_a_time;
  switch (static_cast<Dtype>(dtype)) {
    case Dtype::bfloat16:
      return device::launch(multiply<BFloat16>, grid, nullptr, static_cast<const BFloat16*>(a),
                            static_cast<const BFloat16*>(b), c, rows, one);
    case Dtype::float16:
      return device::launch(multiply<Half>, grid, nullptr, static_cast<const Half*>(a), static_cast<const Half*>(b), c,
                            rows, one);
    default:
      return device::launch(multiply_tf32, grid, nullptr, static_cast<const float*>(a), static_cast<const float*>(b),
                            c);
  }
}

int emulate_vote(int64_t blocks, const uint32_t* from, uint32_t* to) {
  return device::launch(vote, {blocks, device::kWarp}, nullptr, from, to);
}

}  // extern "C"
