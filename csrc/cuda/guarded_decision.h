// What the last block of a guarded census does: sums by row, the decision, the settings of every row, the proof that
// their updates stay finite, then step counts, loss scale and log (cuda).
#pragma once
#include "cuda/guarded_range.h"

namespace mlpkit::cuda {

MLPKIT_DEVICE double largest_of(Dtype dtype) {
  return dtype == Dtype::float64    ? 0x1.fffffffffffffp1023
         : dtype == Dtype::float32  ? 0x1.fffffep127
         : dtype == Dtype::bfloat16 ? 0x1.fep127
                                    : 65504.0;
}
MLPKIT_DEVICE GuardedGroupOnDevice group_of(const GuardedUpdateArgs& args, int32_t group) {
  GuardedGroupOnDevice found;
  if (args.groups) {
    constexpr int words = sizeof(GuardedGroupOnDevice) / 8;
    uint64_t bits[words];
#pragma unroll
    for (int i = 0; i < words; ++i) device::load(reinterpret_cast<const uint64_t*>(args.groups + group) + i, bits[i]);
    memcpy(&found, bits, sizeof(found));
  } else {
    found = args.group[group];
  }
  if (found.rate) {
    float rate;
    device::load(found.rate, rate);
    found.settings.lr = rate;
  }
  return found;
}
MLPKIT_DEVICE bool finite(const GuardedGroup& g) {
  const double sum = (g.lr - g.lr) + (g.beta1 - g.beta1) + (g.beta2 - g.beta2) + (g.eps - g.eps) +
                     (g.momentum - g.momentum) + (g.dampening - g.dampening) + (g.weight_decay - g.weight_decay) +
                     (g.l1 - g.l1) + (g.trust - g.trust);
  return sum == 0;
}
MLPKIT_DEVICE double steps_of(const GuardedUpdateArgs& args, const GuardedTensor& row) {
  if (!row.step) return device::load4(args.begun + row.index) ? 1 : 0;
  if (row.wide_step) return number_at(static_cast<const double*>(row.step));
  float step;
  device::load(static_cast<const float*>(row.step), step);
  return step;
}

struct Totals {  // of a thread's rows
  double squares = 0, absmax = 0, nan = 0, bad = 0, first = kNowhere, wrong = kNowhere;
};

// By one thread: all that is known of a row now, given the sums over its chunks; the tally is zero again.
MLPKIT_DEVICE void close_row(const GuardedUpdateArgs& args, int32_t i, const GuardedTensor& row, double squares,
                             double squares_of_p, Totals& totals) {
  GuardedTally* tally = args.tally + i;
  double* census = args.census + 5 * static_cast<int64_t>(row.index);
  double* bounds = args.bounds + 4 * static_cast<int64_t>(row.index);
  const bool active = gradient_of(args, i) != nullptr;
  uint64_t seen[8];
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    device::load(reinterpret_cast<uint64_t*>(tally) + k, seen[k]);
    device::store(reinterpret_cast<uint64_t*>(tally) + k, uint64_t{0});
  }
  const double top = math::bits_as<double>(seen[0]), nan = static_cast<double>(seen[2]);
  const double inf = static_cast<double>(seen[3]);
  const bool bad = nan + inf > 0;
  const double numbers[5] = {nan, inf, bad ? static_cast<double>((uint64_t{1} << 62) - seen[1]) : -1, top, squares};
#pragma unroll
  for (int k = 0; k < 5; ++k) device::store(census + k, active ? numbers[k] : k == 2 ? -1 : 0);
  if (!active) return;
  const double known = number_at(bounds);
  if (known != known)
#pragma unroll
    for (int k = 0; k < 4; ++k) device::store(bounds + k, math::bits_as<double>(seen[4 + k]));
  device::store(&args.settings[i].squares_of_p, squares_of_p);
  totals.squares += squares;
  totals.absmax = Larger::of(totals.absmax, top);
  totals.nan += nan;
  totals.bad += bad;
  const double where = row.index;
  if (bad) totals.first = Smaller::of(totals.first, where);
  if (!finite(group_of(args, row.group).settings)) totals.wrong = Smaller::of(totals.wrong, where);
}

