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

// Neighbouring tiles of the mask contract: up to 16 rows of a region, and up to kBandTiles tiles. A band is worked on
// row by row, since in memory a row of one tile is but a cache line, and lines a page apart come slowly.
constexpr int kBandTiles = 16;
using BandBits = uint16_t[kBandTiles][kMaskTile];
struct Band {
  int64_t first_tile, row, col, cols;
  int rows, tiles;

  MLPKIT_HD int tile_cols(int tile) const { return tile_extent(cols - tile * kMaskTile); }
};

template <class Body>
MLPKIT_HD void each_band(const Region& region, Body&& body) {
  const int64_t col_tiles = mask_tiles(region.total_cols);
  const int64_t end_row = region.row + region.rows, end_col = region.col + region.cols;
  constexpr int64_t width = kBandTiles * kMaskTile;
  for (int64_t row = region.row; row < end_row; row += kMaskTile)
    for (int64_t col = region.col; col < end_col; col += width) {
      const int64_t cols = end_col - col < width ? end_col - col : width;
      body(Band{row / kMaskTile * col_tiles + col / kMaskTile, row, col, cols, tile_extent(end_row - row),
                static_cast<int>(mask_tiles(cols))});
    }
}

// Calls body(tile, first_row, end_row) for a few rows of each tile, then for the next few. More rows of a wide output
// would lie in one set of the nearest cache, a multiple of its pages apart.
constexpr int kRowsTogether = 4;
// Rows between one that is read and one that is fetched early: the hardware guesses no further than to a page's end.
constexpr int kAhead = 8;
template <class Body>
MLPKIT_HD void each_strip(int rows, int tiles, Body&& body) {
  for (int first = 0; first < rows; first += kRowsTogether) {
    const int end = first + kRowsTogether < rows ? first + kRowsTogether : rows;
    for (int tile = 0; tile < tiles; ++tile) body(tile, first, end);
  }
}

// Bit c of keep[tile][r] is set where element (r, c) is kept.
__attribute__((noinline)) void draw(const Dropout& dropout, const Band& band, BandBits& keep) {
  if (dropout.threshold == 0 || dropout.threshold >= 65536) {
    __builtin_memset(keep, dropout.threshold ? 0 : 0xff, sizeof(keep));
    return;
  }
  MaskTiles mask(dropout);
  for (int tile = 0; tile < band.tiles; ++tile) mask.draw(band.first_tile + tile, keep[tile]);
}

// Bits of the band's rows, to or from where all of the output's lie.
MLPKIT_HD void save_bits(const Band& band, const BandBits& bits, uint16_t* all) {
  for (int tile = 0; tile < band.tiles; ++tile)
    __builtin_memcpy(all + (band.first_tile + tile) * kMaskTile, bits[tile], band.rows * sizeof(uint16_t));
}

// The largest magnitude of a band that was written just now, read while it is in the nearest cache. As integers,
// magnitudes are ordered like the numbers, and every NaN is above them.
template <class T, class C>
__attribute__((noinline)) double largest_magnitude(const Band& band, const T* y, int64_t stride) {
  using V = typename Wide<C>::type;
  using Bits = std::conditional_t<sizeof(C) == 8, int64_t, IntVec>;
  constexpr Bits magnitude = Bits{} + (sizeof(C) == 8 ? INT64_MAX : INT32_MAX);
  Bits largest{};
  for (int r = 0; r < band.rows; ++r)
    for (int tile = 0; tile < band.tiles; ++tile) {
      TileRow<C> values;
      values.read(y + (band.row + r) * stride + band.col + tile * kMaskTile, band.tile_cols(tile));
      for (const V v : values.v) {
        const Bits bits = math::bits_as<Bits>(v) & magnitude;
        largest = bits > largest ? bits : largest;
      }
    }
  C lanes[Wide<C>::lanes];
  __builtin_memcpy(lanes, &largest, sizeof(lanes));
  double result = 0;
  for (const C lane : lanes) result = larger_magnitude(lane, result);
  return result;
}

// Whole tiles side by side.
template <class A, class T, class C>
struct ForwardTiles {
  const C* product;  // [rows, tiles * 16]
  int64_t product_stride;
  const C* bias;   // [tiles * 16] or nullptr
  const C* slope;  // the same
  C negative_slope, scale;
  bool masks;
  T* y;  // [rows, tiles * 16]
  Saved<A, T>* saved;
  int64_t stride;
  uint16_t (*keep)[kMaskTile];
  uint16_t (*positive)[kMaskTile];
  int rows, tiles;
};

