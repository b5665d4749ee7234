// The sums that layer norm takes along a row, by cascade: 256 elements at a time, and then the parts (cpu). Included by
// *_kernel.cpp files only.
#pragma once
#include "cpu/norm_act_dropout.h"
#include "cpu/tile_row.h"

MLPKIT_BEGIN_ISA

// Two sums along a row of n elements: terms(col, count, first, second) gives sixteen terms of each, zero beyond count.
template <class C>
struct RowSums {
  C first, second;
};
template <class C, class Terms>
MLPKIT_HD RowSums<C> sum_row(int64_t n, Terms&& terms) {
  constexpr int64_t kPart = 16 * kMaskTile;
  TileRow<C> first_total, second_total;
  first_total.fill(0);
  second_total.fill(0);
  for (int64_t begin = 0; begin < n; begin += kPart) {
    TileRow<C> first_part, second_part, first, second;
    first_part.fill(0);
    second_part.fill(0);
    for (int64_t col = begin; col < n && col < begin + kPart; col += kMaskTile) {
      terms(col, tile_extent(n - col), first, second);
      first_part.add(first);
      second_part.add(second);
    }
    first_total.add(first_part);
    second_total.add(second_part);
  }
  return {first_total.sum(), second_total.sum()};
}

// Writes mean and inverse deviation of one row of z.
template <class T, class C>
MLPKIT_HD void row_moments(const T* z, int64_t cols, const Normalisation& norm, int64_t row) {
  const C pivot = sum_row<C>(cols,
                             [&](int64_t col, int n, TileRow<C>& value, TileRow<C>& none) {
                               value.read(z + col, n);
                               none.fill(0);
                             })
                      .first /
                  static_cast<C>(cols);
  const RowSums<C> sums = sum_row<C>(cols, [&](int64_t col, int n, TileRow<C>& d, TileRow<C>& square) {
    d.read(z + col, n);
    for (int i = 0; i < TileRow<C>::count; ++i) d.v[i] = d.v[i] - pivot;
    d.keep_first(n);
    for (int i = 0; i < TileRow<C>::count; ++i) square.v[i] = d.v[i] * d.v[i];
  });
  const double n = static_cast<double>(cols);
  const Moments moments = moments_around(pivot, sums.first, sums.second, n);
  *element<C>(norm.mean, row) = static_cast<C>(moments.mean);
  *element<C>(norm.inverse, row) = inverse_deviation(static_cast<C>(moments.squares / n), norm.eps);
}

// mean(g) and mean(g x) of one row
template <class C>
struct RowMeans {
  C g, gx;
};
template <class T, class C>
MLPKIT_HD RowMeans<C> gradient_means(const NormBackward& args, int64_t row) {
  const int64_t cols = args.region.total_cols, begin = row * cols;
  const C mean = *element<C>(args.norm.mean, row), inverse = *element<C>(args.norm.inverse, row);
  const RowSums<C> sums = sum_row<C>(cols, [&](int64_t col, int n, TileRow<C>& g, TileRow<C>& gx) {
    g.read(element<C>(args.g, begin + col), n);  // zero beyond n, and so are the products
    gx.read(element<T>(args.z, begin + col), n);
    for (int i = 0; i < TileRow<C>::count; ++i)
      gx.v[i] = g.v[i] * normalised(gx.v[i], typename TileRow<C>::V{} + mean, typename TileRow<C>::V{} + inverse);
  });
  return {sums.first / static_cast<C>(cols), sums.second / static_cast<C>(cols)};
}

MLPKIT_END_ISA
