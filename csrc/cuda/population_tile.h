// Tiles of 16x16 bfloat16 or float32 in shared memory, and how a warp multiplies them, as the population's kernels need
// it (cuda). bfloat16: mlp_tile.h's tiles and mma.sync. float32: rows of 16 numbers whose groups of four are exchanged
// by row, so that neither eight rows nor a column pair falls into one bank twice, and multiply-adds that round; a lane
// has the same elements of a result in both.
#pragma once
#include "cuda/mlp_tile.h"
#include "cuda/population_plan.h"

namespace mlpkit::cuda {

// Where word j (mask contract) of a lane lies in a tile: row lane / 4 + 8 (j mod 2), columns 2 (lane mod 4) + 8 (j / 2)
// and the next.
MLPKIT_DEVICE int pair_place(uint32_t lane, int j, BFloat16) { return j * 64 + static_cast<int>(lane) * 2; }
MLPKIT_DEVICE int float_place(int r, int c) { return r * 16 + ((c / 4 ^ (r / 2 & 3)) * 4) + c % 4; }
MLPKIT_DEVICE int pair_place(uint32_t lane, int j, float) {
  return float_place(static_cast<int>(lane / 4) + 8 * (j & 1), static_cast<int>(lane % 4) * 2 + 8 * (j / 2));
}

MLPKIT_DEVICE void put_pair(BFloat16* to, float left, float right) {
  device::store4(to, device::narrow_pair(left, right, BFloat16{}));
}
MLPKIT_DEVICE void put_pair(float* to, float left, float right) { device::store_pair(to, left, right); }
MLPKIT_DEVICE float2 get_pair(const BFloat16* from) { return device::widen_pair(device::load4(from), BFloat16{}); }
MLPKIT_DEVICE float2 get_pair(const float* from) { return device::load_pair(from); }

// Sixteen bytes of a tile: which row and columns they are.
struct TilePart {
  int row, col;
};
MLPKIT_DEVICE TilePart part_of_tile(int part, BFloat16) { return {(part / 8 & 1) * 8 + part % 8, part / 16 * 8}; }
MLPKIT_DEVICE TilePart part_of_tile(int part, float) { return {part / 4, (part % 4 ^ (part / 8 & 3)) * 4}; }

// A matrix of tiles: `across` tiles from one to the next along the result's rows or columns, `deep` along the sum.
template <class T>
struct Tiles {
  const T* data;
  int across, deep;
  MLPKIT_DEVICE const T* at(int a, int k) const { return data + (a * across + k * deep) * kTileElements; }
};

// What a warp computes at once: up to two row tiles by up to two column tiles (float32: one).
template <class T>
constexpr int kTileCols = sizeof(T) == 2 ? 2 : 1;
template <class T>
using Products = float[2][kTileCols<T>][2][4];

struct Item {
  int row, rows, col, cols;  // tiles
};

// products[h][w] += a b over `deep` tiles; by_sum: the operand is transposed, the sum goes along its rows. sums[h]: the
// sums of a's rows, in every lane of theirs, where wanted.
template <bool a_by_sum, bool b_by_sum>
MLPKIT_DEVICE void multiply_item(const Tiles<BFloat16>& a, const Tiles<BFloat16>& b, const Item& item, int deep,
                                 uint32_t lane, Products<BFloat16>& products, bool wants_sums, float (&sums)[2][4]) {
  const int a_row = tile_row(lane, a_by_sum ? Blocks::exchanged : Blocks::lying);
  const int b_row = tile_row(lane, b_by_sum ? Blocks::lying : Blocks::exchanged);
  const uint32_t one = device::narrow_pair(1.f, 1.f, BFloat16{}), ones[2] = {one, one};
  for (int k = 0; k < deep; ++k) {
    uint32_t of_a[2][4], of_b[2][4];
#pragma unroll
    for (int h = 0; h < 2; ++h)
      if (h < item.rows) load_tile<a_by_sum>(a.at(item.row + h, k), a_row, of_a[h]);
#pragma unroll
    for (int w = 0; w < 2; ++w)
      if (w < item.cols) load_tile<b_by_sum>(b.at(item.col + w, k), b_row, of_b[w]);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (h >= item.rows) continue;
#pragma unroll
      for (int w = 0; w < 2; ++w)
        if (w < item.cols) multiply_tile<BFloat16>(products[h][w], of_a[h], of_b[w]);
      if (wants_sums) device::multiply_add(sums[h], of_a[h], ones, BFloat16{});
    }
  }
}

// Four steps of the sum: numbers 4 k to 4 k + 3 of the rows or columns of a tile.
template <bool by_sum>
MLPKIT_DEVICE void load_four(const float* tile, int at, int k, float (&to)[4]) {
  if constexpr (!by_sum) {
    device::load16(tile + float_place(at, 4 * k), to);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) device::load(tile + float_place(4 * k + j, at), to[j]);
  }
}

// Sums of 256 terms are added to those before: a single chain would lose more (docs/precision.md).
constexpr int kChainTiles = 16;

template <bool a_by_sum, bool b_by_sum>
MLPKIT_DEVICE void multiply_item(const Tiles<float>& a, const Tiles<float>& b, const Item& item, int deep,
                                 uint32_t lane, Products<float>& products, bool wants_sums, float (&sums)[2][4]) {
  const int g = static_cast<int>(lane / 4), c = static_cast<int>(lane % 4) * 2;
  for (int chain = 0; chain < deep; chain += kChainTiles) {
    float part[2][2][4] = {}, part_sums[2][2] = {};
    for (int k = chain; k < deep && k < chain + kChainTiles; ++k)
#pragma unroll 1
      for (int four = 0; four < 4; ++four) {
        float of_b[4][4];
#pragma unroll
        for (int n = 0; n < 4; ++n) load_four<b_by_sum>(b.at(item.col, k), c + n % 2 + n / 2 * 8, four, of_b[n]);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          if (h >= item.rows) continue;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float of_a[4];
            load_four<a_by_sum>(a.at(item.row + h, k), g + 8 * i, four, of_a);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
#pragma unroll
              for (int n = 0; n < 4; ++n) part[h][n / 2][2 * i + n % 2] += of_a[j] * of_b[n][j];
              part_sums[h][i] += of_a[j];
            }
          }
        }
      }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int e = 0; e < 8; ++e) products[h][0][e / 4][e % 4] += part[h][e / 4][e % 4];
      if (wants_sums) sums[h][0] += part_sums[h][0], sums[h][2] += part_sums[h][1];
    }
  }
}

}  // namespace mlpkit::cuda
