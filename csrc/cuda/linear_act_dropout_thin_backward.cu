// All gradients of a layer with few in_features, without a dz in memory (cuda).
//
// dx = dz W and dweight = dz^T x are the same product: of dz, along its rows or its columns, with a matrix [terms,
// depth]. One kernel does both. A block has 128 rows of the result (rows of dz for dx, columns for dweight) and a share
// of the terms; tiles of 64 terms come by cp.async: dy, z where the slope needs it, the bits and the other operand.
// Each thread turns its own pieces of dy into dz where they lie, as soon as they have landed, and adds dbias from the
// same numbers before they are rounded; after one barrier the tensor core reads them, transposed by ldmatrix for
// dweight. Sums of at most 64 tiles (4096 terms) stay in accumulators, longer ones go by such blocks; shares leave as
// fp32 and are added in their order by one more kernel.
//
// dy is read once for each of the two, the second time in part from the L2. Feeding both from one tile would need 32 KB
// of partial dx, written and read, for every 16 KB of dy: no block can hold 128 columns' dweight for all columns, or dx
// for all rows.
//
// Napkin for 8192 x 128 -> 4096, bf16, relu, dropout, on an H200 (132 multiprocessors, 4.3 TB/s, 1.75 GHz): dy is 67
// MB, bits 4: 71 MB a pass, 17 us of DRAM the first time; 8.6 GFLOP a pass, 14 us at the rate of mma.sync; shared
// memory moves 32 KB in, 32 KB through the slope and 96 KB to the tensor core a tile of 16 KB of dy: 1280 clocks, 23 us
// a pass for 4096 tiles, the tightest of these; partial sums 8 + 17 MB, written and read in the L2, 8 us. Four launches
// (two products, two sums), 55 us in all; the floor of one read of dy is 17 us, of its two products 29. Without a bias
// gradient three launches. With z (gelu) 138 MB a pass: 32 us each.
#include <algorithm>

#include "core/short_math.h"
#include "cuda/column_sums.h"
#include "cuda/linear_act_dropout_thin.h"
#include "cuda/mask_panel.h"
#include "cuda/thin_tile.h"

