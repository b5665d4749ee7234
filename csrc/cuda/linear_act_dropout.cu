// Bias, activation and dropout in one pass forward; slope, mask, gradient and bias gradient in one pass backward (cuda).
//
// Napkin for 8192 x 4096 (33.6 M elements) on an H200 at 4.3 TB/s; the GEMMs are the library's and not counted.
//   forward, bf16: reads 4 B (the fp32 product), writes 2 B and 1/8 B of bits an element: 206 MB, one launch, floor 48 us; with z saved 10 B,
//     64 us. fp32: 8 B, 63 us. Philox: 7 integer operations an element, 0.24 T in all, 20 us of issue slots beneath the loads.
//   backward, bf16: reads dy and bits, writes dz: 4.1 B an element, 33 us; with z read 6.1 B, 48 us. Column sums: 1/16 B an element more, and
//     one small launch.
#include "cuda/linear_act_dropout.h"

#include "cuda/column_sums.h"
#include "cuda/mask_panel.h"

namespace mlpkit::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / device::kWarp;
constexpr int kTilesASum = 4;  // backward: row tiles that a warp sums up before it writes a partial column sum

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Where a warp works: panel `col` of a row block of `tiles` row tiles. Each lane's columns stay the same down the block.
template <class T>
struct Place : MaskPanel<T> {
  using Panel = MaskPanel<T>;
  // Steps that are loaded together: 64 bytes of floats in flight a lane, and as much code as the activations are unrolled to.
  static constexpr int batch = sizeof(T) == 8 ? 2 : 16 / Panel::width;

  int64_t rows, cols;        // of the output
  int64_t row_tile, col;     // the first row tile; the lane's first column
  int64_t row_block, first_tile_col;
  int64_t row_tiles, col_tiles;
  int count;                 // the lane's columns that lie inside
  bool aligned;              // 16-byte accesses fit: all or none of the lane's columns lie inside

  MLPKIT_DEVICE Place(int64_t rows, int64_t cols, int tiles, bool aligned)
      : Panel{device::thread_index() % device::kWarp}, rows(rows), cols(cols), aligned(aligned) {
    const uint32_t warp = device::block_index() * kWarps + device::thread_index() / device::kWarp;
    row_tiles = (rows + kMaskTile - 1) / kMaskTile;
    col_tiles = (cols + kMaskTile - 1) / kMaskTile;
    const uint32_t across = static_cast<uint32_t>((col_tiles + kPanelTiles - 1) / kPanelTiles);
    row_block = warp / across;
    row_tile = row_block * tiles;
    first_tile_col = static_cast<int64_t>(warp % across) * kPanelTiles;
    col = first_tile_col * kMaskTile + Panel::col();
    count = col >= cols ? 0 : cols - col < Panel::width ? static_cast<int>(cols - col) : Panel::width;
  }

  MLPKIT_DEVICE bool inside(int64_t tile) const { return tile < row_tiles; }
  MLPKIT_DEVICE int64_t tile_number(int64_t tile) const { return tile * col_tiles + first_tile_col; }
  MLPKIT_DEVICE int64_t element(int64_t tile, int step) const { return (tile * kMaskTile + Panel::row(step)) * cols + col; }
  MLPKIT_DEVICE int columns(int64_t tile, int step) const { return tile * kMaskTile + Panel::row(step) < rows ? count : 0; }
  // The lane's tile of a bit plane can hang over the right edge, where the plane has none.
  MLPKIT_DEVICE bool has_bits() const { return first_tile_col + this->lane % 4 < col_tiles; }
};

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
MLPKIT_DEVICE void read_slope(const Place<T>& place, const void* slope, int64_t slopes, double negative_slope, C (&to)[Place<T>::width]) {
  constexpr int width = Place<T>::width;
  if (slope && slopes > 1) return read<width, T>(slope, place.col, place.count, place.aligned, to);
  C single = static_cast<C>(negative_slope);
  if (slope) device::load(static_cast<const T*>(slope), single);
#pragma unroll
  for (int i = 0; i < width; ++i) to[i] = single;
}

// The switch over activations stands outside the loop over a batch, so that each dtype has one kernel and the branch costs one in a batch.
template <int batch, int width, class C>
MLPKIT_HD void values(Activation activation, const C (&z)[batch][width], const C (&slope)[width], C (&y)[batch][width]) {
  visit_activation(activation, [&](auto formula) {
#pragma unroll
    for (int i = 0; i < batch * width; ++i)
      y[i / width][i % width] = decltype(formula)::value(z[i / width][i % width], slope[i % width]);
  });
}

