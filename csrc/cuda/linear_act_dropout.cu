// The element-wise halves of linear_act_dropout on a CUDA device: one pass forward, one pass backward (cuda).
//
// Napkin for 8192 x 4096 (33.6 M elements) on an H200 at 4.3 TB/s; the GEMMs are the library's and not counted.
//   forward: bf16 reads 4 bytes an element (the fp32 product) and writes 2 and 1/8 of bits: 206 MB, one launch, 48 us;
//     with z saved 8 bytes and an eighth, 63 us; fp32 8 bytes, 63 us. Philox is 7 integer operations an element, 20 us
//     of issue slots beneath the loads.
//   backward: bf16 reads dy and bits and writes dz: 4 bytes and an eighth, 32 us; with z 6, 48 us. The column sums add
//     1/16 of a byte an element and one small launch.
#include "cuda/linear_act_dropout.h"

#include "cuda/column_sums.h"
#include "cuda/mask_panel.h"

namespace mlpkit::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / device::kWarp;
// At once on a multiprocessor: 64 registers a thread forward, 80 backward. Each thread has 2 to 4 loads of 16 bytes in
// flight, so 24 to 32 warps have 24 to 64 KB; 4.3 TB/s with a latency of 0.8 us needs 26 KB.
constexpr int kForwardBlocks = 4, kBackwardBlocks = 3;
constexpr int kTilesASum = 4;  // backward: row tiles that a warp sums up before it writes a partial column sum

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Where a warp works: which block of row tiles (one tile forward, kTilesASum backward), which 64 columns.
template <class T>
struct Place : MaskPanel<T> {
  using Panel = MaskPanel<T>;

  int64_t rows, cols;  // of the output
  int row_tiles, col_tiles;
  int row_block, first_tile_col;
  int col;       // the lane's first column
  int count;     // the lane's columns that lie inside
  bool aligned;  // 16-byte accesses fit: all or none of the lane's columns lie inside

  MLPKIT_DEVICE Place(int64_t rows, int64_t cols, bool aligned)
      : Panel{device::thread_index() % device::kWarp}, rows(rows), cols(cols), aligned(aligned) {
    const uint32_t warp = device::block_index() * kWarps + device::thread_index() / device::kWarp;
    row_tiles = static_cast<int>((rows + kMaskTile - 1) / kMaskTile);
    col_tiles = (static_cast<int>(cols) + kMaskTile - 1) / kMaskTile;
    const uint32_t across = (col_tiles + kPanelTiles - 1) / kPanelTiles;
    row_block = warp / across;
    first_tile_col = warp % across * kPanelTiles;
    col = first_tile_col * kMaskTile + Panel::col();
    const int left = static_cast<int>(cols) - col;
    count = left < 0 ? 0 : left < Panel::width ? left : Panel::width;
  }

  MLPKIT_DEVICE int64_t tile_number(int tile) const { return static_cast<int64_t>(tile) * col_tiles + first_tile_col; }
  MLPKIT_DEVICE int64_t row_at(int tile, int step) const {
    return static_cast<int64_t>(tile) * kMaskTile + Panel::row(step);
  }
  MLPKIT_DEVICE int64_t element(int tile, int step) const { return row_at(tile, step) * cols + col; }
  MLPKIT_DEVICE int columns(int tile, int step) const { return row_at(tile, step) < rows ? count : 0; }
  // The lane's tile of a bit plane can hang over the right edge, where the plane has none.
  MLPKIT_DEVICE bool has_bits() const { return first_tile_col + static_cast<int>(this->lane) % 4 < col_tiles; }
};

// How many steps are loaded together before the first is used; the activations are unrolled over as many elements.
// Those of double are long and slow, so it takes fewer.
template <class T, int elements>
constexpr int kBatch = sizeof(T) == 8 ? elements / 8 : elements / MaskPanel<T>::width;

// The lane's columns of one row, `count` of them inside; the rest are zero and not read.
template <int width, class T, class C>
MLPKIT_DEVICE void read(const void* base, int64_t element, int count, bool aligned, C (&to)[width]) {
  const T* from = static_cast<const T*>(base) + element;
  constexpr int piece = 16 / sizeof(T);
#pragma unroll
  for (int i = 0; i < width; ++i) to[i] = 0;
  if (aligned) {
    if (count == 0) return;
#pragma unroll
    for (int i = 0; i < width; i += piece) device::load16(from + i, to + i);
  } else {
#pragma unroll
    for (int i = 0; i < width; ++i)
      if (i < count) device::load(from + i, to[i]);
  }
}

