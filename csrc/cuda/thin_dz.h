// A block of the thin backward kernel: 128 rows of its result, a share of the terms, tiles of dz made where dy landed
// (cuda). What it is for: cuda/linear_act_dropout_thin_backward.cu.
#pragma once
#include "core/short_math.h"
#include "cuda/linear_act_dropout_thin.h"
#include "cuda/mask_panel.h"
#include "cuda/thin_tile.h"

namespace mlpkit::cuda::thin_dz {

constexpr int kThreads = 256, kWarps = kThreads / device::kWarp;
constexpr int kResults = 128, kTerms = 64;  // of a tile of dz
constexpr int kTilesASum = 64;              // then the accumulators are added to memory
constexpr int kTileBytes = kResults * kTerms * 2;
constexpr int kBitsBytes = kThreads * 8;  // of one plane
constexpr int kStageLimit = 160 * 1024;   // a block may have 163 KB on compute capability 8.0

template <int depth, bool reads_z>
constexpr int kStageBytes = (reads_z ? 2 : 1) * kTileBytes + kTerms * depth * 2 + 2 * kBitsBytes;
template <int depth, bool reads_z>
constexpr int kStages = kStageLimit / kStageBytes<depth, reads_z> > 4 ? 4 : kStageLimit / kStageBytes<depth, reads_z>;

// The results [results, args.depth] are cut into blocks of 128 rows and `halves` of `depth` features, the terms into
// `shares`. Halves are neighbours, so that the second one finds dy in the L2.
struct Work {
  int64_t results, terms;
  int shares, halves;
  const void* other;  // [terms, depth], T
  void* to;           // [results, depth], T, where no partial sums leave; otherwise nullptr
  float* partial;     // [shares, results, depth], or nullptr
  float* bias_sums;   // [shares, stride], or nullptr: only where results are columns
  float* slope_sums;  // the same
  int64_t stride;
};

// The pieces of 8 columns of dy that a thread loads and turns into dz: rows row + 4 i, i = 0 .. 3, of one column octet.
// A warp has 16 rows and 64 columns, a row of mask tiles; four pieces of a thread share two words of bits.
template <bool along_columns>
struct Pieces {
  static constexpr int width = along_columns ? kResults : kTerms;  // of a tile of dy
  int row, octet, tile_col;                                        // inside the tile

  MLPKIT_DEVICE Pieces() {
    const int lane = static_cast<int>(device::thread_index() % device::kWarp);
    const int warp = static_cast<int>(device::thread_index() / device::kWarp);
    constexpr int across = width / kPanelCols;
    row = warp / across * kMaskTile + lane / 8;
    octet = warp % across * 8 + lane % 8;
    tile_col = octet / 2;
  }
  MLPKIT_DEVICE int offset(int i) const { return swizzled<width>(row + 4 * i, octet); }
};

template <class T, int depth, bool along_columns, bool reads_z>
struct Block {
  static constexpr int kSums = depth / 16;           // m16n8 products side by side in a warp, which has half the depth
  static constexpr int kUnrolled = reads_z ? 2 : 4;  // pieces of dy that are worked on at once

  const ThinBackward& args;
  const Work& work;
  const bool aligned;
  const Pieces<along_columns> pieces;
  int64_t first_result = 0, first_feature = 0;
  float sums[2][kSums][4];
  float dbias[8], dslope[8], slope[8];
  float factor[2] = {1, 1};  // act'(z) for z > 0 and otherwise, where that is all it depends on

  MLPKIT_DEVICE Block(const ThinBackward& args, const Work& work, bool aligned)
      : args(args), work(work), aligned(aligned) {
    visit_activation(args.activation, [&](auto formula) {
      using A = decltype(formula);
      if constexpr (A::needs != Needs::preactivation) {
        factor[0] = A::slope(1.f, static_cast<float>(args.negative_slope));
        // Without a plane of signs the bits have the slope in them already: relu's.
        factor[1] = args.positive ? A::slope(-1.f, static_cast<float>(args.negative_slope)) : factor[0];
      }
    });
  }

  MLPKIT_DEVICE int64_t first_row(int64_t tile) const { return along_columns ? tile * kTerms : first_result; }
  MLPKIT_DEVICE int64_t first_col(int64_t tile) const { return along_columns ? first_result : tile * kTerms; }

