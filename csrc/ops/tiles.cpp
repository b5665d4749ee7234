// Tiles in torch's thread pool; fp32 products by our own kernel, fp64 ones by the library (ops).
#include "ops/tiles.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "cpu/gemm.h"
#include "ops/gemm.h"

namespace mlpkit {
namespace {

static_assert(kTileRows <= kGemmRows && kTileCols <= kGemmCols);

constexpr double kFlopsWorthAThread = 4e5;
constexpr size_t kTileBytes = sizeof(double) * kTileRows * kTileCols;

// One for each thread, kept: a fresh megabyte a call would cost more in page faults than a small layer takes.
struct Workspace {
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  std::unique_ptr<char, Free> memory{static_cast<char*>(std::aligned_alloc(64, kTileBytes + kGemmScratchBytes))};
  void* tile() const { return memory.get(); }
  void* gemm() const { return memory.get() + kTileBytes; }
};

Workspace& workspace() {
  static thread_local Workspace mine;
  return mine;
}

int64_t size_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

const char* at(const Operand& operand, int64_t row, int64_t col) {
  return static_cast<const char*>(operand.data) + (row * operand.stride + col) * size_of(operand.dtype);
}

}  // namespace

void each_block(const Tiling& tiling, const std::function<void(const Block&, void*)>& body) {
  const auto& [rows, cols, tile_rows, tile_cols, depth] = tiling;
  const int64_t down = ceil_div(rows, tile_rows), across = ceil_div(cols, tile_cols);
  const double tile_flops = 2.0 * std::min(rows, tile_rows) * std::min(cols, tile_cols) * std::max<int64_t>(depth, 16);
  const int64_t grain = std::max<int64_t>(1, static_cast<int64_t>(kFlopsWorthAThread / std::max(tile_flops, 1.0)));
  at::parallel_for(0, down * across, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / across * tiling.tile_rows, col = i % across * tiling.tile_cols;
      const Block block{row, std::min(tiling.tile_rows, tiling.rows - row), col,
                        std::min(tiling.tile_cols, tiling.cols - col)};
      body(block, workspace().tile());
    }
  });
}

bool prefers_bfloat16_pairs() { return cpu::capability() == cpu::Capability::avx512_bf16; }

void multiply(const Operand& a, const Operand& b, int64_t depth, const Block& block, void* c, int64_t ldc) {
  const char* a_data = a.transposed ? at(a, 0, block.row) : at(a, block.row, 0);
  const char* b_data = b.transposed ? at(b, block.col, 0) : at(b, 0, block.col);
  if (a.dtype == Dtype::float64) {
    const SingleThreadedBlas single;
    return gemm({at::kDouble, a.transposed, b.transposed, block.rows, block.cols, depth, a_data, a.stride, b_data,
                 b.stride, c, ldc});
  }
  const GemmTile tile{
      a.dtype,  b.dtype, a.transposed, b.transposed,           block.rows, block.cols,        depth, a_data,
      a.stride, b_data,  b.stride,     static_cast<float*>(c), ldc,        workspace().gemm()};
#if defined(__x86_64__)
  if (prefers_bfloat16_pairs() && a.dtype == Dtype::bfloat16 && b.dtype == Dtype::bfloat16)
    return isa_avx512_bf16::gemm_tile_of_pairs(tile);
#endif
  cpu::gemm_tile(tile);
}

}  // namespace mlpkit
