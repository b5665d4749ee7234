// The order of a member's rows in an epoch (core; host and device): Fisher and Yates' shuffle of its row table, last
// position first, each draw one word of Philox.
//
// Draw n of an epoch is word n mod 4 of the call with counter (n / 128, (n mod 128) / 4, epoch, kShuffleStream) and the
// member's seed as key: what core/dropout_mask.h calls lane (n mod 128) / 4 of tile n / 128. No network has so many
// layers that their masks could meet that stream.
#pragma once
#include "core/dropout_mask.h"

namespace mlpkit {

constexpr uint32_t kShuffleStream = 0xffffffffu;

}  // namespace mlpkit

MLPKIT_BEGIN_ISA

// A position below `bound` <= 2^31 from 32 random bits; each has a chance of 1 / bound, off by less than 2^-32.
MLPKIT_HD uint32_t draw_below(uint32_t bound, uint32_t word) {
  return static_cast<uint32_t>(static_cast<uint64_t>(word) * bound >> 32);
}

MLPKIT_END_ISA
