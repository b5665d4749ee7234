// Norm, activation and dropout in one pass forward; backward, their gradient with its column sums, and then the norm's
// own (cpu; compiled once for each instruction set). The moments of columns: norm_moments_kernel.cpp.
#include "cpu/mask_tile.h"
#include "cpu/norm_act_dropout.h"
#include "cpu/norm_rows.h"
#include "cpu/tile_row.h"

MLPKIT_BEGIN_ISA
namespace {

constexpr int kTile = kMaskTile;
constexpr unsigned kAllKept = 0xffffu;

// Calls, not inlined: every pair of activation and dtype has its own loops, and these do not differ between them.
__attribute__((noinline)) void draw(const Dropout& dropout, uint64_t number, uint16_t (&keep)[kTile]) {
  if (dropout.threshold == 0 || dropout.threshold >= 65536) {
    __builtin_memset(keep, dropout.threshold ? 0 : 0xff, sizeof(keep));
    return;
  }
  MaskTiles(dropout).draw(number, keep);
}
template <class T, class C>
__attribute__((noinline)) void take_row_moments(const NormActDropoutForward& args, int64_t row) {
  const int64_t cols = args.region.total_cols;
  row_moments<T, C>(element<T>(args.z, row * cols), cols, args.norm, row);
}

// The normalised values of one tile's columns, row by row.
template <class C>
struct TileNorm {
  TileRow<C> mean, inverse, weight, bias;
  bool by_row, present;

