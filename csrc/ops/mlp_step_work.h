// What the parts of mlp_step share: its memory and its plan (ops).
#pragma once
#include <c10/util/Exception.h>

#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cpu/mlp_step.h"
#include "ops/mlp_step.h"

namespace mlpkit {

// Floats, 64-byte aligned, that stay where they are until more are wanted.
class AlignedMemory {
 public:
  float* at_least(int64_t floats) {
    if (floats > size_) {
      memory_.reset();  // first, so that there is never twice as much, and nothing is left of what is too small
      size_ = 0;
      memory_.reset(static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64)));
      TORCH_CHECK(memory_, "mlp_step: no memory for ", floats, " floats of workspace");
      size_ = floats;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  std::unique_ptr<float, Free> memory_;
  int64_t size_ = 0;
};

// The kernels for a dtype here.
struct MlpStepKernels {
  int64_t per_lane;
  void (*weights)(const StepWeights&);  // nullptr where the weight itself is multiplied
  void (*panel)(const StepPanel&);
  void (*gradient)(const StepGradient&);
  int64_t lanes(int64_t numbers) const { return (numbers + per_lane - 1) / per_lane; }
};

struct MlpStepParameter {
  BorrowedTensor value;
  MlpStepState state;
  float* gradient;
};

struct NormAverages {  // running ones of a batch norm; nullptr where there are none
  const float *mean = nullptr, *variance = nullptr;
  double momentum = 0.0;
};

struct NormWork {                                     // of a layer with a norm
  std::vector<double> moments;                        // [panels, 2, out], as StepNorm's
  std::vector<float> mean, inverse, mean_g, mean_gx;  // [out]
  std::vector<float> sums;                            // [panels, 2, out]
  std::vector<float> next_mean, next_variance;        // [out]: the running averages after this step, if it is taken
  float *dweight = nullptr, *dbias = nullptr;         // gradients
};

// Of "fp32", "bf16" or "fp16".
Dtype dtype_of_precision(const std::string& name);

// The kernels for float32 and float16, or for bfloat16: in pairs where the processor multiplies them.
MlpStepKernels mlp_step_kernels(Dtype dtype);

// A batch norm's mean and inverse deviation from the moments of the panels; the running averages as they would be next.
void combine_moments(const StepLayer& layer, int64_t rows, const NormAverages& averages, NormWork& work);
// The means over all rows that a batch norm's gradient subtracts.
void combine_sums(const StepLayer& layer, int64_t rows, NormWork& work);
// Fills the gradients of a norm's parameters; returns the sum of their squares.
double norm_gradients(const StepLayer& layer, int64_t rows, const NormWork& work);
// Fills the gradients of prelu's slopes, `slopes` of them; returns the sum of their squares.
double slope_gradients(const StepLayer& layer, int64_t rows, int64_t slopes, float* gradient);

inline float* data(BorrowedTensor tensor) { return static_cast<float*>(tensor->mutable_data()); }
inline float* data_or_null(BorrowedTensor tensor) { return tensor ? data(tensor) : nullptr; }

struct MlpStep::Work {
  std::vector<MlpStepLayer> tensors;
  Dtype dtype;
  Activation activation;
  float negative_slope;
  MlpStepLoss loss;
  Optimizer optimizer;
  std::vector<MlpStepParameter> parameters;
  MlpStepKernels kernels;

  std::vector<StepLayer> layers;
  std::vector<double> values, squares;  // the loss of each panel; squares of each piece of gradient
  std::vector<StepGradient> pieces;
  AlignedMemory gradients, weights, activations, scratch, rows_memory;
  int64_t rows = 0, rows_per_lane = 0;  // what activations are laid out for
  double loss_scale = 1.0;

  std::vector<NormWork> norms;  // one a layer
  std::vector<float*> dslopes;  // likewise, nullptr without one

  void lay_out();
  void set_weights();
  void set_dropout(const std::vector<double>& p, int64_t seed, int64_t offset);
  void set_rows(int64_t count);
  std::optional<StepLoss> loss_of(const at::Tensor& target);
  bool worth_threads() const;
  int64_t scratch_floats() const {
    return (step_scratch(layers.data(), static_cast<int64_t>(layers.size())) + 15) / 16 * 16;
  }
  void set_norms();
  void run_panels(const float* x, const StepLoss& loss, int64_t from, int64_t until, float* memory, bool by_panel);
  NormAverages averages_of(size_t layer) const;
  bool averages_bounded() const;
  void move_averages();
  double forward_and_backward(const float* x, const StepLoss& loss);
  double gradient_norm();
  bool bounded();
  void update(double scale, const std::vector<MlpStepGroup>& groups);
};

}  // namespace mlpkit
