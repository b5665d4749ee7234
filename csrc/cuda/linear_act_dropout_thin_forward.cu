// The forward pass of a layer with few in_features: a stream of y, not a matrix product (cuda).
//
// A block of 4 warps has 128 columns and keeps their weights in registers, a warp 32 of them; tiles of 64 rows of x
// come by cp.async, and y leaves from the accumulators by 16-byte stores. The tensor core numbers a warp's 32 columns
// at will: column 8 t + 2 j + h of them is column 2 t + h of its product j, so that a lane holds 8 adjacent columns of
// two rows. Random bits are drawn where the mask contract has them and change places within four lanes, by two shuffles
// for 16 elements; live bits go back the same way.
//
// Napkin for 8192 x 128 -> 4096, bf16, relu, dropout, on an H200 (132 multiprocessors, 4.3 TB/s, 1.75 GHz): y is 67 MB,
// live bits 4, x and W 3: 74 MB, one launch, floor 17 us; 8.6 GFLOP, 14 us at the rate of mma.sync (600 TFLOP/s). Issue
// slots: an element costs about 17 instructions, 6 of them Philox, 19 us at four a clock. From L2 x is read once for
// 128 columns: 67 MB, 12 us. All of these run beside each other in 12 warps; to reach: 23 us, 75 % of the copy
// bandwidth. With z saved (gelu) 141 MB, floor 33 us; gelu itself is 50 instructions an element, which is then what
// counts.
#include "cuda/linear_act_dropout_thin.h"

#include "core/short_math.h"
#include "cuda/thin_tile.h"

namespace mlpkit::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / device::kWarp;
constexpr int kRows = 64;     // of a tile
constexpr int kProducts = 4;  // m16n8 products side by side in a warp
constexpr int kWarpCols = 8 * kProducts, kStrip = kWarps * kWarpCols;
[[maybe_unused]] constexpr int kStep = kMaskTile;  // rows that a warp has in its accumulators

template <int depth>
constexpr int kStages = depth > 128 ? 2 : 3;
// The weights take depth / 2 registers: three blocks a multiprocessor have 168 each, two 255.
template <int depth>
constexpr int kBlocks = depth > 128 ? 2 : 3;

// Four nibbles of each of four lanes, transposed: nibble s of lane t becomes nibble t of lane s.
[[maybe_unused]] MLPKIT_DEVICE uint32_t transpose_nibbles(uint32_t x, uint32_t lane) {
  const uint32_t by_one = device::shuffle_xor(x, 1);
  x = lane & 1 ? (x & 0xf0f0u) | (by_one & 0xf0f0u) >> 4 : (x & 0x0f0fu) | (by_one & 0x0f0fu) << 4;
  const uint32_t by_two = device::shuffle_xor(x, 2);
  return lane & 2 ? (x & 0xff00u) | by_two >> 8 : (x & 0x00ffu) | (by_two & 0x00ffu) << 8;
}

// The keep bits that this lane draws for one mask tile: bit 2 w + h for half h of word w.
[[maybe_unused]] MLPKIT_DEVICE uint32_t draw_tile(const Dropout& dropout, uint64_t tile, uint32_t lane) {
  const Words words = mask_words(dropout, tile, lane);
  uint32_t bits = 0;
#pragma unroll
  for (int bit = 0; bit < 8; ++bit)
    bits |= (mask_bits(words, (bit >> 1 & 1) * 8, (bit >> 2) * 8 + (bit & 1)) >= dropout.threshold ? 1u : 0u) << bit;
  return bits;
}

// What a warp does with its 32 columns. Element (j, i) of the accumulators is row lane / 4 + 8 (i / 2) of the step and
// column col + 2 j + i mod 2; bit 4 j + i of a word of bits belongs to it.
template <class T, int depth>
struct Warp {
  const ThinForward& args;
  Dropout dropout;
  uint32_t lane;
  bool aligned;
  int col_tiles;
  int first_col = 0, col = 0, count = 0;  // the warp's first column, the lane's and how many of its 8 lie inside
  uint32_t weight[depth / 16][kProducts][2];
  uint32_t bias[kProducts];  // pairs

  MLPKIT_DEVICE Warp(const ThinForward& args, bool aligned)
      : args(args),
        dropout(args.dropout),
        lane(device::thread_index() % device::kWarp),
        aligned(aligned),
        col_tiles(static_cast<int>((args.cols + kMaskTile - 1) / kMaskTile)) {
    if (!args.seed) return;
    int64_t seed, offset;
    device::load(args.seed, seed);
    device::load(args.seed + 1, offset);
    dropout.seed = static_cast<uint64_t>(seed);
    dropout.offset = static_cast<uint32_t>(offset);
  }

