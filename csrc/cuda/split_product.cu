// The product kernel: 128 x 64 of c by a block of 4 warps, 32 x 64 by a warp, slabs of 32 along depth by cp.async
// (cuda).
//
// A number is the sum of two of tf32, big and small, exact to 22 bits; of their four products the smallest is left out.
// The tensor cores cut their sums off instead of rounding, which over a long depth would cost more than all else: they
// sum three products of eight, and the sum over depth is made of additions that round. Where a number is not finite, or
// big overflows, what is left for small is NaN: a warp that finds its result not finite computes it once more in fp32.
//
// Napkin for 4096 x 4096 x 4096 on an H200: 137 GFLOP, 412 of them tf32; at the rate of mma.sync (300 TFLOP/s) 1.37 ms,
// where SGEMM takes 2.5 (55 TFLOP/s of 67). Issue slots of a warp for 8 of depth: 48 products, 64 additions, 72 to
// split 24 registers, 20 for the rest: 204 for 16 thousand multiply-adds, at four a clock on 132 multiprocessors
// 0.93 ms; whole-number instructions of the split at half that rate: 0.5 ms of a pipe of its own. From L2 come 6.4 GB,
// 1.1 ms beneath it. To reach: 1.8 ms, 1.4 x SGEMM.
#include "cuda/split_product.h"

#include "cuda/device.h"
#include "cuda/thin_tile.h"

namespace mlpkit::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 128, kCols = 64, kSlab = 32, kStages = 3;
constexpr int kWarpRows = kRows / (kThreads / device::kWarp);
constexpr int kDown = kWarpRows / 16, kAcross = kCols / 8;  // m16n8 products of a warp
constexpr int kBytesOfA = kRows * kSlab * 4, kStageBytes = kBytesOfA + kCols * kSlab * 4;
constexpr int kGroup = 8;  // tiles below each other that run together, so that they share b in L2

struct Split {
  uint32_t big, small;
};

[[maybe_unused]] MLPKIT_DEVICE Split split(uint32_t number) {
  const uint32_t big = (number + 0x1000u) & 0xffffe000u;
  return {big, math::bits_as<uint32_t>(math::bits_as<float>(number) - math::bits_as<float>(big))};
}

// One operand's part of a slab in shared memory: some lines (rows of a or columns of b) of 32 along depth.
template <int tile, bool along_depth>  // whether numbers next to each other in memory follow each other along depth
struct Operand {
  const float* matrix;
  int64_t lines, depth, first;  // first: line

  // A thread copies pieces of 16 bytes below each other; past the end come zeros.
  MLPKIT_DEVICE void fetch(unsigned char* to, int64_t slab) const {
    constexpr int pieces = along_depth ? kSlab / 4 : tile / 4, step = kThreads / pieces;
    const int thread = static_cast<int>(device::thread_index()), piece = thread % pieces;
    const int64_t row = (along_depth ? first : slab) + thread / pieces, rows = along_depth ? lines : depth;
    const int64_t col = (along_depth ? slab : first) + 4 * piece, cols = along_depth ? depth : lines;
    const float* from = matrix + row * cols + col;
#pragma unroll
    for (int i = 0; i < tile * kSlab / 4 / kThreads; ++i) {
      const bool valid = row + i * step < rows && col < cols;
      const int below = thread / pieces + i * step;
      device::copy16_async(to + (along_depth ? swizzled<2 * kSlab>(below, piece) : at(below, piece)),
                           valid ? from : matrix, valid);
      from += step * cols;
    }
  }
  // Pieces of four lines change places so that eight lines of four rows next to each other lie in different banks.
  static MLPKIT_DEVICE int at(int k, int piece) { return (k * (tile / 4) + (piece ^ (k & 3) * 2)) * 16; }

