// Column sums by a cascade: 256 rows are summed in a warp, its results by another launch, until one row is left (cuda).
//
// Napkin: a backward pass leaves one row of fp32 sums for 64 rows of dy, so 8192 x 4096 leaves 128 x 4096 x 4 = 2 MB:
// 0.5 us at 4.3 TB/s, one launch, under its latency of about 2 us. 512 warps read 32 bytes of 16 rows at once, 16 rows
// in flight a lane.
#include "cuda/column_sums.h"

#include "cuda/device.h"

namespace mlpkit::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / device::kWarp;
constexpr int kRows = 256;              // of one warp
constexpr int kAcross = 2, kDown = 16;  // lanes: 2 side by side make a 32-byte sector

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class C>
constexpr int kWidth = 16 / sizeof(C);  // columns of one lane

template <class C>
struct Rows {
  const C* from;  // [rows, stride]
  int64_t rows, stride;
};

// Row b of `to` becomes the sum of rows 256 b .. 256 b + 255 of `from`.
template <class C, class T>
MLPKIT_KERNEL(kThreads, 4)
sum_rows(const Rows<C> args, T* to, int64_t cols) {
  constexpr int width = kWidth<C>;
  const uint32_t across = static_cast<uint32_t>(args.stride / (kAcross * width));
  const uint32_t warp = device::block_index() * kWarps + device::thread_index() / device::kWarp;
  const uint32_t lane = device::thread_index() % device::kWarp;
  const int64_t block = warp / across, col = (warp % across * kAcross + lane % kAcross) * width;
  const int64_t first = block * kRows + lane / kAcross;
  if (block * kRows >= args.rows) return;

  C part[kRows / kDown][width] = {};
#pragma unroll
  for (int i = 0; i < kRows / kDown; ++i)
    if (first + i * kDown < args.rows) device::load16(args.from + (first + i * kDown) * args.stride + col, part[i]);
  C sum[width];
#pragma unroll
  for (int k = 0; k < width; ++k) {
#pragma unroll
    for (int step = 1; step < kRows / kDown; step *= 2)
#pragma unroll
      for (int i = 0; i < kRows / kDown; i += 2 * step) part[i][k] += part[i + step][k];
    sum[k] = part[0][k];
#pragma unroll
    for (int lanes = kAcross; lanes < device::kWarp; lanes *= 2) sum[k] += device::shuffle_xor(sum[k], lanes);
  }
  if (lane >= kAcross) return;
#pragma unroll
  for (int k = 0; k < width; ++k)
    if (col + k < cols) device::store(to + block * cols + col + k, sum[k]);
}

// to[0] becomes the sum of from[0 .. cols). One warp; a lane adds 16 numbers at a time.
template <class C, class T>
MLPKIT_KERNEL(device::kWarp, 1)
sum_row(const C* from, T* to, int64_t cols) {
  C sum = 0;
  for (int64_t col = device::thread_index(); col < cols; col += 16 * device::kWarp) {
    C part = 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      C next = 0;
      if (col + i * device::kWarp < cols) device::load(from + col + i * device::kWarp, next);
      part += next;
    }
    sum += part;
  }
#pragma unroll
  for (int lanes = 1; lanes < device::kWarp; lanes *= 2) sum += device::shuffle_xor(sum, lanes);
  if (device::thread_index() == 0) device::store(to, sum);
}

template <class C, class T>
cudaError_t run(const ColumnSums& args, cudaStream_t stream) {
  const int64_t across = args.stride / (kAcross * kWidth<C>);
  C* from = static_cast<C*>(args.from);
  int64_t rows = args.rows;
  const auto blocks = [&] { return ceil_div(ceil_div(rows, kRows) * across, kWarps); };
  while (rows > kRows || args.total) {
    C* sums = from + rows * args.stride;
    const cudaError_t error = device::launch(sum_rows<C, C>, {blocks(), kThreads}, stream,
                                             Rows<C>{from, rows, args.stride}, sums, args.stride);
    if (error != cudaSuccess) return error;
    from = sums;
    rows = ceil_div(rows, kRows);
    if (args.total && rows == 1)
      return device::launch(sum_row<C, T>, {1, device::kWarp}, stream, from, static_cast<T*>(args.to), args.cols);
  }
  return device::launch(sum_rows<C, T>, {blocks(), kThreads}, stream, Rows<C>{from, rows, args.stride},
                        static_cast<T*>(args.to), args.cols);
}

}  // namespace

int64_t column_sums_elements(int64_t rows, int64_t stride) {
  int64_t all = rows;
  do {
    rows = ceil_div(rows, kRows);
    all += rows;
  } while (rows > 1);
  return all * stride;
}

cudaError_t column_sums(const ColumnSums& args, cudaStream_t stream) {
  switch (args.dtype) {
    case Dtype::float64:
      return run<double, double>(args, stream);
    case Dtype::float32:
      return run<float, float>(args, stream);
    case Dtype::bfloat16:
      return run<float, BFloat16>(args, stream);
    case Dtype::float16:
      return run<float, Half>(args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace mlpkit::cuda