MLPKIT_DEVICE Totals close_rows(const GuardedUpdateArgs& args, double* shared) {
  const uint32_t thread = device::thread_index(), lane = thread % device::kWarp, warp = thread / device::kWarp;
  Totals totals;
  const auto add = [&](const GuardedTensor& row, int64_t begin, int64_t step, double& g, double& p) {
    const int64_t end = chunks_of(args, row);
    const bool norms = args.kind == Optimizer::lars || args.kind == Optimizer::lamb;
#pragma unroll 4
    for (int64_t c = begin; c < end; c += step) {
      g += number_at(args.parts + 2 * (row.first_chunk + c));
      if (norms) p += number_at(args.parts + 2 * (row.first_chunk + c) + 1);
    }
  };
  for (int32_t i = 0; i < args.by_block; ++i) {
    double g = 0, p = 0;
    const GuardedTensor row = read(args.table + i);
    if (gradient_of(args, i)) add(row, thread, kGuardedThreads, g, p);
    g = over_block<Plus>(g, shared);
    p = over_block<Plus>(p, shared);
    if (thread == 0) close_row(args, i, row, g, p, totals);
  }
  for (int32_t i = args.by_block + static_cast<int32_t>(warp); i < args.by_warp; i += kGuardedWarps) {
    double g = 0, p = 0;
    const GuardedTensor row = read(args.table + i);
    if (gradient_of(args, i)) add(row, lane, device::kWarp, g, p);
    g = over_warp<Plus>(g);
    p = over_warp<Plus>(p);
    if (lane == 0) close_row(args, i, row, g, p, totals);
  }
  for (int32_t i = args.by_warp + static_cast<int32_t>(thread); i < args.rows; i += kGuardedThreads) {
    double g = 0, p = 0;
    const GuardedTensor row = read(args.table + i);
    if (gradient_of(args, i)) add(row, 0, 1, g, p);
    close_row(args, i, row, g, p, totals);
  }
  totals.squares = over_block<Plus>(totals.squares, shared);
  totals.absmax = over_block<Larger>(totals.absmax, shared);
  totals.nan = over_block<Plus>(totals.nan, shared);
  totals.bad = over_block<Plus>(totals.bad, shared);
  totals.first = over_block<Smaller>(totals.first, shared);
  totals.wrong = over_block<Smaller>(totals.wrong, shared);
  return totals;
}

// Squares that double cannot hold: those of gradients divided by the largest of them can. By this block alone.
MLPKIT_DEVICE double shrunk_squares(const GuardedUpdateArgs& args, double shrink, double* shared) {
  double total = 0;
  for (int32_t i = 0; i < args.rows; ++i) {
    const void* gradient = gradient_of(args, i);
    if (!gradient) continue;
    const GuardedTensor row = read(args.table + i);
    double squares = 0;
    for (int64_t at = device::thread_index(); at < row.count; at += kGuardedThreads) {
      const double x = shrink * (row.gradient_dtype == Dtype::float64
                                     ? element<double>(row.gradient_dtype, gradient, at)
                                     : static_cast<double>(element<float>(row.gradient_dtype, gradient, at)));
      squares += x * x;
    }
    squares = over_block<Plus>(squares, shared);
    if (device::thread_index() == 0) device::store(args.census + 5 * static_cast<int64_t>(row.index) + 4, squares);
    total += squares;
  }
  return total;
}

// The settings of a row, and whether a bound proves that its update stays finite; by one thread.
MLPKIT_DEVICE bool settle(const GuardedUpdateArgs& args, int32_t i, double factor, double shrink) {
  const GuardedTensor row = read(args.table + i);
  const GuardedGroup group = group_of(args, row.group).settings;
  const double* census = args.census + 5 * static_cast<int64_t>(row.index);
  const double* bounds = args.bounds + 4 * static_cast<int64_t>(row.index);
  const double t = steps_of(args, row) + 1, norm_of_p = ::sqrt(number_at(&args.settings[i].squares_of_p));
  OptimizerSettingsOf<double> s = settings_at(args.kind, group, t, ::pow(group.beta1, t), ::pow(group.beta2, t));
  if (args.kind == Optimizer::lars) s.lr = lars_rate(group, norm_of_p, ::sqrt(number_at(census + 4)) / shrink * factor);
  if (args.kind == Optimizer::lamb) s.rate = group.lr * norm_of_p;
  Extents e{number_at(bounds), number_at(bounds + 1), number_at(bounds + 2), number_at(bounds + 3)};
  const double wide = largest_of(row.dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32);
  double limit = largest_of(row.dtype);
  if (row.copy) limit = Smaller::of(limit, largest_of(row.copy_dtype));
  constexpr double room = 1 - 0x1p-7;
  const bool unbounded = args.kind == Optimizer::lamb && !(s.rate > 0);
  const bool proven =
      t >= 1 && !unbounded && stays_within(s, e, number_at(census + 3) * factor, limit * room, wide * room);
  write(&args.settings[i].single, rounded<float>(s));
  write(&args.settings[i].wide, s);
  device::store(&args.settings[i].doubtful, proven ? 0.0 : 1.0);
  return proven;
}

