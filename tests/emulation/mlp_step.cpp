// The launch functions of csrc/cuda/mlp_step.h with flat arguments, for ctypes (emulation).
#include "cuda/mlp_step.h"

using namespace mlpkit;

namespace {

struct Network {
  int layers;
  const int* widths;
  const double* p;  // of each hidden layer
  const float* const* weights;
  const float* const* biases;
  int activation;
};

cuda::MlpShape shape_of(int layers, const int* widths, int64_t rows, bool gradients, bool keeps_slopes, bool loss) {
  cuda::MlpShape shape{};
  shape.layers = layers;
  for (int i = 0; i <= layers; ++i) shape.widths[i] = widths[i];
  shape.rows = rows;
  shape.gradients = gradients;
  shape.keeps_slopes = keeps_slopes;
  shape.loss = loss;
  return shape;
}

void set_layers(cuda::MlpLayer* to, const Network& network) {
  for (int i = 0; i < network.layers; ++i) {
    to[i] = {network.weights[i], network.biases[i], network.widths[i], network.widths[i + 1], 0, 1.f};
    if (i + 1 == network.layers) continue;
    to[i].threshold = dropout_threshold(network.p[i]);
    to[i].scale = static_cast<float>(dropout_scale(to[i].threshold));
  }
}

}  // namespace

extern "C" {

// plan: blocks, floats of a part, deep, high, teams, resident, shared_sums, bytes of shared memory, blocks of rows,
// panels.
int emulate_mlp_plan(int layers, const int* widths, int64_t rows, int gradients, int keeps_slopes, int loss,
                     int multiprocessors, int shared_bytes, int64_t* plan) {
  const cuda::MlpShape shape = shape_of(layers, widths, rows, gradients, keeps_slopes, loss);
  cuda::MlpPlan made{};
  if (cuda::mlp_obstacle(shape) || !cuda::plan_mlp(shape, {multiprocessors, shared_bytes}, made)) return 1;
  const int64_t numbers[] = {made.blocks,   made.floats,      made.deep,         made.high,       made.teams,
                             made.resident, made.shared_sums, made.shared_bytes, made.row_blocks, made.panels};
  for (int i = 0; i < 10; ++i) plan[i] = numbers[i];
  return 0;
}

int emulate_mlp_pass(const Network* network, int dtype, int64_t rows, const void* x, int x_is_single,
                     const int64_t* seed, void* y, int loss, int mean, double slope_scale, double delta,
                     double smoothing, const int64_t* classes, const float* target, int64_t ignore_index,
                     const float* by_class, const float* loss_scale, int keeps_slopes, int multiprocessors,
                     int shared_bytes, float* parts, cuda::MlpValues* values) {
  cuda::MlpPass pass{};
  pass.dtype = static_cast<Dtype>(dtype);
  pass.activation = static_cast<Activation>(network->activation);
  pass.negative_slope = 0.01f;
  pass.layers = network->layers;
  set_layers(pass.layer, *network);
  pass.rows = rows;
  pass.x = x;
  pass.x_is_single = x_is_single != 0;
  pass.seed = seed;
  pass.y = y;
  pass.has_loss = loss >= 0;
  const int outputs = network->widths[network->layers];
  pass.loss = {static_cast<Loss>(loss < 0 ? 0 : loss),
               mean != 0,
               static_cast<float>(slope_scale),
               static_cast<float>(delta),
               static_cast<float>(1.0 - smoothing),
               static_cast<float>(smoothing / outputs),
               classes,
               target,
               ignore_index,
               by_class};
  pass.loss_scale = loss_scale;
  pass.parts = parts;
  pass.values = values;
  cuda::MlpPlan plan{};
  const cuda::MlpShape shape =
      shape_of(network->layers, network->widths, rows, parts != nullptr, keeps_slopes, pass.has_loss);
  if (!cuda::plan_mlp(shape, {multiprocessors, shared_bytes}, plan)) return 1;
  return cuda::mlp_pass(pass, plan, nullptr);
}

// state: for each parameter (weight, bias of the first layer, and so on; absent biases left out) first, second, step.
int emulate_mlp_update(const Network* network, int64_t rows, int parts, int64_t floats, int mean, int by_counted,
                       const float* part, const cuda::MlpValues* values, float* const* state, int optimizer,
                       const double* group, double clip_norm, float* gradients, double* squares, uint32_t* bad,
                       cuda::MlpControl* control, int64_t* seed, float* loss_scale, uint32_t* clean_steps) {
  cuda::MlpUpdate update{};
  update.layers = network->layers;
  set_layers(update.layer, *network);
  cuda::MlpPlan plan{};
  cuda::plan::lay_out_gradients(shape_of(network->layers, network->widths, rows, true, false, true), plan);
  int64_t at = 0;
  const auto add = [&](const float* value, int count) {
    const int i = update.parameters++;
    update.parameter[i] = {const_cast<float*>(value), state[3 * i], state[3 * i + 1], state[3 * i + 2], at, count, 0};
    at += (count + 3) / 4 * 4;
    return i;
  };
  for (int i = 0; i < network->layers; ++i) {
    update.dweight[i] = plan.dweight[i];
    update.dbias[i] = plan.dbias[i];
    update.weight_of[i] = add(network->weights[i], network->widths[i] * network->widths[i + 1]);
    update.bias_of[i] = network->biases[i] ? add(network->biases[i], network->widths[i + 1]) : -1;
  }
  update.parts = parts;
  update.groups = 1;
  update.floats = floats;
  update.quads = at / 4;
  update.rows = rows;
  update.outputs = network->widths[network->layers];
  update.mean = mean != 0;
  update.by_counted = by_counted != 0;
  update.part = part;
  update.values = values;
  update.group[0] = {group[1], group[2], group[3], group[4], group[5], group[6], group[7] != 0, group[0], nullptr};
  update.optimizer = static_cast<Optimizer>(optimizer);
  update.clip_norm = clip_norm;
  update.gradients = gradients;
  update.squares = squares;
  update.bad = bad;
  update.control = control;
  update.seed = seed;
  update.loss_scale = loss_scale;
  update.clean_steps = clean_steps;
  update.growth = 2.f, update.backoff = 0.5f, update.floor = 1.f, update.ceiling = 16777216.f;
  update.growth_interval = 3;
  return cuda::mlp_update(update, nullptr);
}

}  // extern "C"