  // Registers 2 half + i: line + group + 8 half of the slab's column k + lane mod 4 + 4 i, group being lane / 4.
  MLPKIT_DEVICE static void load(const unsigned char* from, int line, int k, uint32_t lane, uint32_t (&to)[4]) {
    if constexpr (along_depth) {
      const int matrix = static_cast<int>(lane / 8), row = line + matrix / 2 * 8 + static_cast<int>(lane % 8);
      device::load_matrices<false>(from + swizzled<2 * kSlab>(row, k / 4 + matrix % 2), to);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at_line = line + static_cast<int>(lane / 4) + i / 2 * 8;
        const int at_k = k + static_cast<int>(lane % 4) + i % 2 * 4;
        to[i] = device::load4(from + at(at_k, at_line / 4) + at_line % 4 * 4);
      }
    }
  }

  MLPKIT_DEVICE float number(int64_t line, int64_t k) const {
    float value;
    device::load(matrix + (along_depth ? line * depth + k : k * lines + line), value);
    return value;
  }
};

template <bool a_along_depth, bool b_along_depth>
struct Warp {
  Operand<kRows, a_along_depth> a;
  Operand<kCols, b_along_depth> b;
  uint32_t lane;
  int row;  // the warp's first in the tile
  float sum[kDown][kAcross][4] = {};

  MLPKIT_DEVICE void multiply(const unsigned char* stage) {
#pragma unroll 1  // more would take registers for operands of products to come, and spill
    for (int k = 0; k < kSlab; k += 8) {
      uint32_t big[kDown][4], small[kDown][4];
#pragma unroll
      for (int i = 0; i < kDown; ++i) {
        uint32_t whole[4];
        a.load(stage, row + 16 * i, k, lane, whole);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const Split parts = split(whole[r]);
          const int to = r % 2 * 2 + r / 2;  // the product wants both halves of the lines first
          big[i][to] = parts.big, small[i][to] = parts.small;
        }
      }
#pragma unroll
      for (int j = 0; j < kAcross; j += 2) {
        uint32_t whole[4];
        b.load(stage + kBytesOfA, 8 * j, k, lane, whole);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Split parts[2] = {split(whole[2 * half]), split(whole[2 * half + 1])};
          const uint32_t b_big[2] = {parts[0].big, parts[1].big}, b_small[2] = {parts[0].small, parts[1].small};
#pragma unroll
          for (int i = 0; i < kDown; ++i) {
            float part[4] = {};
            device::multiply_add_tf32(part, small[i], b_big);
            device::multiply_add_tf32(part, big[i], b_small);
            device::multiply_add_tf32(part, big[i], b_big);
#pragma unroll
            for (int r = 0; r < 4; ++r) sum[i][j + half][r] += part[r];
          }
        }
      }
    }
  }

  // Element r of product (i, j), of the tile.
  MLPKIT_DEVICE int row_of(int i, int r) const { return row + 16 * i + static_cast<int>(lane / 4) + r / 2 * 8; }
  MLPKIT_DEVICE int col_of(int j, int r) const { return 8 * j + static_cast<int>(lane % 4) * 2 + r % 2; }

  MLPKIT_DEVICE bool finite() const {
    float zero = 0;
#pragma unroll
    for (int i = 0; i < kDown; ++i)
#pragma unroll
      for (int j = 0; j < kAcross; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r) zero += sum[i][j][r] * 0.0f;
    return device::ballot(zero != 0.0f) == 0;
  }

  MLPKIT_DEVICE void write(float* c) const {
#pragma unroll
    for (int i = 0; i < kDown; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t at_row = a.first + row_of(i, 2 * half);
#pragma unroll
        for (int j = 0; j < kAcross; ++j) {
          const int64_t at_col = b.first + col_of(j, 0);
          if (at_row < a.lines && at_col < b.lines)
            device::store_pair(c + at_row * b.lines + at_col, sum[i][j][2 * half], sum[i][j][2 * half + 1]);
        }
      }
  }

  // The same place, computed in fp32. Rare, so it may be slow, and must not take registers from the rest.
  MLPKIT_DEVICE void repair(float* c) const {
#pragma unroll 1
    for (int i = 0; i < kDown * 2; ++i) {
      const int64_t at_row = a.first + row_of(0, 0) + 8 * i;
#pragma unroll 1
      for (int j = 0; j < kAcross; ++j) {
        const int64_t at_col = b.first + col_of(j, 0);
        if (at_row >= a.lines || at_col >= b.lines) continue;
        float left = 0, right = 0;
#pragma unroll 1
        for (int64_t k = 0; k < a.depth; ++k) {
          const float number = a.number(at_row, k);
          left += number * b.number(at_col, k);
          right += number * b.number(at_col + 1, k);
        }
        device::store_pair(c + at_row * b.lines + at_col, left, right);
      }
    }
  }
};

