// What census and update of guarded_update.h have in common: access to elements, sums over a block (cuda).
#pragma once
#include "core/census.h"
#include "cuda/device.h"
#include "cuda/guarded_update.h"

namespace mlpkit::cuda {

constexpr int kGuardedThreads = 256, kGuardedWarps = kGuardedThreads / device::kWarp;
constexpr double kNowhere = 0x1p62, kGuardedNan = __builtin_nan("");

// The type computed with, and its bits.
template <class T>
struct ComputedIn {
  using R = float;
};
template <>
struct ComputedIn<double> {
  using R = double;
};
template <class R>
struct BitsOf {
  using Format = Float32Format;
  using Bits = uint32_t;
};
template <>
struct BitsOf<double> {
  using Format = Float64Format;
  using Bits = uint64_t;
};

MLPKIT_DEVICE bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// Sixteen bytes as numbers and back.
MLPKIT_DEVICE void unpack(const device::Bits16& bits, double* to, double) {
#pragma unroll
  for (int i = 0; i < 2; ++i)
    to[i] =
        math::bits_as<double>(static_cast<uint64_t>(bits.v[2 * i]) | static_cast<uint64_t>(bits.v[2 * i + 1]) << 32);
}
MLPKIT_DEVICE void unpack(const device::Bits16& bits, float* to, float) {
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = math::bits_as<float>(bits.v[i]);
}
template <class T>
MLPKIT_DEVICE void unpack(const device::Bits16& bits, float* to, T) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = device::widen_pair(bits.v[i], T{});
    to[2 * i] = pair.x, to[2 * i + 1] = pair.y;
  }
}

// `count` elements of which `left` exist; the others are 0 and not touched. wide: all exist, and begin at 16 bytes.
// once: nothing else of this step reads them.
template <bool once, int count, class T, class R>
MLPKIT_DEVICE void load_elements(const T* from, bool wide, int64_t left, R* to) {
  constexpr int step = 16 / sizeof(T);
  static_assert(count % step == 0, "whole accesses");
  if (wide) {
#pragma unroll
    for (int i = 0; i < count; i += step)
      unpack(once ? device::load_bits16_once(from + i) : device::load_bits16(device::global(from + i)), to + i, T{});
    return;
  }
#pragma unroll
  for (int i = 0; i < count; ++i) {
    to[i] = 0;
    if (i < left) device::load(from + i, to[i]);
  }
}
template <int count, class T, class R>
MLPKIT_DEVICE void store_elements(T* to, bool wide, int64_t left, const R* from) {
  constexpr int step = 16 / sizeof(T);
  if (wide) {
#pragma unroll
    for (int i = 0; i < count; i += step) device::store16(device::global(to + i), from + i);
    return;
  }
#pragma unroll
  for (int i = 0; i < count; ++i)
    if (i < left) device::store(to + i, from[i]);
}
// One element of any type; R is double where the type is float64 and nowhere else.
template <class R>
MLPKIT_DEVICE R element(Dtype dtype, const void* from, int64_t at) {
  R x = 0;
  if constexpr (sizeof(R) == 8) {
    device::load(device::global(static_cast<const double*>(from) + at), x);
  } else if (dtype == Dtype::bfloat16) {
    device::load(device::global(static_cast<const BFloat16*>(from) + at), x);
  } else if (dtype == Dtype::float16) {
    device::load(device::global(static_cast<const Half*>(from) + at), x);
  } else {
    device::load(device::global(static_cast<const float*>(from) + at), x);
  }
  return x;
}

// A struct of whole 16-byte words, in global memory and back.
template <class S>
MLPKIT_DEVICE S read(const S* from) {
  constexpr int words = (sizeof(S) + 15) / 16;
  device::Bits16 bits[words];
#pragma unroll
  for (int i = 0; i < words; ++i) bits[i] = device::load_bits16(reinterpret_cast<const unsigned char*>(from) + 16 * i);
  S result;
  memcpy(&result, bits, sizeof(S));
  return result;
}
template <class S>
MLPKIT_DEVICE void write(S* to, const S& from) {
  constexpr int words = (sizeof(S) + 15) / 16;
  device::Bits16 bits[words] = {};
  memcpy(bits, &from, sizeof(S));
#pragma unroll
  for (int i = 0; i < words; ++i) device::store_bits16(reinterpret_cast<unsigned char*>(to) + 16 * i, bits[i]);
}
MLPKIT_DEVICE double number_at(const double* from) {
  double x;
  device::load(from, x);
  return x;
}

