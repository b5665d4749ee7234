// The second and third launch of mlp_step.h: the parts of the gradients added up in a fixed order, with the inspection
// of everything that decides about the step; then the update of all parameters, or of none (cuda).
//
// Napkin for an H200, P parameters in N parts: the sum reads 4 N P bytes and 12 P of parameters and state, and writes
// 4 P; the update moves 28 P for Adam. 128-64-64-10 from 128 parts: 7 MB out of L2, 2 us; both launches are bound by
// latency, not by bytes.
#include "cuda/device.h"
#include "cuda/mlp_step.h"

namespace mlpkit::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / device::kWarp;
// Parameters, state and gradients within this bound, and settings as mlpkit.guard.bounds asks for, cannot overflow in
// an update.
constexpr double kLargest = 1099511627776.0;  // 2^40

// The sum of a value over all threads of the block, in every thread, in a fixed order. scratch: one double a warp; free
// again after the next barrier.
MLPKIT_DEVICE double sum_of_block(double value, double* scratch) {
#pragma unroll
  for (int lanes = 1; lanes < device::kWarp; lanes *= 2) value += device::shuffle_xor(value, lanes);
  const uint32_t thread = device::thread_index();
  device::sync();
  if (thread % device::kWarp == 0) device::store(scratch + thread / device::kWarp, value);
  device::sync();
  double sum = 0.0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    double one;
    device::load(scratch + warp, one);
    sum += one;
  }
  return sum;
}

// The values of all blocks of the pass, added up.
MLPKIT_DEVICE MlpValues values_of(const MlpUpdate& u, double* scratch) {
  double sums[3] = {};
  for (int part = static_cast<int>(device::thread_index()); part < u.parts; part += kThreads)
#pragma unroll
    for (int n = 0; n < 3; ++n) {
      double one;
      device::load(reinterpret_cast<const double*>(u.values + part) + n, one);
      sums[n] += one;
    }
  return {sum_of_block(sums[0], scratch), sum_of_block(sums[1], scratch), sum_of_block(sums[2], scratch)};
}

// What gradients must be multiplied by: the pass knows the number of rows, but not how many of them count.
MLPKIT_DEVICE double factor_of(const MlpUpdate& u, const MlpValues& values, float loss_scale) {
  const double counted = u.by_counted ? static_cast<double>(u.rows) / values.counted : 1.0;
  return counted / static_cast<double>(loss_scale);
}
MLPKIT_DEVICE double loss_of(const MlpUpdate& u, const MlpValues& values) {
  if (!u.mean) return values.loss;
  return values.loss / (u.by_counted ? values.counted : static_cast<double>(u.rows) * static_cast<double>(u.outputs));
}

// Four floats of a part, and the elements of a parameter that they are.
struct Quad {
  int parameter;  // -1: padding
  int row, cols, at[4];
  bool inside[4];
};
MLPKIT_DEVICE Quad quad_of(const MlpUpdate& u, int64_t at) {
  Quad quad{-1, 0, 0, {}, {}};
  int i = u.layers - 1;
  while (i > 0 && at < u.dweight[i]) --i;
  const int in = u.layer[i].in, out = u.layer[i].out;
  if (at >= u.dbias[i]) {
    const int row = static_cast<int>(at - u.dbias[i]);
    quad.parameter = u.bias_of[i];
#pragma unroll
    for (int e = 0; e < 4; ++e) quad.at[e] = row + e, quad.inside[e] = row + e < out;
    return quad;
  }
  const int within = static_cast<int>(at - u.dweight[i]), tile = within / kTileElements, tiles = tiles_of(in);
  const int lane = within / 4 % 32, half = within / 128 % 2;
  const int row = tile / tiles * 16 + lane / 4, col = tile % tiles * 16 + half * 8 + lane % 4 * 2;
  quad.parameter = u.weight_of[i];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int r = row + e / 2 * 8, c = col + e % 2;
    quad.at[e] = r * in + c, quad.inside[e] = r < out && c < in;
  }
  return quad;
}