template <int width, class T, class C>
MLPKIT_DEVICE void write(void* base, int64_t element, int count, bool aligned, const C (&from)[width]) {
  T* to = static_cast<T*>(base) + element;
  if (aligned) {
    if (count) device::store16(to, from);
  } else {
#pragma unroll
    for (int i = 0; i < width; ++i)
      if (i < count) device::store(to + i, from[i]);
  }
}

// prelu's slope for the lane's columns, or the one negative slope.
template <class T, class C>
MLPKIT_DEVICE void read_slope(const Place<T>& place, const void* slope, int64_t slopes, double negative_slope,
                              C (&to)[Place<T>::width]) {
  constexpr int width = Place<T>::width;
  if (slope && slopes > 1) return read<width, T>(slope, place.col, place.count, place.aligned, to);
  C single = static_cast<C>(negative_slope);
  if (slope) device::load(static_cast<const T*>(slope), single);
#pragma unroll
  for (int i = 0; i < width; ++i) to[i] = single;
}

// z becomes act(z), or act'(z). The switch over activations stands outside the loop over a batch, so that each dtype
// has one kernel and the branch costs one in a batch; in place, because registers are what limits the number of warps
// in flight.
template <int batch, int width, class C>
MLPKIT_HD void to_values(Activation activation, const C (&slope)[width], C (&z)[batch][width]) {
  visit_activation(activation, [&](auto formula) {
#pragma unroll
    for (int i = 0; i < batch * width; ++i)
      z[i / width][i % width] = decltype(formula)::value(z[i / width][i % width], slope[i % width]);
  });
}

template <bool reads_z, int batch, int width, class C>
MLPKIT_HD void to_slopes(Activation activation, const C (&slope)[width], C (&z)[batch][width]) {
  visit_activation(activation, [&](auto formula) {
    using A = decltype(formula);
    if constexpr ((A::needs == Needs::preactivation) == reads_z) {
#pragma unroll
      for (int i = 0; i < batch * width; ++i)
        z[i / width][i % width] = A::slope(z[i / width][i % width], slope[i % width]);
    }
  });
}

template <class T, class C>
MLPKIT_KERNEL(kThreads, kForwardBlocks)
forward(const ActDropoutForward args, bool aligned) {
  constexpr int width = Place<T>::width, batch = kBatch<T, 16>;
  const Place<T> place(args.rows, args.cols, aligned);
  const int tile = place.row_block;
  if (tile >= place.row_tiles) return;

  Dropout dropout = args.dropout;
  uint32_t keep = dropout.threshold ? 0 : kAllSet;
  if (args.seed) {
    int64_t seed, offset;
    device::load(args.seed, seed);
    device::load(args.seed + 1, offset);
    dropout.seed = static_cast<uint64_t>(seed);
    dropout.offset = static_cast<uint32_t>(offset);
    keep = place.keep(dropout, args.first_tile + place.tile_number(tile));
  }
  const C scale = static_cast<C>(dropout.scale);

  const bool saves_live = args.keep && args.activation == Activation::relu;
  uint32_t dead = 0, positive = 0;  // z <= 0 and z > 0: neither holds for NaN
#pragma unroll 1
  for (int first = 0; first < place.steps; first += batch) {
    C z[batch][width], bias[width], slope[width];
#pragma unroll
    for (int s = 0; s < batch; ++s)
      read<width, C>(args.product, place.element(tile, first + s), place.columns(tile, first + s), aligned, z[s]);
    read_slope(place, args.slope, args.slopes, args.negative_slope, slope);
    if (args.bias) {
      read<width, T>(args.bias, place.col, place.count, aligned, bias);
#pragma unroll
      for (int i = 0; i < batch * width; ++i) z[i / width][i % width] += bias[i % width];
    }
    if (saves_live) {
#pragma unroll
      for (int i = 0; i < batch * width; ++i) dead |= (z[i / width][i % width] <= 0 ? 1u : 0u) << (first * width + i);
    }
    if (args.positive) {
#pragma unroll
      for (int i = 0; i < batch * width; ++i)
        positive |= (z[i / width][i % width] > 0 ? 1u : 0u) << (first * width + i);
    }
    if (args.z) {
#pragma unroll
      for (int s = 0; s < batch; ++s)
        write<width, T>(args.z, place.element(tile, first + s), place.columns(tile, first + s), aligned, z[s]);
    }
    to_values(args.activation, slope, z);
#pragma unroll
    for (int s = 0; s < batch; ++s) {
      const uint32_t kept = place.of_step(keep, first + s);
#pragma unroll
      for (int i = 0; i < width; ++i) z[s][i] *= kept >> i & 1 ? scale : C(0);
      write<width, T>(args.y, place.element(tile, first + s), place.columns(tile, first + s), aligned, z[s]);
    }
  }
  const int64_t offset = place.plane_offset(place.tile_number(tile));
  if (saves_live) keep &= ~place.in_mask_order(dead);
  if (args.positive) positive = place.in_mask_order(positive);
  if (args.keep && place.has_bits()) device::store4(args.keep + offset, keep);
  if (args.positive && place.has_bits()) device::store4(args.positive + offset, positive);
}

