// Guarded update: census and update of one range (cpu; compiled once for each instruction set). Numbers of other types
// than the one computed with pass through a block that stays in the first level cache.
#include "cpu/guarded_update.h"

#include "core/census.h"
#include "cpu/simd_updates.h"

MLPKIT_BEGIN_ISA
namespace {

constexpr int64_t kBlock = 1024;

typedef float HalfVec __attribute__((vector_size(kLanes * 2)));
typedef int64_t SignedLongVec __attribute__((vector_size(kLanes * 4)));
constexpr int kDoubles = kLanes / 2;

// R: the number computed with; V: a vector of it; I: the vector of its bits.
template <class R>
struct Kind;
template <>
struct Kind<float> {
  using V = FloatVec;
  using I = IntVec;
  using Bits = int32_t;
  using Format = Float32Format;
  static constexpr Bits magnitude = 0x7fffffff;
};
template <>
struct Kind<double> {
  using V = DoubleVec;
  using I = SignedLongVec;
  using Bits = int64_t;
  using Format = Float64Format;
  static constexpr Bits magnitude = 0x7fffffffffffffff;
};

template <class R>
using VecOf = typename Kind<R>::V;

template <class T>
void widen(const void* from, int64_t count, float* to) {
  const T* x = static_cast<const T*>(from);
  FloatVec wide;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    load(x + i, wide);
    store(to + i, wide);
  }
  for (; i < count; ++i) to[i] = to_float(x[i]);
}
MLPKIT_HD void narrow_one(float x, BFloat16& to) { to = to_bfloat16(x); }
MLPKIT_HD void narrow_one(float x, Half& to) { to = to_half(x); }
template <class T>
void narrow(const float* from, int64_t count, void* to) {
  T* y = static_cast<T*>(to);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(y + i, load_bits<FloatVec>(from + i));
  for (; i < count; ++i) narrow_one(from[i], y[i]);
}

int64_t size_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }
void* offset(void* from, Dtype dtype, int64_t elements) {
  return from ? static_cast<char*>(from) + elements * size_of(dtype) : nullptr;
}
const void* offset(const void* from, Dtype dtype, int64_t elements) {
  return offset(const_cast<void*>(from), dtype, elements);
}

// `count` elements as numbers of type R: where they lie, if they are that, otherwise widened into `block`.
void fetch(Dtype dtype, const void* from, int64_t count, float* block) {
  switch (dtype) {
    case Dtype::bfloat16:
      return widen<BFloat16>(from, count, block);
    case Dtype::float16:
      return widen<Half>(from, count, block);
    default:
      __builtin_memcpy(block, from, count * sizeof(float));
  }
}
void fetch(Dtype, const void* from, int64_t count, double* block) { __builtin_memcpy(block, from, count * 8); }
void put(Dtype dtype, const float* block, int64_t count, void* to) {
  switch (dtype) {
    case Dtype::bfloat16:
      return narrow<BFloat16>(block, count, to);
    case Dtype::float16:
      return narrow<Half>(block, count, to);
    default:
      __builtin_memcpy(to, block, count * sizeof(float));
  }
}
void put(Dtype, const double* block, int64_t count, void* to) { __builtin_memcpy(to, block, count * 8); }
template <class R>
bool plain(Dtype dtype) {
  return dtype == (sizeof(R) == 8 ? Dtype::float64 : Dtype::float32);
}

// Elements as doubles, a vector of them at a time.
MLPKIT_HD DoubleVec doubles_at(const double* x) { return load_bits<DoubleVec>(x); }
MLPKIT_HD DoubleVec doubles_at(const float* x) { return __builtin_convertvector(load_bits<HalfVec>(x), DoubleVec); }

// Sums in a fixed order: four vectors side by side, then lane by lane.
struct Squares {
  DoubleVec sums[4] = {};
  template <bool kShrunk, class R>
  MLPKIT_HD void see(const R* x, double shrink) {
    for (int k = 0; k < 4; ++k) {
      DoubleVec v = doubles_at(x + k * kDoubles);
      if (kShrunk) v *= shrink;
      sums[k] = math::multiply_add(v, v, sums[k]);
    }
  }
  double total() const {
    const DoubleVec sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    double total = 0;
    for (int k = 0; k < kDoubles; ++k) total += sum[k];
    return total;
  }
};
constexpr int kSquares = 4 * kDoubles;  // elements that Squares sees at once

