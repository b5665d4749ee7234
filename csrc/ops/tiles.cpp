// Tiles in torch's thread pool; fp32 products by our own kernels, fp64 ones by the library (ops).
#include "ops/tiles.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdlib>

#include "ops/gemm.h"

namespace mlpkit {
namespace {

constexpr double kFlopsWorthAThread = 4e5;
constexpr int64_t kStripRows = 48;  // whole blocks of the product's kernels, whole tiles of the mask

int64_t size_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

// Element (row, col) of op(operand).
const char* at(const Operand& operand, int64_t row, int64_t col) {
  const int64_t index = operand.transposed ? col * operand.stride + row : row * operand.stride + col;
  return static_cast<const char*>(operand.data) + index * size_of(operand.dtype);
}

void pack_lanes(bool pairs, const GemmLanes& g) {
#if defined(__x86_64__)
  if (pairs) return isa_avx512_bf16::gemm_lanes_pairs(g);
#endif
  cpu::gemm_lanes(g);
}

struct Lanes {
  const float* data;
  int64_t row_stride, depth_stride;
};

// Short rows of floats are read where they are. Long ones may lie a multiple of a page apart, and would evict each
// other from the nearest cache.
bool in_place(const Operand& a, bool pairs) {
  return a.dtype == Dtype::float32 && !pairs && !a.transposed && a.stride <= kGemmDepth;
}

Lanes lanes_of(const Operand& a, bool pairs, int64_t row, int64_t rows, int64_t k, int64_t numbers, Scratch& scratch) {
  if (in_place(a, pairs)) return {reinterpret_cast<const float*>(at(a, row, k)), a.stride, 1};
  pack_lanes(pairs, {a.dtype, a.transposed, rows, numbers, at(a, row, k), a.stride, scratch.lanes()});
  return {scratch.lanes(), a.transposed ? 1 : kGemmStride, a.transposed ? kGemmStride : 1};
}

}  // namespace

Scratch::Scratch()
    : memory_(
          static_cast<char*>(std::aligned_alloc(64, kTileBytes + sizeof(float) * (kLaneFloats + 2 * kPanelFloats)))) {}
Scratch::~Scratch() { std::free(memory_); }

Scratch& Scratch::mine() {
  static thread_local Scratch scratch;
  return scratch;
}

bool Scratch::holds(int i, const void* from, int64_t number) {
  const bool same = packed_[i].from == from && packed_[i].number == number;
  packed_[i] = {from, number};
  return same;
}

void in_parallel(int64_t count, double flops, const std::function<void(int64_t, int64_t)>& body) {
  const int64_t grain = std::max<int64_t>(1, static_cast<int64_t>(kFlopsWorthAThread / std::max(flops, 1.0)));
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    Scratch::mine().forget();  // the memory that panels were packed from may have changed since the last call
    body(begin, end);
  });
}

void each_block(const Tiling& tiling, const std::function<void(const Block&, Scratch&)>& body) {
  const auto& [rows, cols, tile_rows, tile_cols, depth] = tiling;
  const int64_t down = ceil_div(rows, tile_rows), across = ceil_div(cols, tile_cols);
  const double flops = 2.0 * std::min(rows, tile_rows) * std::min(cols, tile_cols) * std::max<int64_t>(depth, 16);
  in_parallel(down * across, flops, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i % down * tiling.tile_rows, col = i / down * tiling.tile_cols;
      const Block block{row, std::min(tiling.tile_rows, tiling.rows - row), col,
                        std::min(tiling.tile_cols, tiling.cols - col)};
      body(block, Scratch::mine());
    }
  });
}

int64_t strip_rows(int64_t rest) { return rest >= kStripRows + kGemmFewLines ? kStripRows : rest; }

GemmFetch fetch_of(const std::array<PassedOver, 2>& matrices, const Block& block) {
  GemmFetch fetch;
  fetch.rows = block.rows;
  for (int i = 0; i < 2; ++i) {
    const auto& [data, cols, size] = matrices[i];
    if (data)
      fetch.matrices[i] = {static_cast<const char*>(data) + (block.row * cols + block.col) * size, cols * size,
                           block.cols * size};
  }
  return fetch;
}

bool prefers_bfloat16_pairs() { return cpu::capability() == cpu::Capability::avx512_bf16; }

const float* packed(const Operand& b, bool pairs, int64_t from, int64_t depth, int64_t col, int64_t cols,
                    Scratch& scratch, int i) {
  const void* data = at(b, from, col);
  float* panels = scratch.panels(i);
  if (scratch.holds(i, data, depth)) return panels;
  const GemmPack pack{b.dtype, b.transposed, depth, cols, data, b.stride, panels};
#if defined(__x86_64__)
  if (pairs) {
    isa_avx512_bf16::gemm_pack_pairs(pack);
    return panels;
  }
#endif
  cpu::gemm_pack(pack);
  return panels;
}

void multiply_packed(bool pairs, const GemmMultiply& product) {
#if defined(__x86_64__)
  if (pairs) return isa_avx512_bf16::gemm_multiply_pairs(product);
#endif
  cpu::gemm_multiply(product);
}

void multiply_doubles(const Operand& a, const Operand& b, int64_t depth, const Block& block, double* c, int64_t ldc) {
  const SingleThreadedBlas single;
  gemm({at::kDouble, a.transposed, b.transposed, block.rows, block.cols, depth, at(a, block.row, 0), a.stride,
        at(b, 0, block.col), b.stride, c, ldc});
}

void multiply_in_strips(const Operand& a, const Operand& b, int64_t depth, const Block& block, Scratch& scratch,
                        const std::array<PassedOver, 2>& passed_over,
                        const std::function<void(const Block&, const void*, int64_t)>& body) {
  if (a.dtype == Dtype::float64) {
    multiply_doubles(a, b, depth, block, static_cast<double*>(scratch.tile()), block.cols);
    return body(block, scratch.tile(), block.cols);
  }
  const bool pairs = prefers_bfloat16_pairs() && a.dtype == Dtype::bfloat16 && b.dtype == Dtype::bfloat16;
  const int64_t longest = kGemmDepth * (pairs ? 2 : 1);
  float* tile = static_cast<float*>(scratch.tile());
  int64_t k = 0;
  do {  // once even where the depth is 0, to write the zeros
    const int64_t numbers = std::min(longest, depth - k);
    const bool last = k + numbers >= depth;
    const float* panels = packed(b, pairs, k, numbers, block.col, block.cols, scratch, 0);
    const Lanes lanes = lanes_of(a, pairs, block.row, block.rows, k, numbers, scratch);
    for (int64_t row = 0, rows; row < block.rows; row += rows) {
      rows = last ? strip_rows(block.rows - row) : block.rows;
      const Block strip{block.row + row, rows, block.col, block.cols};
      float* c = k == 0 && last ? tile : tile + row * block.cols;
      multiply_packed(
          pairs, {rows, block.cols, numbers, lanes.data + row * lanes.row_stride, lanes.row_stride, lanes.depth_stride,
                  panels, c, block.cols, k > 0, last ? fetch_of(passed_over, strip) : GemmFetch{}});
      if (last) body(strip, c, block.cols);
    }
    k += longest;
  } while (k < depth);
}

}  // namespace mlpkit
