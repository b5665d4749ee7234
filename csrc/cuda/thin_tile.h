// Tiles of a [rows, depth] matrix of two-byte elements in shared memory (cuda).
#pragma once
#include "cuda/device.h"

namespace mlpkit::cuda {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline bool on_16_bytes(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }
MLPKIT_HD int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

// Where a row's piece of 16 bytes lies in a tile of `width` columns: pieces change places within eight by the row, so
// that eight rows of one piece, as ldmatrix reads them, lie in different banks.
template <int width>
MLPKIT_HD int swizzled(int row, int piece) {
  static_assert(width >= 64, "a row has at least eight pieces");
  return row * width * 2 + (piece ^ (row & 7)) * 16;
}

// Starts the copy of `depth` features of rows first .. first + tile_rows - 1 of a matrix; past the end come zeros.
template <class T, int depth, int tile_rows, int threads>
MLPKIT_DEVICE void fetch_rows(unsigned char* to, const void* matrix, int64_t first, int64_t rows, int64_t features,
                              int64_t first_feature = 0) {
  constexpr int pieces = depth / 8;
#pragma unroll
  for (int i = 0; i < tile_rows * pieces / threads; ++i) {
    const int index = i * threads + static_cast<int>(device::thread_index());
    const int row = index / pieces, piece = index % pieces;
    const int64_t feature = first_feature + piece * 8;
    const bool valid = first + row < rows && feature < features;
    const T* from = static_cast<const T*>(matrix) + (valid ? (first + row) * features + feature : 0);
    device::copy16_async(to + swizzled<depth>(row, piece), from, valid);
  }
}

}  // namespace mlpkit::cuda
