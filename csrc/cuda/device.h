// All that kernels know of the device: indices, barriers, shuffles, memory, tensor-core products, launches (cuda). No
// other file of csrc/cuda names a CUDA built-in, so a file of this name for the host compiler runs the same kernels on
// the CPU. All accesses to memory, global and shared, go through the functions here: there they are checked.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "core/dtype.h"

// blocks: how many of them a multiprocessor is to hold at once, which caps the registers.
#define MLPKIT_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define MLPKIT_DEVICE __device__ __forceinline__
// An array in the block's shared memory, static; at the top of a kernel.
#define MLPKIT_SHARED(T, name, count) __shared__ __align__(16) T name[count]

namespace mlpkit::device {

constexpr int kWarp = 32;

// Sixteen bytes as they are.
struct Bits16 {
  uint32_t v[4];
};

MLPKIT_DEVICE uint32_t block_index() { return blockIdx.x; }
MLPKIT_DEVICE uint32_t blocks() { return gridDim.x; }
MLPKIT_DEVICE uint32_t thread_index() { return threadIdx.x; }

// The block's dynamic shared memory, of the size that it was launched with; aligned to 128 bytes.
MLPKIT_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char mlpkit_shared_memory[];
  return mlpkit_shared_memory;
}

// All threads of the block; `threads` of them, whole warps, at barrier 1 to 15; the lanes of a warp.
MLPKIT_DEVICE void sync() { __syncthreads(); }
MLPKIT_DEVICE void sync_part(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
MLPKIT_DEVICE void sync_warp() { __syncwarp(); }

// What this thread wrote before, every thread of the grid sees before what it writes after.
MLPKIT_DEVICE void fence() { __threadfence(); }
// Integers in global memory only: a sum of floats in no fixed order is not deterministic. Returns the number before.
MLPKIT_DEVICE uint32_t atomic_add(uint32_t* to, uint32_t value) { return atomicAdd(to, value); }
MLPKIT_DEVICE void atomic_max(uint32_t* to, uint32_t value) { atomicMax(to, value); }
MLPKIT_DEVICE void atomic_add(uint64_t* to, uint64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
}
MLPKIT_DEVICE void atomic_max(uint64_t* to, uint64_t value) {
  atomicMax(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
}

// The value that another lane of the warp passes to the same call. Every lane of the warp calls it.
template <class F>
MLPKIT_DEVICE F shuffle(F value, uint32_t from_lane) {
  return __shfl_sync(0xffffffffu, value, from_lane);
}
template <class F>
MLPKIT_DEVICE F shuffle_xor(F value, uint32_t lane_mask) {
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}
// Over all lanes of the warp; every lane calls it and gets the result. Bit l of a ballot is lane l's.
MLPKIT_DEVICE uint32_t ballot(bool is) { return __ballot_sync(0xffffffffu, is); }
MLPKIT_DEVICE uint32_t reduce_add(uint32_t value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_add_sync(0xffffffffu, value);
#else
  for (int lanes = 1; lanes < kWarp; lanes *= 2) value += shuffle_xor(value, lanes);
  return value;
#endif
}
MLPKIT_DEVICE uint32_t reduce_max(uint32_t value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(0xffffffffu, value);
#else
  for (int lanes = 1; lanes < kWarp; lanes *= 2) value = max(value, shuffle_xor(value, lanes));
  return value;
#endif
}
MLPKIT_DEVICE uint32_t reduce_or(uint32_t value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_or_sync(0xffffffffu, value);
#else
  for (int lanes = 1; lanes < kWarp; lanes *= 2) value |= shuffle_xor(value, lanes);
  return value;
#endif
}

MLPKIT_DEVICE void load(const int64_t* from, int64_t& to) { to = *from; }
MLPKIT_DEVICE void load(const uint32_t* from, uint32_t& to) { to = *from; }
MLPKIT_DEVICE void load(const uint64_t* from, uint64_t& to) { to = *from; }
MLPKIT_DEVICE void store(int64_t* to, int64_t from) { *to = from; }
MLPKIT_DEVICE void store(uint32_t* to, uint32_t from) { *to = from; }
MLPKIT_DEVICE void store(uint64_t* to, uint64_t from) { *to = from; }

// One element from memory to the compute type and back; rounds to nearest even, overflow becomes Inf, NaN stays NaN.
MLPKIT_DEVICE void load(const double* from, double& to) { to = *from; }
MLPKIT_DEVICE void load(const float* from, float& to) { to = *from; }
MLPKIT_DEVICE void load(const BFloat16* from, float& to) { to = to_float(*from); }
MLPKIT_DEVICE void load(const Half* from, float& to) { to = __half2float(__ushort_as_half(from->bits)); }
MLPKIT_DEVICE void store(double* to, double from) { *to = from; }
MLPKIT_DEVICE void store(float* to, float from) { *to = from; }
MLPKIT_DEVICE void store(BFloat16* to, float from) { to->bits = __bfloat16_as_ushort(__float2bfloat16_rn(from)); }
MLPKIT_DEVICE void store(Half* to, float from) { to->bits = __half_as_ushort(__float2half_rn(from)); }

// A pointer that came out of memory: the compiler cannot see by itself that it is one to global memory.
template <class T>
MLPKIT_DEVICE T* global(T* pointer) {
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}

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

MLPKIT_DEVICE uint32_t load4(const void* from) { return *static_cast<const uint32_t*>(from); }
MLPKIT_DEVICE uint32_t load1(const void* from) { return *static_cast<const uint8_t*>(from); }
MLPKIT_DEVICE void store4(void* to, uint32_t from) { *static_cast<uint32_t*>(to) = from; }
MLPKIT_DEVICE void store1(void* to, uint32_t from) { *static_cast<uint8_t*>(to) = static_cast<uint8_t>(from); }
// Two adjacent numbers, one access of 8 bytes.
MLPKIT_DEVICE float2 load_pair(const float* from) { return *reinterpret_cast<const float2*>(from); }
MLPKIT_DEVICE void store_pair(float* to, float low, float high) { *reinterpret_cast<float2*>(to) = {low, high}; }
MLPKIT_DEVICE Bits16 load_bits16(const void* from) {
  const uint4 v = *static_cast<const uint4*>(from);
  return {v.x, v.y, v.z, v.w};
}
MLPKIT_DEVICE void store_bits16(void* to, const Bits16& from) {
  *static_cast<uint4*>(to) = {from.v[0], from.v[1], from.v[2], from.v[3]};
}
// The same for global memory that nothing else of this launch touches: it need not stay in the caches.
MLPKIT_DEVICE Bits16 load_bits16_once(const void* from) {
  const uint4 v = __ldcs(static_cast<const uint4*>(from));
  return {v.x, v.y, v.z, v.w};
}
MLPKIT_DEVICE void store_bits16_once(void* to, const Bits16& from) {
  __stcs(static_cast<uint4*>(to), uint4{from.v[0], from.v[1], from.v[2], from.v[3]});
}

// What follows is made of instructions that begin with compute capability 8.0. A kernel that uses it puts its body
// under `if constexpr (device::kTensorCores)`: for an older device it is empty, and its launch function must refuse
// that.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
constexpr bool kTensorCores = true;
#else
constexpr bool kTensorCores = false;
#endif

MLPKIT_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Sixteen bytes of global memory on their way to shared memory; zeros, and nothing is read, where not valid. They have
// arrived, for this thread, after a wait that leaves fewer groups in flight than were committed since.
MLPKIT_DEVICE void copy16_async(void* to, const void* from, bool valid = true) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
#else
  __trap();
#endif
}
// Four bytes in the same way.
MLPKIT_DEVICE void copy4_async(void* to, const void* from, bool valid = true) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 4 : 0)
               : "memory");
