// Tiles of 16x16 elements in shared memory, and how a warp multiplies them (cuda).
//
// A tile is four blocks of 8x8 elements: upper left, lower left, upper right, lower right; a block is eight rows of 16
// bytes, 128 bytes that no access splits among banks. That one order serves every operand of mma.m16n8k16: as it lies
// or transposed, with the middle blocks exchanged or not, ldmatrix makes of it
//   a   of an activation [rows, in]            as it lies
//   b   of a weight [out, in], by in           exchanged            y = x W^T
//   b   of a weight [out, in], by out          transposed           dx = dz W
//   a   of a gradient [rows, out], by rows     transposed, exchanged
//   b   of an activation [rows, in], by rows   transposed           dW = dz^T x
// and word j of a lane's accumulators goes into block j: it is word j of the mask contract, so that neither the mask
// nor the next operand needs a shuffle.
#pragma once
#include <type_traits>

#include "cuda/device.h"
#include "cuda/mlp_plan.h"

namespace mlpkit::cuda {

enum class Blocks { lying, exchanged };

// Where the lane's row of a tile lies, in elements: lane / 8 is the operand's block, lane % 8 its row.
MLPKIT_DEVICE int tile_row(uint32_t lane, Blocks blocks) {
  const uint32_t swapped = (lane & 7) | (lane & 8) << 1 | (lane & 16) >> 1;
  return static_cast<int>((blocks == Blocks::exchanged ? swapped : lane) * 8);
}

template <bool transposed, class T>
MLPKIT_DEVICE void load_tile(const T* tile, int lanes_row, uint32_t (&to)[4]) {
  device::load_matrices<transposed>(tile + lanes_row, to);
}

// Two products side by side: d [16, 16] += a [16, 16] b [16, 16].
template <class T>
MLPKIT_DEVICE void multiply_tile(float (&d)[2][4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
  const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
  device::multiply_add(d[0], a, left, T{});
  device::multiply_add(d[1], a, right, T{});
}

// A matrix in global memory, row by row.
struct Matrix {
  const void* data;
  bool single;   // float32; otherwise T
  bool aligned;  // rows start at multiples of 16 bytes
  int64_t rows;
  int cols;
};

MLPKIT_HD Matrix matrix_of(const void* data, bool single, int64_t rows, int cols) {
  const int bytes = cols * (single ? 4 : 2);
  return {data, single, bytes % 16 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0, rows, cols};
}

template <class T>
MLPKIT_DEVICE void load_eight(const Matrix& m, int64_t row, int col, float (&to)[8]) {
  const auto from = [&](auto* data) {
    data += row * m.cols + col;
    using Element = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
    if (m.aligned && col + 8 <= m.cols) {
      device::load16(data, to);
      if constexpr (sizeof(Element) == 4) device::load16(data + 4, to + 4);
      return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (col + i < m.cols) device::load(data + i, to[i]);
  };
  if (m.single)
    from(static_cast<const float*>(m.data));
  else
    from(static_cast<const T*>(m.data));
}

// Where one part of a fill comes from: eight columns of a row.
struct Part {
  int64_t row;
  int col;
  bool inside;
};
MLPKIT_DEVICE Part part_of(const Matrix& m, int part, int col_tiles, int64_t row, int col) {
  const int tile = part / 32, block = part / 8 % 4;
  const int64_t r = row + tile / col_tiles * 16 + (block & 1) * 8 + part % 8;
  const int c = col + tile % col_tiles * 16 + (block >> 1) * 8;
  return {r, c, r < m.rows && c < m.cols};
}

// Tiles from row and col on, row tile by row tile, by all threads of the block; zeros beyond the matrix. Eight lanes
// fill 128 adjacent bytes. All that one thread has to read is on its way at once, or a good part of it.
template <class T>
MLPKIT_DEVICE void fill_tiles(T* tiles, int row_tiles, int col_tiles, const Matrix& m, int64_t row, int col) {
  const int parts = row_tiles * col_tiles * 32, thread = static_cast<int>(device::thread_index());
  if (!m.aligned || m.cols % 8 != 0) {
    for (int part = thread; part < parts; part += kMlpThreads) {
      const Part at = part_of(m, part, col_tiles, row, col);
      float values[8] = {};
      if (at.inside) load_eight<T>(m, at.row, at.col, values);
      device::store16(tiles + part * 8, values);
    }
  } else if (m.single) {
    constexpr int kAtOnce = 4;
    for (int first = thread; first < parts; first += kAtOnce * kMlpThreads) {
      float values[kAtOnce][8] = {};
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const Part at = part_of(m, first + i * kMlpThreads, col_tiles, row, col);
        if (!at.inside || first + i * kMlpThreads >= parts) continue;
        const float* from = static_cast<const float*>(m.data) + at.row * m.cols + at.col;
        device::load16(from, values[i]);
        device::load16(from + 4, values[i] + 4);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        if (first + i * kMlpThreads < parts) device::store16(tiles + (first + i * kMlpThreads) * 8, values[i]);
    }
  } else {
    for (int part = thread; part < parts; part += kMlpThreads) {
      const Part at = part_of(m, part, col_tiles, row, col);
      const T* from = static_cast<const T*>(m.data) + (at.inside ? at.row * m.cols + at.col : 0);
      device::copy16_async(tiles + part * 8, from, at.inside);
    }
    device::commit_copies();
    device::wait_for_copies<0>();
  }
}

// The other way, for `rows` rows: tiles to a matrix of T in global memory from row on.
template <class T>
MLPKIT_DEVICE void write_tiles(const T* tiles, int rows, int col_tiles, T* to, bool aligned, int64_t row, int cols) {
  const int parts = (rows + 15) / 16 * col_tiles * 32;
  for (int part = static_cast<int>(device::thread_index()); part < parts; part += kMlpThreads) {
    const int tile = part / 32, block = part / 8 % 4;
    const int r = tile / col_tiles * 16 + (block & 1) * 8 + part % 8, c = tile % col_tiles * 16 + (block >> 1) * 8;
    if (r >= rows) continue;
    T* at = to + (row + r) * cols + c;
    if (aligned && c + 8 <= cols) {
      device::store_bits16(at, device::load_bits16(tiles + part * 8));
      continue;
    }
    float values[8];
    device::load16(tiles + part * 8, values);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (c + i < cols) device::store(at + i, values[i]);
  }
}

}  // namespace mlpkit::cuda
