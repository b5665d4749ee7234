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

#include "cuda/column_sums.h"
#include "cuda/thin_dz.h"

namespace mlpkit::cuda {
namespace {

using namespace thin_dz;

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
