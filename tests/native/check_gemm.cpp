// The steps of a product together, in float lanes and where there are any in pairs, against a plain sum in long double
// (tests).
#include "cpu/gemm.h"
#include "harness.h"

namespace {

using namespace native;
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
  bool fetches = false;
};

struct Kernels {
  void (*pack)(const mlpkit::GemmPack&);
  void (*lanes)(const mlpkit::GemmLanes&);
  void (*multiply)(const mlpkit::GemmMultiply&);
  int64_t longest;
};

struct Floats {  // as many as a kernel may write
  explicit Floats(int64_t count) : memory(static_cast<float*>(std::aligned_alloc(64, sizeof(float) * count))) {}
  ~Floats() { std::free(memory); }
  Floats(const Floats&) = delete;
  float* memory;
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

// op(m) from a row and a column on.
const void* from(Matrix& m, Dtype dtype, int64_t row, int64_t col) {
  return static_cast<const char*>(m.numbers.data()) + (dtype == Dtype::float32 ? 4 : 2) * m.at(row, col);
}

void multiply(const Case& c, const Kernels& kernels, Matrix& a, Matrix& b, Matrix& result) {
  const Floats panels(mlpkit::kPanelFloats), lanes(mlpkit::kLaneFloats);
  int64_t k = 0;
  do {
    const int64_t depth = std::min(kernels.longest, c.depth - k);
    kernels.pack({c.dtype_b, c.transpose_b, depth, c.cols, from(b, c.dtype_b, k, 0), b.stride, panels.memory});
    kernels.lanes({c.dtype_a, c.transpose_a, c.rows, depth, from(a, c.dtype_a, 0, k), a.stride, lanes.memory});
    const int64_t along_rows = c.transpose_a ? 1 : mlpkit::kGemmStride,
                  along_depth = c.transpose_a ? mlpkit::kGemmStride : 1;
    // Fetching rows while a product runs changes nothing: here its own, and those of no second matrix.
    mlpkit::GemmFetch fetch;
    fetch.rows = c.fetches ? c.rows : 0;
    fetch.matrices[0] = {result.numbers.data(), 4 * result.stride, 4 * c.cols};
    kernels.multiply({c.rows, c.cols, depth, lanes.memory, along_rows, along_depth, panels.memory,
                      static_cast<float*>(result.numbers.data()), result.stride, k > 0, fetch});
    k += kernels.longest;
  } while (k < c.depth);
}

void run(const Case& c, const Kernels& kernels, Draw& draw, Report& report) {
  Matrix a(c.dtype_a, c.transpose_a, c.rows, c.depth, c.padding, draw);
  Matrix b(c.dtype_b, c.transpose_b, c.depth, c.cols, c.padding, draw);
  Matrix result(Dtype::float32, false, c.rows, c.cols, c.padding, draw);
  a.numbers.draw(draw, -1, 1);
  b.numbers.draw(draw, -1, 1);
  multiply(c, kernels, a, b, result);
  compare(c, a, b, result, report);
}

// Edges of every block size: 4, 6 and 12 rows, 8 to 32 columns, 32, 256 and 512 terms.
Case drawn(Dtype a, Dtype b, bool transpose_a, bool transpose_b, Draw& draw) {
  const int64_t rows = draw.of<int64_t>({1, 3, 5, 7, 12, 13, 17, 25, 40});
  const int64_t cols = draw.of<int64_t>({1, 7, 15, 16, 17, 31, 33, 64, 65});
  const int64_t depth = draw.of<int64_t>({0, 1, 2, 3, 15, 17, 31, 33, 64, 255, 257, 513});
  return {a, b, transpose_a, transpose_b, rows, cols, depth, draw.of<int64_t>({0, 1, 5}), draw.of<bool>({false, true})};
}

void in_floats(Report& report) {
  const Kernels kernels{mlpkit::cpu::gemm_pack, mlpkit::cpu::gemm_lanes, mlpkit::cpu::gemm_multiply,
                        mlpkit::kGemmDepth};
  const std::vector<Dtype> dtypes = {Dtype::float32, Dtype::bfloat16, Dtype::float16};
  Draw draw(11);
  for (const Dtype a : dtypes)
    for (const Dtype b : dtypes)
      for (int transposed = 0; transposed < 4; ++transposed)
        for (int i = 0; i < 10; ++i) run(drawn(a, b, transposed & 1, transposed & 2, draw), kernels, draw, report);
  // The largest product fills panels and lanes to the last byte.
  for (int transposed = 0; transposed < 4; ++transposed)
    run({Dtype::float32, Dtype::bfloat16, bool(transposed & 1), bool(transposed & 2), mlpkit::kGemmRows,
         mlpkit::kGemmCols, 259, 0},
        kernels, draw, report);
}

NATIVE_CHECK(gemm_pack, in_floats);
NATIVE_CHECK(gemm_lanes, in_floats);
NATIVE_CHECK(gemm_multiply, in_floats);

void in_pairs(Report& report) {
  if (mlpkit::cpu::capability() != mlpkit::cpu::Capability::avx512_bf16)
    return report.that("only AVX-512 with bf16 has them", 0, true);
#if defined(__x86_64__)
  namespace isa = mlpkit::isa_avx512_bf16;
  const Kernels kernels{isa::gemm_pack_pairs, isa::gemm_lanes_pairs, isa::gemm_multiply_pairs, 2 * mlpkit::kGemmDepth};
  Draw draw(12);
  for (int transposed = 0; transposed < 4; ++transposed) {
    for (int i = 0; i < 60; ++i)
      run(drawn(Dtype::bfloat16, Dtype::bfloat16, transposed & 1, transposed & 2, draw), kernels, draw, report);
    run({Dtype::bfloat16, Dtype::bfloat16, bool(transposed & 1), bool(transposed & 2), mlpkit::kGemmRows,
         mlpkit::kGemmCols, 515, 0},
        kernels, draw, report);
  }
#endif
}

NATIVE_CHECK(gemm_pack_pairs, in_pairs);
NATIVE_CHECK(gemm_lanes_pairs, in_pairs);
NATIVE_CHECK(gemm_multiply_pairs, in_pairs);

}  // namespace