#else
  __trap();
#endif
}
MLPKIT_DEVICE void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int groups_in_flight>
MLPKIT_DEVICE void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(groups_in_flight) : "memory");
#endif
}

// ldmatrix: `count` (1, 2 or 4) matrices of 8 x 8 two-byte elements from shared memory. Lane 8 i + r gives the address
// of row r of matrix i; lane 4 r + c gets elements 2 c and 2 c + 1 of row r of each, or, transposed, of column r.
template <bool transposed, int count>
MLPKIT_DEVICE void load_matrices(const void* row, uint32_t (&to)[count]) {
  static_assert(count == 1 || count == 2 || count == 4, "ldmatrix loads 1, 2 or 4 matrices");
#if __CUDA_ARCH__ >= 800
  const uint32_t from = shared_address(row);
  if constexpr (count == 4 && !transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
  if constexpr (count == 4 && transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
  if constexpr (count == 2 && !transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(from)
                 : "memory");
  if constexpr (count == 2 && transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(from)
                 : "memory");
  if constexpr (count == 1 && !transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(to[0]) : "r"(from) : "memory");
  if constexpr (count == 1 && transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(to[0]) : "r"(from) : "memory");
#else
  __trap();
#endif
}

// d += a b on the tensor cores: a [16, 16] by rows, b [16, 8] by columns, in fragments; sums in fp32. With g = lane / 4
// and c = 2 (lane mod 4), a register of a holds (row g + 8 (i mod 2), columns c + 8 (i / 2) and the next), one of b
// (rows c + 8 i and the next, column g), and d[i] is (row g + 8 (i / 2), column c + i mod 2).
MLPKIT_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], BFloat16) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}
MLPKIT_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Half) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}
// The same for a [16, 8] and b [8, 8] of tf32: a's registers are (row g + 8 (i mod 2), column lane mod 4 + 4 (i / 2)),
// b's (row lane mod 4 + 4 i, column g). Of the operands' bits the lowest 13 do not count.
MLPKIT_DEVICE void multiply_add_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}

// The current device, for those who choose a grid: its multiprocessors, the shared memory a block may ask for, 10 x the
// compute capability.
inline int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&value, which, device) != cudaSuccess) return 0;
  return value;
}
inline int multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount); }
inline int shared_memory_limit() { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
inline int capability() {
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
}

struct Grid {  // one-dimensional
  int64_t blocks;
  int threads;
  int shared_bytes = 0;  // dynamic
  // The multiprocessor's memory is to be shared memory as far as it goes, so that as many blocks fit as can.
  bool mostly_shared = false;
};

// Queues kernel(args...) on the stream.
template <class... Parameters, class... Args>
cudaError_t launch(void (*kernel)(Parameters...), const Grid& grid, cudaStream_t stream, const Args&... args) {
  if (grid.blocks <= 0) return cudaSuccess;
  if (grid.blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (grid.shared_bytes > 48 * 1024) {  // more must be asked for
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, grid.shared_bytes);
    if (error != cudaSuccess) return error;
  }
  if (grid.mostly_shared) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributePreferredSharedMemoryCarveout,
                             cudaSharedmemCarveoutMaxShared);
    if (error != cudaSuccess) return error;
  }
  kernel<<<static_cast<uint32_t>(grid.blocks), grid.threads, grid.shared_bytes, stream>>>(args...);
  return cudaGetLastError();
}

}  // namespace mlpkit::device