MLPKIT_HD int64_t tiles(int64_t size, int tile) { return (size + tile - 1) / tile; }

template <bool a_along_depth, bool b_along_depth>
MLPKIT_KERNEL(kThreads, 3)
multiply_split(const SplitProduct args) {
  if constexpr (device::kTensorCores) {
    const int64_t down = tiles(args.rows, kRows), across = tiles(args.cols, kCols);
    const int64_t group = device::block_index() / (kGroup * across), inside = device::block_index() % (kGroup * across);
    const int64_t height = min_of(kGroup, down - group * kGroup);
    const int64_t first_row = (group * kGroup + inside % height) * kRows, first_col = inside / height * kCols;
    Warp<a_along_depth, b_along_depth> mine{{args.a, args.rows, args.depth, first_row},
                                            {args.b, args.cols, args.depth, first_col},
                                            device::thread_index() % device::kWarp,
                                            static_cast<int>(device::thread_index() / device::kWarp) * kWarpRows};
    unsigned char* shared = device::shared_memory();
    const auto fetch = [&](int64_t slab, int stage) {
      if (slab * kSlab < args.depth) {
        mine.a.fetch(shared + stage * kStageBytes, slab * kSlab);
        mine.b.fetch(shared + stage * kStageBytes + kBytesOfA, slab * kSlab);
      }
      device::commit_copies();
    };
    for (int stage = 0; stage < kStages - 1; ++stage) fetch(stage, stage);
    int stage = 0;
    for (int64_t slab = 0; slab * kSlab < args.depth; ++slab) {
      device::wait_for_copies<kStages - 2>();
      device::sync();  // this slab is here, and the one before has been read by all
      fetch(slab + kStages - 1, stage == 0 ? kStages - 1 : stage - 1);
      mine.multiply(shared + stage * kStageBytes);
      stage = stage == kStages - 1 ? 0 : stage + 1;
    }
    if (mine.finite())
      mine.write(args.c);
    else
      mine.repair(args.c);
  }
}

int64_t blocks(const SplitProduct& args) { return tiles(args.rows, kRows) * tiles(args.cols, kCols); }

}  // namespace

bool split_takes(const SplitProduct& args) {
  const int64_t of_a = args.layout == SplitLayout::of_transposed_a ? args.rows : args.depth;
  const int64_t of_b = args.layout == SplitLayout::of_weight ? args.depth : args.cols;
  return device::capability() >= 80 && args.rows > 0 && args.cols > 0 && args.depth > 0 && of_a % 4 == 0 &&
         of_b % 4 == 0 && args.cols % 4 == 0 && blocks(args) <= INT32_MAX &&
         device::shared_memory_limit() >= kStages * kStageBytes;
}

bool split_pays(const SplitProduct& args) {
  constexpr int64_t least_depth = 256;
  return args.depth >= least_depth && blocks(args) >= device::multiprocessors();
}

cudaError_t split_product(const SplitProduct& args, cudaStream_t stream) {
  if (!split_takes(args) || !on_16_bytes(args.a) || !on_16_bytes(args.b) || !on_16_bytes(args.c))
    return cudaErrorInvalidValue;
  const device::Grid grid{blocks(args), kThreads, kStages * kStageBytes};
  switch (args.layout) {
    case SplitLayout::of_weight:
      return device::launch(multiply_split<true, true>, grid, stream, args);
    case SplitLayout::plain:
      return device::launch(multiply_split<true, false>, grid, stream, args);
    case SplitLayout::of_transposed_a:
      return device::launch(multiply_split<false, false>, grid, stream, args);
  }
  return cudaErrorInvalidValue;
}

}  // namespace mlpkit::cuda