MLPKIT_DEVICE bool large(const float* data, int at) {
  float value;
  device::load(data + at, value);
  return !(math::absolute(value) <= static_cast<float>(kLargest));
}
// Whether an update of this element might overflow.
MLPKIT_DEVICE bool doubtful(const MlpParameter& parameter, int at) {
  if (large(parameter.value, at)) return true;
  if (parameter.first && large(parameter.first, at)) return true;
  if (!parameter.second) return false;
  float second;
  device::load(parameter.second + at, second);
  return !(second >= 0.f && second <= static_cast<float>(kLargest));
}

// A block adds up 128 floats: each warp an eighth of the parts, then the warps' sums in fp64.
MLPKIT_KERNEL(kThreads, 2)
add_parts(const MlpUpdate u) {
  MLPKIT_SHARED(float, sums, kWarps * 128);
  MLPKIT_SHARED(double, scratch, kWarps);
  const int thread = static_cast<int>(device::thread_index()), lane = thread % device::kWarp;
  const int warp = thread / device::kWarp;
  const int64_t at = device::block_index() * 128 + lane * 4;
  float sum[4] = {};
  if (at < u.floats) {
#pragma unroll 4
    for (int part = warp; part < u.parts; part += kWarps) {
      float one[4];
      device::load16(u.part + u.floats * part + at, one);
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[e] += one[e];
    }
  }
  device::store16(sums + thread * 4, sum);
  const MlpValues values = values_of(u, scratch);
  float loss_scale = 1.f;
  if (u.loss_scale) device::load(u.loss_scale, loss_scale);
  const double factor = factor_of(u, values, loss_scale);

  double squares = 0.0;
  bool bad = false;
  if (warp == 0 && at < u.floats) {
    double total[4] = {};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      float one[4];
      device::load16(sums + (w * device::kWarp + lane) * 4, one);
#pragma unroll
      for (int e = 0; e < 4; ++e) total[e] += one[e];
    }
    const Quad quad = quad_of(u, at);
    if (quad.parameter >= 0) {
      const MlpParameter& parameter = u.parameter[quad.parameter];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (!quad.inside[e]) continue;
        const float gradient = static_cast<float>(total[e] * factor);
        device::store(u.gradients + parameter.gradient + quad.at[e], gradient);
        squares += static_cast<double>(gradient) * gradient;
        bad = bad || doubtful(parameter, quad.at[e]);
      }
    }
  }
  // The first block sets the step counts aside: the update counts them on while others still read.
  if (device::block_index() == 0 && thread < u.parameters) {
    float step = 0.f;
    if (u.parameter[thread].step) device::load(u.parameter[thread].step, step);
    bad = bad || !(step >= 0.f && step < 16777216.f);
    device::store(u.control->steps + thread, step);
  }
  squares = sum_of_block(squares, scratch);
  const double any_bad = sum_of_block(bad ? 1.0 : 0.0, scratch);
  if (thread > 0) return;
  device::store(u.squares + device::block_index(), squares);
  device::store(u.bad + device::block_index(), any_bad > 0.0 ? uint32_t{1} : uint32_t{0});
  if (device::block_index() > 0) return;
  const double loss = loss_of(u, values);
  device::store(&u.control->loss, values.out_of_range > 0.0 ? static_cast<double>(__builtin_nanf("")) : loss);
  device::store(&u.control->scale, static_cast<double>(loss_scale));
}

