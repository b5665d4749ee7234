// range_update and census_of_range: every optimizer and every dtype against the formulas in long double (tests).
#include "cpu/guarded_update.h"
#include "harness.h"

namespace {

using namespace native;
using mlpkit::Optimizer;
using mlpkit::RangeUpdate;
using Settings = mlpkit::OptimizerSettingsOf<double>;

constexpr int kRoundings = 16;  // at most so many in a chain take part in one element

struct State {
  Real p, first, second, third;
};

Real sign(Real x) { return x > 0 ? 1 : x < 0 ? -1 : 0; }

// The new state of one element; the sizes of what its parts are made of go to `size`.
State exact(const Settings& s, State at, Real g, State& size) {
  const bool decoupled = s.kind == Optimizer::adamw || s.kind == Optimizer::lamb;
  const Real l1 = s.l1 * sign(at.p), l2 = decoupled ? 0 : s.weight_decay * at.p;
  const Real size_of_g = std::fabs(g) + std::fabs(l1) + std::fabs(l2);
  size = {std::fabs(at.p), std::fabs(at.first), at.second, std::fabs(at.third)};
  g += l1 + l2;
  if (s.kind == Optimizer::sgd) {
    if (s.momentum != 0) at.first = s.fresh ? g : s.momentum * at.first + s.undamped * g;
    size.first = s.momentum * size.first + size_of_g;
    at.p -= s.lr * (s.momentum == 0 ? g : s.nesterov ? g + s.momentum * at.first : at.first);
    size.p += s.lr * (size_of_g + size.first);
    return at;
  }
  at.second = s.beta2 * at.second + s.rest2 * g * g;
  size.second = s.beta2 * size.second + s.rest2 * size_of_g * size_of_g;
  if (s.kind == Optimizer::rmsprop) {
    Real variance = at.second;
    if (s.centered) {
      at.third += s.rest2 * (g - at.third);
      size.third += s.rest2 * (size_of_g + size.third);
      variance = std::max<Real>(0, at.second - at.third * at.third);
    }
    const Real divisor = std::sqrt(variance) + s.eps, worse = size.second / std::max<Real>(variance, 1e-3L);
    const Real step = g / divisor, size_of_step = size_of_g / divisor * (1 + worse);
    if (s.momentum != 0) at.first = s.momentum * at.first + step;
    size.first = s.momentum * size.first + size_of_step;
    at.p -= s.lr * (s.momentum != 0 ? at.first : step);
    size.p += s.lr * size.first;
    return at;
  }
  if (s.kind == Optimizer::adamw) at.p *= s.shrink;
  at.first += s.rest1 * (g - at.first);
  size.first += s.rest1 * (size_of_g + size.first);
  if (s.amsgrad) at.third = std::max(at.third, at.second);
  size.third = std::max(size.third, size.second);
  const Real variance = s.amsgrad ? at.third : at.second;
  const Real divisor = std::sqrt(variance) / s.root2 + s.eps, worse = 1 + size.third / variance;
  if (s.kind == Optimizer::lamb) {
    const Real r = at.first / s.correction1 / divisor + s.weight_decay * at.p;
    const Real size_of_r = size.first / s.correction1 / divisor * worse + s.weight_decay * size.p;
    at.third = r;
    size.third = size_of_r;
    at.p -= s.rate * (r * s.unit);
    size.p += s.rate * size_of_r * s.unit;
    return at;
  }
  at.p -= s.step_size * at.first / divisor;
  size.p += s.step_size * size.first / divisor * worse;
  return at;
}

Settings settings(Optimizer kind) {
  Settings s{};
  s.kind = kind;
  s.lr = 0.01;
  s.undamped = 0.9;
  s.beta2 = 0.99;
  s.rest1 = 0.1;
  s.rest2 = 0.01;
  s.eps = 1e-6;
  s.step_size = 0.02;
  s.root2 = 0.2;
  s.shrink = 0.999;
  s.correction1 = 0.4;
  s.rate = 0.3;
  s.unit = 0.25;
  return s;
}

struct Rows {
  Rows(const Settings& s, Dtype dtype, Dtype gradient, bool copied, int64_t count, Draw& draw)
      : has_first(s.kind == Optimizer::rmsprop || s.kind == Optimizer::sgd ? s.momentum != 0 : true),
        has_second(s.kind != Optimizer::sgd),
        has_third(s.amsgrad || s.centered),
        p(dtype, count, draw),
        g(gradient, count, draw),
        first(dtype, has_first ? count : 0, draw),
        second(dtype, has_second ? count : 0, draw),
        third(dtype, has_third ? count : 0, draw),
        copy(Dtype::bfloat16, copied ? count : 0, draw) {
    p.draw(draw, -1, 1);
    g.draw(draw, -4, 4);
    first.draw(draw, -1, 1);
    second.draw(draw, 0.5, 2);
    third.draw(draw, s.centered ? -0.5 : 0.5, s.centered ? 0.5 : 2);
  }
  State state(int64_t i) const {
    return {p.get(i), has_first ? first.get(i) : 0, has_second ? second.get(i) : 0, has_third ? third.get(i) : 0};
  }
  RangeUpdate args(const Settings& s, Dtype dtype, Dtype gradient, double* largest, double* squares) {
    RangeUpdate args{};
    args.settings = s;
    args.factor = 0.5;
    args.dtype = dtype;
    args.gradient_dtype = gradient;
    args.copy_dtype = Dtype::bfloat16;
    args.count = p.count();
    args.p = p.data();
    args.g = g.data();
    if (has_first) args.first = first.data();
    if (has_second) args.second = second.data();
    if (has_third) args.third = third.data();
    if (copy.count()) args.copy = copy.data();
    args.largest = largest;
    args.squares = squares;
    return args;
  }
  bool has_first, has_second, has_third;
  Numbers p, g, first, second, third, copy;
};

void run(const Settings& s, Dtype dtype, Dtype gradient, int64_t count, Draw& draw, Report& report) {
  const bool copied = dtype == Dtype::float32 && draw.coin();
  Rows rows(s, dtype, gradient, copied, count, draw);
  std::vector<State> before, expected, sizes;
  Real squares = 0, size_of_squares = 0;
  for (int64_t i = 0; i < count; ++i) {
    State size;
    before.push_back(rows.state(i));
    expected.push_back(exact(s, before.back(), rows.g.get(i) * 0.5L, size));
    sizes.push_back(size);
    squares += expected.back().third * expected.back().third;
    size_of_squares += size.third * size.third;
  }
  double largest[4], sum = 0;
  RangeUpdate args = rows.args(s, dtype, gradient, largest, &sum);
  args.part = s.kind == Optimizer::lamb ? RangeUpdate::moments : RangeUpdate::whole;
  args.dry = true;
  mlpkit::cpu::range_update(args);
  for (int64_t i = 0; i < count; ++i) {
    const State now = rows.state(i);
    report.that("a dry run writes nothing", i,
                now.p == before[i].p && now.first == before[i].first && now.second == before[i].second &&
                    now.third == before[i].third);
    if (copied) report.that("a dry run writes no copy", i, rows.copy.untouched(i));
  }
  args.dry = false;
  mlpkit::cpu::range_update(args);
  const Real unit = kRoundings * native::unit(dtype);
  if (s.kind == Optimizer::lamb) {
    report.near("squares", 0, sum, squares, 2 * unit * size_of_squares);
    args.part = RangeUpdate::parameter;
    mlpkit::cpu::range_update(args);
  }
  for (int64_t i = 0; i < count; ++i) {
    const auto near = [&](const char* what, Real ours, Real wanted, Real size) {
      report.near(what, i, ours, wanted, unit * size + ulp(wanted, dtype) * (compute_type(dtype) == dtype ? 0 : 2));
    };
    const State now = rows.state(i);
    // Lamb's second part takes the moments as they were stored.
    const Real stored = s.kind == Optimizer::lamb && dtype != compute_type(dtype)
                            ? s.rate * s.unit * std::fabs(expected[i].third) * 0x1p-6L
                            : 0;
    near("p", now.p, expected[i].p, sizes[i].p + stored / unit);
    if (rows.has_first) near("first", now.first, expected[i].first, sizes[i].first);
    if (rows.has_second) near("second", now.second, expected[i].second, sizes[i].second);
    if (rows.has_third) near("third", now.third, expected[i].third, sizes[i].third);
    if (copied) report.that("copy", i, rows.copy.get(i) == rounded(now.p, Dtype::bfloat16));
    report.that("largest p", i, std::fabs(now.p) <= largest[0] * (1 + 0x1p-7L));
  }
}

void range_update(Report& report) {
  Draw draw(61);
  const std::pair<Dtype, Dtype> dtypes[] = {{Dtype::float32, Dtype::float32},   {Dtype::float64, Dtype::float64},
                                            {Dtype::bfloat16, Dtype::bfloat16}, {Dtype::float16, Dtype::float16},
                                            {Dtype::float32, Dtype::bfloat16},  {Dtype::float32, Dtype::float16}};
  for (const auto& [dtype, gradient] : dtypes)
    for (const int64_t count : {0, 1, 5, 16, 37, 1029})
      for (const Optimizer kind :
           {Optimizer::sgd, Optimizer::adam, Optimizer::adamw, Optimizer::rmsprop, Optimizer::lamb})
        for (int choice = 0; choice < 3; ++choice) {
          Settings s = settings(kind);
          s.weight_decay = choice ? 0.1 : 0;
          s.l1 = choice == 2 ? 0.05 : 0;
          s.amsgrad = choice && (kind == Optimizer::adam || kind == Optimizer::adamw);
          s.centered = choice == 2 && kind == Optimizer::rmsprop;
          const bool heavy = kind == Optimizer::sgd || kind == Optimizer::rmsprop;
          s.momentum = heavy && choice ? 0.9 : 0;
          s.nesterov = choice == 2;
          s.fresh = choice == 1 && draw.coin();
          if (count > 100 && choice != 2) continue;
          run(s, dtype, gradient, count, draw, report);
        }
}

NATIVE_CHECK(range_update, range_update);

void plant(Dtype dtype, void* to, int64_t index, Real planted) {
  const double wide = static_cast<double>(planted);
  const float narrow = static_cast<float>(planted);
  if (dtype == Dtype::float64) std::memcpy(static_cast<char*>(to) + 8 * index, &wide, 8);
  if (dtype == Dtype::float32) std::memcpy(static_cast<char*>(to) + 4 * index, &narrow, 4);
  if (size_of(dtype) != 2) return;
  const int infinity = dtype == Dtype::bfloat16 ? 0x7f80 : 0x7c00;
  const int bits = std::isnan(planted) ? infinity + 1 : planted < 0 ? infinity | 0x8000 : infinity;
  const uint16_t pattern = static_cast<uint16_t>(bits);
  std::memcpy(static_cast<char*>(to) + 2 * index, &pattern, 2);
}

void census_once(Dtype dtype, int64_t count, Real planted, Draw& draw, Report& report) {
  Numbers x(dtype, count, draw);
  x.draw(draw, 0, 3);
  const int64_t place = count / 2;
  if (count && std::isfinite(planted) && planted != 0) x.set(place, planted);
  if (count && !std::isfinite(planted)) plant(dtype, x.data(), place, planted);
  Real squares = 0, largest = 0;
  int64_t nan = 0, inf = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Real value = x.get(i);
    nan += std::isnan(value);
    inf += std::isinf(value);
    if (!std::isfinite(value)) continue;
    squares += value * 0.5L * value * 0.5L;
    largest = std::max(largest, std::fabs(value));
  }
  mlpkit::RangeCensus ours;
  mlpkit::cpu::census_of_range({dtype, x.data(), count, 0.5, &ours});
  report.that("nan", count, ours.nan == nan);
  report.that("inf", count, ours.inf == inf);
  report.that("first", count, ours.first == (nan + inf ? place : -1));
  report.that("absmax", count, ours.absmax == largest);
  report.near("squares", count, ours.sum_of_squares, squares, 0x1p-45L * squares);
  if (!nan) report.that("negative", count, ours.negative == (count && planted < 0));
  std::vector<Real> before;
  for (int64_t i = 0; i < count; ++i) before.push_back(x.get(i));
  mlpkit::RangeCensus again;
  mlpkit::cpu::census_of_range({dtype, x.data(), count, 0.5, &again, x.data(), 0.25});
  const bool same = again.nan == nan && again.inf == inf && again.first == ours.first && again.absmax == ours.absmax;
  report.that("census on the way", count, same);
  for (int64_t i = 0; i < count; ++i)
    if (std::isfinite(before[i])) report.near("product", count, x.get(i), before[i] / 4, 0x1p-25L);
}

void census_of_range(Report& report) {
  Draw draw(62);
  for (const Dtype dtype : {Dtype::float64, Dtype::float32, Dtype::bfloat16, Dtype::float16})
    for (const int64_t count : {0, 1, 5, 16, 37, 250, 1024, 1500})
      for (const Real planted : {0.0L, Real(INFINITY), Real(-INFINITY), Real(NAN), -7.0L, 5.0L})
        census_once(dtype, count, planted, draw, report);
}

NATIVE_CHECK(census_of_range, census_of_range);

}  // namespace
