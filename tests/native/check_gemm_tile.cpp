// gemm_tile, and gemm_tile_of_pairs where there is one, against a plain sum in long double (tests).
#include "cpu/gemm.h"
#include "harness.h"

namespace {

using namespace native;
using mlpkit::GemmTile;

// Numbers of op(m), a [lines, numbers] matrix with padding between the lines and none after the last one.
struct Matrix {
  int64_t rows, cols, stride;
  bool transposed;
  Numbers numbers;
  Matrix(Dtype dtype, bool transposed, int64_t rows, int64_t cols, int64_t padding, Draw& draw)
      : rows(rows),
        cols(cols),
        stride((transposed ? rows : cols) + padding),
        transposed(transposed),
        numbers(dtype, extent(transposed ? cols : rows, transposed ? rows : cols), draw) {}
  int64_t at(int64_t row, int64_t col) const { return transposed ? col * stride + row : row * stride + col; }
  std::vector<Real> values() const {
    std::vector<Real> all;
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t col = 0; col < cols; ++col) all.push_back(numbers.get(at(row, col)));
    return all;
  }

 private:
  int64_t extent(int64_t lines, int64_t length) const { return lines && length ? (lines - 1) * stride + length : 0; }
};

struct Case {
  Dtype dtype_a, dtype_b;
  bool transpose_a, transpose_b;
  int64_t rows, cols, depth, padding;
};

// A block of up to 512 terms is summed in one chain and the blocks are added up: no term takes part in more roundings
// than that. A single rounding each of the product counts too.
Real roundings(int64_t depth) { return static_cast<Real>(std::min<int64_t>(depth, 512) + depth / 32 + 2); }

void compare(const Case& c, const Matrix& a, const Matrix& b, const Matrix& result, Report& report) {
  const std::vector<Real> left = a.values(), right = b.values();
  for (int64_t row = 0; row < c.rows; ++row)
    for (int64_t col = 0; col < c.cols; ++col) {
      Real sum = 0, magnitudes = 0;
      for (int64_t k = 0; k < c.depth; ++k) {
        const Real term = left[static_cast<size_t>(row * c.depth + k)] * right[static_cast<size_t>(k * c.cols + col)];
        sum += term;
        magnitudes += std::fabs(term);
      }
      report.near("product", row * c.cols + col, result.numbers.get(result.at(row, col)), sum,
                  roundings(c.depth) * unit(Dtype::float32) * magnitudes);
    }
  for (int64_t row = 0; row + 1 < c.rows; ++row)
    for (int64_t col = c.cols; col < result.stride; ++col)
      report.that("padding is left alone", row, result.numbers.untouched(result.at(row, col)));
}

void run(const Case& c, void (*kernel)(const GemmTile&), void* scratch, Draw& draw, Report& report) {
  Matrix a(c.dtype_a, c.transpose_a, c.rows, c.depth, c.padding, draw);
  Matrix b(c.dtype_b, c.transpose_b, c.depth, c.cols, c.padding, draw);
  Matrix result(Dtype::float32, false, c.rows, c.cols, c.padding, draw);
  a.numbers.draw(draw, -1, 1);
  b.numbers.draw(draw, -1, 1);
  GemmTile tile{};
  tile.dtype_a = c.dtype_a;
  tile.dtype_b = c.dtype_b;
  tile.transpose_a = c.transpose_a;
  tile.transpose_b = c.transpose_b;
  tile.rows = c.rows;
  tile.cols = c.cols;
  tile.depth = c.depth;
  tile.a = a.numbers.data();
  tile.lda = a.stride;
  tile.b = b.numbers.data();
  tile.ldb = b.stride;
  tile.c = static_cast<float*>(result.numbers.data());
  tile.ldc = result.stride;
  tile.scratch = scratch;
  kernel(tile);
  compare(c, a, b, result, report);
}

// Edges of every block size: 4, 6 and 12 rows, 8 to 32 columns, 32, 256 and 512 terms.
Case drawn(Dtype a, Dtype b, bool transpose_a, bool transpose_b, Draw& draw) {
  const int64_t rows = draw.of<int64_t>({1, 3, 5, 7, 12, 13, 17, 25, 40});
  const int64_t cols = draw.of<int64_t>({1, 7, 15, 16, 17, 31, 33, 64, 65});
  const int64_t depth = draw.of<int64_t>({0, 1, 2, 3, 15, 17, 31, 33, 64, 255, 257, 513});
  return {a, b, transpose_a, transpose_b, rows, cols, depth, draw.of<int64_t>({0, 1, 5})};
}

struct Scratch {
  void* memory = std::aligned_alloc(64, mlpkit::kGemmScratchBytes);
  ~Scratch() { std::free(memory); }
};

void gemm_tile(Report& report) {
  const std::vector<Dtype> dtypes = {Dtype::float32, Dtype::bfloat16, Dtype::float16};
  const Scratch scratch;
  Draw draw(11);
  for (const Dtype a : dtypes)
    for (const Dtype b : dtypes)
      for (int transposed = 0; transposed < 4; ++transposed)
        for (int i = 0; i < 10; ++i)
          run(drawn(a, b, transposed & 1, transposed & 2, draw), mlpkit::cpu::gemm_tile, scratch.memory, draw, report);
  // The largest tile fills the scratch to its last byte.
  for (int transposed = 0; transposed < 4; ++transposed)
    run({Dtype::float32, Dtype::bfloat16, bool(transposed & 1), bool(transposed & 2), mlpkit::kGemmRows,
         mlpkit::kGemmCols, 259, 0},
        mlpkit::cpu::gemm_tile, scratch.memory, draw, report);
}

NATIVE_CHECK(gemm_tile, gemm_tile);

void gemm_tile_of_pairs(Report& report) {
  if (mlpkit::cpu::capability() != mlpkit::cpu::Capability::avx512_bf16)
    return report.that("only AVX-512 with bf16 has it", 0, true);
#if defined(__x86_64__)
  const Scratch scratch;
  Draw draw(12);
  const auto kernel = mlpkit::isa_avx512_bf16::gemm_tile_of_pairs;
  for (int transposed = 0; transposed < 4; ++transposed) {
    for (int i = 0; i < 60; ++i)
      run(drawn(Dtype::bfloat16, Dtype::bfloat16, transposed & 1, transposed & 2, draw), kernel, scratch.memory, draw,
          report);
    run({Dtype::bfloat16, Dtype::bfloat16, bool(transposed & 1), bool(transposed & 2), mlpkit::kGemmRows,
         mlpkit::kGemmCols, 515, 0},
        kernel, scratch.memory, draw, report);
  }
#endif
}

NATIVE_CHECK(gemm_tile_of_pairs, gemm_tile_of_pairs);

}  // namespace
