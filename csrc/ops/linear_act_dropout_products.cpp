// Two ways to dx = dz W and dW = dz^T x. Where in_features fit one tile, dz is never stored: a tile of it is formed in
// the cache and feeds both products at once. Otherwise all tiles of dz are stored, packed for both products (ops).
#include "ops/linear_act_dropout_products.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>

#include "ops/kept_memory.h"

namespace mlpkit {
namespace {

// A thin layer's work is cut along its longer side into at most so many units for threads to share. A unit has its own
// sums where others add to the same gradient.
constexpr int64_t kMostUnits = 16;
constexpr int64_t kPairStride = kGemmStride;  // of bfloat16 in pairs along the columns, in numbers
static_assert(kTileRows * kPairStride / 2 + kTileRows / 2 * kGemmStride <= kLaneFloats);

bool low_precision(Dtype dtype) { return dtype == Dtype::bfloat16 || dtype == Dtype::float16; }
bool in_pairs(Dtype dtype) { return dtype == Dtype::bfloat16 && prefers_bfloat16_pairs(); }

// A tile of dz from an even row of it on.
DzTile tile_in(float* lanes, bool pairs, int64_t row = 0) {
  if (!pairs) return {lanes + row * kGemmStride, kGemmStride, nullptr, 0};
  auto* down = reinterpret_cast<uint32_t*>(lanes + kTileRows * kPairStride / 2);
  return {lanes + row * kPairStride / 2, kPairStride, down + row / 2 * kGemmStride, kGemmStride};
}

enum class Gradient { of_x, of_weight };

struct Sum {  // where a product goes: c = or c +=
  float* c;
  int64_t stride, cols;
  bool add;
  GemmFetch fetch = {};
};

// From a block of dz, in lanes: of_x is dz W, a sum over its columns; of_weight is dz^T x for `rows` of its columns, a
// sum over its rows.
void multiply_tile(Gradient gradient, const float* lanes, bool pairs, int64_t rows, int64_t depth, const float* panels,
                   const Sum& sum) {
  GemmMultiply product{rows,  sum.cols,   depth,   lanes,    pairs ? kPairStride / 2 : kGemmStride, 1, panels,
                       sum.c, sum.stride, sum.add, sum.fetch};
  if (gradient == Gradient::of_weight) {
    if (pairs) product.lanes += kTileRows * kPairStride / 2;
    product.row_stride = 1;
    product.depth_stride = kGemmStride;
  }
  multiply_packed(pairs, product);
}

at::Tensor floats(int64_t rows, int64_t cols) {
  return empty_kept({rows, cols}, at::TensorOptions().dtype(at::kFloat));
}

// Rounds [rows, cols] floats to out's dtype; out has row stride `stride`.
void round_to(void* out, Dtype dtype, int64_t stride, const float* from, int64_t from_stride, int64_t rows,
              int64_t cols) {
  const int64_t size = low_precision(dtype) ? 2 : 4;
  for (int64_t r = 0; r < rows; ++r) {
    char* to = static_cast<char*>(out) + r * stride * size;
    if (size == 4)
      std::memcpy(to, from + r * from_stride, cols * sizeof(float));
    else
      cpu::convert({Dtype::float32, dtype, from + r * from_stride, to, cols});
  }
}

// Sums of units, of the calling thread. Up to 16 MiB are kept from call to call: in fresh pages, to write them would
// take longer than to compute them, and the thread that adds them in place would wait for the others.
float* partial_sums(int64_t count, at::Tensor& own) {
  constexpr int64_t most_kept = int64_t{4} << 20;
  static thread_local at::Tensor kept;
  at::Tensor& memory = count > most_kept ? own : kept;
  if (!memory.defined() || memory.numel() < count) memory = floats(1, count);
  return memory.mutable_data_ptr<float>();
}

// dz is cut along its longer side, the inner one here, into units. For the gradient that sums along the outer side
// every unit has rows of its own; to the other one every unit adds, the first in place and, so that the order of
// additions is the same for any number of threads, the others through sums of their own.
class ThinProducts {
 public:
  ThinProducts(const DzProducts& problem, const FormDz& form_dz)
      : problem_(problem), form_dz_(form_dz), pairs_(in_pairs(problem.dtype)), by_cols_(problem.cols >= problem.rows) {
    const int64_t inner = std::max(problem.cols, problem.rows), outer = std::min(problem.cols, problem.rows);
    inner_blocks_ = ceil_div(inner, kTileRows);
    outer_blocks_ = ceil_div(outer, kTileRows);
    blocks_a_unit_ = ceil_div(inner_blocks_, kMostUnits);
    units_ = ceil_div(inner_blocks_, blocks_a_unit_);
    const Operand x{problem.dtype, problem.x, problem.depth, false};
    const Operand weight{problem.dtype, problem.weight, problem.depth, false};
    sides_[0] = {Gradient::of_x, weight, problem.dx, problem.rows, {}, nullptr};
    sides_[1] = {Gradient::of_weight, x, problem.dweight, problem.cols, {}, nullptr};
  }

