// Work of fixed size for an instruction counter: native_counts <name>. Each function below is counted by itself, with
// the kernels compiled for AVX2, which valgrind knows (tests).
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/linear_act_dropout.h"
#include "cpu/mask_tile.h"
#include "cpu/update.h"

namespace {

std::vector<float> numbers(int64_t count) {
  std::vector<float> result(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) result[static_cast<size_t>(i)] = static_cast<float>(i % 17 - 8) / 16.f;
  return result;
}

struct Layer {  // y = gelu(x W^T + b) of a ragged layer, fp32
  static constexpr int64_t rows = 61, cols = 150, depth = 300;
  std::vector<float> x = numbers(rows * depth), weight = numbers(cols * depth), bias = numbers(cols);
  std::vector<float> product = numbers(rows * cols), y = numbers(rows * cols), z = numbers(rows * cols);
  std::unique_ptr<void, void (*)(void*)> scratch{
      std::aligned_alloc(64, sizeof(float) * (mlpkit::kPanelFloats + mlpkit::kLaneFloats)), std::free};
};

}  // namespace

extern "C" {

__attribute__((noinline)) void count_gemm(Layer& layer) {
  using mlpkit::Dtype;
  float* panels = static_cast<float*>(layer.scratch.get());
  float* lanes = panels + mlpkit::kPanelFloats;
  for (int64_t k = 0; k < Layer::depth; k += mlpkit::kGemmDepth) {
    const int64_t depth = std::min(mlpkit::kGemmDepth, Layer::depth - k);
    mlpkit::isa_avx2::gemm_pack(
        {Dtype::float32, true, depth, Layer::cols, layer.weight.data() + k, Layer::depth, panels});
    mlpkit::isa_avx2::gemm_lanes({Dtype::float32, false, Layer::rows, depth, layer.x.data() + k, Layer::depth, lanes});
    mlpkit::isa_avx2::gemm_multiply({Layer::rows, Layer::cols, depth, lanes, mlpkit::kGemmStride, 1, panels,
                                     layer.product.data(), Layer::cols, k > 0});
  }
}

__attribute__((noinline)) void count_epilogue(Layer& layer) {
  mlpkit::ActDropoutForward args{};
  args.region = {0, Layer::rows, 0, Layer::cols, Layer::cols};
  args.dtype = mlpkit::Dtype::float32;
  args.activation = mlpkit::Activation::gelu;
  args.product = layer.product.data();
  args.product_stride = Layer::cols;
  args.bias = layer.bias.data();
  args.y = layer.y.data();
  args.saved = layer.z.data();
  mlpkit::isa_avx2::act_dropout_forward(args);
}

// The bits of 256 tiles, 16 rows each.
__attribute__((noinline)) unsigned count_mask_tile() {
  mlpkit::Dropout dropout;
  dropout.seed = 7;
  dropout.threshold = 19661;
  mlpkit::MaskTiles mask(dropout);
  unsigned mixed = 0;
  for (uint64_t tile = 0; tile < 256; ++tile) {
    uint16_t keep[mlpkit::kMaskTile];
    mask.draw(tile, keep);
    for (const uint16_t row : keep) mixed ^= row;
  }
  return mixed;
}

__attribute__((noinline)) void count_adam(const mlpkit::Update& args) { mlpkit::isa_avx2::update(args); }

}  // extern "C"

int main(int count, char** arguments) {
  const std::string name = count == 2 ? arguments[1] : "";
  Layer layer;
  if (name == "gemm") {
    count_gemm(layer);
  } else if (name == "epilogue") {
    count_epilogue(layer);
  } else if (name == "mask_tile") {
    const volatile unsigned used = count_mask_tile();
    (void)used;
  } else if (name == "adam") {
    std::vector<float> p = numbers(16411), g = p, first = p, second(p.size(), 0.5f);
    mlpkit::OptimizerSettings settings{};
    settings.kind = mlpkit::Optimizer::adam;
    settings.lr = settings.step_size = settings.weight_decay = 0.01f;
    settings.beta2 = settings.rest1 = settings.rest2 = settings.eps = settings.root2 = 0.5f;
    count_adam({settings, 1.f, static_cast<int64_t>(p.size()), p.data(), g.data(), first.data(), second.data()});
  } else {
    return 2;
  }
  return 0;
}
