// Work on a matrix tile by tile, in parallel, and the matrix product of one tile (ops).
#pragma once
#include <cstdint>
#include <functional>

#include "core/dtype.h"

namespace mlpkit {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Block {
  int64_t row, rows, col, cols;
};

struct Tiling {  // of a (rows, cols) matrix, each element of which takes about `depth` multiply-adds
  int64_t rows, cols, tile_rows, tile_cols, depth;
};

// Tiles hold at most this many rows and columns: 256 x 256 floats are a quarter of a 1 MiB L2.
constexpr int64_t kTileRows = 256, kTileCols = 256;

// Calls body(block, scratch) for every tile; scratch has room for one tile of doubles. Tiles are fixed by the problem
// alone, never by the number of threads, so every sum is the same for any of them.
void each_block(const Tiling& tiling, const std::function<void(const Block&, void* scratch)>& body);

// Whether a product of two bfloat16 operands is quicker than one with a float operand here.
bool prefers_bfloat16_pairs();

struct Operand {  // a matrix in memory, row-major
  Dtype dtype;
  const void* data;
  int64_t stride;
  bool transposed;  // the product reads its transpose
};

// c = op(a) op(b) for the rows and columns of a block, summed over `depth` in fp32 (fp64 for float64 operands). c is
// the block's first element, float or double.
void multiply(const Operand& a, const Operand& b, int64_t depth, const Block& block, void* c, int64_t ldc);

}  // namespace mlpkit