template <class R>
MLPKIT_DEVICE void update_one(const GuardedUpdateArgs& args, const OptimizerSettingsOf<R>& s, R& p, R g, R& first,
                              R& second, R& third) {
  switch (args.kind) {
    case Optimizer::sgd:
    case Optimizer::lars:
      return Sgd::update(s, p, g, first, second, third);
    case Optimizer::adam:
    case Optimizer::adamw:
      return Adam::update(s, p, g, first, second, third);
    case Optimizer::rmsprop:
      return Rmsprop::update(s, p, g, first, second, third);
    case Optimizer::lamb:
      Lamb::move(s, p, g, first, second);
      third = Lamb::direction(s, p, first, second);
  }
}

// Whether the update of an element of this thread would not be finite, computed and thrown away.
template <class R>
MLPKIT_DEVICE bool fails_as(const GuardedUpdateArgs& args, const GuardedTensor& row, int32_t i, double factor,
                            const Chunk& chunk) {
  OptimizerSettingsOf<R> s;
  if constexpr (sizeof(R) == 8)
    s = read(&args.settings[i].wide);
  else
    s = read(&args.settings[i].single);
  const void* gradient = gradient_of(args, i);
  const Factors<R> times = factors_of<R>(group_of(args, row.group).settings.maximize ? -factor : factor);
  // As rounding to nearest goes, half a unit above the largest number is still that.
  const auto limit_of = [](Dtype dtype) {
    return Smaller::of(largest_of(dtype) * (1 + 0x1p-13), 0x1.fffffffffffffp1023);
  };
  const double limit = limit_of(row.dtype);
  const double limit_of_p = row.copy ? Smaller::of(limit, limit_of(row.copy_dtype)) : limit;
  const bool lamb = args.kind == Optimizer::lamb;
  bool bad = false;
  for (int64_t at = chunk.begin + device::thread_index(); at < chunk.begin + chunk.count; at += kGuardedThreads) {
    R p = element<R>(row.dtype, row.p, at), first = 0, second = 0, third = 0;
    if (row.first) first = element<R>(row.dtype, row.first, at);
    if (row.second) second = element<R>(row.dtype, row.second, at);
    if (row.third) third = element<R>(row.dtype, row.third, at);
    const R g = element<R>(row.gradient_dtype, gradient, at);
    update_one<R>(args, s, p, g * times.first * times.second, first, second, third);
    const double turned = ::fabs(static_cast<double>(third));
    double largest = ::fabs(static_cast<double>(p));
    // No element of lamb's step is longer than the whole; without a norm it is lr times the direction as it is.
    if (lamb) largest += s.rate > 0 ? static_cast<double>(s.rate) : ::fabs(static_cast<double>(s.lr)) * turned;
    bad = bad || !(largest <= limit_of_p) || (row.first && !(::fabs(static_cast<double>(first)) <= limit)) ||
          (row.second && !(::fabs(static_cast<double>(second)) <= limit)) ||
          ((row.third || lamb) && !(turned <= limit));
  }
  return bad;
}
MLPKIT_DEVICE bool fails(const GuardedUpdateArgs& args, const GuardedTensor& row, int32_t i, double factor,
                         const Chunk& chunk) {
  return row.dtype == Dtype::float64 ? fails_as<double>(args, row, i, factor, chunk)
                                     : fails_as<float>(args, row, i, factor, chunk);
}

// What a trial of the rows in doubt says of the step; bad: the first row that failed.
MLPKIT_DEVICE void judge_trial(const GuardedUpdateArgs& args, GuardedDecision& d, double bad) {
  const bool allowed = d.reason == static_cast<double>(GuardedReason::taken);
  if (bad < kNowhere && allowed) {
    d.reason = static_cast<double>(GuardedReason::update);
    d.row = bad;
  }
  d.taken = args.force || (allowed && bad >= kNowhere) ? 1 : 0;
}

MLPKIT_DEVICE void log_step(const GuardedUpdateArgs& args, const GuardedDecision& d, double scale) {
  const double steps = number_at(args.log), skips = number_at(args.log + 1);
  device::store(args.log, steps + 1);
  if (d.taken) return;
  device::store(args.log + 1, skips + 1);
  double numbers[kGuardedSkip] = {steps, d.reason, d.norm, d.factor, d.row, d.rows, scale, 0, 0, -1, 0, 0};
  if (d.row >= 0)
#pragma unroll
    for (int k = 0; k < 5; ++k) numbers[7 + k] = number_at(args.census + 5 * static_cast<int64_t>(d.row) + k);
  double* to = args.log + 2 + static_cast<int64_t>(skips) % kGuardedSkips * kGuardedSkip;
#pragma unroll
  for (int k = 0; k < kGuardedSkip; ++k) device::store(to + k, numbers[k]);
}