// A function of its own, which calls none: so all constants of a formula stay in registers from row to row.
template <class A, class T, class C>
__attribute__((noinline)) void forward_tiles(const ForwardTiles<A, T, C>& given) {
  using V = typename Wide<C>::type;
  constexpr int lanes = Wide<C>::lanes;
  const ForwardTiles<A, T, C> args = given;  // a copy, which no store can change
  each_strip(args.rows, args.tiles, [&](int tile, int first, int end) __attribute__((always_inline)) {
    const int64_t col = tile * kMaskTile;
    const C* product = args.product + first * args.product_stride + col;
    T* y = args.y + first * args.stride + col;
    Saved<A, T>* saved = args.saved + (args.saved ? first * args.stride + col : 0);
    TileRow<C> bias, slope;
    bias.read_or_fill(args.bias, col, kMaskTile, C(0));
    slope.read_or_fill(args.slope, col, kMaskTile, args.negative_slope);
    for (int r = first; r < end; ++r) {
      TileRow<C> z, value, saving;
      z.read(product, kMaskTile);
      if (args.bias) z.add(bias);
      const unsigned kept = args.keep[tile][r];
      unsigned live = 0, above = 0;
      for (int i = 0; i < TileRow<C>::count; ++i) {
        V factor;
        select_lanes(kept >> (i * lanes), V{} + args.scale, V{}, factor);
        value.v[i] = A::value(z.v[i], slope.v[i]);
        saving.v[i] = worth_saving<A, T>(z.v[i], slope.v[i]);
        if (args.masks) value.v[i] = value.v[i] * factor;
        if (A::needs == Needs::sign) {
          live |= (lane_mask(z.v[i] <= 0) ^ ((1u << lanes) - 1)) << (i * lanes);
          above |= lane_mask(z.v[i] > 0) << (i * lanes);
        }
      }
      value.write(y, kMaskTile);
      __builtin_prefetch(y + kAhead * args.stride, 1);
      if (args.saved) {
        saving.write(saved, kMaskTile);
        __builtin_prefetch(saved + kAhead * args.stride, 1);
        saved += args.stride;
      }
      if (__is_same(A, Relu)) args.keep[tile][r] = static_cast<uint16_t>(kept & live);
      if (__is_same(A, LeakyRelu)) args.positive[tile][r] = static_cast<uint16_t>(above);
      product += args.product_stride;
      y += args.stride;
    }
  });
}

template <class T>
MLPKIT_HD void copy_rows(T* to, int64_t to_stride, const T* from, int64_t from_stride, int rows, int cols) {
  for (int r = 0; r < rows; ++r) __builtin_memcpy(to + r * to_stride, from + r * from_stride, cols * sizeof(T));
}

// The `cols` first columns of a tile: as a whole one, in copies.
template <class A, class T, class C>
__attribute__((noinline)) void forward_ragged(const ForwardTiles<A, T, C>& args, int cols) {
  C product[kMaskTile][kMaskTile] = {}, bias[kMaskTile] = {}, slope[kMaskTile] = {};
  T y[kMaskTile][kMaskTile];
  Saved<A, T> saved[kMaskTile][kMaskTile];
  ForwardTiles<A, T, C> whole = args;
  copy_rows(product[0], kMaskTile, args.product, args.product_stride, args.rows, cols);
  if (args.bias) __builtin_memcpy(bias, args.bias, cols * sizeof(C));
  if (args.slope) __builtin_memcpy(slope, args.slope, cols * sizeof(C));
  whole.product = product[0];
  whole.bias = args.bias ? bias : nullptr;
  whole.slope = args.slope ? slope : nullptr;
  whole.y = y[0];
  whole.saved = args.saved ? saved[0] : nullptr;
  whole.product_stride = whole.stride = kMaskTile;
  forward_tiles(whole);
  copy_rows(args.y, args.stride, y[0], kMaskTile, args.rows, cols);
  if (args.saved) copy_rows(args.saved, args.stride, saved[0], kMaskTile, args.rows, cols);
}

template <class A, class T, class C>
void forward(const ActDropoutForward& args) {
  const int64_t stride = args.region.total_cols;
  each_band(args.region, [&](const Band& band) __attribute__((always_inline)) {
    BandBits keep, positive;
    draw(args.dropout, band, keep);
    const int whole = static_cast<int>(band.cols / kMaskTile), ragged = static_cast<int>(band.cols % kMaskTile);
    const auto tiles_from = [&](int tile, int tiles) {
      const int64_t col = band.col + tile * kMaskTile, element_of_y = band.row * stride + col;
      return ForwardTiles<A, T, C>{
          element<C>(args.product, (band.row - args.region.row) * args.product_stride + col - args.region.col),
          args.product_stride,
          args.bias ? element<C>(args.bias, col) : nullptr,
          args.slope ? element<C>(args.slope, col) : nullptr,
          static_cast<C>(args.negative_slope),
          static_cast<C>(args.dropout.scale),
          args.dropout.threshold > 0,
          element<T>(args.y, element_of_y),
          args.saved ? element<Saved<A, T>>(args.saved, element_of_y) : nullptr,
          stride,
          keep + tile,
          positive + tile,
          band.rows,
          tiles};
    };
    if (whole) forward_tiles(tiles_from(0, whole));
    if (ragged) forward_ragged(tiles_from(whole, 1), ragged);
    if (args.keep) save_bits(band, keep, args.keep);
    if (__is_same(A, LeakyRelu) && args.positive) save_bits(band, positive, args.positive);
    if (args.absmax)
      *args.absmax = larger_magnitude(largest_magnitude<T, C>(band, element<T>(args.y, 0), stride), *args.absmax);
  });
}

