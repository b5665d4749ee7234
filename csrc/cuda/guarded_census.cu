// The first launch of guarded_update.h: every block looks at chunks of gradients, and the last one to finish decides
// for all; with the table's upload, and the trial of updates that no bound vouches for (cuda).
//
// Napkin for an H200 (4.3 TB/s, 1.7 GHz, 132 multiprocessors), n elements of float32: 4 n bytes read, 93 us for 100
// million; a conversion to double and one double multiply-add an element, 64 a clock, 28 us beside it. 512 threads a
// multiprocessor have 64 bytes each under way, 32 KB, where latency times bandwidth asks for 25. The deciding block
// reads 16 bytes a chunk, 5 us for 3000 chunks, and 200 a row: 3 us for up to 256 rows. A launch: 2 us.
#include "cuda/guarded_decision.h"

namespace mlpkit::cuda {
namespace {

constexpr int kThreads = kGuardedThreads, kLoads = 4;

// What a thread has seen of a range: zeros add nothing.
template <class R>
struct Look {
  using Format = typename BitsOf<R>::Format;
  using Bits = typename BitsOf<R>::Bits;
  double squares[2] = {0, 0};
  Bits top = 0, signs = 0;  // top: of the finite ones
  uint32_t nan = 0, inf = 0, from_end = 0;

