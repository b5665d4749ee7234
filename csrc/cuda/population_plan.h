// How a member of a population is laid out on a device (cuda; host): its parameters in global memory, in the order in
// which a warp of mma.m16n8k16 holds the gradients; what is multiplied and added up in shared memory.
//
// Napkin for 128 -> 64 -> 64 -> 10, batch 128, bf16, Adam on an H200 (132 multiprocessors at 1.75 GHz; 1000
// multiply-adds of mma.sync a clock each; about 32 bytes a clock each from L2 when all ask):
//   FLOPs       6 x 13.1k x 128 = 10 MFLOP (tiles padded: 10.2): 5.1k clocks of the tensor cores
//   shared      x 32 KB, two hidden 16 KB each, outputs 4 KB, logits 12 KB, weights 27 KB: 107 KB, two blocks a
//               multiprocessor; gradients (53 KB) go through L2 then
//   L2          x 64 KB; parameters, both moments in and out 320 KB; gradients 106 KB: 15k clocks at 32 bytes
//   issue       update 55 instructions a parameter (two divisions, a root): 5.7k clocks; masks and epilogues 3k
//   a step      L2 bound: 15k clocks = 8.8 us a multiprocessor: 15 million member-steps a second expected; 30 million
//               want parameters or gradients of that member to stay on the multiprocessor.
#pragma once
#include "core/dtype.h"
#include "core/macros.h"
#include "cuda/mlp_plan.h"

