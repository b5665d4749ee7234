// Bias, activation and dropout in one pass forward; slope, mask, gradient, bias gradient in one pass backward (cpu;
// compiled once for each instruction set).
#include "cpu/linear_act_dropout.h"

#include <type_traits>

#include "cpu/mask_tile.h"
#include "cpu/simd.h"
#include "cpu/tile_row.h"

MLPKIT_BEGIN_ISA
namespace {

constexpr unsigned kAllKept = 0xffffu;

// The largest finite value of a storage type.
template <class T>
constexpr float kLargest = 3.4028234e38f;
template <>
inline constexpr float kLargest<BFloat16> = 3.3895314e38f;
template <>
inline constexpr float kLargest<Half> = 65504.f;

template <class T, class V>
MLPKIT_HD V saturate(V z) {
  constexpr float infinity = __builtin_inff(), largest = kLargest<T>;
  const V low = (z > largest) ? ((z < infinity) ? V{} + largest : z) : z;
  return (low < -largest) ? ((low > -infinity) ? V{} - largest : low) : low;
}

// float16 holds slopes three bits finer than bfloat16, and their range is small.
template <class A, class T>
using Saved = std::conditional_t<__is_same(T, BFloat16) && !__is_same(A, Prelu), Half, T>;

// What is saved for the backward pass: the slope, of which the forward pass has the dear parts at hand. prelu's slope
// has a gradient of its own, which takes the pre-activation; one beyond the storage type is saved as its largest
// number, since an Inf would make 0 * Inf, a NaN that the forward pass never had.
template <class A, class T, class V>
MLPKIT_HD V worth_saving(V z, V slope) {
  if constexpr (!__is_same(A, Prelu))
    return A::slope(z, slope);
  else if constexpr (sizeof(T) == 2)
    return saturate<T>(z);
  else
    return z;
}

// Where a tile lies: its number in the mask contract, its column, and how much of it is inside the output.
struct Tile {
  int64_t number, row, col;
  int rows, cols;
};

template <class Body>
MLPKIT_HD void each_tile(const Region& region, Body&& body) {
  const int64_t col_tiles = mask_tiles(region.total_cols);
  const int64_t end_row = region.row + region.rows, end_col = region.col + region.cols;
  for (int64_t row = region.row; row < end_row; row += kMaskTile)
    for (int64_t col = region.col; col < end_col; col += kMaskTile)
      body(Tile{row / kMaskTile * col_tiles + col / kMaskTile, row, col, tile_extent(end_row - row),
                tile_extent(end_col - col)});
}

template <class A, class T, class C>
void forward(const ActDropoutForward& args) {
  using V = typename Wide<C>::type;
  constexpr int lanes = Wide<C>::lanes;
  const uint32_t threshold = args.dropout.threshold;
  const bool draws = threshold > 0 && threshold < 65536;
  const C scale = static_cast<C>(args.dropout.scale);
  MaskTile mask;
  each_tile(args.region, [&](const Tile& tile) __attribute__((always_inline)) {
    TileRow<C> bias, slope, product, y, z, saved;
    bias.read_or_fill(args.bias, tile.col, tile.cols, C(0));
    slope.read_or_fill(args.slope, tile.col, tile.cols, static_cast<C>(args.negative_slope));
    if (draws) mask.fill(args.dropout, tile.number);
    for (int r = 0; r < tile.rows; ++r) {
      product.read(
          element<C>(args.product, (tile.row + r - args.region.row) * args.product_stride + tile.col - args.region.col),
          tile.cols);
      const unsigned keep = draws ? mask.keep(r, threshold) : threshold ? 0u : kAllKept;
      unsigned live = 0, positive = 0;
      for (int i = 0; i < TileRow<C>::count; ++i) {
        z.v[i] = args.bias ? product.v[i] + bias.v[i] : product.v[i];
        V kept;
        select_lanes(keep >> (i * lanes), V{} + scale, V{}, kept);
        y.v[i] = A::value(z.v[i], slope.v[i]);
        if (threshold) y.v[i] = y.v[i] * kept;
        if (A::needs == Needs::sign) {
          live |= (lane_mask(z.v[i] <= 0) ^ ((1u << lanes) - 1)) << (i * lanes);
          positive |= lane_mask(z.v[i] > 0) << (i * lanes);
        }
      }
      const int64_t index = (tile.row + r) * args.region.total_cols + tile.col;
      y.write(element<T>(args.y, index), tile.cols);
      if (args.saved) {
        for (int i = 0; i < TileRow<C>::count; ++i) saved.v[i] = worth_saving<A, T>(z.v[i], slope.v[i]);
        saved.write(element<Saved<A, T>>(args.saved, index), tile.cols);
      }
      const bool sign_is_slope = args.activation == Activation::relu;
      if (args.keep) args.keep[tile.number * kMaskTile + r] = static_cast<uint16_t>(sign_is_slope ? keep & live : keep);
      if (args.positive) args.positive[tile.number * kMaskTile + r] = static_cast<uint16_t>(positive);
    }
  });
}

template <class T, class C>
MLPKIT_HD void write_dz(const ActDropoutBackward& args, const Tile& tile, int r, const TileRow<C>& dz) {
  const int64_t row = tile.row + r - args.region.row, col = tile.col - args.region.col;
  if constexpr (__is_same(T, BFloat16)) {
    if (args.dz.down) {
      BFloat16* to = element<BFloat16>(args.dz.data, row * args.dz.stride + col);
      dz.write(to, kMaskTile);
      uint32_t* down = args.dz.down + row / 2 * args.dz.down_stride + col;
      for (int i = 0; i < kMaskTile; i += kLanes) {
        // An even row leaves zeros for its partner, which the last row of an odd number never gets.
        UintVec pair = __builtin_convertvector(load_bits<ShortVec>(to + i), UintVec);
        if (row % 2) pair = load_bits<UintVec>(down + i) | pair << 16;
        store_bits(down + i, pair);
      }
      return;
    }
  }
  dz.write(element<C>(args.dz.data, row * args.dz.stride + col), kMaskTile);
}

template <class A, class T, class C>
void backward(const ActDropoutBackward& args) {
  using V = typename Wide<C>::type;
  constexpr int lanes = Wide<C>::lanes;
  const C scale = static_cast<C>(args.dropout.scale);
  each_tile(args.region, [&](const Tile& tile) __attribute__((always_inline)) {
    TileRow<C> slope, dy, saved, dz, dbias, dslope;
    slope.read_or_fill(args.slope, tile.col, tile.cols, static_cast<C>(args.negative_slope));
    dbias.fill(0);
    dslope.fill(0);
    for (int r = 0; r < tile.rows; ++r) {
      const int64_t index = (tile.row + r) * args.region.total_cols + tile.col;
      dy.read(element<T>(args.dy, index), tile.cols);
      if (A::needs == Needs::preactivation) saved.read(element<Saved<A, T>>(args.saved, index), tile.cols);
      const unsigned keep = args.keep ? args.keep[tile.number * kMaskTile + r] : kAllKept;
      const unsigned positive = args.positive ? args.positive[tile.number * kMaskTile + r] : 0;
      for (int i = 0; i < TileRow<C>::count; ++i) {
        V factor;
        select_lanes(keep >> (i * lanes), V{} + scale, V{}, factor);
        if (A::needs == Needs::preactivation) {
          if constexpr (__is_same(A, Prelu)) {
            dslope.v[i] += dy.v[i] * factor * Prelu::slope_by_a(saved.v[i]);
            factor = factor * Prelu::slope(saved.v[i], slope.v[i]);
          } else {
            factor = factor * saved.v[i];
          }
        } else if (__is_same(A, LeakyRelu)) {
          V slopes;
          select_lanes(positive >> (i * lanes), V{} + C(1), slope.v[i], slopes);
          factor = factor * slopes;
        }
        dz.v[i] = dy.v[i] * factor;
        dbias.v[i] += dz.v[i];
      }
      write_dz<T, C>(args, tile, r, dz);
    }
    const auto add = [&](void* sums, const TileRow<C>& part) __attribute__((always_inline)) {
      if (!sums) return;
      TileRow<C> sum;
      sum.read(element<C>(sums, tile.col), tile.cols);
      sum.add(part);
      sum.write(element<C>(sums, tile.col), tile.cols);
    };
    add(args.dbias, dbias);
    add(args.dslope, dslope);
  });
}

template <class From, class To>
void convert_elements(const Convert& args) {
  constexpr int64_t lanes = kLanes;
  const From* from = static_cast<const From*>(args.from);
  To* to = static_cast<To*>(args.to);
  FloatVec v;
  int64_t i = 0;
  for (; i + lanes <= args.count; i += lanes) {
    load(from + i, v);
    store(to + i, v);
  }
  if (i == args.count) return;
  From last_from[lanes] = {};
  To last_to[lanes];
  __builtin_memcpy(last_from, from + i, (args.count - i) * sizeof(From));
  load(last_from, v);
  store(last_to, v);
  __builtin_memcpy(to + i, last_to, (args.count - i) * sizeof(To));
}

}  // namespace

void act_dropout_forward(const ActDropoutForward& args) {
  visit_storage(args.dtype, [&]<class T, class C>(T, C) {
    visit_activation(args.activation, [&]<class A>(A) { forward<A, T, C>(args); });
  });
}

void act_dropout_backward(const ActDropoutBackward& args) {
  visit_storage(args.dtype, [&]<class T, class C>(T, C) {
    visit_activation(args.activation, [&]<class A>(A) { backward<A, T, C>(args); });
  });
}

void convert(const Convert& args) {
  if (args.to_dtype == Dtype::bfloat16) return convert_elements<float, BFloat16>(args);
  if (args.to_dtype == Dtype::float16) return convert_elements<float, Half>(args);
  if (args.from_dtype == Dtype::bfloat16) return convert_elements<BFloat16, float>(args);
  if (args.from_dtype == Dtype::float16) return convert_elements<Half, float>(args);
}

MLPKIT_END_ISA