struct Chunk {
  int32_t row;
  int64_t begin, count;
};
MLPKIT_DEVICE Chunk chunk_at(const GuardedUpdateArgs& args, int64_t chunk, const GuardedTensor& row, int32_t i) {
  const int64_t begin = (chunk - row.first_chunk) * args.chunk, left = row.count - begin;
  return {i, begin, left < args.chunk ? left : args.chunk};
}
MLPKIT_DEVICE int64_t chunks_of(const GuardedUpdateArgs& args, const GuardedTensor& row) {
  return (row.count + args.chunk - 1) / args.chunk;
}
MLPKIT_DEVICE const void* gradient_of(const GuardedUpdateArgs& args, int32_t row) {
  if (!args.gradients) return args.gradient[row];
  uint64_t address;
  device::load(reinterpret_cast<const uint64_t*>(args.gradients) + row, address);
  return reinterpret_cast<const void*>(address);
}

// The result of op over the values of all threads, in every thread and in a fixed order. shared: [kGuardedWarps]; free
// again after the next barrier.
struct Plus {
  MLPKIT_DEVICE static double of(double a, double b) { return a + b; }
};
struct Larger {  // NaN stays
  MLPKIT_DEVICE static double of(double a, double b) { return b <= a ? a : b; }
};
struct Smaller {
  MLPKIT_DEVICE static double of(double a, double b) { return b < a ? b : a; }
};
template <class Op>
MLPKIT_DEVICE double over_warp(double value) {
#pragma unroll
  for (int lanes = 1; lanes < device::kWarp; lanes *= 2) value = Op::of(value, device::shuffle_xor(value, lanes));
  return value;
}
template <class Op>
MLPKIT_DEVICE double over_block(double value, double* shared) {
  value = over_warp<Op>(value);
  device::sync();
  if (device::thread_index() % device::kWarp == 0)
    device::store(shared + device::thread_index() / device::kWarp, value);
  device::sync();
  double result = number_at(shared);
#pragma unroll
  for (int warp = 1; warp < kGuardedWarps; ++warp) result = Op::of(result, number_at(shared + warp));
  return result;
}
MLPKIT_DEVICE uint32_t warp_max(uint32_t value) { return device::reduce_max(value); }
MLPKIT_DEVICE uint64_t warp_max(uint64_t value) {
#pragma unroll
  for (int lanes = 1; lanes < device::kWarp; lanes *= 2) {
    const uint64_t other = device::shuffle_xor(value, lanes);
    value = other > value ? other : value;
  }
  return value;
}
// A magnitude as the bits of a double: these grow with it too, NaN above Inf above all others.
MLPKIT_DEVICE uint64_t as_double(uint32_t magnitude) {
  return math::bits_as<uint64_t>(static_cast<double>(math::bits_as<float>(magnitude)));
}
MLPKIT_DEVICE uint64_t as_double(uint64_t magnitude) { return magnitude; }

// Whether this block is the last of the grid to come here; all others' writes are then seen.
MLPKIT_DEVICE bool last_block(uint32_t* finished, double* shared) {
  device::fence();
  device::sync();
  if (device::thread_index() == 0) {
    const bool last = device::atomic_add(finished, 1) + 1 == device::blocks();
    if (last) device::store(finished, 0u);
    device::store(shared, last ? 1.0 : 0.0);
  }
  device::sync();
  const bool last = number_at(shared) != 0;
  device::fence();
  device::sync();
  return last;
}

// Resident blocks, or fewer where there is less to do; one at least, since somebody must decide.
inline int64_t guarded_blocks(int64_t chunks, int resident) {
  const int64_t most = static_cast<int64_t>(device::multiprocessors()) * resident;
  return chunks < 1 ? 1 : chunks < most || most < 1 ? chunks : most;
}

}  // namespace mlpkit::cuda