namespace mlpkit::cuda {

constexpr int kMemberLayers = 8;  // seven hidden layers and the output
constexpr int kMemberWarps = 8, kMemberThreads = 32 * kMemberWarps, kMemberRows = 256;
constexpr int kMemberRegisters = 128;  // of a thread, at most
// The block's own words at the beginning of its shared memory.
constexpr int kMemberHead = 2048;

struct MemberShape {
  Dtype dtype;
  int layers;
  int widths[kMemberLayers + 1];  // of the input, then of every layer
  int batch;
  bool keeps_slopes;  // for all activations but relu, and identity without dropout
  bool prelu;
  int moments;  // 0 to 2, of the optimizer
};

struct MemberDevice {
  int multiprocessors, shared_bytes;  // of a block, at most
  int shared_of_all;                  // of a multiprocessor
};

struct MemberPlan {
  int warps, rows;  // rows of a pass; a batch takes one or more
  int resident;     // blocks that fit a multiprocessor
  // Offsets in bytes of shared memory; -1 for what there is not. A layer's input is slot[i].
  int slot[kMemberLayers + 1], slope[kMemberLayers], negative[kMemberLayers], weight[kMemberLayers],
      bias[kMemberLayers];
  int logits, logits_stride, gradients, index, by_row, shared_bytes;  // gradients: -1 where they lie in global memory
  int floats;                                                         // of the parameters, padded to whole tiles
};

// Where tensors begin in the parameters, in floats.
struct MemberPlaces {
  int weight[kMemberLayers], bias[kMemberLayers], slope[kMemberLayers];
  int floats;
};

inline MemberPlaces member_places(const MemberShape& shape) {
  MemberPlaces places{};
  for (int i = 0; i < shape.layers; ++i) {
    const int in = tiles_of(shape.widths[i]), out = tiles_of(shape.widths[i + 1]);
    places.weight[i] = places.floats;
    places.floats += kTileElements * in * out;
    places.bias[i] = places.floats;
    places.floats += 16 * out;
    places.slope[i] = shape.prelu && i + 1 < shape.layers ? places.floats : -1;
    if (places.slope[i] >= 0) places.floats += 16;
  }
  return places;
}

// Where element (o, i) of a weight [out, in] lies, from the weight's beginning.
MLPKIT_HD int weight_place(int o, int i, int in) {
  const int tile = o / 16 * tiles_of(in) + i / 16, r = o % 16, c = i % 16;
  return tile * kTileElements + c / 8 * 128 + ((r % 8) * 4 + c % 8 / 2) * 4 + r / 8 * 2 + c % 2;
}

namespace plan {

inline void lay_out_member(const MemberShape& shape, MemberPlan& plan) {
  Memory memory;
  memory.take(kMemberHead);
  const int element = shape.dtype == Dtype::float32 ? 4 : 2, tile = kTileElements * element;
  const int row_tiles = tiles_of(plan.rows);
  for (int i = 0; i <= shape.layers; ++i) plan.slot[i] = memory.take(row_tiles * tiles_of(shape.widths[i]) * tile);
  for (int i = 0; i < shape.layers; ++i) {
    const int in = tiles_of(shape.widths[i]), out = tiles_of(shape.widths[i + 1]);
    const bool hidden = i + 1 < shape.layers;
    plan.slope[i] = hidden && shape.keeps_slopes ? memory.take(row_tiles * out * tile) : -1;
    plan.negative[i] = hidden && shape.prelu ? memory.take(row_tiles * out * tile) : -1;
    plan.weight[i] = memory.take(in * out * tile);
    plan.bias[i] = memory.take(out * 16 * 4);
  }
  // Eight more than the columns: rows that a warp writes at once fall into different banks.
  plan.logits_stride = 16 * tiles_of(shape.widths[shape.layers]) + 8;
  plan.logits = memory.take(16 * row_tiles * plan.logits_stride * 4);
  plan.index = memory.take(16 * row_tiles * 4);
  plan.by_row = memory.take(16 * row_tiles * 4);
  if (plan.gradients >= 0) plan.gradients = memory.take(plan.floats * 4);
  plan.shared_bytes = memory.used();
}

inline int resident_blocks(const MemberDevice& device, const MemberPlan& plan) {
  const int by_memory = device.shared_of_all / (plan.shared_bytes + 1024);
  const int by_registers = 65536 / (kMemberRegisters * 32 * plan.warps);
  return by_memory < by_registers ? by_memory : by_registers;
}

// Clocks of a step by all blocks of a multiprocessor, roughly: what shared units take, or what one block takes by
// itself over the number of blocks, whichever is more.
inline double member_clocks(const MemberShape& shape, const MemberPlan& plan) {
  double parameters = 0.0, columns = 0.0;
  for (int i = 0; i < shape.layers; ++i) {
    parameters += kTileElements * static_cast<double>(tiles_of(shape.widths[i])) * tiles_of(shape.widths[i + 1]);
    columns += 16.0 * tiles_of(shape.widths[i + 1]);
  }
  const int passes = (shape.batch + plan.rows - 1) / plan.rows;
  const double rows = 16.0 * tiles_of(shape.batch), rate = shape.dtype == Dtype::float32 ? 64.0 : 1000.0;
  const double products = 3.0 * rows * parameters / rate;
  const double issue = (55.0 * parameters + 25.0 * rows * columns) / 128.0;
  const double traffic =
      4.0 * rows * shape.widths[0] + 8.0 * parameters * (1 + shape.moments + (plan.gradients < 0 ? passes : 0));
  const double together = products + issue > traffic / 32.0 ? products + issue : traffic / 32.0;
  const double alone =
      600.0 * passes * (6.0 * shape.layers + 6.0) + 4.0 * (products + issue) * 8.0 / plan.warps + traffic / 64.0;
  return alone / plan.resident > together ? alone / plan.resident : together;
}

}  // namespace plan

// Fills the plan with the cheapest layout that fits; false where even 16 rows do not fit the shared memory.
inline bool plan_member(const MemberShape& shape, const MemberDevice& device, MemberPlan& plan) {
  MemberPlan tried{};
  tried.floats = member_places(shape).floats;
  double least = -1.0;
  const int most = shape.batch < kMemberRows ? 16 * tiles_of(shape.batch) : kMemberRows;
  for (tried.rows = most; tried.rows >= 16; tried.rows = tried.rows > 16 ? 16 * tiles_of(tried.rows / 2) : 0)
    for (int choice = 0; choice < 6; ++choice) {
      tried.warps = kMemberWarps >> choice / 2;
      tried.gradients = choice % 2 == 0 ? 0 : -1;
      plan::lay_out_member(shape, tried);
      if (tried.shared_bytes > device.shared_bytes) continue;
      tried.resident = plan::resident_blocks(device, tried);
      const double cost = plan::member_clocks(shape, tried);
      if (tried.resident < 1 || (least >= 0.0 && cost >= least)) continue;
      least = cost;
      plan = tried;
    }
  return least >= 0.0;
}

}  // namespace mlpkit::cuda