  void run() {
    for (Side& side : sides_) side.prepare(problem_);
    Side& inner = sides_[by_cols_ ? 0 : 1];
    int64_t in_place = units_;
    at::Tensor own;
    partial_size_ = inner.rows * problem_.depth;
    if (units_ > 1 && inner.out && at::get_num_threads() > 1 && !at::in_parallel_region())
      partials_ = partial_sums((units_ - 1) * partial_size_, own);
    const double flops = 4.0 * problem_.rows * problem_.cols * std::max<int64_t>(problem_.depth, 16);
    in_parallel(units_, flops / units_, [&](int64_t begin, int64_t end) {
      if (begin == 0) in_place = end;
      for (int64_t unit = begin; unit < end; ++unit) work(unit, begin == 0);
    });
    add_partials(inner, in_place);
    for (Side& side : sides_) side.finish(problem_);
  }

 private:
  struct Side {
    Gradient gradient;
    Operand operand;  // what dz is multiplied with
    void* out;
    int64_t rows;
    at::Tensor own;  // sums of a gradient in low precision
    float* sum;

    void prepare(const DzProducts& problem) {
      if (!out) return;
      if (low_precision(problem.dtype)) own = floats(rows, problem.depth);
      sum = own.defined() ? own.mutable_data_ptr<float>() : static_cast<float*>(out);
    }
    void finish(const DzProducts& problem) const {
      if (!out || !own.defined()) return;
      in_parallel(ceil_div(rows, kTileRows), 2.0 * kTileRows * problem.depth, [&](int64_t begin, int64_t end) {
        const int64_t first = begin * kTileRows * problem.depth;
        const int64_t last = std::min(end * kTileRows, rows) * problem.depth;
        cpu::convert({Dtype::float32, problem.dtype, sum + first, static_cast<uint16_t*>(out) + first, last - first});
      });
    }
  };

  Block block(int64_t outer, int64_t inner) const {
    const int64_t row = (by_cols_ ? outer : inner) * kTileRows, col = (by_cols_ ? inner : outer) * kTileCols;
    return {row, std::min(kTileRows, problem_.rows - row), col, std::min(kTileCols, problem_.cols - col)};
  }

  // Products of one block of dz: strip by strip as it is formed for dx, whole for dW. While they run, the numbers that
  // the next strip is formed of are fetched.
  void multiply(const Block& dz, const Block& next, Scratch& scratch, const Sum& dx, const Sum& dweight) const {
    const GemmFetch fetch_next = fetch_of(problem_.formed_of, {next.row, strip_rows(next.rows), next.col, next.cols});
    const float* of_weight = packed_for(sides_[0], dz.col, dz.cols, scratch);
    for (int64_t row = 0, rows; row < dz.rows; row += rows) {
      rows = strip_rows(dz.rows - row);
      const DzTile tile = tile_in(scratch.lanes(), pairs_, row);
      form_dz_({dz.row + row, rows, dz.col, dz.cols}, tile);
      if (!dx.c) continue;
      Sum sum = dx;
      sum.c += row * problem_.depth;
      const int64_t after = row + rows, rest = dz.rows - after;
      if (rest)
        sum.fetch = fetch_of(problem_.formed_of, {dz.row + after, strip_rows(rest), dz.col, dz.cols});
      else if (!dweight.c)
        sum.fetch = fetch_next;
      multiply_tile(Gradient::of_x, static_cast<float*>(tile.data), pairs_, rows, dz.cols, of_weight, sum);
    }
    if (!dweight.c) return;
    Sum sum = dweight;
    sum.fetch = fetch_next;
    multiply_tile(Gradient::of_weight, scratch.lanes(), pairs_, dz.cols, dz.rows,
                  packed_for(sides_[1], dz.row, dz.rows, scratch), sum);
  }

