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

MLPKIT_HD DoubleVec squares_of(const double* x, double shrink) {
  const DoubleVec v = load_bits<DoubleVec>(x) * shrink;
  return v * v;
}
MLPKIT_HD DoubleVec squares_of(const float* x, double shrink) {
  const DoubleVec v = __builtin_convertvector(load_bits<HalfVec>(x), DoubleVec) * shrink;
  return v * v;
}

// Sums in a fixed order: four vectors side by side, then lane by lane.
template <class R>
double sum_of_squares(const R* x, int64_t count, double shrink) {
  DoubleVec sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kDoubles <= count; i += 4 * kDoubles)
    for (int k = 0; k < 4; ++k) sums[k] += squares_of(x + i + k * kDoubles, shrink);
  const DoubleVec sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double total = 0;
  for (int k = 0; k < kDoubles; ++k) total += sum[k];
  for (; i < count; ++i) total += (x[i] * shrink) * (x[i] * shrink);
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

template <class R>
void census_as(const CensusOfRange& args) {
  using I = typename Kind<R>::I;
  RangeCensus& result = *args.result;
  result = {0, 0, -1, 0, 0, false};
  alignas(64) R block[kBlock];
  for (int64_t begin = 0; begin < args.count; begin += kBlock) {
    const int64_t count = args.count - begin < kBlock ? args.count - begin : kBlock;
    const void* from = offset(args.data, args.dtype, begin);
    const R* x = static_cast<const R*>(from);
    if (!plain<R>(args.dtype)) {
      fetch(args.dtype, from, count, block);
      x = block;
    }
    Top<R> top;
    constexpr int64_t lanes = sizeof(I) / sizeof(R);
    for (int64_t i = 0; i < count; i += lanes) {
      const I bits = load_part<I>(x + i, count - i);
      top.see(bits);
      top.signs |= bits;
    }
    for (int64_t i = 0; i < lanes; ++i) result.negative = result.negative || top.signs[i] < 0;
    const double largest = top.value();
    if (!(largest <= 0x1.fffffffffffffp1023)) {
      count_bad(x, count, args.shrink, begin, result);
      continue;
    }
    result.absmax = largest > result.absmax ? largest : result.absmax;
    result.sum_of_squares += sum_of_squares(x, count, args.shrink);
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

template <class V, class R>
MLPKIT_HD V part_of(const R* from, int64_t at, int64_t n) {
  return from ? load_part<V>(from + at, n) : V{};
}
template <class V, class R>
MLPKIT_HD void keep_part(R* to, int64_t at, V value, int64_t n, Top<R>& top) {
  if (!to) return;
  store_part(to + at, value, n);
  top.see(math::bits_as<typename Kind<R>::I>(value));
}

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
template <class Formula, class R>
void update_block(const OptimizerSettingsOf<R>& settings, R factor, const Block<R>& block, Seen<R>& seen) {
  using V = VecOf<R>;
  constexpr int64_t lanes = sizeof(V) / sizeof(R);
  const OptimizerSettingsOf<R> s = settings;
  const auto apply = [&](int64_t at, int64_t n) __attribute__((always_inline)) {
    V p = part_of<V>(block.p, at, n), g = part_of<V>(block.g, at, n) * factor;
    V first = part_of<V>(block.first, at, n), second = part_of<V>(block.second, at, n);
    V third = part_of<V>(block.third, at, n);
    Formula::update(s, p, g, first, second, third);
    if (n < lanes)
      for (int64_t i = n; i < lanes; ++i) p[i] = first[i] = second[i] = third[i] = 0;
    keep_part(block.p, at, p, n, seen.p);
    keep_part(block.first, at, first, n, seen.first);
    keep_part(block.second, at, second, n, seen.second);
    keep_part(block.third, at, third, n, seen.third);
  };
  int64_t at = 0;
  for (; at + lanes <= block.count; at += lanes) apply(at, lanes);
  if (at < block.count) apply(at, block.count - at);
}

template <class R>
using UpdateBlock = void (*)(const OptimizerSettingsOf<R>&, R, const Block<R>&, Seen<R>&);

template <class R>
UpdateBlock<R> formula_of(const RangeUpdate& args) {
  if (args.part == RangeUpdate::moments) return update_block<LambMoments, R>;
  if (args.part == RangeUpdate::parameter) return update_block<LambParameter, R>;
  switch (args.settings.kind) {
    case Optimizer::adam:
    case Optimizer::adamw:
      return update_block<Adam, R>;
    case Optimizer::rmsprop:
      return update_block<Rmsprop, R>;
    default:
      return update_block<Sgd, R>;
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
  for (int64_t at = 0; at < args.count; at += kBlock) {
    const int64_t count = args.count - at < kBlock ? args.count - at : kBlock;
    const auto place = [&](void* from) { return offset(from, args.dtype, at); };
    void* places[] = {place(args.p), place(args.first), place(args.second), place(args.third)};
    Block<R> block{};
    block.count = count;
    block.p = p.begin(args.dtype, places[0], count, !args.dry && !moments);
    block.first = first.begin(args.dtype, places[1], count, !args.dry);
    block.second = second.begin(args.dtype, places[2], count, !args.dry);
    block.third = moments ? third.copy : third.begin(args.dtype, places[3], count, !args.dry);
    block.g = g.begin(args.gradient_dtype, offset(args.g, args.gradient_dtype, at), count, true);
    update(settings, static_cast<R>(args.factor), block, seen);
    if (moments) squares += sum_of_squares(third.copy, count, 1.0);
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
