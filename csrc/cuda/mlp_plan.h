// How the pass over a small network is laid out on a device: rows of a block, shared memory, blocks (cuda; host).
//
// A block of eight warps takes 16 x high x teams rows at a time: each team of warps has 16 x high rows of its own, and
// the warps of a team share out the columns of a layer. Everything that is multiplied lies in shared memory as tiles of
// 16x16 elements of 512 bytes (mlp_tile.h), of bf16 or f16; widths count in tiles.
//
// Napkin for an H200 (132 multiprocessors at 1.75 GHz, 128 bytes a clock of shared memory and about 1270 multiply-adds
// a clock by mma.sync on each, 4.3 TB/s), P parameters, B rows:
//   inference   bytes B (4 in + 2 out), FLOPs 2 P B, 1 launch. 64-64-64-64-64-16, B 2^21: 0.34 GB of bf16 = 78 us
//               (0.16 ms of f32); tensor cores 107 us; shared memory 34 KB a weight pass of 32 rows + 24 KB = 120 us:
//               floor 120 us, 17e9 rows/s.
//   step        bytes 4 B in + parts P 4 x 2 + 28 P, FLOPs 6 P B, 3 launches. The same network, B 2^21: shared memory
//               1.2 MB for 128 rows = 0.66 ms, tensor cores 0.32 ms: floor 0.66 ms, 3.1e9 rows/s.
//               128-64-64-10, B 4096: 2.1 MB in, 13.6 MB of parts, all in L2: 3 launches of 2 us, 1 us of weights into
//               shared memory, 2 us of products at one warp a scheduler, 2 x 2 us of parts: floor 11 us.
//               Nine layers of 256, B 4096: 2.4 MB of weights twice for each of 128 blocks of 32 rows = 0.6 GB out of
//               L2, and 0.6 GB of parts through memory = 140 us; tensor cores 25 us: floor 140 us, bound by the parts.
// The roofline is shared memory, not the tensor core, for every width up to 128; at 256 weights come from L2.
#pragma once
#include "core/macros.h"

namespace mlpkit::cuda {

constexpr int kMlpLayers = 9, kMlpWidest = 256;  // eight hidden layers and the output
constexpr int kMlpWarps = 8, kMlpThreads = 32 * kMlpWarps;
constexpr int kTileElements = 256, kTileBytes = 512;

MLPKIT_HD constexpr int tiles_of(int width) { return (width + 15) / 16; }

struct MlpShape {
  int layers;
  int widths[kMlpLayers + 1];  // of the input, then of every layer
  int64_t rows;
  bool gradients;     // activations are kept for a backward pass
  bool keeps_slopes;  // and slopes beside them: for all activations but relu, and identity without dropout
  bool loss;
};

struct MlpDevice {
  int multiprocessors, shared_bytes;  // of a block, at most
};

struct MlpPlan {
  int deep, high;    // tiles of columns and of rows that a warp multiplies from registers; names the kernel's instance
  int teams;         // 1, 2, 4 or 8
  bool resident;     // weights stay in shared memory; otherwise panels of 16 columns come in, so many at a time
  int panels;        // at most one for each warp of a team
  bool shared_sums;  // gradients of the weights add up in shared memory; otherwise in the block's part itself
  int blocks;
  int64_t row_blocks;
  // Offsets in bytes of shared memory: a layer's input is slot[i], the last slot is the output.
  int slot[kMlpLayers + 1], slope[kMlpLayers], weight[kMlpLayers], bias[kMlpLayers];
  int stage, panel_bytes, logits, logits_stride, sums, scratch, shared_bytes;
  // Offsets in floats of a part of the gradients, and its length.
  int64_t dweight[kMlpLayers], dbias[kMlpLayers], floats;