template <int batch, int width, class C>
MLPKIT_HD void slopes(Activation activation, const C (&z)[batch][width], const C (&slope)[width], C (&to)[batch][width]) {
  visit_activation(activation, [&](auto formula) {
#pragma unroll
    for (int i = 0; i < batch * width; ++i)
      to[i / width][i % width] = decltype(formula)::slope(z[i / width][i % width], slope[i % width]);
  });
}

template <class T, class C>
MLPKIT_KERNEL(kThreads) forward(const ActDropoutForward args, bool aligned) {
  constexpr int width = Place<T>::width, batch = Place<T>::batch;
  const Place<T> place(args.rows, args.cols, 1, aligned);
  const int64_t tile = place.row_tile;
  if (!place.inside(tile)) return;

  Dropout dropout = args.dropout;
  uint32_t keep = dropout.threshold ? 0 : kAllSet;
  if (args.seed) {
    dropout.seed = static_cast<uint64_t>(args.seed[0]);
    dropout.offset = static_cast<uint32_t>(args.seed[1]);
    keep = place.keep(dropout, place.tile_number(tile));
  }
  C bias[width] = {}, slope[width];
  if (args.bias) read<width, T>(args.bias, place.col, place.count, aligned, bias);
  read_slope(place, args.slope, args.slopes, args.negative_slope, slope);
  const C scale = static_cast<C>(dropout.scale);

  uint32_t dead = 0, positive = 0;  // z <= 0 and z > 0: neither holds for NaN
#pragma unroll 1
  for (int first = 0; first < place.steps; first += batch) {
    C z[batch][width], y[batch][width];
#pragma unroll
    for (int s = 0; s < batch; ++s)
      read<width, C>(args.product, place.element(tile, first + s), place.columns(tile, first + s), aligned, z[s]);
#pragma unroll
    for (int s = 0; s < batch; ++s)
#pragma unroll
      for (int i = 0; i < width; ++i) {
        z[s][i] += bias[i];
        dead |= (z[s][i] <= 0 ? 1u : 0u) << ((first + s) * width + i);
        positive |= (z[s][i] > 0 ? 1u : 0u) << ((first + s) * width + i);
      }
    values(args.activation, z, slope, y);
#pragma unroll
    for (int s = 0; s < batch; ++s) {
      const int64_t element = place.element(tile, first + s);
      const int count = place.columns(tile, first + s);
      const uint32_t kept = place.of_step(keep, first + s);
#pragma unroll
      for (int i = 0; i < width; ++i) y[s][i] *= kept >> i & 1 ? scale : C(0);
      write<width, T>(args.y, element, count, aligned, y[s]);
      if (args.z) write<width, T>(args.z, element, count, aligned, z[s]);
    }
  }
  if (args.keep) {
    if (args.activation == Activation::relu) keep &= ~place.in_mask_order(dead);
    if (place.has_bits()) device::store4(args.keep + place.plane_offset(place.tile_number(tile)), keep);
  }
  if (args.positive) {
    positive = place.in_mask_order(positive);
    if (place.has_bits()) device::store4(args.positive + place.plane_offset(place.tile_number(tile)), positive);
  }
}

// Partial column sums of the warp's rows, one row of them for each row block. Lanes with the same columns are added as a tree.
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