  MLPKIT_HD TileNorm(const Normalisation& norm, int64_t col, int cols)
      : by_row(norm.norm == Norm::layer), present(norm.norm != Norm::none) {
    const bool by_column = norm.norm == Norm::batch;
    mean.read_or_fill(by_column ? norm.mean : nullptr, col, cols, 0);
    inverse.read_or_fill(by_column ? norm.inverse : nullptr, col, cols, 1);
    weight.read_or_fill(norm.weight, col, cols, 1);
    // x + (-0) is x for every x, a zero of either sign too.
    bias.read_or_fill(norm.bias, col, cols, static_cast<C>(-0.0));
  }
  MLPKIT_HD void take_row(const Normalisation& norm, int64_t row) {
    if (!by_row) return;
    mean.fill(*element<C>(norm.mean, row));
    inverse.fill(*element<C>(norm.inverse, row));
  }
  // z becomes x.
  MLPKIT_HD void normalise(TileRow<C>& z) const {
    if (!present) return;
    for (int i = 0; i < TileRow<C>::count; ++i) z.v[i] = normalised(z.v[i], mean.v[i], inverse.v[i]);
  }
  MLPKIT_HD typename TileRow<C>::V affine(const TileRow<C>& x, int i) const {
    return scaled_and_shifted(x.v[i], weight.v[i], bias.v[i]);
  }
};

template <class A, class T, class C>
MLPKIT_HD void forward_tile(const NormActDropoutForward& args, int64_t row, int64_t col, int64_t number) {
  using V = typename Wide<C>::type;
  constexpr int lanes = Wide<C>::lanes;
  const int rows = tile_extent(args.region.row + args.region.rows - row);
  const int cols = tile_extent(args.region.col + args.region.cols - col);
  const uint32_t threshold = args.dropout.threshold;
  const C scale = static_cast<C>(args.dropout.scale);
  TileNorm<C> norm(args.norm, col, cols);
  TileRow<C> slope, x, y;
  slope.read_or_fill(args.slope, col, cols, static_cast<C>(args.negative_slope));
  uint16_t kept_of_row[kTile];
  draw(args.dropout, number, kept_of_row);
  for (int r = 0; r < rows; ++r) {
    const int64_t index = (row + r) * args.region.total_cols + col;
    norm.take_row(args.norm, row + r);
    x.read(element<T>(args.z, index), cols);
    norm.normalise(x);
    const unsigned keep = kept_of_row[r];
    unsigned live = 0, positive = 0;
    for (int i = 0; i < TileRow<C>::count; ++i) {
      const V u = norm.affine(x, i);
      V kept;
      select_lanes(keep >> (i * lanes), V{} + scale, V{}, kept);
      y.v[i] = A::value(u, slope.v[i]);
      if (threshold) y.v[i] = y.v[i] * kept;
      if (A::needs == Needs::sign) {
        live |= (lane_mask(u <= 0) ^ ((1u << lanes) - 1)) << (i * lanes);
        positive |= lane_mask(u > 0) << (i * lanes);
      }
    }
    y.write(element<T>(args.y, index), cols);
    const bool sign_is_slope = args.activation == Activation::relu;
    if (args.keep) args.keep[number * kTile + r] = static_cast<uint16_t>(sign_is_slope ? keep & live : keep);
    if (args.positive) args.positive[number * kTile + r] = static_cast<uint16_t>(positive);
  }
}

template <class A, class T, class C>
void forward(const NormActDropoutForward& args) {
  const Region& region = args.region;
  const int64_t col_tiles = mask_tiles(region.total_cols), end = region.row + region.rows;
  for (int64_t row = region.row; row < end; row += kTile) {
    // A row's moments just before its tiles, while it is in cache.
    if (args.norm.norm == Norm::layer)
      for (int r = 0; r < tile_extent(end - row); ++r) take_row_moments<T, C>(args, row + r);
    for (int64_t col = region.col; col < region.col + region.cols; col += kTile)
      forward_tile<A, T, C>(args, row, col, row / kTile * col_tiles + col / kTile);
  }
}

template <class C>
MLPKIT_HD void add_to(void* sums, const TileRow<C>& part, int64_t col, int cols) {
  if (!sums) return;
  TileRow<C> sum;
  sum.read(element<C>(sums, col), cols);
  sum.add(part);
  sum.write(element<C>(sums, col), cols);
}

template <class A, class T, class C>
MLPKIT_HD void backward_tile(const NormActDropoutBackward& args, int64_t row, int64_t col, int64_t number) {
  using V = typename Wide<C>::type;
  constexpr int lanes = Wide<C>::lanes;
  constexpr bool reads_u = A::needs == Needs::preactivation;
  const int rows = tile_extent(args.region.row + args.region.rows - row);
  const int cols = tile_extent(args.region.col + args.region.cols - col);
  const C scale = static_cast<C>(args.dropout.scale);
  TileNorm<C> norm(args.norm, col, cols);
  TileRow<C> slope, dy, x, du, dbias, dweight, dslope;
  slope.read_or_fill(args.slope, col, cols, static_cast<C>(args.negative_slope));
  for (TileRow<C>* sums : {&dbias, &dweight, &dslope, &x}) sums->fill(0);
  for (int r = 0; r < rows; ++r) {
    const int64_t index = (row + r) * args.region.total_cols + col;
    norm.take_row(args.norm, row + r);
    dy.read(element<T>(args.dy, index), cols);
    if (reads_u || norm.present) x.read(element<T>(args.z, index), cols);
    norm.normalise(x);
    const unsigned keep = args.keep ? args.keep[number * kTile + r] : kAllKept;
    const unsigned positive = args.positive ? args.positive[number * kTile + r] : 0;
    for (int i = 0; i < TileRow<C>::count; ++i) {
      V factor;
      select_lanes(keep >> (i * lanes), V{} + scale, V{}, factor);
      if (reads_u) {
        const V u = norm.affine(x, i);
        if constexpr (__is_same(A, Prelu)) dslope.v[i] += dy.v[i] * factor * Prelu::slope_by_a(u);
        factor = factor * A::slope(u, slope.v[i]);
      } else if (__is_same(A, LeakyRelu)) {
        V slopes;
        select_lanes(positive >> (i * lanes), V{} + C(1), slope.v[i], slopes);
        factor = factor * slopes;
      }
      du.v[i] = dy.v[i] * factor;
      dbias.v[i] += du.v[i];
      dweight.v[i] += du.v[i] * x.v[i];
      // Rounded here, so that g less the mean of equal g is 0.
      du.v[i] = du.v[i] * norm.weight.v[i];
    }
    du.write(element<C>(args.g, index), cols);
  }
  add_to(args.dbias, dbias, col, cols);
  add_to(args.dweight, dweight, col, cols);
  add_to(args.dslope, dslope, col, cols);
}

template <class A, class T, class C>
void backward(const NormActDropoutBackward& args) {
  const Region& region = args.region;
  const int64_t col_tiles = mask_tiles(region.total_cols);
  for (int64_t row = region.row; row < region.row + region.rows; row += kTile)
    for (int64_t col = region.col; col < region.col + region.cols; col += kTile)
      backward_tile<A, T, C>(args, row, col, row / kTile * col_tiles + col / kTile);
}

template <class T, class C>
void norm_backward_rows(const NormBackward& args) {
  const Region& region = args.region;
  const bool by_row = args.norm.norm == Norm::layer, taken = by_row || args.mean_g;
  for (int64_t row = region.row; row < region.row + region.rows; ++row) {
    const int64_t begin = row * region.total_cols;
    RowMeans<C> means{};
    if (by_row) means = gradient_means<T, C>(args, row);
    for (int64_t col = region.col; col < region.col + region.cols; col += kTile) {
      const int cols = tile_extent(region.col + region.cols - col);
      TileNorm<C> norm(args.norm, col, cols);
      TileRow<C> x, g, mean_g, mean_gx;
      norm.take_row(args.norm, row);
      mean_g.read_or_fill(args.mean_g, col, cols, means.g);
      mean_gx.read_or_fill(args.mean_gx, col, cols, means.gx);
      g.read(element<C>(args.g, begin + col), cols);
      if (taken) {
        x.read(element<T>(args.z, begin + col), cols);
        norm.normalise(x);
      } else {
        x.fill(0);  // whatever z is: Inf times a mean of 0 would be NaN
      }
      for (int i = 0; i < TileRow<C>::count; ++i)
        g.v[i] = norm_gradient(g.v[i], x.v[i], norm.inverse.v[i], mean_g.v[i], mean_gx.v[i]);
      g.write(element<T>(args.dz, begin + col), cols);
    }
  }
}

}  // namespace

void norm_act_dropout_forward(const NormActDropoutForward& args) {
  visit_storage(args.dtype, [&]<class T, class C>(T, C) {
    visit_activation(args.activation, [&]<class A>(A) { forward<A, T, C>(args); });
  });
}

void norm_act_dropout_backward(const NormActDropoutBackward& args) {
  visit_storage(args.dtype, [&]<class T, class C>(T, C) {
    visit_activation(args.activation, [&]<class A>(A) { backward<A, T, C>(args); });
  });
}

void norm_backward(const NormBackward& args) {
  visit_storage(args.dtype, [&]<class T, class C>(T, C) { norm_backward_rows<T, C>(args); });
}

MLPKIT_END_ISA
