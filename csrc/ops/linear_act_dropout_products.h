// The two products of linear_act_dropout's backward pass on the CPU: dx = dz W and dW = dz^T x (ops).
#pragma once
#include <array>
#include <functional>

#include "cpu/linear_act_dropout.h"
#include "ops/tiles.h"

namespace mlpkit {

struct DzProducts {
  int64_t rows, cols, depth;  // dz is [rows, cols], x [rows, depth], W [cols, depth]
  Dtype dtype;
  const void* x;
  const void* weight;
  void* dx;                             // like x, or nullptr where it is not wanted
  void* dweight;                        // like W, or nullptr
  std::array<PassedOver, 2> formed_of;  // what dz is formed of
};

// Writes dz of a block of at most kTileRows x kTileCols that lies in one tile and starts at multiples of 16.
using FormDz = std::function<void(const Block&, const DzTile&)>;

// Calls form_dz for every block once, and multiplies.
void multiply_dz(const DzProducts& problem, const FormDz& form_dz);

}  // namespace mlpkit