MLPKIT_DEVICE OptimizerSettings settings_of(const MlpUpdate& u, const MlpGroup& group, double step) {
  double lr = group.lr, rest1 = 1.0, rest2 = 1.0;
  if (group.lr_on_device) {
    float value;
    device::load(group.lr_on_device, value);
    lr = value;
  }
  if (u.optimizer == Optimizer::adam || u.optimizer == Optimizer::adamw) {
    rest1 = 1.0 - ::pow(group.beta1, step);
    rest2 = ::sqrt(1.0 - ::pow(group.beta2, step));
  }
  OptimizerSettings s{};
  s.kind = u.optimizer;
  s.nesterov = group.nesterov;
  s.lr = static_cast<float>(lr);
  s.weight_decay = static_cast<float>(group.weight_decay);
  s.momentum = static_cast<float>(group.momentum);
  s.undamped = static_cast<float>(1.0 - group.dampening);
  s.beta2 = static_cast<float>(group.beta2);
  s.rest1 = static_cast<float>(1.0 - group.beta1);
  s.rest2 = static_cast<float>(1.0 - group.beta2);
  s.eps = static_cast<float>(group.eps);
  s.step_size = static_cast<float>(lr / rest1);
  s.root2 = static_cast<float>(rest2);
  s.shrink = static_cast<float>(1.0 - lr * group.weight_decay);
  return s;
}

MLPKIT_DEVICE void update_one(const OptimizerSettings& s, float& p, float g, float& first, float& second) {
  float none = 0;
  if (s.kind == Optimizer::sgd)
    Sgd::update(s, p, g, first, second, none);
  else if (s.kind == Optimizer::rmsprop)
    Rmsprop::update(s, p, g, first, second, none);
  else
    Adam::update(s, p, g, first, second, none);
}

// Elements at to at + 4 of a tensor that has `count`, by one access where its memory allows.
MLPKIT_DEVICE bool whole(const float* data, int at, int count) {
  return at + 4 <= count && reinterpret_cast<uintptr_t>(data) % 16 == 0;
}
MLPKIT_DEVICE void read_quad(const float* data, int at, int count, float (&to)[4]) {
  if (whole(data, at, count)) return device::load16(data + at, to);
#pragma unroll
  for (int e = 0; e < 4; ++e)
    if (at + e < count) device::load(data + at + e, to[e]);
}
MLPKIT_DEVICE void write_quad(float* data, int at, int count, const float (&from)[4]) {
  if (whole(data, at, count)) return device::store16(data + at, from);
#pragma unroll
  for (int e = 0; e < 4; ++e)
    if (at + e < count) device::store(data + at + e, from[e]);
}

struct Decision {
  bool taken, overflowed;
  double norm;
  float clip;  // what gradients are multiplied by
};
// The same in every block.
MLPKIT_DEVICE Decision decide(const MlpUpdate& u, double* scratch) {
  double squares = 0.0, bad = 0.0, loss;
  const int count = static_cast<int>(reduce_blocks(u.floats));
  for (int block = static_cast<int>(device::thread_index()); block < count; block += kThreads) {
    double one;
    uint32_t flag;
    device::load(u.squares + block, one);
    device::load(u.bad + block, flag);
    squares += one;
    bad += flag;
  }
  squares = sum_of_block(squares, scratch);
  bad = sum_of_block(bad, scratch);
  device::load(&u.control->loss, loss);
  const double norm = ::sqrt(squares), applied = u.clip_norm > 0 && u.clip_norm < norm ? u.clip_norm : norm;
  constexpr double most = 3.4028234663852886e38;  // beyond float32, the general way's loss is Inf
  const bool loss_finite = math::absolute(static_cast<float>(loss)) <= static_cast<float>(most);
  // Written so that NaN is refused.
  const bool norm_finite = norm <= 1.7976931348623157e308;
  const bool taken = loss_finite && norm_finite && applied <= kLargest && bad == 0.0;
  return {taken, loss_finite && !norm_finite, norm, norm > applied ? static_cast<float>(applied / norm) : 1.f};
}