template <class R>
double sum_of_squares(const R* x, int64_t count) {
  Squares squares;
  int64_t i = 0;
  for (; i + kSquares <= count; i += kSquares) squares.see<false>(x + i, 1);
  double total = squares.total();
  for (; i < count; ++i) total += static_cast<double>(x[i]) * x[i];
  return total;
}

template <class R>
struct Top {  // the largest magnitude as bits: NaN above Inf above all others
  typename Kind<R>::I largest{}, signs{};
  MLPKIT_HD void see(typename Kind<R>::I bits) {
    const typename Kind<R>::I magnitude = bits & Kind<R>::magnitude;
    largest = magnitude > largest ? magnitude : largest;
  }
  typename Kind<R>::Bits bits() const {
    typename Kind<R>::Bits top = 0;
    for (size_t i = 0; i < sizeof(largest) / sizeof(R); ++i) top = largest[i] > top ? largest[i] : top;
    return top;
  }
  double value() const { return math::bits_as<R>(bits()); }
};

template <class R>
void count_bad(const R* x, int64_t count, double shrink, int64_t begin, RangeCensus& result) {
  double absmax = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double magnitude = __builtin_fabs(x[i]);
    if (magnitude <= 0x1.fffffffffffffp1023) {
      absmax = magnitude > absmax ? magnitude : absmax;
      result.sum_of_squares += (magnitude * shrink) * (magnitude * shrink);
      continue;
    }
    if (result.first < 0) result.first = begin + i;
    (magnitude != magnitude ? result.nan : result.inf) += 1;
  }
  result.absmax = absmax > result.absmax ? absmax : result.absmax;
}

// Said two pages ahead: processors fetch ahead of a stream within its page only, and begin anew in each.
template <class R>
MLPKIT_HD void foresee(const R* x) {
  const char* ahead = reinterpret_cast<const char*>(x) + 2 * 4096;
  __builtin_prefetch(ahead);
  __builtin_prefetch(ahead + 64);
}

// Magnitudes and squares in one reading; whatever is not finite is looked at again.
template <bool kShrunk, class R>
void census_block(const R* x, int64_t count, double shrink, int64_t begin, RangeCensus& result) {
  using I = typename Kind<R>::I;
  constexpr int64_t lanes = sizeof(I) / sizeof(R);
  Top<R> top;
  Squares squares;
  const auto look = [&](int64_t at, int64_t n) __attribute__((always_inline)) {
    const I bits = load_part<I>(x + at, n);
    top.see(bits);
    top.signs |= bits;
  };
  int64_t i = 0;
  for (; i + kSquares <= count; i += kSquares) {
    if (i % (4096 / static_cast<int64_t>(sizeof(R))) == 0) foresee(x + i);
    for (int64_t k = 0; k < kSquares; k += lanes) look(i + k, lanes);
    squares.see<kShrunk>(x + i, shrink);
  }
  double rest = 0;
  for (int64_t k = i; k < count; k += lanes) look(k, count - k);
  for (; i < count; ++i) rest += (x[i] * shrink) * (x[i] * shrink);
  for (int64_t k = 0; k < lanes; ++k) result.negative = result.negative || top.signs[k] < 0;
  const double largest = top.value();
  if (!(largest <= 0x1.fffffffffffffp1023)) return count_bad(x, count, shrink, begin, result);
  result.absmax = largest > result.absmax ? largest : result.absmax;
  result.sum_of_squares += squares.total() + rest;
}

template <class R>
void multiplied(const R* x, int64_t count, R factor, R* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = x[i] * factor;
}