  // Elements [at, at + count) of a chunk of `all`.
  template <int count>
  MLPKIT_DEVICE void see(const R* x, int64_t at, int64_t all) {
    Bits most = 0;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const Bits bits = math::bits_as<Bits>(x[i]), magnitude = bits & Format::magnitude;
      signs |= bits;
      most = magnitude > most ? magnitude : most;
    }
    if (most < Format::infinity) {
      top = most > top ? most : top;
#pragma unroll
      for (int i = 0; i < count; ++i) {
        const double wide = x[i];
        squares[i % 2] = math::multiply_add(wide, wide, squares[i % 2]);
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const Bits magnitude = math::bits_as<Bits>(x[i]) & Format::magnitude;
      if (magnitude < Format::infinity) {
        const double wide = x[i];
        squares[i % 2] = math::multiply_add(wide, wide, squares[i % 2]);
        top = magnitude > top ? magnitude : top;
        continue;
      }
      (magnitude > Format::infinity ? nan : inf) += 1;
      const uint32_t left = static_cast<uint32_t>(all - at - i);
      from_end = left > from_end ? left : from_end;
    }
  }
};

template <class T>
MLPKIT_DEVICE void look_at(const T* from, int64_t all, Look<typename ComputedIn<T>::R>& look) {
  using R = typename ComputedIn<T>::R;
  constexpr int step = 16 / sizeof(T);
  const bool even = aligned(from);
  for (int64_t base = 0; base < all; base += kThreads * step * kLoads) {
    R x[kLoads][step];
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int64_t at = base + (k * kThreads + device::thread_index()) * step, left = all - at;
      load_elements<false, step>(from + at, even && left >= step, left, x[k]);
    }
#pragma unroll
    for (int k = 0; k < kLoads; ++k)
      look.template see<step>(x[k], base + (k * kThreads + device::thread_index()) * step, all);
  }
}

// The same for all threads of the block. from_end, nan and inf are those of this thread's warp, in every lane.
struct Seen {
  double squares;
  uint64_t top;
  uint32_t nan, inf, from_end;
  bool bad, negative;
};
template <class R>
MLPKIT_DEVICE Seen all_of(const Look<R>& look, double* shared) {
  using Bits = typename BitsOf<R>::Bits;
  Seen seen{};
  const uint64_t top = as_double(warp_max(look.top));
  const bool negative = device::ballot((look.signs & BitsOf<R>::Format::sign) != Bits{0}) != 0;
  if (device::ballot(look.from_end > 0)) {
    seen.nan = device::reduce_add(look.nan);
    seen.inf = device::reduce_add(look.inf);
    seen.from_end = device::reduce_max(look.from_end);
  }
  const uint32_t warp = device::thread_index() / device::kWarp;
  seen.squares = over_block<Plus>(look.squares[0] + look.squares[1], shared);
  // Magnitude, and flags in the sign bit and beside it: the block's maximum of each.
  if (device::thread_index() % device::kWarp == 0) {
    device::store(shared + kGuardedWarps + warp, math::bits_as<double>(top));
    device::store(shared + 2 * kGuardedWarps + warp, (seen.from_end ? 2.0 : 0.0) + (negative ? 1.0 : 0.0));
  }
  device::sync();
#pragma unroll
  for (int i = 0; i < kGuardedWarps; ++i) {
    const uint64_t one = math::bits_as<uint64_t>(number_at(shared + kGuardedWarps + i));
    const double flags = number_at(shared + 2 * kGuardedWarps + i);
    seen.top = one > seen.top ? one : seen.top;
    seen.bad = seen.bad || flags >= 2;
    seen.negative = seen.negative || flags == 1 || flags == 3;
  }
  return seen;
}

MLPKIT_DEVICE Seen census_of(Dtype dtype, const void* data, const Chunk& chunk, double* shared) {
  if (dtype == Dtype::float64) {
    Look<double> look;
    look_at(static_cast<const double*>(data) + chunk.begin, chunk.count, look);
    return all_of(look, shared);
  }
  Look<float> look;
  if (dtype == Dtype::float32)
    look_at(static_cast<const float*>(data) + chunk.begin, chunk.count, look);
  else if (dtype == Dtype::bfloat16)
    look_at(static_cast<const BFloat16*>(data) + chunk.begin, chunk.count, look);
  else
    look_at(static_cast<const Half*>(data) + chunk.begin, chunk.count, look);
  return all_of(look, shared);
}

MLPKIT_DEVICE void look_at_chunk(const GuardedUpdateArgs& args, int64_t number, double* shared) {
  const int32_t i = static_cast<int32_t>(device::load4(args.row_of_chunk + number));
  const void* gradient = gradient_of(args, i);
  if (!gradient) return;
  const GuardedTensor row = read(args.table + i);
  const Chunk chunk = chunk_at(args, number, row, i);
  GuardedTally* tally = args.tally + i;
  const bool first = device::thread_index() == 0;
  const Seen g = census_of(row.gradient_dtype, gradient, chunk, shared);
  if (first) {
    device::store(args.parts + 2 * number, g.squares);
    device::atomic_max(&tally->top, g.top);
  }
  if (g.from_end && device::thread_index() % device::kWarp == 0) {
    if (g.nan) device::atomic_add(&tally->nan, static_cast<uint64_t>(g.nan));
    if (g.inf) device::atomic_add(&tally->inf, static_cast<uint64_t>(g.inf));
    const int64_t index = chunk.begin + chunk.count - g.from_end;
    device::atomic_max(&tally->from_end, (uint64_t{1} << 62) - static_cast<uint64_t>(index));
  }
  const bool norms = args.kind == Optimizer::lars || args.kind == Optimizer::lamb;
  const double known = number_at(args.bounds + 4 * static_cast<int64_t>(row.index));
  const void* const state[4] = {row.p, row.first, row.second, row.third};
#pragma unroll 1
  for (int k = 0; k < 4; ++k) {
    const void* data = k == 0 ? state[0] : k == 1 ? state[1] : k == 2 ? state[2] : state[3];
    if (!data || (known == known && !(norms && k == 0))) continue;
    const Seen one = census_of(row.dtype, data, chunk, shared);
    if (!first) continue;
    if (k == 0 && norms) device::store(args.parts + 2 * number + 1, one.squares);
    const bool wrong = one.bad || (k == 2 && one.negative);
    device::atomic_max(&tally->seen[k], wrong ? math::bits_as<uint64_t>(kGuardedNan) : one.top);
  }
}

MLPKIT_KERNEL(kThreads, 2)
census(const GuardedUpdateArgs args) {
  MLPKIT_SHARED(double, shared, 3 * kGuardedWarps);
  for (int64_t chunk = device::block_index(); chunk < args.chunks; chunk += device::blocks())
    look_at_chunk(args, chunk, shared);
  if (last_block(args.finished, shared)) decide(args, shared);
}

MLPKIT_KERNEL(kThreads, 2)
attempt(const GuardedUpdateArgs args) {
  MLPKIT_SHARED(double, shared, kGuardedWarps);
  if (number_at(&args.decision->taken) != 2) return;
  const double factor = number_at(&args.decision->factor);
  for (int64_t number = device::block_index(); number < args.chunks; number += device::blocks()) {
    const int32_t i = static_cast<int32_t>(device::load4(args.row_of_chunk + number));
    const GuardedTensor row = read(args.table + i);
    if (!gradient_of(args, i) || number_at(&args.settings[i].doubtful) == 0) continue;
    const bool bad = fails(args, row, i, factor, chunk_at(args, number, row, i));
    if (over_block<Larger>(bad ? 1.0 : 0.0, shared) > 0 && device::thread_index() == 0)
      device::atomic_max(args.finished + 1, 0xffffffffu - static_cast<uint32_t>(row.index));
  }
  if (!last_block(args.finished, shared)) return;
  uint32_t worst;
  device::load(args.finished + 1, worst);
  device::sync();
  if (device::thread_index() == 0) device::store(args.finished + 1, 0u);
  GuardedDecision d = read(args.decision);
  device::sync();
  judge_trial(args, d, worst ? static_cast<double>(0xffffffffu - worst) : kNowhere);
  conclude(args, d);
}

struct Words {
  uint64_t* to;
  int32_t count;
  uint64_t word[kGuardedWords];
};

MLPKIT_KERNEL(kThreads, 2)
upload(const Words words) {
  for (int32_t i = static_cast<int32_t>(device::thread_index()); i < words.count; i += kThreads)
    device::store(words.to + i, words.word[i]);
}

// The last row that begins at or before a chunk: rows without elements come at the end and have none.
MLPKIT_KERNEL(kThreads, 2)
number_chunks(const GuardedTensor* table, int32_t rows, int32_t chunks, int32_t* row_of_chunk) {
  const int64_t chunk = device::block_index() * int64_t{kThreads} + device::thread_index();
  if (chunk >= chunks) return;
  int32_t low = 0, high = rows;  // table[low] begins at or before it, table[high] after it or is empty
  while (high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    int64_t first, count;
    device::load(&table[middle].first_chunk, first);
    device::load(&table[middle].count, count);
    (first <= chunk && count > 0 ? low : high) = middle;
  }
  device::store4(row_of_chunk + chunk, static_cast<uint32_t>(low));
}

}  // namespace

cudaError_t guarded_census(const GuardedUpdateArgs& args, cudaStream_t stream) {
  const int64_t blocks = guarded_blocks(args.chunks, 2);
  const cudaError_t error = device::launch(census, {blocks, kThreads}, stream, args);
  if (error != cudaSuccess || !args.tries) return error;
  return device::launch(attempt, {blocks, kThreads}, stream, args);
}

cudaError_t guarded_upload(uint64_t* to, const uint64_t* words, int64_t count, cudaStream_t stream) {
  for (int64_t at = 0; at < count; at += kGuardedWords) {
    Words part;
    part.to = to + at;
    part.count = static_cast<int32_t>(count - at < kGuardedWords ? count - at : kGuardedWords);
    memcpy(part.word, words + at, part.count * sizeof(uint64_t));
    const cudaError_t error = device::launch(upload, {1, kThreads}, stream, part);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t guarded_number_chunks(const GuardedTensor* table, int32_t rows, int32_t chunks, int32_t* row_of_chunk,
                                  cudaStream_t stream) {
  return device::launch(number_chunks, {(chunks + kThreads - 1) / kThreads, kThreads}, stream, table, rows, chunks,
                        row_of_chunk);
}

}  // namespace mlpkit::cuda
