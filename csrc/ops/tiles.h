// Work on a matrix tile by tile, in parallel, and the matrix product of one tile (ops).
#pragma once
#include <array>
#include <cstdint>
#include <functional>

#include "core/dtype.h"
#include "cpu/gemm.h"

namespace mlpkit {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Block {
  int64_t row, rows, col, cols;
};

// A contiguous matrix that an element-wise pass reads or writes; data may be null.
struct PassedOver {
  const void* data;
  int64_t cols, element_size;
};

// Its rows in a block, to be fetched while a product runs.
GemmFetch fetch_of(const std::array<PassedOver, 2>& matrices, const Block& block);

// Rows of a tile that are worked on while they are in the nearest caches, `rest` rows before its end.
int64_t strip_rows(int64_t rest);

struct Tiling {  // of a (rows, cols) matrix, each element of which takes about `depth` multiply-adds
  int64_t rows, cols, tile_rows, tile_cols, depth;
};

// Tiles hold at most this many rows and columns: 256 x 256 floats are a quarter of a 1 MiB L2.
constexpr int64_t kTileRows = 256, kTileCols = 256;
static_assert(kTileRows <= kGemmRows && kTileCols <= kGemmCols);

// A thread's working memory, kept from call to call: a fresh megabyte a call would cost more in page faults than a
// small layer takes.
class Scratch {
 public:
  static Scratch& mine();  // of the calling thread

  void* tile() const { return memory_; }  // one tile of doubles
  float* lanes() const { return floats(kTileBytes); }
  float* panels(int i) const { return floats(kTileBytes + sizeof(float) * (kLaneFloats + i * kPanelFloats)); }
  // Whether panels(i) hold what was packed from there under that number: then packing again is not needed.
  bool holds(int i, const void* from, int64_t number);
  void forget() { packed_[0] = packed_[1] = {}; }

 private:
  static constexpr size_t kTileBytes = sizeof(double) * kTileRows * kTileCols;
  struct Packed {
    const void* from = nullptr;
    int64_t number = 0;
  };
  Scratch();
  ~Scratch();
  float* floats(size_t bytes) const { return reinterpret_cast<float*>(memory_ + bytes); }
  char* memory_;
  Packed packed_[2];
};

// Splits count pieces of work of so many floating-point operations each into ranges for torch's threads; no range is
// too small to be worth a thread.
void in_parallel(int64_t count, double flops, const std::function<void(int64_t begin, int64_t end)>& body);

// Calls body(block, scratch) for every tile, those of one column after each other. Tiles are fixed by the problem
// alone, never by the number of threads, so every sum is the same for any of them.
void each_block(const Tiling& tiling, const std::function<void(const Block&, Scratch&)>& body);

// Whether a product of two bfloat16 operands is quicker than one with a float operand here.
bool prefers_bfloat16_pairs();

struct Operand {  // a matrix in memory, row-major
  Dtype dtype;
  const void* data;
  int64_t stride;
  bool transposed;  // the product reads its transpose
};

// Panels of rows `from` up to from + depth and some columns of op(b), in scratch.panels(i); found there if they were
// the last ones packed.
const float* packed(const Operand& b, bool pairs, int64_t from, int64_t depth, int64_t col, int64_t cols,
                    Scratch& scratch, int i);
void multiply_packed(bool pairs, const GemmMultiply& product);

// c = op(a) op(b) for the rows and columns of a block, float64 operands. c is the block's first element.
void multiply_doubles(const Operand& a, const Operand& b, int64_t depth, const Block& block, double* c, int64_t ldc);

// The same for operands of any dtype, summed over `depth` in fp32 (fp64 for float64), in strips of rows that are handed
// on while they are in the nearest cache: body(strip, its product as float or double, row stride). A strip begins at a
// multiple of 16 rows of the block. What the body reads or writes is fetched while its product runs.
void multiply_in_strips(const Operand& a, const Operand& b, int64_t depth, const Block& block, Scratch& scratch,
                        const std::array<PassedOver, 2>& passed_over,
                        const std::function<void(const Block& strip, const void* c, int64_t ldc)>& body);

}  // namespace mlpkit