  MLPKIT_HD int warps_of_team() const { return kMlpWarps / teams; }
  MLPKIT_HD int block_rows() const { return 16 * high * teams; }
};

// Why a shape cannot be planned; nullptr if it can.
inline const char* mlp_obstacle(const MlpShape& shape) {
  if (shape.layers < 1 || shape.layers > kMlpLayers) return "it has 1 to 9 layers";
  for (int i = 0; i <= shape.layers; ++i)
    if (shape.widths[i] < 1 || shape.widths[i] > kMlpWidest) return "its widths are 1 to 256";
  return shape.rows < 1 ? "it has at least one row" : nullptr;
}

namespace plan {

class Memory {  // bytes of shared memory, handed out one after another
 public:
  int take(int bytes) {
    const int taken = used_;
    used_ += (bytes + 127) / 128 * 128;
    return taken;
  }
  int used() const { return used_; }

 private:
  int used_ = 0;
};

inline void lay_out_gradients(const MlpShape& shape, MlpPlan& plan) {
  int64_t floats = 0;
  for (int i = 0; i < shape.layers; ++i) {
    plan.dweight[i] = floats;
    floats += int64_t{kTileElements} * tiles_of(shape.widths[i]) * tiles_of(shape.widths[i + 1]);
    plan.dbias[i] = floats;
    floats += 16 * tiles_of(shape.widths[i + 1]);
  }
  plan.floats = floats;
}

// Offsets of everything for the choices that the plan already holds; returns the bytes that are needed.
inline int lay_out_memory(const MlpShape& shape, MlpPlan& plan) {
  Memory memory;
  const int row_tiles = plan.high * plan.teams;
  int widest = 0, alternate[2] = {0, 0};
  for (int i = 0; i <= shape.layers; ++i) {
    const int tiles = tiles_of(shape.widths[i]);
    widest = widest > tiles ? widest : tiles;
    alternate[i & 1] = alternate[i & 1] > tiles ? alternate[i & 1] : tiles;
  }
  // Without gradients an input is not needed any more when the layer after next writes its outputs.
  const int pair[2] = {shape.gradients ? 0 : memory.take(row_tiles * alternate[0] * kTileBytes),
                       shape.gradients ? 0 : memory.take(row_tiles * alternate[1] * kTileBytes)};
  for (int i = 0; i <= shape.layers; ++i)
    plan.slot[i] = shape.gradients ? memory.take(row_tiles * tiles_of(shape.widths[i]) * kTileBytes) : pair[i & 1];
  for (int i = 0; i < shape.layers; ++i) {
    const int out = tiles_of(shape.widths[i + 1]), in = tiles_of(shape.widths[i]);
    const bool slopes = shape.gradients && shape.keeps_slopes && i + 1 < shape.layers;
    plan.slope[i] = slopes ? memory.take(row_tiles * out * kTileBytes) : 0;
    plan.weight[i] = plan.resident ? memory.take(in * out * kTileBytes) : 0;
    plan.bias[i] = memory.take(out * 16 * 4);
  }
  plan.panel_bytes = widest * kTileBytes;
  plan.stage = plan.resident ? 0 : memory.take(plan.panels * plan.panel_bytes);
  // Eight more than the columns: rows that a warp writes at once fall into different banks.
  plan.logits_stride = 16 * tiles_of(shape.widths[shape.layers]) + 8;
  plan.logits = shape.loss ? memory.take(16 * row_tiles * plan.logits_stride * 4) : 0;
  plan.sums = plan.shared_sums ? memory.take(static_cast<int>(plan.floats) * 4) : 0;
  plan.scratch = memory.take(kMlpWarps * 4 * 8);
  plan.shared_bytes = memory.used();
  return plan.shared_bytes;
}

// Whether the plan's teams and residency fit; then everything else is filled in.
inline bool fits(const MlpShape& shape, const MlpDevice& device, bool wants_shared_sums, MlpPlan& plan) {
  plan.row_blocks = (shape.rows + plan.block_rows() - 1) / plan.block_rows();
  // One round of rows a block has nothing to add up.
  const bool adds_up = shape.gradients && plan.row_blocks > device.multiprocessors;
  plan.shared_sums = adds_up && wants_shared_sums;
  if (plan.shared_sums && plan.floats * 4 > device.shared_bytes) return false;
  plan.panels = plan.warps_of_team();
  while (lay_out_memory(shape, plan) > device.shared_bytes) {
    if (plan.resident || plan.panels == 1) return false;
    plan.panels /= 2;
  }
  const bool two = plan.deep == 4 && plan.shared_bytes + 1024 <= (device.shared_bytes + 1024) / 2;
  const int64_t most = int64_t{device.multiprocessors} * (two ? 2 : 1);
  plan.blocks = static_cast<int>(plan.row_blocks < most ? plan.row_blocks : most);
  return true;
}

// Clocks that the busiest multiprocessor needs, roughly: the larger of what shared memory and what the tensor cores
// take for a block of rows, what comes from and goes to L2 at 64 bytes a clock, and a latency for every layer and every
// time that all wait for L2.
inline double clocks(const MlpShape& shape, const MlpDevice& device, const MlpPlan& plan) {
  double parameters = 0.0, columns = 0.0, stages = 0.0;
  for (int i = 0; i < shape.layers; ++i) {
    parameters += kTileElements * static_cast<double>(tiles_of(shape.widths[i])) * tiles_of(shape.widths[i + 1]);
    columns += 16.0 * tiles_of(shape.widths[i]);
    stages += (tiles_of(shape.widths[i + 1]) + plan.panels - 1) / plan.panels;
  }
  const double passes = shape.gradients ? 2.0 : 1.0, rows = plan.block_rows();
  const double tensor = rows * parameters * (shape.gradients ? 3.0 : 1.0) / 1270.0;
  // Weights once a team and pass; rows once a warp that shares them, and twice for the gradients of the weights.
  const double by_weights = 2.0 * parameters * plan.teams * passes;
  const double by_rows = 2.0 * rows * columns * ((plan.warps_of_team() + 1) * passes + (shape.gradients ? 8.0 : 0.0));
  const double shared = (by_weights + by_rows + (plan.shared_sums ? 8.0 * parameters : 0.0)) / 128.0;
  const bool adds_up = shape.gradients && !plan.shared_sums && plan.row_blocks > device.multiprocessors;
  const double from_l2 = (plan.resident ? 0.0 : 4.0 * parameters * passes) + (adds_up ? 8.0 * parameters : 0.0);
  const double waits = (plan.resident ? 0.0 : stages * passes) + (adds_up ? shape.layers : 0.0);
  const double latency =
      (600.0 * shape.layers * passes + 1500.0 * waits) / (plan.blocks > device.multiprocessors ? 2 : 1);
  const int64_t rounds = (plan.row_blocks + device.multiprocessors - 1) / device.multiprocessors;
  return static_cast<double>(rounds) * ((tensor > shared ? tensor : shared) + from_l2 / 64.0 + latency);
}

}  // namespace plan

// Fills the plan with the cheapest layout that fits; false where even 16 rows do not fit the shared memory.
inline bool plan_mlp(const MlpShape& shape, const MlpDevice& device, MlpPlan& plan) {
  int widest = 0;
  for (int i = 0; i <= shape.layers; ++i)
    widest = widest > tiles_of(shape.widths[i]) ? widest : tiles_of(shape.widths[i]);
  MlpPlan tried{};
  tried.deep = widest <= 4 ? 4 : widest <= 8 ? 8 : 16;
  tried.high = tried.deep == 16 ? 1 : 2;
  plan::lay_out_gradients(shape, tried);
  double least = -1.0;
  for (int choice = 0; choice < 4; ++choice)
    for (int teams = kMlpWarps; teams >= 1; teams /= 2) {
      tried.teams = teams;
      tried.resident = choice < 2;
      if (!plan::fits(shape, device, choice % 2 == 0, tried)) continue;
      const double cost = plan::clocks(shape, device, tried);
      if (least >= 0.0 && cost >= least) continue;
      least = cost;
      plan = tried;
    }
  return least >= 0.0;
}

}  // namespace mlpkit::cuda
