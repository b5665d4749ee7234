// update and inspect: every optimizer against its formula in long double (tests).
#include <algorithm>

#include "cpu/update.h"
#include "harness.h"

namespace {

using namespace native;
using mlpkit::Optimizer;
using mlpkit::OptimizerSettings;

constexpr int kRoundings = 8;  // at most so many in a chain take part in one element

struct State {
  Real p, first, second;
};

// The new state of one element, and the magnitudes that p, first and second are made of.
std::pair<State, State> exact(const OptimizerSettings& s, State at, Real g) {
  State size = {std::fabs(at.p), std::fabs(at.first), at.second};
  const Real size_of_g = std::fabs(g) + s.weight_decay * size.p;
  if (s.kind == Optimizer::adamw)
    at.p *= s.shrink;
  else
    g += s.weight_decay * at.p;
  if (s.kind == Optimizer::sgd) {
    if (s.momentum != 0) at.first = s.momentum * at.first + s.undamped * g;
    size.first = s.momentum * size.first + s.undamped * size_of_g;
    const Real step = s.momentum == 0 ? g : s.nesterov ? g + s.momentum * at.first : at.first;
    at.p -= s.lr * step;
    size.p += s.lr * (size_of_g + size.first);
    return {at, size};
  }
  at.second = s.beta2 * at.second + s.rest2 * g * g;
  size.second = s.beta2 * size.second + s.rest2 * size_of_g * size_of_g;
  const Real root = std::sqrt(at.second);
  if (s.kind == Optimizer::rmsprop) {
    at.p -= s.lr * (g / (root + s.eps));
    size.p += s.lr * (size_of_g / (root + s.eps)) * size.second / at.second;
    return {at, size};
  }
  at.first += s.rest1 * (g - at.first);
  size.first += s.rest1 * (size_of_g + size.first);
  const Real divisor = root / s.root2 + s.eps;
  at.p -= s.step_size * (at.first / divisor);
  // An error of the second moment's relative size is one of the step's.
  size.p += s.step_size * (size.first / divisor) * size.second / at.second;
  return {at, size};
}

OptimizerSettings settings(Optimizer kind, bool nesterov, float momentum, float weight_decay) {
  OptimizerSettings s{};
  s.kind = kind;
  s.nesterov = nesterov;
  s.lr = 0.01f;
  s.weight_decay = weight_decay;
  s.momentum = momentum;
  s.undamped = nesterov ? 1.f : 0.9f;
  s.beta2 = 0.99f;
  s.rest1 = 0.1f;
  s.rest2 = 0.01f;
  s.eps = 1e-8f;
  s.step_size = 0.02f;
  s.root2 = 0.2f;
  s.shrink = 0.999f;
  return s;
}

void run(const OptimizerSettings& s, int64_t count, Draw& draw, Report& report) {
  const bool has_first = s.kind == Optimizer::sgd ? s.momentum != 0 : s.kind != Optimizer::rmsprop;
  const bool has_second = s.kind != Optimizer::sgd;
  Numbers p(Dtype::float32, count, draw), g(Dtype::float32, count, draw);
  Numbers first(Dtype::float32, has_first ? count : 0, draw), second(Dtype::float32, has_second ? count : 0, draw);
  p.draw(draw, -1, 1);
  g.draw(draw, -4, 4);
  first.draw(draw, -1, 1);
  second.draw(draw, 0, 2);
  const auto state = [&](int64_t i) {
    return State{p.get(i), has_first ? first.get(i) : 0, has_second ? second.get(i) : 0};
  };
  std::vector<std::pair<State, State>> expected;
  for (int64_t i = 0; i < count; ++i) expected.push_back(exact(s, state(i), g.get(i) * 0.5L));
  const auto data = [](Numbers& numbers) { return static_cast<float*>(numbers.data()); };
  float largest = 0.25f;
  const bool wants_largest = draw.coin();
  mlpkit::cpu::update({s, 0.5f, count, data(p), data(g), has_first ? data(first) : nullptr,
                       has_second ? data(second) : nullptr, wants_largest ? &largest : nullptr});
  Real written = 0.25L;
  const Real unit = kRoundings * native::unit(Dtype::float32);
  for (int64_t i = 0; i < count; ++i) {
    const auto& [wanted, size] = expected[static_cast<size_t>(i)];
    const State ours = state(i);
    report.near("p", i, ours.p, wanted.p, unit * size.p);
    if (has_first) report.near("first", i, ours.first, wanted.first, unit * size.first);
    if (has_second) report.near("second", i, ours.second, wanted.second, unit * size.second);
    written = std::max({written, std::fabs(ours.p), std::fabs(ours.first), ours.second});
  }
  if (wants_largest) report.that("largest of what is written", count, largest == written);
}

void update(Report& report) {
  Draw draw(51);
  for (const int64_t count : {0, 1, 3, 7, 8, 15, 16, 17, 33, 250})
    for (const float weight_decay : {0.f, 0.1f}) {
      for (const Optimizer kind : {Optimizer::adam, Optimizer::adamw, Optimizer::rmsprop})
        run(settings(kind, false, 0.f, weight_decay), count, draw, report);
      run(settings(Optimizer::sgd, false, 0.f, weight_decay), count, draw, report);
      run(settings(Optimizer::sgd, false, 0.9f, weight_decay), count, draw, report);
      run(settings(Optimizer::sgd, true, 0.9f, weight_decay), count, draw, report);
    }
}

NATIVE_CHECK(update, update);

void inspect_once(int64_t count, bool has_first, bool has_second, Real planted, Draw& draw, Report& report) {
  Numbers p(Dtype::float32, count, draw);
  Numbers first(Dtype::float32, has_first ? count : 0, draw), second(Dtype::float32, has_second ? count : 0, draw);
  p.draw(draw, -1, 1);
  first.draw(draw, -2, 2);
  second.draw(draw, 0, 3);
  // At the end, where the last, ragged vector is.
  if (count && planted != 0) (has_second ? second : has_first ? first : p).set(count - 1, planted);
  Real largest = 0.25L;
  bool negative = false;
  for (int64_t i = 0; i < count; ++i) {
    for (const Real x : {p.get(i), has_first ? first.get(i) : 0, has_second ? second.get(i) : 0})
      largest = std::isnan(largest) || std::fabs(x) <= largest ? largest : std::fabs(x);
    negative = negative || (has_second && std::signbit(second.get(i)));
  }
  float our_largest = 0.25f;
  bool our_negative = false;
  const auto data = [](Numbers& numbers) { return static_cast<float*>(numbers.data()); };
  mlpkit::cpu::inspect({data(p), has_first ? data(first) : nullptr, has_second ? data(second) : nullptr, count,
                        &our_largest, &our_negative});
  report.that("largest", count, std::isnan(largest) ? std::isnan(our_largest) : our_largest == largest);
  report.that("negative", count, our_negative == negative);
}

void inspect(Report& report) {
  Draw draw(52);
  for (const int64_t count : {0, 1, 3, 7, 8, 15, 16, 17, 33, 250})
    for (const Real planted : {0.0L, Real(INFINITY), Real(NAN), -7.0L, 5.0L})
      for (int states = 0; states < 4; ++states) inspect_once(count, states & 1, states & 2, planted, draw, report);
}

NATIVE_CHECK(inspect, inspect);

}  // namespace