  MLPKIT_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < 8 * kSums; ++i) sums[i / (4 * kSums)][i / 4 % kSums][i % 4] = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) dbias[i] = dslope[i] = 0;
  }

  // Eight elements of a [rows, cols] matrix, zero past its end, to shared memory.
  MLPKIT_DEVICE void fetch_piece(unsigned char* to, const void* matrix, int64_t row, int64_t col) const {
    const int64_t left = row < args.rows ? args.cols - col : 0;
    const T* from = static_cast<const T*>(matrix) + (left > 0 ? row * args.cols + col : 0);
    if (aligned) return device::copy16_async(to, from, left > 0);
    float numbers[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      numbers[i] = 0;
      if (i < left) device::load(from + i, numbers[i]);
    }
    device::store16(reinterpret_cast<T*>(to), numbers);
  }

  MLPKIT_DEVICE void fetch(unsigned char* stage, int64_t tile) const {
    const int64_t row = first_row(tile) + pieces.row, col = first_col(tile) + 8 * pieces.octet;
#pragma unroll
    for (int i = 0; i < 4; ++i) fetch_piece(stage + pieces.offset(i), args.dy, row + 4 * i, col);
    unsigned char* next = stage + kTileBytes;
    if (reads_z) {
#pragma unroll
      for (int i = 0; i < 4; ++i) fetch_piece(next + pieces.offset(i), args.z, row + 4 * i, col);
      next += kTileBytes;
    }
    const int64_t col_tiles = (args.cols + kMaskTile - 1) / kMaskTile;
    const int64_t mask_tile = row / kMaskTile * col_tiles + col / kMaskTile;
    const bool inside = row / kMaskTile * kMaskTile < args.rows && col < args.cols;
#pragma unroll
    for (int plane = 0; plane < 2; ++plane) {
      const uint8_t* bits = plane ? args.positive : args.keep;
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (bits)
          device::copy4_async(next + device::thread_index() * 8 + 4 * i,
                              bits + (inside ? mask_tile * kMaskLanes + (row % 8 + 4 * i) * 4 : 0), inside);
      next += kBitsBytes;
    }
    fetch_rows<T, depth, kTerms, kThreads>(next, work.other, tile * kTerms, work.terms, args.depth, first_feature);
  }

  // act'(z), or prelu's slope, for the columns of this thread's pieces.
  MLPKIT_DEVICE void take_slopes(int64_t col) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      slope[i] = static_cast<float>(args.negative_slope);
      if (args.slope && (args.slopes == 1 || col + i < args.cols))
        device::load(static_cast<const T*>(args.slope) + (args.slopes == 1 ? 0 : col + i), slope[i]);
    }
  }

  // The thread's pieces of dy become dz; rows past the end stay zero, even where the slope is Inf or NaN.
  MLPKIT_DEVICE void to_dz(unsigned char* stage, int64_t tile) {
    const unsigned char* planes = stage + (reads_z ? 2 : 1) * kTileBytes + device::thread_index() * 8;
    const int64_t row = first_row(tile) + pieces.row;
    const int lower = 4 * (pieces.octet & 1);
    const float scale = static_cast<float>(args.scale);
    if (reads_z && args.slope && !along_columns) take_slopes(first_col(tile) + 8 * pieces.octet);
#pragma unroll kUnrolled
    for (int i = 0; i < 4; ++i) {
      const int shift = lower + 2 * (i / 2);
      uint32_t keep = 0xffu, positive = 0xffu;
      if (args.keep) keep = gather_pairs(device::load4(planes + 4 * (i % 2)) >> shift);
      if (!reads_z && args.positive) positive = gather_pairs(device::load4(planes + kBitsBytes + 4 * (i % 2)) >> shift);
      T* at = reinterpret_cast<T*>(stage + pieces.offset(i));
      float dz[8];
      device::load16(at, dz);
      if constexpr (reads_z) {
        float z[8];
        device::load16(reinterpret_cast<const T*>(stage + kTileBytes + pieces.offset(i)), z);
        if (along_columns && work.slope_sums) {
#pragma unroll
          for (int k = 0; k < 8; ++k)
            if (row + 4 * i < args.rows) dslope[k] += dz[k] * (keep >> k & 1 ? scale : 0.f) * Prelu::slope_by_a(z[k]);
        }
        visit_activation(args.activation, [&](auto formula) {
          using A = decltype(formula);
          if constexpr (A::needs == Needs::preactivation) {
#pragma unroll
            for (int k = 0; k < 8; ++k) z[k] = A::slope(Short(z[k]), Short(slope[k])).v;
          }
        });
#pragma unroll
        for (int k = 0; k < 8; ++k) dz[k] *= (keep >> k & 1 ? scale : 0.f) * z[k];
      } else {
#pragma unroll
        for (int k = 0; k < 8; ++k)
          dz[k] *= (keep >> k & 1 ? scale : 0.f) * (positive >> k & 1 ? factor[0] : factor[1]);
      }
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        if (row + 4 * i >= args.rows || first_col(tile) + 8 * pieces.octet + k >= args.cols) dz[k] = 0;
        if (along_columns) dbias[k] += dz[k];
      }
      device::store16(at, dz);
    }
  }

  // sums += dz (or its transpose) times the other operand: 32 results and half the depth a warp.
  MLPKIT_DEVICE void multiply(const unsigned char* stage) {
    constexpr int width = Pieces<along_columns>::width;
    const unsigned char* other = stage + (reads_z ? 2 : 1) * kTileBytes + 2 * kBitsBytes;
    const int lane = static_cast<int>(device::thread_index() % device::kWarp);
    const int warp = static_cast<int>(device::thread_index() / device::kWarp);
    const int first = warp % 4 * 32, first_piece = warp / 4 * (depth / 16);
#pragma unroll
    for (int s = 0; s < kTerms / 16; ++s) {
      uint32_t of_dz[2][4];
#pragma unroll
      for (int a = 0; a < 2; ++a) {
        const int result = first + 16 * a;
        if (along_columns)
          device::load_matrices<true>(
              stage + swizzled<width>(16 * s + lane % 8 + lane / 16 * 8, result / 8 + lane / 8 % 2), of_dz[a]);
        else
          device::load_matrices<false>(stage + swizzled<width>(result + lane % 16, 2 * s + lane / 16), of_dz[a]);
      }
#pragma unroll
      for (int n = 0; n < kSums; n += 2) {
        uint32_t two[4];
        device::load_matrices<true>(other + swizzled<depth>(16 * s + lane % 16, first_piece + n + lane / 16), two);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t one[2] = {two[2 * half], two[2 * half + 1]};
#pragma unroll
          for (int a = 0; a < 2; ++a) device::multiply_add(sums[a][n + half], of_dz[a], one, T{});
        }
      }
    }
  }

  MLPKIT_DEVICE void write(int share, bool adds) const {
    const int lane = static_cast<int>(device::thread_index() % device::kWarp);
    const int warp = static_cast<int>(device::thread_index() / device::kWarp);
#pragma unroll
    for (int a = 0; a < 2; ++a)
#pragma unroll
      for (int n = 0; n < kSums; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t result = first_result + warp % 4 * 32 + 16 * a + lane / 4 + 8 * half;
          const int64_t feature = first_feature + warp / 4 * (depth / 2) + 8 * n + lane % 4 * 2;
          if (result >= work.results || feature >= args.depth) continue;
          float low = sums[a][n][2 * half], high = sums[a][n][2 * half + 1];
          const int64_t element = result * args.depth + feature;
          if (work.to) {
            device::store4(static_cast<T*>(work.to) + element, device::narrow_pair(low, high, T{}));
            continue;
          }
          float* to = work.partial + share * work.results * args.depth + element;
          if (adds) {
            const float2 before = device::load_pair(to);
            low += before.x, high += before.y;
          }
          device::store_pair(to, low, high);
        }
  }

  // The column sums of all threads: lanes by shuffles, then the four warps that have the same columns in their order.
  MLPKIT_DEVICE void write_columns(float (&mine)[8], float* shared, float* to, bool adds) const {
    const int lane = static_cast<int>(device::thread_index() % device::kWarp);
    const int warp = static_cast<int>(device::thread_index() / device::kWarp);
#pragma unroll
    for (int k = 0; k < 8; ++k)
#pragma unroll
      for (int lanes = 8; lanes < device::kWarp; lanes *= 2) mine[k] += device::shuffle_xor(mine[k], lanes);
    device::sync();
    if (lane < 8) {
      device::store16(shared + warp * 64 + lane * 8, mine);
      device::store16(shared + warp * 64 + lane * 8 + 4, mine + 4);
    }
    device::sync();
    const int col = static_cast<int>(device::thread_index());
    if (col >= kResults || first_result + col >= args.cols) return;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps / 2; ++w) {
      float part;
      device::load(shared + (2 * w + col / 64) * 64 + col % 64, part);
      sum += part;
    }
    if (adds) {
      float before;
      device::load(to + first_result + col, before);
      sum += before;
    }
    device::store(to + first_result + col, sum);
  }
};

}  // namespace mlpkit::cuda::thin_dz
