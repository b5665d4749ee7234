// All that kernels know of the device: indices, shuffles, 16-byte accesses, conversions, launches (cuda). No other file
// of csrc/cuda names a CUDA built-in, so a file of this name for the host compiler runs the same kernels on the CPU.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "core/dtype.h"

// blocks: how many of them a multiprocessor is to hold at once, which caps the registers.
#define MLPKIT_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define MLPKIT_DEVICE __device__ __forceinline__

namespace mlpkit::device {

constexpr int kWarp = 32;

MLPKIT_DEVICE uint32_t block_index() { return blockIdx.x; }
MLPKIT_DEVICE uint32_t thread_index() { return threadIdx.x; }

// The value that another lane of the warp passes to the same call. Every lane of the warp calls it.
template <class F>
MLPKIT_DEVICE F shuffle(F value, uint32_t from_lane) {
  return __shfl_sync(0xffffffffu, value, from_lane);
}
template <class F>
MLPKIT_DEVICE F shuffle_xor(F value, uint32_t lane_mask) {
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}

MLPKIT_DEVICE void load(const int64_t* from, int64_t& to) { to = *from; }

// One element from memory to the compute type and back; rounds to nearest even, overflow becomes Inf, NaN stays NaN.
MLPKIT_DEVICE void load(const double* from, double& to) { to = *from; }
MLPKIT_DEVICE void load(const float* from, float& to) { to = *from; }
MLPKIT_DEVICE void load(const BFloat16* from, float& to) { to = to_float(*from); }
MLPKIT_DEVICE void load(const Half* from, float& to) { to = __half2float(__ushort_as_half(from->bits)); }
MLPKIT_DEVICE void store(double* to, double from) { *to = from; }
MLPKIT_DEVICE void store(float* to, float from) { *to = from; }
MLPKIT_DEVICE void store(BFloat16* to, float from) { to->bits = __bfloat16_as_ushort(__float2bfloat16_rn(from)); }
MLPKIT_DEVICE void store(Half* to, float from) { to->bits = __half_as_ushort(__float2half_rn(from)); }

// Sixteen aligned bytes, one access: 16 / sizeof(T) elements.
MLPKIT_DEVICE void load16(const double* from, double* to) {
  const double2 v = *reinterpret_cast<const double2*>(from);
  to[0] = v.x, to[1] = v.y;
}
MLPKIT_DEVICE void load16(const float* from, float* to) {
  const float4 v = *reinterpret_cast<const float4*>(from);
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}
MLPKIT_DEVICE float2 widen_pair(uint32_t pair, BFloat16) {
  return {math::bits_as<float>(pair << 16), math::bits_as<float>(pair & 0xffff0000u)};
}
MLPKIT_DEVICE float2 widen_pair(uint32_t pair, Half) { return __half22float2(math::bits_as<__half2>(pair)); }
MLPKIT_DEVICE uint32_t narrow_pair(float low, float high, BFloat16) {
  return math::bits_as<uint32_t>(__floats2bfloat162_rn(low, high));
}
MLPKIT_DEVICE uint32_t narrow_pair(float low, float high, Half) {
  return math::bits_as<uint32_t>(__floats2half2_rn(low, high));
}

template <class T>
MLPKIT_DEVICE void load16(const T* from, float* to) {
  const uint4 v = *reinterpret_cast<const uint4*>(from);
  const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = widen_pair(pairs[i], T{});
    to[2 * i] = pair.x, to[2 * i + 1] = pair.y;
  }
}

MLPKIT_DEVICE void store16(double* to, const double* from) { *reinterpret_cast<double2*>(to) = {from[0], from[1]}; }
MLPKIT_DEVICE void store16(float* to, const float* from) {
  *reinterpret_cast<float4*>(to) = {from[0], from[1], from[2], from[3]};
}
template <class T>
MLPKIT_DEVICE void store16(T* to, const float* from) {
  *reinterpret_cast<uint4*>(to) = {narrow_pair(from[0], from[1], T{}), narrow_pair(from[2], from[3], T{}),
                                   narrow_pair(from[4], from[5], T{}), narrow_pair(from[6], from[7], T{})};
}

MLPKIT_DEVICE uint32_t load4(const uint8_t* from) { return *reinterpret_cast<const uint32_t*>(from); }
MLPKIT_DEVICE void store4(uint8_t* to, uint32_t from) { *reinterpret_cast<uint32_t*>(to) = from; }

// Queues kernel(args...) on the stream; blocks and threads are one-dimensional.
template <class... Parameters, class... Args>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream,
                   const Args&... args) {
  if (blocks <= 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  kernel<<<static_cast<uint32_t>(blocks), threads, 0, stream>>>(args...);
  return cudaGetLastError();
}

}  // namespace mlpkit::device