// Partial column sums of the warp's rows, one row of them for each row block. Lanes with the same columns are added as
// a tree.
template <class T, class C>
MLPKIT_DEVICE void write_sums(const Place<T>& place, C (&sums)[Place<T>::width], C* to, int64_t stride) {
  constexpr int width = Place<T>::width, piece = 16 / sizeof(C);
#pragma unroll
  for (int lanes = Place<T>::across; lanes < device::kWarp; lanes *= 2)
#pragma unroll
    for (int i = 0; i < width; ++i) sums[i] += device::shuffle_xor(sums[i], lanes);
  if (place.lane >= Place<T>::across) return;
#pragma unroll
  for (int i = 0; i < width; i += piece) device::store16(to + place.row_block * stride + place.col + i, sums + i);
}

// reads_z: the activation's slope depends on z itself; otherwise on its sign at most, and relu's is in `keep` already.
template <class T, class C, bool reads_z>
MLPKIT_KERNEL(kThreads, kBackwardBlocks)
backward(const ActDropoutBackward args, bool aligned, C* bias_sums, C* slope_sums, int64_t stride) {
  constexpr int width = Place<T>::width, elements = reads_z ? 8 : 16, batch = kBatch<T, elements>;
  const Place<T> place(args.rows, args.cols, aligned);
  const int first_tile = place.row_block * kTilesASum;
  if (first_tile >= place.row_tiles) return;
  C dbias[width] = {}, dslope[width] = {};
  const C scale = static_cast<C>(args.scale);
  C of_sign[2][1] = {{1}, {-1}};  // act'(z) for z > 0 and otherwise, where that is all it depends on
  if (!reads_z) to_slopes<false>(args.activation, {static_cast<C>(args.negative_slope)}, of_sign);

#pragma unroll 1
  for (int tile = first_tile; tile < first_tile + kTilesASum && tile < place.row_tiles; ++tile) {
    const int64_t offset = place.plane_offset(place.tile_number(tile));
    uint32_t keep = kAllSet, positive = kAllSet;
    if (args.keep && place.has_bits()) keep = device::load4(args.keep + offset);
    if (args.positive && place.has_bits()) positive = device::load4(args.positive + offset);
#pragma unroll 1
    for (int first = 0; first < place.steps; first += batch) {
      C dy[batch][width], z[batch][width];
#pragma unroll
      for (int s = 0; s < batch; ++s) {
        const int64_t element = place.element(tile, first + s);
        const int count = place.columns(tile, first + s);
        read<width, T>(args.dy, element, count, aligned, dy[s]);
        if (reads_z) read<width, T>(args.z, element, count, aligned, z[s]);
      }
      if (reads_z && slope_sums) {
#pragma unroll
        for (int s = 0; s < batch; ++s) {
          const uint32_t kept = place.of_step(keep, first + s);
#pragma unroll
          for (int i = 0; i < width; ++i)
            dslope[i] += dy[s][i] * (kept >> i & 1 ? scale : C(0)) * Prelu::slope_by_a(z[s][i]);
        }
      }
      if constexpr (reads_z) {
        C slope[width];
        read_slope(place, args.slope, args.slopes, args.negative_slope, slope);
        to_slopes<true>(args.activation, slope, z);
      }
#pragma unroll
      for (int s = 0; s < batch; ++s) {
        const uint32_t kept = place.of_step(keep, first + s), above = reads_z ? 0 : place.of_step(positive, first + s);
        const int count = place.columns(tile, first + s);
        if (count == 0) continue;  // below the last row 0 * slope is NaN where the slope is Inf or NaN
#pragma unroll
        for (int i = 0; i < width; ++i) {
          const C act_slope = reads_z ? z[s][i] : above >> i & 1 ? of_sign[0][0] : of_sign[1][0];
          dy[s][i] *= (kept >> i & 1 ? scale : C(0)) * act_slope;
          dbias[i] += dy[s][i];
        }
        if (args.dz) write<width, T>(args.dz, place.element(tile, first + s), count, aligned, dy[s]);
      }
    }
  }
  if (bias_sums) write_sums(place, dbias, bias_sums, stride);
  if (reads_z && slope_sums) write_sums(place, dslope, slope_sums, stride);
}