template <class R>
void census_as(const CensusOfRange& args) {
  RangeCensus& result = *args.result;
  result = {0, 0, -1, 0, 0, false};
  const auto look = args.shrink == 1 ? census_block<false, R> : census_block<true, R>;
  const bool as_it_lies = plain<R>(args.dtype);
  if (as_it_lies && !args.to) return look(static_cast<const R*>(args.data), args.count, args.shrink, 0, result);
  alignas(64) R block[kBlock];
  const R factor = static_cast<R>(args.factor);
  for (int64_t begin = 0; begin < args.count; begin += kBlock) {
    const int64_t count = args.count - begin < kBlock ? args.count - begin : kBlock;
    const void* from = offset(args.data, args.dtype, begin);
    void* to = offset(args.to, args.dtype, begin);
    if (!as_it_lies) fetch(args.dtype, from, count, block);
    const R* x = as_it_lies ? static_cast<const R*>(from) : block;
    // Looked at first: what is bad is counted as it was.
    look(x, count, args.shrink, begin, result);
    if (!to) continue;
    multiplied(x, count, factor, as_it_lies ? static_cast<R*>(to) : block);
    if (!as_it_lies) put(args.dtype, block, count, to);
  }
}

// Pointers to one block of numbers of type R.
template <class R>
struct Block {
  R *p, *first, *second, *third;
  const R* g;
  int64_t count;
};

template <class R>
struct Seen {
  Top<R> p, first, second, third;
  double squares = 0;
};

struct LambMoments {
  template <class S, class F>
  MLPKIT_HD static void update(const S& s, F& p, F g, F& first, F& second, F& third) {
    Lamb::move(s, p, g, first, second);
    third = Lamb::direction(s, p, first, second);
  }
};
struct LambParameter {
  template <class S, class F>
  MLPKIT_HD static void update(const S& s, F& p, F, F& first, F& second, F&) {
    Lamb::update(s, p, first, second);
  }
};

// Lanes beyond the end compute with zeros; where that makes no zero (0 / 0 without eps), they are not looked at.
// kLean: neither l1 nor decay, nesterov, amsgrad or a third state, as the caller has seen.
template <class Formula, class R, bool kLean>
void update_block(const OptimizerSettingsOf<R>& settings, R factor, const Block<R>& block, Seen<R>& seen) {
  using V = VecOf<R>;
  constexpr int64_t lanes = sizeof(V) / sizeof(R);
  // What is stored below cannot change copies.
  OptimizerSettingsOf<R> s = settings;
  const Block<R> b = block;
  Seen<R> now = seen;
  if (kLean) {
    s.l1 = s.weight_decay = 0;
    s.nesterov = s.amsgrad = s.centered = false;
  }
  R* const third_state = kLean ? nullptr : b.third;
  const auto part = [](const R* from, int64_t at, int64_t n)
                        __attribute__((always_inline)) { return from ? load_part<V>(from + at, n) : V{}; };
  const auto keep = [](R* to, int64_t at, V value, int64_t n, Top<R>& top) __attribute__((always_inline)) {
    if (!to) return;
    store_part(to + at, value, n);
    top.see(math::bits_as<typename Kind<R>::I>(value));
  };
  const auto apply = [&](int64_t at, int64_t n) __attribute__((always_inline)) {
    V p = load_part<V>(b.p + at, n), g = load_part<V>(b.g + at, n) * factor;
    V first = part(b.first, at, n), second = part(b.second, at, n), third = part(third_state, at, n);
    Formula::update(s, p, g, first, second, third);
    if (n < lanes)
      for (int64_t i = n; i < lanes; ++i) p[i] = first[i] = second[i] = third[i] = 0;
    keep(b.p, at, p, n, now.p);
    keep(b.first, at, first, n, now.first);
    keep(b.second, at, second, n, now.second);
    keep(third_state, at, third, n, now.third);
  };
  int64_t at = 0;
  for (; at + lanes <= b.count; at += lanes) apply(at, lanes);
  if (at < b.count) apply(at, b.count - at);
  seen = now;
}

template <class R>
using UpdateBlock = void (*)(const OptimizerSettingsOf<R>&, R, const Block<R>&, Seen<R>&);

template <class Formula, class R>
UpdateBlock<R> lean_or_not(const RangeUpdate& args) {
  const OptimizerSettingsOf<double>& s = args.settings;
  const bool decays = (s.weight_decay != 0 && s.kind != Optimizer::adamw) || s.l1 != 0;
  const bool lean = !decays && !s.nesterov && !s.amsgrad && !s.centered && args.third == nullptr;
  return lean ? update_block<Formula, R, true> : update_block<Formula, R, false>;
}