  const float* packed_for(const Side& side, int64_t from, int64_t depth, Scratch& scratch) const {
    if (!side.out) return nullptr;
    return packed(side.operand, pairs_, from, depth, 0, problem_.depth, scratch,
                  side.gradient == Gradient::of_x ? 0 : 1);
  }

  // Adding a product to a sum is one addition, the same as adding it later, only where it is summed in one block.
  bool adds_once(const Block& dz) const {
    return blocks_a_unit_ == 1 && std::min({dz.rows, dz.cols, problem_.depth}) >= kGemmFewLines;
  }

  void work(int64_t unit, bool in_place) const {
    const Side &inner_side = sides_[by_cols_ ? 0 : 1], &outer_side = sides_[by_cols_ ? 1 : 0];
    Scratch& scratch = Scratch::mine();
    const int64_t first = unit * blocks_a_unit_, end = std::min(first + blocks_a_unit_, inner_blocks_);
    const int64_t tile = kTileRows * problem_.depth;
    for (int64_t outer = 0; outer < outer_blocks_; ++outer) {
      const bool direct = unit == 0 || (in_place && adds_once(block(outer, first)));
      float* total = inner_side.sum + outer * tile;
      float* c = direct ? total : in_place ? static_cast<float*>(scratch.tile()) : partial(unit) + outer * tile;
      for (int64_t inner = first; inner < end; ++inner) {
        const Sum of_inner = sum_at(inner_side.out ? c : nullptr, inner > first || (direct && unit > 0));
        const Sum of_outer = sum_at(outer_side.out ? outer_side.sum + inner * tile : nullptr, outer > 0);
        const bool last = inner + 1 == end;
        const Block next = outer + last == outer_blocks_ ? Block{} : block(outer + last, last ? first : inner + 1);
        multiply(block(outer, inner), next, scratch, by_cols_ ? of_inner : of_outer, by_cols_ ? of_outer : of_inner);
      }
      if (!inner_side.out || direct || !in_place) continue;
      const int64_t count = std::min(tile, inner_side.rows * problem_.depth - outer * tile);
      for (int64_t i = 0; i < count; ++i) total[i] += c[i];
    }
  }

  Sum sum_at(float* c, bool add) const { return {c, problem_.depth, problem_.depth, add}; }

  float* partial(int64_t unit) const { return partials_ ? partials_ + (unit - 1) * partial_size_ : nullptr; }

  void add_partials(const Side& side, int64_t from_unit) const {
    if (!side.out || from_unit == units_) return;
    const int64_t count = side.rows * problem_.depth, piece = 4096;
    in_parallel(ceil_div(count, piece), 1.0 * piece * units_, [&](int64_t begin, int64_t end) {
      for (int64_t unit = from_unit; unit < units_; ++unit)
        for (int64_t i = begin * piece; i < std::min(end * piece, count); ++i) side.sum[i] += partial(unit)[i];
    });
  }