int64_t col_panels(int64_t cols) { return ceil_div(cols, kPanelCols); }
int64_t row_blocks(int64_t rows) { return ceil_div(rows, kTilesASum * kMaskTile); }

// Warps are numbered in 32 bits and columns in 31; device memory ends long before rows do.
int64_t blocks_of(int64_t warps) { return warps > UINT32_MAX - kWarps ? int64_t{UINT32_MAX} : ceil_div(warps, kWarps); }

bool on_16_bytes(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <class... Pointers>
bool all_aligned(int64_t cols, int width, Pointers... pointers) {
  return cols % width == 0 && (on_16_bytes(pointers) && ...);
}

template <class T, class C>
cudaError_t run(const ActDropoutForward& args, cudaStream_t stream) {
  const bool aligned = all_aligned(args.cols, Place<T>::width, args.product, args.bias, args.slope, args.y, args.z);
  const int64_t warps = ceil_div(args.rows, kMaskTile) * col_panels(args.cols);
  return device::launch(forward<T, C>, {blocks_of(warps), kThreads}, stream, args, aligned);
}

template <class T, class C>
cudaError_t run(const ActDropoutBackward& args, cudaStream_t stream) {
  const bool aligned = all_aligned(args.cols, Place<T>::width, args.dy, args.z, args.slope, args.dz);
  const int64_t stride = col_panels(args.cols) * kPanelCols, rows = row_blocks(args.rows);
  C* bias_sums = args.dbias ? static_cast<C*>(args.scratch) : nullptr;
  C* slope_sums = args.dslope ? static_cast<C*>(args.scratch) + column_sums_elements(rows, stride) : nullptr;
  const auto kernel = args.z ? backward<T, C, true> : backward<T, C, false>;
  cudaError_t error = device::launch(kernel, {blocks_of(rows * col_panels(args.cols)), kThreads}, stream, args, aligned,
                                     bias_sums, slope_sums, stride);
  if (error == cudaSuccess && bias_sums)
    error = column_sums({rows, args.cols, stride, args.dtype, bias_sums, args.dbias, false}, stream);
  if (error == cudaSuccess && slope_sums)
    error = column_sums({rows, args.cols, stride, args.dtype, slope_sums, args.dslope, args.slopes == 1}, stream);
  return error;
}

template <class Args>
cudaError_t visit_dtype(const Args& args, cudaStream_t stream) {
  if (args.cols > INT32_MAX - kPanelCols) return cudaErrorInvalidValue;
  switch (args.dtype) {
    case Dtype::float64:
      return run<double, double>(args, stream);
    case Dtype::float32:
      return run<float, float>(args, stream);
    case Dtype::bfloat16:
      return run<BFloat16, float>(args, stream);
    case Dtype::float16:
      return run<Half, float>(args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int64_t scratch_elements(int64_t rows, int64_t cols) {
  return 2 * column_sums_elements(row_blocks(rows), col_panels(cols) * kPanelCols);
}

cudaError_t act_dropout_forward(const ActDropoutForward& args, cudaStream_t stream) {
  return visit_dtype(args, stream);
}
cudaError_t act_dropout_backward(const ActDropoutBackward& args, cudaStream_t stream) {
  return visit_dtype(args, stream);
}

}  // namespace mlpkit::cuda
