// Forward, loss, backward and gradients of an MLP by the kernels of cpu/mlp_step.h, over torch's threads (ops).
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>

#include "ops/mlp_step_work.h"

namespace mlpkit {
namespace {

constexpr double kFlopsWorthThreads = 4e6;
// Sums of squares that were formed in fp32 are taken for what they are within these bounds; beyond, in fp64 again.
constexpr double kSmallestSquares = 1e-24, kLargestSquares = 1e30;

}  // namespace

bool MlpStep::Work::worth_threads() const {
  double flops = 0.0;
  for (const StepLayer& layer : layers) flops += 6.0 * static_cast<double>(rows * layer.in * layer.out);
  return flops >= kFlopsWorthThreads;
}

// Segments from to until of every panel. memory: step_scratch floats for each thread, or for each panel.
void MlpStep::Work::run_panels(const float* x, const StepLoss& step_loss, int64_t from, int64_t until, float* memory,
                               bool by_panel) {
  const int64_t count = static_cast<int64_t>(layers.size()), floats = scratch_floats();
  const bool threads = worth_threads();
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t place = by_panel ? panel : threads ? at::get_thread_num() : 0;
      kernels.panel({dtype, layers.data(), count, rows, panel, x, step_loss, from, until, memory + floats * place,
                     &values[panel]});
    }
  };
  if (threads)
    at::parallel_for(0, panels_of(rows), 1, run);
  else
    run(0, panels_of(rows));
}

// Returns the loss; fills dz and inputs of every layer. A batch norm of the batch stops all panels twice: until all
// know its moments, and until all know the sums of its gradients.
double MlpStep::Work::forward_and_backward(const float* x, const StepLoss& step_loss) {
  const size_t count = layers.size();
  bool by_panel = false;
  for (const StepLayer& layer : layers) by_panel = by_panel || layer.norm.moments != nullptr;
  const int64_t places = by_panel ? panels_of(rows) : worth_threads() ? at::get_num_threads() : 1;
  float* memory = scratch.at_least(scratch_floats() * places);
  int64_t from = 0;
  for (size_t segment = 0; segment < 2 * count; ++segment) {
    const size_t layer = segment < count ? segment : 2 * count - 2 - segment;
    const bool last = segment + 1 == 2 * count;
    if (!last && !layers[layer].norm.moments) continue;
    run_panels(x, step_loss, from, static_cast<int64_t>(segment + 1), memory, by_panel);
    from = static_cast<int64_t>(segment + 1);
    if (last) break;
    if (segment < count)
      combine_moments(layers[layer], rows, averages_of(layer), norms[layer]);
    else
      combine_sums(layers[layer], rows, norms[layer]);
  }
  double sum = 0.0;
  for (const double value : values) sum += value;
  return sum * loss_scale;
}

// Fills the gradients of all parameters; returns their norm.
double MlpStep::Work::gradient_norm() {
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernels.gradient(pieces[i]);
  };
  const int64_t count = static_cast<int64_t>(pieces.size());
  if (!worth_threads())
    run(0, count);
  else
    at::parallel_for(0, count, 1, run);
  double sum = 0.0;
  for (const double square : squares) sum += square;
  for (size_t i = 0; i < layers.size(); ++i) {
    const BorrowedTensor slope = tensors[i].slope;
    if (slope) sum += slope_gradients(layers[i], rows, slope->numel(), dslopes[i]);
    sum += norm_gradients(layers[i], rows, norms[i]);
  }
  if (sum > kSmallestSquares && sum < kLargestSquares) return std::sqrt(sum);
  sum = 0.0;
  for (const MlpStepParameter& parameter : parameters)
    for (int64_t i = 0; i < parameter.value->numel(); ++i)
      sum += static_cast<double>(parameter.gradient[i]) * parameter.gradient[i];
  return std::sqrt(sum);
}

double slope_gradients(const StepLayer& layer, int64_t rows, int64_t slopes, float* gradient) {
  std::vector<double> sums(slopes);
  for (int64_t at = 0; at < panels_of(rows) * layer.out; ++at) sums[slopes > 1 ? at % slopes : 0] += layer.dslope[at];
  double squares_of = 0.0;
  for (int64_t at = 0; at < slopes; ++at) {
    gradient[at] = static_cast<float>(sums[at]);
    squares_of += sums[at] * sums[at];
  }
  return squares_of;
}

}  // namespace mlpkit