  const DzProducts& problem_;
  const FormDz& form_dz_;
  const bool pairs_, by_cols_;
  int64_t inner_blocks_, outer_blocks_, blocks_a_unit_, units_;
  Side sides_[2];
  int64_t partial_size_ = 0;
  float* partials_ = nullptr;
};

// The sum over the blocks of dz along one side, for a tile of a gradient.
void wide_product(Gradient gradient, const DzProducts& problem, const float* tiles, void* out) {
  const bool of_x = gradient == Gradient::of_x, pairs = in_pairs(problem.dtype);
  const int64_t rows = of_x ? problem.rows : problem.cols, length = of_x ? problem.cols : problem.rows;
  const Operand operand{problem.dtype, of_x ? problem.weight : problem.x, problem.depth, false};
  const int64_t blocks = ceil_div(length, kTileRows), across = ceil_div(problem.cols, kTileCols);
  const bool direct = blocks == 1 && !low_precision(problem.dtype);
  const int64_t tile_rows = ceil_div(rows, kTileRows) * ceil_div(problem.depth, kTileCols) < kMostUnits ? 128 : 256;
  each_block({rows, problem.depth, tile_rows, kTileCols, length}, [&](const Block& block, Scratch& scratch) {
    const int64_t size = low_precision(problem.dtype) ? 2 : 4;
    char* to = static_cast<char*>(out) + (block.row * problem.depth + block.col) * size;
    Sum sum{direct ? reinterpret_cast<float*>(to) : static_cast<float*>(scratch.tile()),
            direct ? problem.depth : kTileCols, block.cols, false};
    const int64_t own = block.row / kTileRows, offset = block.row % kTileRows;
    for (int64_t k = 0; k < blocks; ++k) {
      const int64_t depth = std::min(kTileRows, length - k * kTileRows);
      const float* panels = packed(operand, pairs, k * kTileRows, depth, block.col, block.cols, scratch, 0);
      const float* lanes = tiles + (of_x ? own * across + k : k * across + own) * kLaneFloats +
                           offset * (!of_x   ? 1
                                     : pairs ? kPairStride / 2
                                             : kGemmStride);
      multiply_tile(gradient, lanes, pairs, block.rows, depth, panels, sum);
      sum.add = true;
    }
    if (!direct) round_to(to, problem.dtype, problem.depth, sum.c, sum.stride, block.rows, block.cols);
  });
}

void wide_products(const DzProducts& problem, const FormDz& form_dz) {
  const int64_t across = ceil_div(problem.cols, kTileCols);
  const at::Tensor tiles = floats(ceil_div(problem.rows, kTileRows) * across, kLaneFloats);
  each_block({problem.rows, problem.cols, kTileRows, kTileCols, 16}, [&](const Block& block, Scratch&) {
    const int64_t tile = block.row / kTileRows * across + block.col / kTileCols;
    form_dz(block, tile_in(tiles.mutable_data_ptr<float>() + tile * kLaneFloats, in_pairs(problem.dtype)));
  });
  const float* lanes = tiles.const_data_ptr<float>();
  if (problem.dx) wide_product(Gradient::of_x, problem, lanes, problem.dx);
  if (problem.dweight) wide_product(Gradient::of_weight, problem, lanes, problem.dweight);
}

// The library's products of a dz that is stored as a matrix.
void fp64_products(const DzProducts& problem, const FormDz& form_dz) {
  const int64_t stride = ceil_div(problem.cols, kMaskTile) * kMaskTile, depth = problem.depth;
  const at::Tensor stored = at::empty({problem.rows, stride}, at::TensorOptions().dtype(at::kDouble));
  double* dz = stored.mutable_data_ptr<double>();
  each_block({problem.rows, problem.cols, kTileRows, kTileCols, 16}, [&](const Block& block, Scratch&) {
    form_dz(block, {dz + block.row * stride + block.col, stride, nullptr, 0});
  });
  const auto product = [&](void* out, int64_t rows, int64_t length, bool transposed, const void* other) {
    const Operand a{Dtype::float64, dz, stride, transposed}, b{Dtype::float64, other, depth, false};
    each_block({rows, depth, kTileRows, kTileCols, length}, [&](const Block& block, Scratch&) {
      multiply_doubles(a, b, length, block, static_cast<double*>(out) + block.row * depth + block.col, depth);
    });
  };
  if (problem.dx) product(problem.dx, problem.rows, problem.cols, false, problem.weight);
  if (problem.dweight) product(problem.dweight, problem.cols, problem.rows, true, problem.x);
}

}  // namespace

void multiply_dz(const DzProducts& problem, const FormDz& form_dz) {
  const int64_t size = problem.dtype == Dtype::float64 ? 8 : low_precision(problem.dtype) ? 2 : 4;
  if (problem.rows == 0 || problem.cols == 0) {
    if (problem.dx) std::memset(problem.dx, 0, problem.rows * problem.depth * size);
    if (problem.dweight) std::memset(problem.dweight, 0, problem.cols * problem.depth * size);
    return;
  }
  if (problem.dtype == Dtype::float64) return fp64_products(problem, form_dz);
  if (problem.depth > kTileCols) return wide_products(problem, form_dz);
  ThinProducts(problem, form_dz).run();
}

}  // namespace mlpkit
