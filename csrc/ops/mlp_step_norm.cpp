// Norms between an MLP's layers: what all rows together decide, and the running averages (ops).
#include <cmath>

#include "core/norm.h"
#include "ops/mlp_step_work.h"

namespace mlpkit {

// Norms as the kernels take them, for this number of rows.
void MlpStep::Work::set_norms() {
  const int64_t panels = panels_of(rows);
  for (size_t i = 0; i < layers.size(); ++i) {
    StepLayer& layer = layers[i];
    const MlpStepNorm& tensor = tensors[i].norm;
    NormWork& work = norms[i];
    layer.norm = {};
    layer.norm.kind = tensor.kind;
    if (tensor.kind == Norm::none) continue;
    layer.norm.eps = tensor.eps;
    layer.norm.weight = data_or_null(tensor.weight);
    layer.norm.bias = data_or_null(tensor.bias);
    work.sums.resize(2 * panels * layer.out);
    layer.norm.sums = work.sums.data();
    if (tensor.kind == Norm::layer) continue;
    for (std::vector<float>* each : {&work.mean, &work.inverse, &work.mean_g, &work.mean_gx}) each->resize(layer.out);
    layer.norm.mean = work.mean.data();
    layer.norm.inverse = work.inverse.data();
    if (tensor.frozen) {
      for (int64_t n = 0; n < layer.out; ++n) {
        work.mean[n] = data(tensor.running_mean)[n];
        work.inverse[n] = inverse_deviation(data(tensor.running_var)[n], tensor.eps);
      }
      continue;
    }
    work.moments.resize(2 * panels * layer.out);
    layer.norm.moments = work.moments.data();
    layer.norm.mean_g = work.mean_g.data();
    layer.norm.mean_gx = work.mean_gx.data();
  }
}

NormAverages MlpStep::Work::averages_of(size_t i) const {
  const MlpStepNorm& tensor = tensors[i].norm;
  return {data_or_null(tensor.running_mean), data_or_null(tensor.running_var), tensor.momentum};
}

void combine_moments(const StepLayer& layer, int64_t rows, const NormAverages& averages, NormWork& work) {
  const double count = static_cast<double>(rows);
  work.next_mean.resize(averages.mean ? layer.out : 0);
  work.next_variance.resize(work.next_mean.size());
  for (int64_t n = 0; n < layer.out; ++n) {
    const auto part = [&](int64_t panel) {
      const double* at = work.moments.data() + 2 * panel * layer.out + n;
      return Moments{at[0], at[layer.out]};
    };
    const auto size = [&](int64_t panel) { return static_cast<double>(std::min(kPanel, rows - panel * kPanel)); };
    double sum = 0.0, squares_of = 0.0;
    for (int64_t panel = 0; panel < panels_of(rows); ++panel) sum += part(panel).mean * size(panel);
    const double mean = sum / count;
    for (int64_t panel = 0; panel < panels_of(rows); ++panel)
      squares_of += squares_around(mean, part(panel), size(panel));
    work.mean[n] = static_cast<float>(mean);
    work.inverse[n] = static_cast<float>(inverse_deviation(squares_of / count, layer.norm.eps));
    if (!averages.mean) continue;
    const auto moved = [&](const float* average, double value) {
      return static_cast<float>((1.0 - averages.momentum) * average[n] + averages.momentum * value);
    };
    work.next_mean[n] = moved(averages.mean, mean);
    work.next_variance[n] = moved(averages.variance, squares_of / (count - 1.0));
  }
}

void combine_sums(const StepLayer& layer, int64_t rows, NormWork& work) {
  for (int64_t n = 0; n < layer.out; ++n) {
    double sum = 0.0, sum_x = 0.0;
    for (int64_t panel = 0; panel < panels_of(rows); ++panel) {
      sum += work.sums[2 * panel * layer.out + n];
      sum_x += work.sums[(2 * panel + 1) * layer.out + n];
    }
    const double share = (layer.norm.weight ? layer.norm.weight[n] : 1.0) / static_cast<double>(rows);
    work.mean_g[n] = static_cast<float>(sum * share);
    work.mean_gx[n] = static_cast<float>(sum_x * share);
  }
}

double norm_gradients(const StepLayer& layer, int64_t rows, const NormWork& work) {
  double squares_of = 0.0;
  const auto fill = [&](float* gradient, int64_t which) {
    for (int64_t n = 0; gradient && n < layer.out; ++n) {
      double sum = 0.0;
      for (int64_t panel = 0; panel < panels_of(rows); ++panel) sum += work.sums[(2 * panel + which) * layer.out + n];
      gradient[n] = static_cast<float>(sum);
      squares_of += sum * sum;
    }
  };
  fill(work.dbias, 0);
  fill(work.dweight, 1);
  return squares_of;
}

// Whether the running averages are finite, and will be.
bool MlpStep::Work::averages_bounded() const {
  for (size_t i = 0; i < layers.size(); ++i) {
    const MlpStepNorm& tensor = tensors[i].norm;
    for (int64_t n = 0; tensor.running_mean && n < layers[i].out; ++n)
      if (!std::isfinite(data(tensor.running_mean)[n]) || !std::isfinite(data(tensor.running_var)[n])) return false;
    for (const std::vector<float>* next : {&norms[i].next_mean, &norms[i].next_variance})
      for (const float value : *next)
        if (!std::isfinite(value)) return false;
  }
  return true;
}

void MlpStep::Work::move_averages() {
  for (size_t i = 0; i < layers.size(); ++i) {
    const MlpStepNorm& tensor = tensors[i].norm;
    if (tensor.kind != Norm::batch || tensor.frozen) continue;
    if (tensor.batches) {
      *static_cast<int64_t*>(tensor.batches->mutable_data()) += 1;
      tensor.batches->bump_version();
    }
    if (!tensor.running_mean) continue;
    std::copy(norms[i].next_mean.begin(), norms[i].next_mean.end(), data(tensor.running_mean));
    std::copy(norms[i].next_variance.begin(), norms[i].next_variance.end(), data(tensor.running_var));
    for (const BorrowedTensor average : {tensor.running_mean, tensor.running_var}) average->bump_version();
  }
}

}  // namespace mlpkit