  // The weights of these columns, as fragments; columns and features past the end are zero.
  MLPKIT_DEVICE void take_columns(int strip) {
    const int group = lane / 4, pair = lane % 4;
    first_col = strip * kStrip + static_cast<int>(device::thread_index() / device::kWarp) * kWarpCols;
    col = first_col + 8 * pair;
    const int left = static_cast<int>(args.cols) - col;
    count = left < 0 ? 0 : left < 8 ? left : 8;
    const T* from = static_cast<const T*>(args.weight);
#pragma unroll
    for (int j = 0; j < kProducts; ++j) {
      const int64_t row = first_col + 8 * (group / 2) + 2 * j + group % 2;
#pragma unroll
      for (int s = 0; s < depth / 16; ++s)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int feature = 16 * s + 8 * i + 2 * pair;
          weight[s][j][i] =
              row < args.cols && feature < args.depth ? device::load4(from + row * args.depth + feature) : 0;
        }
    }
#pragma unroll
    for (int j = 0; j < kProducts; ++j) {
      float pair[2] = {0, 0};
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (args.bias && 2 * j + i < count) device::load(static_cast<const T*>(args.bias) + col + 2 * j + i, pair[i]);
      bias[j] = device::narrow_pair(pair[0], pair[1], T{});
    }
  }

  MLPKIT_DEVICE void multiply(const unsigned char* tile, int step, float (&z)[kProducts][4]) const {
#pragma unroll
    for (int j = 0; j < kProducts; ++j) {
      const float2 pair = device::widen_pair(bias[j], T{});
      z[j][0] = z[j][2] = pair.x;
      z[j][1] = z[j][3] = pair.y;
    }
#pragma unroll
    for (int s = 0; s < depth / 16; ++s) {
      uint32_t rows[4];
      device::load_matrices<false>(tile + swizzled<depth>(step * kStep + lane % 16, 2 * s + lane / 16), rows);
#pragma unroll
      for (int j = 0; j < kProducts; ++j) device::multiply_add(z[j], rows, weight[s][j], T{});
    }
  }

  MLPKIT_DEVICE void write(void* to, int64_t row, int half, const float (&z)[kProducts][4]) const {
    T* at = static_cast<T*>(to) + row * args.cols + col;
    if (aligned) {
      device::Bits16 bits;
#pragma unroll
      for (int j = 0; j < kProducts; ++j) bits.v[j] = device::narrow_pair(z[j][2 * half], z[j][2 * half + 1], T{});
      if (count && row < args.rows) device::store_bits16_once(at, bits);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (i < count && row < args.rows) device::store(at + i, z[i / 2][2 * half + i % 2]);
    }
  }
  // Bits in mask order: the low byte is the lane's of the left tile.
  MLPKIT_DEVICE void write_bits(uint8_t* plane, int64_t tile, uint32_t bits) const {
    if (first_col / kMaskTile < col_tiles) device::store1(plane + tile * kMaskLanes + lane, bits & 0xffu);
    if (first_col / kMaskTile + 1 < col_tiles) device::store1(plane + (tile + 1) * kMaskLanes + lane, bits >> 8);
  }

  // z of one of the lane's two rows becomes y. One row at a time: with both, the activation's numbers would not fit
  // beside the weights.
  MLPKIT_DEVICE void activate(float (&z)[kProducts][4], int half, uint32_t keep) const {
    float slope[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) slope[i] = static_cast<float>(args.negative_slope);
    if (args.slope) {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (args.slopes == 1 || i < count)
          device::load(static_cast<const T*>(args.slope) + (args.slopes == 1 ? 0 : col + i), slope[i]);
    }
    constexpr int at_once = depth > 128 ? 4 : 8;
#pragma unroll
    for (int first = 0; first < 8; first += at_once)
      visit_activation(args.activation, [&](auto formula) {
#pragma unroll
        for (int i = first; i < first + at_once; ++i) {
          float& at = z[i / 2][2 * half + i % 2];
          at = decltype(formula)::value(Short(at), Short(slope[i])).v;
        }
      });
    const float scale = static_cast<float>(dropout.scale);
#pragma unroll
    for (int i = 0; i < 8; ++i) z[i / 2][2 * half + i % 2] *= keep >> (i / 2 * 4 + 2 * half + i % 2) & 1 ? scale : 0.f;
  }

  MLPKIT_DEVICE void finish(int64_t first_row, float (&z)[kProducts][4]) const {
    const int64_t row = first_row + lane / 4;
    const int64_t tile = first_row / kMaskTile * col_tiles + first_col / kMaskTile;
    uint32_t drawn = dropout.threshold ? 0 : 0xffffu;  // in mask order
    if (args.seed) drawn = draw_tile(dropout, tile, lane) | draw_tile(dropout, tile + 1, lane) << 8;
    const uint32_t keep = transpose_nibbles(drawn, lane);

    if (args.keep) {
      uint32_t dead = 0;  // z <= 0, which NaN is not
      if (args.activation == Activation::relu) {
#pragma unroll
        for (int i = 0; i < 4 * kProducts; ++i) dead |= (z[i / 4][i % 4] <= 0 ? 1u : 0u) << i;
        dead = transpose_nibbles(dead, lane);
      }
      write_bits(args.keep, tile, drawn & ~dead);
    }
    if (args.positive) {
      uint32_t positive = 0;
#pragma unroll
      for (int i = 0; i < 4 * kProducts; ++i) positive |= (z[i / 4][i % 4] > 0 ? 1u : 0u) << i;
      write_bits(args.positive, tile, transpose_nibbles(positive, lane));
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (args.z) write(args.z, row + 8 * half, half, z);
      activate(z, half, keep);
      write(args.y, row + 8 * half, half, z);
    }
  }
};

