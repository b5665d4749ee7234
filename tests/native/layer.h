// One case of the element-wise passes of linear_act_dropout: a region of an output, and what the mask contract says of
// it (tests).
#pragma once
#include "activations.h"
#include "core/dropout_mask.h"
#include "cpu/linear_act_dropout.h"
#include "harness.h"

namespace native {

using mlpkit::kMaskTile;
using mlpkit::mask_tiles;
using mlpkit::Region;

constexpr int kRoundings = 8;  // at most so many in a chain take part in one element

struct Layer {
  Dtype dtype;
  Activation activation;
  double p;
  int64_t total_rows;
  Region region;

  int64_t elements() const { return total_rows * region.total_cols; }
  int64_t words() const { return mask_tiles(total_rows) * mask_tiles(region.total_cols) * kMaskTile; }
  int64_t tile(int64_t row, int64_t col) const {
    return row / kMaskTile * mask_tiles(region.total_cols) + col / kMaskTile;
  }
  int64_t word(int64_t row, int64_t col) const { return tile(row, col) * kMaskTile + row % kMaskTile; }
  bool inside(int64_t row, int64_t col) const {
    return row >= region.row && row < region.row + region.rows && col >= region.col && col < region.col + region.cols;
  }
  bool has_slopes() const { return activation == Activation::prelu; }
  bool has_z() const { return activation >= Activation::prelu; }

  // Of what is saved for the backward pass: slopes, or prelu's z.
  Dtype saved_dtype() const { return dtype == Dtype::bfloat16 && !has_slopes() ? Dtype::float16 : dtype; }

  mlpkit::Dropout dropout() const {
    mlpkit::Dropout dropout;
    dropout.seed = 0x123456789abcdef0u;
    dropout.offset = 5;
    dropout.stream = 2;
    dropout.threshold = mlpkit::dropout_threshold(p);
    dropout.scale = mlpkit::dropout_scale(dropout.threshold);
    return dropout;
  }
  bool kept(int64_t row, int64_t col) const {
    const int r = static_cast<int>(row % kMaskTile), c = static_cast<int>(col % kMaskTile);
    const mlpkit::Words words =
        mlpkit::mask_words(dropout(), static_cast<uint64_t>(tile(row, col)), mlpkit::mask_lane(r, c));
    return mlpkit::mask_bits(words, r, c) >= dropout().threshold;
  }

  template <class Body>
  void each(const Body& body) const {
    for (int64_t row = 0; row < total_rows; ++row)
      for (int64_t col = 0; col < region.total_cols; ++col) body(row, col, row * region.total_cols + col);
  }
};

// Every dtype, activation and kind of p, over regions that are ragged, inside a larger output, a single element, or
// wider than the tiles that are worked on together.
template <class Body>
void each_layer(const Body& body) {
  const std::vector<std::pair<int64_t, Region>> regions = {
      {1, {0, 1, 0, 1, 1}},      {16, {0, 16, 0, 16, 16}},   {19, {0, 19, 0, 35, 35}}, {5, {0, 5, 0, 15, 15}},
      {50, {16, 34, 32, 9, 41}}, {48, {16, 16, 16, 16, 50}}, {3, {0, 3, 16, 270, 300}}};
  for (const Dtype dtype : {Dtype::float64, Dtype::float32, Dtype::bfloat16, Dtype::float16})
    for (int activation = 0; activation <= static_cast<int>(Activation::tanh); ++activation)
      for (const double p : {0.0, 0.3, 1.0})
        for (const auto& [total_rows, region] : regions)
          body(Layer{dtype, static_cast<Activation>(activation), p, total_rows, region});
}

// Words of a bit plane, not all ones and not all zeros until written.
class Plane {
 public:
  Plane(int64_t words, Draw& draw) : memory_(2 * words, 2, draw, kPoison) {}
  uint16_t* data() { return reinterpret_cast<uint16_t*>(memory_.data()); }
  uint16_t get(int64_t word) const { return load_as<uint16_t>(memory_.data(), word); }
  bool bit(int64_t word, int64_t col) const { return get(word) >> (col % kMaskTile) & 1; }
  bool untouched(int64_t word) const { return get(word) == kPoison * 0x101; }

 private:
  static constexpr int kPoison = 0xa5;
  Memory memory_;
};

}  // namespace native