// The end of a decision, which every thread holds: what the step leaves whether it is taken or not.
MLPKIT_DEVICE void conclude(const GuardedUpdateArgs& args, const GuardedDecision& d) {
  const uint32_t thread = device::thread_index();
  float scale = 1, found = 0;
  if (args.scale) device::load(args.scale, scale);
  if (args.found) device::load(args.found, found);
  device::sync();
  for (int32_t i = static_cast<int32_t>(thread); d.taken != 0 && i < args.rows; i += kGuardedThreads) {
    if (!gradient_of(args, i)) continue;
    const GuardedTensor row = read(args.table + i);
    const double steps = steps_of(args, row) + 1;
    if (!row.step)
      device::store4(args.begun + row.index, 1);
    else if (row.wide_step)
      device::store(static_cast<double*>(row.step), steps);
    else
      device::store(static_cast<float*>(row.step), static_cast<float>(steps));
    // The update leaves what it wrote.
#pragma unroll
    for (int k = 0; k < 4; ++k) device::store(args.bounds + 4 * static_cast<int64_t>(row.index) + k, 0.0);
  }
  if (thread != 0) return;
  write(args.decision, d);
  if (args.log) log_step(args, d, scale);
  const bool overflowed = d.rows > 0 || found != 0;
  if (args.found) device::store(args.found, overflowed ? 1.f : 0.f);
  if (!args.scale || args.rule.interval <= 0 || !(d.taken != 0 || overflowed)) return;
  const int64_t clean = args.clean ? static_cast<int32_t>(device::load4(args.clean)) : 0;
  const ScaleState next = next_scale(args.rule, {scale, clean}, overflowed);
  device::store(args.scale, static_cast<float>(next.scale));
  if (args.clean) device::store4(args.clean, static_cast<uint32_t>(next.clean));
}

// Whether gradients, norm, scale and settings allow a step; what it multiplies the gradients by. The same in every
// thread.
MLPKIT_DEVICE GuardedDecision judge(const GuardedUpdateArgs& args, const Totals& totals, double& shrink,
                                    double* shared) {
  float value = 1, found = 0;
  if (args.scale) device::load(args.scale, value);
  if (args.found) device::load(args.found, found);
  const double scale = value;
  constexpr double most = 0x1.fffffffffffffp1023;
  GuardedDecision d{0, 0, ::sqrt(totals.squares) / scale, 1 / scale, -1, totals.bad};
  const auto refuse = [&](GuardedReason reason, double row) {
    d.reason = static_cast<double>(reason);
    d.row = row < kNowhere ? row : -1;
    return d;
  };
  if (totals.bad > 0) d.norm = totals.nan > 0 ? kGuardedNan : __builtin_inf();
  if (totals.bad > 0 || found != 0) return refuse(GuardedReason::gradient, totals.first);
  if (totals.absmax > 0 && !(totals.squares >= 0x1p-1000 && totals.squares <= most)) {
    shrink = Smaller::of(1 / totals.absmax, 0x1p1000);
    device::sync();
    d.norm = 1 / shrink / scale * ::sqrt(shrunk_squares(args, shrink, shared));
  }
  if (!(scale > 0)) return refuse(GuardedReason::scale, kNowhere);
  d.factor = guarded_factor(scale, d.norm, args.clip);
  if (!(1 / scale <= 0x1p127) || !(d.factor > 0)) return refuse(GuardedReason::scale, kNowhere);
  if (!(d.norm <= most)) return refuse(GuardedReason::norm, kNowhere);
  if (totals.wrong < kNowhere) return refuse(GuardedReason::setting, totals.wrong);
  d.taken = 1;
  return d;
}

// By the last block of the census.
MLPKIT_DEVICE void decide(const GuardedUpdateArgs& args, double* shared) {
  const Totals totals = close_rows(args, shared);
  double shrink = 1;
  GuardedDecision d = judge(args, totals, shrink, shared);
  if (d.taken == 0 && !args.force) return conclude(args, d);
  device::sync();
  double doubt = 0;
  for (int32_t i = static_cast<int32_t>(device::thread_index()); i < args.rows; i += kGuardedThreads)
    if (gradient_of(args, i) && !settle(args, i, d.factor, shrink)) doubt = 1;
  doubt = over_block<Larger>(doubt, shared);
  d.taken = 1;
  if (doubt > 0 && args.tries) {
    d.taken = 2;
    if (device::thread_index() == 0) write(args.decision, d);
    return;
  }
  double bad = kNowhere;
  for (int32_t i = 0; doubt > 0 && i < args.rows; ++i) {
    if (!gradient_of(args, i) || number_at(&args.settings[i].doubtful) == 0) continue;
    const GuardedTensor row = read(args.table + i);
    if (fails(args, row, i, d.factor, {i, 0, row.count})) bad = Smaller::of(bad, static_cast<double>(row.index));
  }
  judge_trial(args, d, over_block<Smaller>(bad, shared));
  conclude(args, d);
}

}  // namespace mlpkit::cuda