template <class R>
UpdateBlock<R> formula_of(const RangeUpdate& args) {
  if (args.part == RangeUpdate::moments) return update_block<LambMoments, R, false>;
  if (args.part == RangeUpdate::parameter) return update_block<LambParameter, R, false>;
  switch (args.settings.kind) {
    case Optimizer::adam:
    case Optimizer::adamw:
      return lean_or_not<Adam, R>(args);
    case Optimizer::rmsprop:
      return lean_or_not<Rmsprop, R>(args);
    default:
      return lean_or_not<Sgd, R>(args);
  }
}

// One operand, block by block: in place where its numbers are of type R and may be written, otherwise by a copy.
template <class R>
struct Operand {
  alignas(64) R copy[kBlock];
  R* begin(Dtype dtype, const void* from, int64_t count, bool in_place) {
    if (from == nullptr) return nullptr;
    if (in_place && plain<R>(dtype)) return const_cast<R*>(static_cast<const R*>(from));
    fetch(dtype, from, count, copy);
    return copy;
  }
  const R* times(R factor, int64_t count) {
    for (int64_t i = 0; i < count; ++i) copy[i] *= factor;
    return copy;
  }
  void end(Dtype dtype, void* to, int64_t count, bool dry) const {
    if (to != nullptr && !dry && !plain<R>(dtype)) put(dtype, copy, count, to);
  }
};

template <class R>
void update_as(const RangeUpdate& args) {
  const OptimizerSettingsOf<R> settings = rounded<R>(args.settings);
  const UpdateBlock<R> update = formula_of<R>(args);
  Operand<R> p, g, first, second, third;
  Seen<R> seen;
  double squares = 0;
  const bool moments = args.part == RangeUpdate::moments;
  const Factors<R> factors = factors_of<R>(args.factor);
  const bool once = factors.second == 1;
  const bool in_place =
      once && !args.dry && !moments && !args.copy && plain<R>(args.dtype) && plain<R>(args.gradient_dtype);
  const int64_t most = in_place ? args.count : kBlock;
  for (int64_t at = 0; at < args.count; at += most) {
    const int64_t count = args.count - at < most ? args.count - at : most;
    const auto place = [&](void* from) { return offset(from, args.dtype, at); };
    void* places[] = {place(args.p), place(args.first), place(args.second), place(args.third)};
    Block<R> block{};
    block.count = count;
    block.p = p.begin(args.dtype, places[0], count, !args.dry && !moments);
    block.first = first.begin(args.dtype, places[1], count, !args.dry);
    block.second = second.begin(args.dtype, places[2], count, !args.dry);
    block.third = moments ? third.copy : third.begin(args.dtype, places[3], count, !args.dry);
    block.g = g.begin(args.gradient_dtype, offset(args.g, args.gradient_dtype, at), count, once);
    if (!once) block.g = g.times(factors.first, count);
    update(settings, once ? factors.first : factors.second, block, seen);
    if (moments) squares += sum_of_squares(third.copy, count);
    if (args.part != RangeUpdate::moments) p.end(args.dtype, places[0], count, args.dry);
    if (args.part != RangeUpdate::parameter) {
      first.end(args.dtype, places[1], count, args.dry);
      second.end(args.dtype, places[2], count, args.dry);
    }
    if (!moments) third.end(args.dtype, places[3], count, args.dry);
    if constexpr (sizeof(R) == sizeof(float))
      if (args.copy && !args.dry && !moments)
        put(args.copy_dtype, block.p, count, offset(args.copy, args.copy_dtype, at));
  }
  const Top<R>* tops[] = {&seen.p, &seen.first, &seen.second, &seen.third};
  for (int i = 0; i < 4; ++i) args.largest[i] = tops[i]->value();
  if (args.squares) *args.squares = squares;
}

}  // namespace

void census_of_range(const CensusOfRange& args) {
  if (args.dtype == Dtype::float64) return census_as<double>(args);
  return census_as<float>(args);
}

void range_update(const RangeUpdate& args) {
  if (args.dtype == Dtype::float64) return update_as<double>(args);
  return update_as<float>(args);
}

MLPKIT_END_ISA