namespace mlpkit::cuda {
namespace {

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

template <class T, int depth, bool along_columns, bool reads_z>
MLPKIT_DEVICE void work_on(const ThinBackward& args, const Work& work, bool aligned, int64_t units, float* columns) {
  constexpr int stages = kStages<depth, reads_z>, stage_bytes = kStageBytes<depth, reads_z>;
  unsigned char* const memory = device::shared_memory();
  const int64_t tiles = (work.terms + kTerms - 1) / kTerms;
  const bool multiplies = work.to || work.partial;
  Block<T, depth, along_columns, reads_z> block(args, work, aligned);

#pragma unroll 1
  for (int64_t unit = device::block_index(); unit < units; unit += device::blocks()) {
    const int half = static_cast<int>(unit % work.halves), share = static_cast<int>(unit / work.halves % work.shares);
    const int64_t begin = tiles * share / work.shares, end = tiles * (share + 1) / work.shares;
    block.first_result = unit / work.halves / work.shares * kResults;
    block.first_feature = half * depth;
    if (reads_z) block.take_slopes(block.first_col(0) + 8 * block.pieces.octet);
    const auto fetch = [&](int64_t tile) {
      if (tile < end) block.fetch(memory + (tile - begin) % stages * stage_bytes, tile);
      device::commit_copies();
    };
    block.clear();
    device::sync();  // the stages are free
#pragma unroll 1
    for (int64_t tile = begin; tile < begin + stages - 1; ++tile) fetch(tile);
#pragma unroll 1
    for (int64_t tile = begin; tile < end; ++tile) {
      unsigned char* stage = memory + (tile - begin) % stages * stage_bytes;
      device::wait_for_copies<stages - 2>();
      block.to_dz(stage, tile);
      device::sync();
      fetch(tile + stages - 1);
      if (multiplies) block.multiply(stage);
      const bool last = tile + 1 == end;
      if (!last && (tile + 1 - begin) % kTilesASum != 0) continue;
      const bool adds = tile - begin >= kTilesASum;
      if (multiplies) block.write(share, adds);
      if (along_columns && work.bias_sums && half == 0)
        block.write_columns(block.dbias, columns, work.bias_sums + share * work.stride, adds);
      if (along_columns && work.slope_sums && half == 0)
        block.write_columns(block.dslope, columns, work.slope_sums + share * work.stride, adds);
      block.clear();
    }
    device::wait_for_copies<0>();
  }
}

template <class T, int depth, bool along_columns, bool reads_z>
MLPKIT_KERNEL(kThreads, 1)
multiply_dz(const ThinBackward args, const Work work, bool aligned, int64_t units) {
  MLPKIT_SHARED(float, columns, kWarps * 64);
  if constexpr (device::kTensorCores) work_on<T, depth, along_columns, reads_z>(args, work, aligned, units, columns);
}

// to[i] = from[0][i] + from[1][i] + ..., 8 elements a thread; `first` of them belong to one result, the rest to
// another.
struct Sum {
  const float* from;  // [shares, count]
  void* to;           // [count], T
  int64_t count;
  int shares;
};

template <class T>
MLPKIT_KERNEL(kThreads, 4)
add_shares(const Sum one, const Sum two) {
  int64_t element = (static_cast<int64_t>(device::block_index()) * kThreads + device::thread_index()) * 8;
  const bool first = element < one.count;
  const Sum sum = {first ? one.from : two.from, first ? one.to : two.to, first ? one.count : two.count,
                   first ? one.shares : two.shares};
  if (!first) element -= one.count;
  if (element >= sum.count) return;
  float total[8] = {};
#pragma unroll 4
  for (int share = 0; share < sum.shares; ++share) {
    float part[8];
    device::load16(sum.from + share * sum.count + element, part);
    device::load16(sum.from + share * sum.count + element + 4, part + 4);
#pragma unroll
    for (int i = 0; i < 8; ++i) total[i] += part[i];
  }
  device::Bits16 rounded;
#pragma unroll
  for (int i = 0; i < 4; ++i) rounded.v[i] = device::narrow_pair(total[2 * i], total[2 * i + 1], T{});
  device::store_bits16_once(static_cast<T*>(sum.to) + element, rounded);
}

int halves_of(int64_t depth) { return depth > 128 ? 2 : 1; }

// How many shares the terms are cut into, for the fewest tiles in a row; a share's partial results cost 8 tiles.
int best_shares(int64_t results, int64_t terms, int64_t depth) {
  const int64_t blocks = ceil_div(results, kResults) * halves_of(depth), tiles = ceil_div(terms, kTerms);
  const int64_t processors = std::max(1, device::multiprocessors());
  int64_t best = 1, least = INT64_MAX;
  for (int64_t shares = 1; shares <= std::min<int64_t>(tiles, processors); ++shares) {
    const int64_t time = ceil_div(blocks * shares, processors) * (ceil_div(tiles, shares) + (shares > 1 ? 8 : 0));
    if (time < least) least = time, best = shares;
  }
  return static_cast<int>(best);
}

int64_t bias_stride(int64_t cols) { return ceil_div(cols, 8) * 8; }

struct Scratch {  // in elements
  int64_t of_dx, of_dweight, of_columns;
  Scratch(int64_t rows, int64_t cols, int64_t depth)
      : of_dx(best_shares(rows, cols, depth) * rows * depth),
        of_dweight(best_shares(cols, rows, depth) * cols * depth),
        of_columns(column_sums_elements(best_shares(cols, rows, depth), bias_stride(cols))) {}
  int64_t all() const { return of_dx + of_dweight + 2 * of_columns; }
};

template <class T, int depth, bool along_columns, bool reads_z>
cudaError_t launch_product(const ThinBackward& args, const Work& work, bool aligned, cudaStream_t stream) {
  const int64_t units = ceil_div(work.results, kResults) * work.shares * work.halves;
  const int64_t blocks = std::min<int64_t>(units, std::max(1, device::multiprocessors()));
  constexpr int bytes = kStages<depth, reads_z> * kStageBytes<depth, reads_z>;
  return device::launch(multiply_dz<T, depth, along_columns, reads_z>, {blocks, kThreads, bytes}, stream, args, work,
                        aligned, units);
}

// No partial sums leave: the accumulators of one block have all terms.
bool in_one_sum(const Work& work) { return work.shares == 1 && work.terms <= int64_t{kTilesASum} * kTerms; }

template <class T, int depth, bool along_columns>
cudaError_t product(const ThinBackward& args, Work work, bool aligned, cudaStream_t stream) {
  if (!work.to || in_one_sum(work))
    work.partial = nullptr;
  else
    work.to = nullptr;
  return args.z ? launch_product<T, depth, along_columns, true>(args, work, aligned, stream)
                : launch_product<T, depth, along_columns, false>(args, work, aligned, stream);
}

template <class T, int depth>
cudaError_t run(const ThinBackward& args, cudaStream_t stream) {
  const bool aligned = args.cols % 8 == 0 && on_16_bytes(args.dy) && on_16_bytes(args.z);
  const Scratch sizes(args.rows, args.cols, args.depth);
  const int dx_shares = best_shares(args.rows, args.cols, args.depth),
            dweight_shares = best_shares(args.cols, args.rows, args.depth);
  float* const partial_dweight = args.scratch + sizes.of_dx;
  float* const bias_sums = partial_dweight + sizes.of_dweight;
  const int64_t stride = bias_stride(args.cols);
  Work of_rows{args.rows, args.cols, dx_shares, halves_of(args.depth), args.weight, args.dx, args.scratch,
               nullptr,   nullptr,   0};
  Work of_cols{args.cols,
               args.rows,
               dweight_shares,
               halves_of(args.depth),
               args.x,
               args.dweight,
               partial_dweight,
               args.dbias ? bias_sums : nullptr,
               args.dslope ? bias_sums + sizes.of_columns : nullptr,
               stride};
  cudaError_t error = cudaSuccess;
  if (args.dx) error = product<T, depth, false>(args, of_rows, aligned, stream);
  if (error == cudaSuccess && (args.dweight || args.dbias || args.dslope))
    error = product<T, depth, true>(args, of_cols, aligned, stream);
  const auto in_shares = [&](const Work& work) { return work.to && !in_one_sum(work) ? work.results * args.depth : 0; };
  const Sum dx{args.scratch, args.dx, in_shares(of_rows), dx_shares};
  const Sum dweight{partial_dweight, args.dweight, in_shares(of_cols), dweight_shares};
  if (error == cudaSuccess)
    error = device::launch(add_shares<T>, {ceil_div(dx.count + dweight.count, 8 * kThreads), kThreads}, stream, dx,
                           dweight);
  if (error == cudaSuccess && args.dbias)
    error = column_sums({dweight_shares, args.cols, stride, args.dtype, of_cols.bias_sums, args.dbias, false}, stream);
  if (error == cudaSuccess && args.dslope)
    error = column_sums(
        {dweight_shares, args.cols, stride, args.dtype, of_cols.slope_sums, args.dslope, args.slopes == 1}, stream);
  return error;
}

template <class T>
cudaError_t visit_depth(const ThinBackward& args, cudaStream_t stream) {
  return args.depth <= 64 ? run<T, 64>(args, stream) : run<T, 128>(args, stream);
}

}  // namespace

bool thin_takes(Dtype dtype, int64_t depth) {
  return (dtype == Dtype::bfloat16 || dtype == Dtype::float16) && depth > 0 && depth <= 256 && depth % 16 == 0 &&
         device::capability() >= 80 && device::shared_memory_limit() >= kStageLimit + kWarps * 64 * 4;
}

int64_t thin_scratch_elements(int64_t rows, int64_t cols, int64_t depth) { return Scratch(rows, cols, depth).all(); }

cudaError_t thin_backward(const ThinBackward& args, cudaStream_t stream) {
  if (!thin_takes(args.dtype, args.depth) || args.cols > INT32_MAX - kResults) return cudaErrorInvalidValue;
  if (args.rows == 0 || args.cols == 0) return cudaErrorInvalidValue;
  return args.dtype == Dtype::bfloat16 ? visit_depth<BFloat16>(args, stream) : visit_depth<Half>(args, stream);
}

}  // namespace mlpkit::cuda