template <class T, class C>
MLPKIT_HD void write_dz(const DzTile& to, int64_t row, int64_t col, const TileRow<C>& dz) {
  if constexpr (__is_same(T, BFloat16)) {
    if (to.down) {
      BFloat16* along = element<BFloat16>(to.data, row * to.stride + col);
      dz.write(along, kMaskTile);
      uint32_t* down = to.down + row / 2 * to.down_stride + col;
      for (int i = 0; i < kMaskTile; i += kLanes) {
        // An even row leaves zeros for its partner, which the last row of an odd number never gets.
        UintVec pair = __builtin_convertvector(load_bits<ShortVec>(along + i), UintVec);
        if (row % 2) pair = load_bits<UintVec>(down + i) | pair << 16;
        store_bits(down + i, pair);
      }
      return;
    }
  }
  dz.write(element<C>(to.data, row * to.stride + col), kMaskTile);
}

// sums[tile] of every column are added to those of all columns.
template <class C>
MLPKIT_HD void add_sums(const Band& band, const TileRow<C>* sums, void* all) {
  if (!all) return;
  for (int tile = 0; tile < band.tiles; ++tile) {
    C* to = element<C>(all, band.col + tile * kMaskTile);
    TileRow<C> sum;
    sum.read(to, band.tile_cols(tile));
    sum.add(sums[tile]);
    sum.write(to, band.tile_cols(tile));
  }
}

template <class A, class T, class C>
void backward(const ActDropoutBackward& given) {
  using V = typename Wide<C>::type;
  constexpr int lanes = Wide<C>::lanes;
  const ActDropoutBackward args = given;  // a copy, which no store can change
  const C scale = static_cast<C>(args.dropout.scale);
  const int64_t stride = args.region.total_cols;
  constexpr bool has_slope = __is_same(A, Prelu) || __is_same(A, LeakyRelu);
  each_band(args.region, [&](const Band& band) __attribute__((always_inline)) {
    TileRow<C> dbias[kBandTiles], dslope[kBandTiles];
    for (int tile = 0; tile < band.tiles; ++tile) {
      dbias[tile].fill(0);
      dslope[tile].fill(0);
    }
    each_strip(band.rows, band.tiles, [&](int tile, int first, int end) __attribute__((always_inline)) {
      const int64_t col = band.col + tile * kMaskTile, row = band.row + first;
      const int64_t words = (band.first_tile + tile) * kMaskTile;
      const int cols = band.tile_cols(tile);
      const T* from = element<T>(args.dy, row * stride + col);
      const auto* saved_from =
          element<Saved<A, T>>(args.saved, A::needs == Needs::preactivation ? row * stride + col : 0);
      TileRow<C> slope, bias_sum = dbias[tile], slope_sum = dslope[tile];
      if (has_slope) slope.read_or_fill(args.slope, col, cols, static_cast<C>(args.negative_slope));
      for (int r = first; r < end; ++r) {
        TileRow<C> dy, saved, dz;
        dy.read(from, cols);
        __builtin_prefetch(from + kAhead * stride);
        from += stride;
        if (A::needs == Needs::preactivation) {
          saved.read(saved_from, cols);
          __builtin_prefetch(saved_from + kAhead * stride);
          saved_from += stride;
        }
        const unsigned keep = args.keep ? args.keep[words + r] : kAllKept;
        const unsigned positive = args.positive ? args.positive[words + r] : 0;
        for (int i = 0; i < TileRow<C>::count; ++i) {
          V factor;
          select_lanes(keep >> (i * lanes), V{} + scale, V{}, factor);
          if (A::needs == Needs::preactivation) {
            if constexpr (__is_same(A, Prelu)) {
              slope_sum.v[i] += dy.v[i] * factor * Prelu::slope_by_a(saved.v[i]);
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
          bias_sum.v[i] += dz.v[i];
        }
        write_dz<T, C>(args.dz, band.row + r - args.region.row, col - args.region.col, dz);
      }
      dbias[tile] = bias_sum;
      if (__is_same(A, Prelu)) dslope[tile] = slope_sum;
    });
    add_sums(band, dbias, args.dbias);
    if (__is_same(A, Prelu)) add_sums(band, dslope, args.dslope);
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