// Block b has tiles b tiles_a_block and following, numbered strip by strip of columns.
template <class T, int depth>
MLPKIT_DEVICE void work_on(const ThinForward& args, bool aligned, uint32_t tiles_a_block) {
  constexpr uint32_t stages = kStages<depth>, stage_bytes = kRows * depth * 2;
  unsigned char* const memory = device::shared_memory();
  const uint32_t row_tiles = static_cast<uint32_t>((args.rows + kRows - 1) / kRows);
  const uint32_t strips = static_cast<uint32_t>((args.cols + kStrip - 1) / kStrip);
  const uint32_t begin = device::block_index() * tiles_a_block, all = row_tiles * strips;
  const uint32_t end = begin + tiles_a_block < all ? begin + tiles_a_block : all;
  Warp<T, depth> warp(args, aligned);

  const auto fetch = [&](uint32_t number) {
    if (number < end)
      fetch_rows<T, depth, kRows, kThreads>(memory + (number - begin) % stages * stage_bytes, args.x,
                                            int64_t{number % row_tiles} * kRows, args.rows, args.depth);
    device::commit_copies();
  };
#pragma unroll 1
  for (uint32_t number = begin; number < begin + stages - 1; ++number) fetch(number);
#pragma unroll 1
  for (uint32_t number = begin; number < end; ++number) {
    device::wait_for_copies<stages - 2>();
    device::sync();
    fetch(number + stages - 1);  // to where the tile before this one was
    const uint32_t row_tile = number % row_tiles;
    if (number == begin || row_tile == 0) warp.take_columns(static_cast<int>(number / row_tiles));
    const int64_t first_row = int64_t{row_tile} * kRows;
#pragma unroll 1
    for (int step = 0; step < kRows / kStep && first_row + step * kStep < args.rows; ++step) {
      float z[kProducts][4];
      warp.multiply(memory + (number - begin) % stages * stage_bytes, step, z);
      if (warp.first_col < args.cols) warp.finish(first_row + step * kStep, z);
    }
  }
  device::wait_for_copies<0>();
}

template <class T, int depth>
MLPKIT_KERNEL(kThreads, kBlocks<depth>)
stream_tiles(const ThinForward args, bool aligned, uint32_t tiles_a_block) {
  if constexpr (device::kTensorCores) work_on<T, depth>(args, aligned, tiles_a_block);
}

template <class T, int depth>
cudaError_t run(const ThinForward& args, cudaStream_t stream) {
  const bool aligned = args.cols % 8 == 0 && on_16_bytes(args.y) && on_16_bytes(args.z);
  const int64_t tiles = ceil_div(args.rows, kRows) * ceil_div(args.cols, kStrip);
  if (tiles > INT32_MAX) return cudaErrorInvalidValue;  // a y of 2^44 elements
  const int64_t each = ceil_div(tiles, int64_t{kBlocks<depth>} * device::multiprocessors());
  return device::launch(stream_tiles<T, depth>, {ceil_div(tiles, each), kThreads, kStages<depth> * kRows * depth * 2},
                        stream, args, aligned, static_cast<uint32_t>(each));
}

template <class T>
cudaError_t visit_depth(const ThinForward& args, cudaStream_t stream) {
  if (args.depth <= 64) return run<T, 64>(args, stream);
  if (args.depth <= 128) return run<T, 128>(args, stream);
  return run<T, 256>(args, stream);
}

}  // namespace

cudaError_t thin_forward(const ThinForward& args, cudaStream_t stream) {
  if (!thin_takes(args.dtype, args.depth)) return cudaErrorInvalidValue;
  if (args.cols > INT32_MAX - kStrip) return cudaErrorInvalidValue;
  if (args.rows == 0 || args.cols == 0) return cudaSuccess;
  return args.dtype == Dtype::bfloat16 ? visit_depth<BFloat16>(args, stream) : visit_depth<Half>(args, stream);
}

}  // namespace mlpkit::cuda
