// A warp's unit of work, 16 rows x 64 columns, and how its elements and their mask bits are shared out among the lanes
// (cuda).
//
// Memory order: in each of `steps` steps a lane has `width` adjacent columns of one row, 16 bytes of T, and the lanes
// of a warp cover whole 128-byte lines. Mask order: lane 4 q + t has, in one word, the bytes of lanes 4 q .. 4 q + 3 of
// tile t: rows q and q + 8, all 16 columns. A panel is four tiles of the mask contract side by side, so a lane makes
// four Philox calls, one for every 8 of the 32 elements that it has in either order, and bits change order by shuffles:
// two or four words a lane for bf16 and f32.
#pragma once
#include "core/dropout_mask.h"
#include "cuda/device.h"

namespace mlpkit::cuda {

constexpr int kPanelTiles = 4, kPanelCols = kPanelTiles * kMaskTile;
constexpr uint32_t kAllSet = 0xffffffffu;

// Eight bits, two in the low end of each byte, to eight adjacent bits; and back.
MLPKIT_DEVICE uint32_t gather_pairs(uint32_t pairs) {
  pairs &= 0x03030303u;
  pairs = (pairs | pairs >> 6) & 0x000f000fu;
  return (pairs | pairs >> 12) & 0xffu;
}
MLPKIT_DEVICE uint32_t spread_pairs(uint32_t bits) {
  bits = (bits | bits << 12) & 0x000f000fu;
  return (bits | bits << 6) & 0x03030303u;
}

template <class T>
struct MaskPanel {
  static constexpr int width = 16 / sizeof(T);
  static constexpr int across = kPanelCols / width;  // lanes side by side
  static constexpr int down = device::kWarp / across;
  static constexpr int steps = kMaskTile / down;
  static constexpr int lanes_a_tile_row = kMaskTile / width;

  uint32_t lane;

  MLPKIT_DEVICE int row(int step) const { return step * down + lane / across; }
  MLPKIT_DEVICE int col() const { return lane % across * width; }

  // The keep bits of the panel whose leftmost tile has this number, in mask order.
  MLPKIT_DEVICE uint32_t keep(const Dropout& dropout, uint64_t first_tile) const {
    uint32_t quad = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const Words words = mask_words(dropout, first_tile + lane % 4, (lane & ~3u) + k);
#pragma unroll
      for (int bit = 0; bit < 8; ++bit) {
        const bool kept = mask_bits(words, (bit >> 1 & 1) * 8, (bit >> 2) * 8 + (bit & 1)) >= dropout.threshold;
        quad |= (kept ? 1u : 0u) << (8 * k + bit);
      }
    }
    return quad;
  }

  // Mask order to memory order: bit i is column col() + i of row(step). Every lane of the warp calls it.
  MLPKIT_DEVICE uint32_t of_step(uint32_t quad, int step) const {
    const int r = row(step), c = col();
    const uint32_t tile_rows = device::shuffle(quad, (r & 7) * 4 + c / kMaskTile);
    const uint32_t half_row = gather_pairs(tile_rows >> ((r >> 3) * 2 + (c >> 3 & 1) * 4));
    return half_row >> (c & 7) & ((1u << width) - 1);
  }

  // Memory order, step s in bits s * width and up, to mask order. Every lane of the warp calls it.
  MLPKIT_DEVICE uint32_t in_mask_order(uint32_t steps_bits) const {
    const int quad = lane / 4, tile = lane % 4;
    const int upper_shift = quad / down * width, lower_shift = upper_shift + 8 / down * width;
    uint32_t upper = 0, lower = 0;  // rows quad and quad + 8 of the tile
#pragma unroll
    for (int i = 0; i < lanes_a_tile_row; ++i) {
      const uint32_t bits = device::shuffle(steps_bits, quad % down * across + tile * lanes_a_tile_row + i);
      upper |= (bits >> upper_shift & ((1u << width) - 1)) << (width * i);
      lower |= (bits >> lower_shift & ((1u << width) - 1)) << (width * i);
    }
    return spread_pairs(upper & 0xffu) | spread_pairs(lower & 0xffu) << 2 | spread_pairs(upper >> 8) << 4 |
           spread_pairs(lower >> 8) << 6;
  }

  // Where the lane's four bytes lie in a bit plane: 128 adjacent bytes for the warp.
  MLPKIT_DEVICE int64_t plane_offset(int64_t first_tile) const {
    return (first_tile + lane % 4) * kMaskLanes + (lane & ~3u);
  }
};

}  // namespace mlpkit::cuda