// What one thread of the grid writes at the end: nobody reads it in this launch.
MLPKIT_DEVICE void leave(const MlpUpdate& u, const Decision& decision) {
  device::store(&u.control->norm, decision.norm);
  device::store(&u.control->taken, decision.taken ? 1.0 : 0.0);
  device::store(&u.control->overflowed, decision.overflowed ? 1.0 : 0.0);
  if (u.seed) {
    int64_t offset;
    device::load(u.seed + 1, offset);
    device::store(u.seed + 1, offset + 1);
  }
  for (int i = 0; decision.taken && i < u.parameters; ++i) {
    float step;
    device::load(u.control->steps + i, step);
    if (u.parameter[i].step) device::store(u.parameter[i].step, step + 1.f);
  }
  if (!u.loss_scale) return;
  float scale;
  uint32_t clean;
  device::load(u.loss_scale, scale);
  device::load(u.clean_steps, clean);
  if (decision.overflowed) {
    scale = scale * u.backoff < u.floor ? u.floor : scale * u.backoff;
    clean = 0;
  } else if (decision.taken && ++clean >= static_cast<uint32_t>(u.growth_interval)) {
    scale = scale * u.growth > u.ceiling ? u.ceiling : scale * u.growth;
    clean = 0;
  }
  device::store(u.loss_scale, scale);
  device::store(u.clean_steps, clean);
}

// A thread has four elements.
MLPKIT_KERNEL(kThreads, 2)
update_or_not(const MlpUpdate u) {
  MLPKIT_SHARED(double, scratch, kWarps);
  MLPKIT_SHARED(float, settings, kMlpParameters * sizeof(OptimizerSettings) / 4);
  const int thread = static_cast<int>(device::thread_index());
  const Decision decision = decide(u, scratch);
  if (device::block_index() == 0 && thread == 0) leave(u, decision);
  if (!decision.taken) return;
  constexpr int words = sizeof(OptimizerSettings) / 4;
  if (thread < u.parameters) {
    float step;
    device::load(u.control->steps + thread, step);
    const OptimizerSettings mine = settings_of(u, u.group[u.parameter[thread].group], step + 1.0);
#pragma unroll
    for (int word = 0; word < words; ++word)
      device::store4(settings + thread * words + word,
                     math::bits_as<uint32_t>(reinterpret_cast<const float*>(&mine)[word]));
  }
  device::sync();
  const int64_t quad = device::block_index() * int64_t{kThreads} + thread;
  if (quad >= u.quads) return;
  int i = u.parameters - 1;
  while (i > 0 && quad * 4 < u.parameter[i].gradient) --i;
  const MlpParameter& parameter = u.parameter[i];
  const int at = static_cast<int>(quad * 4 - parameter.gradient), count = parameter.count;
  OptimizerSettings s;
#pragma unroll
  for (int word = 0; word < words; ++word)
    reinterpret_cast<uint32_t*>(&s)[word] = device::load4(settings + i * words + word);
  float p[4] = {}, g[4] = {}, first[4] = {}, second[4] = {};
  read_quad(parameter.value, at, count, p);
  read_quad(u.gradients + parameter.gradient, at, count, g);
  if (parameter.first) read_quad(parameter.first, at, count, first);
  if (parameter.second) read_quad(parameter.second, at, count, second);
#pragma unroll
  for (int e = 0; e < 4; ++e) update_one(s, p[e], decision.clip * g[e], first[e], second[e]);
  write_quad(parameter.value, at, count, p);
  if (parameter.first) write_quad(parameter.first, at, count, first);
  if (parameter.second) write_quad(parameter.second, at, count, second);
}

}  // namespace

cudaError_t mlp_update(const MlpUpdate& update, cudaStream_t stream) {
  const cudaError_t error = device::launch(add_parts, {reduce_blocks(update.floats), kThreads}, stream, update);
  if (error != cudaSuccess) return error;
  return device::launch(update_or_not, {(update.quads + kThreads - 1) / kThreads, kThreads}, stream, update);
}

}  // namespace mlpkit::cuda
