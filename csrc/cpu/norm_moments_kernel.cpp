// Mean and squared deviations of columns, over the rows of one region (cpu; compiled once for each instruction set).
#include "core/norm.h"
#include "cpu/norm_act_dropout.h"
#include "cpu/tile_row.h"

MLPKIT_BEGIN_ISA
namespace {

constexpr int kTile = kMaskTile;

template <class T, class C>
void moments_of_columns(const ColumnMoments& args) {
  const Region& region = args.region;
  const int64_t end = region.row + region.rows;
  for (int64_t col = region.col; col < region.col + region.cols; col += kTile) {
    const int cols = tile_extent(region.col + region.cols - col);
    // Both passes sum sixteen rows, and then the parts.
    const auto each_row = [&](auto&& body, auto&& end_of_part) __attribute__((always_inline)) {
      for (int64_t row = region.row; row < end; row += kTile) {
        for (int r = 0; r < tile_extent(end - row); ++r) {
          TileRow<C> z;
          z.read(element<T>(args.z, (row + r) * region.total_cols + col), cols);
          body(z);
        }
        end_of_part();
      }
    };
    TileRow<C> pivot, sum, squares, sum_part, squares_part;
    for (TileRow<C>* sums : {&pivot, &sum, &squares, &sum_part, &squares_part}) sums->fill(0);
    each_row([&](const TileRow<C>& z) __attribute__((always_inline)) { sum_part.add(z); },
             [&]() __attribute__((always_inline)) {
               pivot.add(sum_part);
               sum_part.fill(0);
             });
    for (int i = 0; i < TileRow<C>::count; ++i) pivot.v[i] = pivot.v[i] / static_cast<C>(region.rows);
    each_row(
        [&](const TileRow<C>& z) __attribute__((always_inline)) {
          for (int i = 0; i < TileRow<C>::count; ++i) {
            const auto d = z.v[i] - pivot.v[i];
            sum_part.v[i] += d;
            squares_part.v[i] += d * d;
          }
        },
        [&]() __attribute__((always_inline)) {
          sum.add(sum_part);
          squares.add(squares_part);
          sum_part.fill(0);
          squares_part.fill(0);
        });
    C pivots[kTile], sums[kTile], squared[kTile];
    pivot.write(pivots, kTile);
    sum.write(sums, kTile);
    squares.write(squared, kTile);
    for (int c = 0; c < cols; ++c) {
      const Moments moments = moments_around(pivots[c], sums[c], squared[c], static_cast<double>(region.rows));
      args.mean[col + c] = moments.mean;
      args.squares[col + c] = moments.squares;
    }
  }
}

}  // namespace

void column_moments(const ColumnMoments& args) {
  visit_storage(args.dtype, [&]<class T, class C>(T, C) { moments_of_columns<T, C>(args); });
}

MLPKIT_END_ISA