template <class T, class C>
MLPKIT_KERNEL(kThreads) backward(const ActDropoutBackward args, bool aligned, C* bias_sums, C* slope_sums, int64_t stride) {
  constexpr int width = Place<T>::width, batch = Place<T>::batch;
  const Place<T> place(args.rows, args.cols, kTilesASum, aligned);
  if (!place.inside(place.row_tile)) return;
  C slope[width], dbias[width] = {}, dslope[width] = {};
  read_slope(place, args.slope, args.slopes, args.negative_slope, slope);
  const C scale = static_cast<C>(args.scale);

#pragma unroll 1
  for (int64_t tile = place.row_tile; tile < place.row_tile + kTilesASum && place.inside(tile); ++tile) {
    const int64_t offset = place.plane_offset(place.tile_number(tile));
    uint32_t keep = kAllSet, positive = kAllSet;
    if (args.keep && place.has_bits()) keep = device::load4(args.keep + offset);
    if (args.positive && place.has_bits()) positive = device::load4(args.positive + offset);
    C tile_dbias[width] = {}, tile_dslope[width] = {};
#pragma unroll 1
    for (int first = 0; first < place.steps; first += batch) {
      C dy[batch][width], z[batch][width], act_slope[batch][width];
#pragma unroll
      for (int s = 0; s < batch; ++s) {
        const int64_t element = place.element(tile, first + s);
        const int count = place.columns(tile, first + s);
        read<width, T>(args.dy, element, count, aligned, dy[s]);
        if (args.z) read<width, T>(args.z, element, count, aligned, z[s]);
      }
      if (!args.z) {  // the sign of z is all that the slope depends on, and relu's is in `keep` already
#pragma unroll
        for (int s = 0; s < batch; ++s) {
          const uint32_t above = place.of_step(positive, first + s);
#pragma unroll
          for (int i = 0; i < width; ++i) z[s][i] = above >> i & 1 ? C(1) : C(-1);
        }
      }
      slopes(args.activation, z, slope, act_slope);
#pragma unroll
      for (int s = 0; s < batch; ++s) {
        const uint32_t kept = place.of_step(keep, first + s);
        C dz[width];
#pragma unroll
        for (int i = 0; i < width; ++i) {
          const C factor = kept >> i & 1 ? scale : C(0);
          dz[i] = dy[s][i] * (factor * act_slope[s][i]);
          tile_dbias[i] += dz[i];
          tile_dslope[i] += dy[s][i] * factor * Prelu::slope_by_a(z[s][i]);
        }
        if (args.dz) write<width, T>(args.dz, place.element(tile, first + s), place.columns(tile, first + s), aligned, dz);
      }
    }
#pragma unroll
    for (int i = 0; i < width; ++i) {
      dbias[i] += tile_dbias[i];
      dslope[i] += tile_dslope[i];
    }
  }
  if (bias_sums) write_sums(place, dbias, bias_sums, stride);
  if (slope_sums) write_sums(place, dslope, slope_sums, stride);
}

int64_t col_panels(int64_t cols) { return ceil_div(cols, kPanelCols); }
int64_t row_blocks(int64_t rows) { return ceil_div(rows, kTilesASum * kMaskTile); }

// Warps are numbered in 32 bits; device memory ends long before they do.
int64_t blocks_of(int64_t warps) { return warps > UINT32_MAX - kWarps ? int64_t{UINT32_MAX} : ceil_div(warps, kWarps); }

bool on_16_bytes(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <class... Pointers>
bool all_aligned(int64_t cols, int width, Pointers... pointers) { return cols % width == 0 && (on_16_bytes(pointers) && ...); }

template <class T, class C>
cudaError_t run(const ActDropoutForward& args, cudaStream_t stream) {
  const bool aligned = all_aligned(args.cols, Place<T>::width, args.product, args.bias, args.slope, args.y, args.z);
  const int64_t warps = ceil_div(args.rows, kMaskTile) * col_panels(args.cols);
  return device::launch(forward<T, C>, blocks_of(warps), kThreads, stream, args, aligned);
}

template <class T, class C>
cudaError_t run(const ActDropoutBackward& args, cudaStream_t stream) {
  const bool aligned = all_aligned(args.cols, Place<T>::width, args.dy, args.z, args.slope, args.dz);
  const int64_t stride = col_panels(args.cols) * kPanelCols, rows = row_blocks(args.rows);
  C* bias_sums = args.dbias ? static_cast<C*>(args.scratch) : nullptr;
  C* slope_sums = args.dslope ? static_cast<C*>(args.scratch) + column_sums_elements(rows, stride) : nullptr;
  cudaError_t error = device::launch(backward<T, C>, blocks_of(rows * col_panels(args.cols)), kThreads, stream, args, aligned, bias_sums,
                                     slope_sums, stride);
  if (error == cudaSuccess && bias_sums) error = column_sums({rows, args.cols, stride, args.dtype, bias_sums, args.dbias, false}, stream);
  if (error == cudaSuccess && slope_sums)
    error = column_sums({rows, args.cols, stride, args.dtype, slope_sums, args.dslope, args.slopes == 1}, stream);
  return error;
}

template <class Args>
cudaError_t visit_dtype(const Args& args, cudaStream_t stream) {
  switch (args.dtype) {
    case Dtype::float64: return run<double, double>(args, stream);
    case Dtype::float32: return run<float, float>(args, stream);
    case Dtype::bfloat16: return run<BFloat16, float>(args, stream);
    case Dtype::float16: return run<Half, float>(args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int64_t scratch_elements(int64_t rows, int64_t cols) {
  return 2 * column_sums_elements(row_blocks(rows), col_panels(cols) * kPanelCols);
}

cudaError_t act_dropout_forward(const ActDropoutForward& args, cudaStream_t stream) { return visit_dtype(args, stream); }
cudaError_t act_dropout_backward(const ActDropoutBackward& args, cudaStream_t stream) { return visit_dtype(args, stream); }

}  // namespace mlpkit::cuda
