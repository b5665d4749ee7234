// The second launch of guarded_update.h, where the first has decided to take the step: unscale, clip and update, 16
// bytes an access; lamb's third (cuda).
//
// Napkin for an H200 (4.3 TB/s), n elements of float32: adam reads g, p, m and v and writes the latter, 28 n bytes,
// 0.65 ms for 100 million, 0.74 ms with the census; sgd 12 n (momentum 20 n), rmsprop 20 n, lamb 28 n + 16 n. The last
// 40 MB of gradients that the census read lie in the 50 MB of L2, so this launch begins at the end. Some 30 operations
// and a division and root of 20 an element: 5e9 operations a 100 million, 0.1 ms at 60e12 a second, hidden. 1024
// threads a multiprocessor have 64 bytes each under way. Up to a million parameters 28 MB come out of L2: 6 us, with
// both launches and the decision 15 us.
#include "cuda/guarded_range.h"

namespace mlpkit::cuda {
namespace {

constexpr int kThreads = kGuardedThreads, kWarps = kGuardedWarps;

// lamb's two parts: the moments, after which third is the direction; the parameter.
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
template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

// What a formula reads and writes of p and the state; g is read by all but LambParameter.
template <class Formula>
struct Touches {
  static constexpr bool moments = kSame<Formula, LambMoments>, last = kSame<Formula, LambParameter>;
  static constexpr bool second = !kSame<Formula, Sgd>, third = kSame<Formula, Adam> || kSame<Formula, Rmsprop>;
};

// The largest magnitudes of what was written, as bits.
template <class R>
struct Largest {
  using Format = typename BitsOf<R>::Format;
  typename BitsOf<R>::Bits of[4] = {0, 0, 0, 0};
  MLPKIT_DEVICE void see(int which, R x) {
    const auto magnitude = math::bits_as<typename BitsOf<R>::Bits>(x) & Format::magnitude;
    of[which] = magnitude > of[which] ? magnitude : of[which];
  }
};

// Into the row's bounds: maxima, whose order does not matter.
template <class Formula, class R>
MLPKIT_DEVICE void raise_bounds(double* bounds, const Largest<R>& largest, double* shared) {
  using Touch = Touches<Formula>;
  const uint32_t thread = device::thread_index(), warp = thread / device::kWarp;
  constexpr bool wanted[4] = {!Touch::moments, !Touch::last, Touch::second && !Touch::last, Touch::third};
  device::sync();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (!wanted[k]) continue;
    const uint64_t top = as_double(warp_max(largest.of[k]));
    if (thread % device::kWarp == 0) device::store(shared + k * kWarps + warp, math::bits_as<double>(top));
  }
  device::sync();
  if (thread >= 4) return;
  if (!(thread == 0 ? wanted[0] : thread == 1 ? wanted[1] : thread == 2 ? wanted[2] : wanted[3])) return;
  uint64_t most = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    const uint64_t one = math::bits_as<uint64_t>(number_at(shared + thread * kWarps + i));
    most = one > most ? one : most;
  }
  if (most) device::atomic_max(reinterpret_cast<uint64_t*>(bounds) + thread, most);
}

template <bool plain, int count, class R>
MLPKIT_DEVICE void load_gradient(Dtype dtype, const void* from, int64_t at, bool wide, int64_t left, R* to) {
  if constexpr (sizeof(R) == 8) {
    load_elements<true, count>(static_cast<const double*>(from) + at, wide, left, to);
  } else if constexpr (plain) {
    load_elements<true, count>(static_cast<const float*>(from) + at, wide, left, to);
  } else if (dtype == Dtype::bfloat16) {
    load_elements<true, count>(static_cast<const BFloat16*>(from) + at, wide, left, to);
  } else if (dtype == Dtype::float16) {
    load_elements<true, count>(static_cast<const Half*>(from) + at, wide, left, to);
  } else {
    load_elements<true, count>(static_cast<const float*>(from) + at, wide, left, to);
  }
}

// Updates a chunk of a row whose elements are T, kWidth of them at once; returns the squares of lamb's directions.
template <class Formula, class T, bool plain, int kWidth>
MLPKIT_DEVICE double update_chunk(const GuardedUpdateArgs& args, const GuardedTensor& row, const Chunk& chunk,
                                  double factor, double* shared) {
  using R = typename ComputedIn<T>::R;
  using Touch = Touches<Formula>;
  OptimizerSettingsOf<R> s;
  if constexpr (sizeof(R) == 8)
    s = read(&args.settings[chunk.row].wide);
  else
    s = read(&args.settings[chunk.row].single);
  const Factors<R> times = factors_of<R>(factor);
  const void* const g = gradient_of(args, chunk.row);
  const auto at_begin = [&](void* data) { return data ? static_cast<T*>(data) + chunk.begin : nullptr; };
  T *const p = at_begin(row.p), *const first = at_begin(row.first);
  T* const second = Touch::second ? at_begin(row.second) : nullptr;
  T* const third = Touch::third ? at_begin(row.third) : nullptr;
  const bool even =
      aligned(p) && aligned(g) && aligned(first) && aligned(second) && aligned(third) && (plain || aligned(row.copy));
  Largest<R> largest;
  double squares = 0;
  for (int64_t at = device::thread_index() * kWidth; at < chunk.count; at += kThreads * kWidth) {
    const int64_t left = chunk.count - at;
    const bool wide = even && left >= kWidth;
    R x[kWidth], dx[kWidth] = {}, m[kWidth] = {}, v[kWidth] = {}, w[kWidth] = {};
    load_elements<false, kWidth>(p + at, wide, left, x);
    if (!Touch::last) load_gradient<plain, kWidth>(row.gradient_dtype, g, chunk.begin + at, wide, left, dx);
    if (first) load_elements<true, kWidth>(first + at, wide, left, m);
    if (second) load_elements<true, kWidth>(second + at, wide, left, v);
    if (third) load_elements<true, kWidth>(third + at, wide, left, w);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      Formula::update(s, x[i], dx[i] * times.first * times.second, m[i], v[i], w[i]);
      // Zeros in the place of elements that do not exist might make NaN: 0 / 0 without eps.
      if (i >= left) continue;
      if (!Touch::moments) largest.see(0, x[i]);
      if (!Touch::last && first) largest.see(1, m[i]);
      if (Touch::second && !Touch::last) largest.see(2, v[i]);
      if (third) largest.see(3, w[i]);
      if (Touch::moments) {
        const double direction = w[i];
        squares = math::multiply_add(direction, direction, squares);
      }
    }
    if (!Touch::moments) store_elements<kWidth>(p + at, wide, left, x);
    if (first && !Touch::last) store_elements<kWidth>(first + at, wide, left, m);
    if (second && !Touch::last) store_elements<kWidth>(second + at, wide, left, v);
    if (third) store_elements<kWidth>(third + at, wide, left, w);
    if constexpr (kSame<T, float> && !plain && !Touch::moments) {
      if (!row.copy) continue;
      if (row.copy_dtype == Dtype::bfloat16)
        store_elements<kWidth>(static_cast<BFloat16*>(row.copy) + chunk.begin + at, wide, left, x);
      else
        store_elements<kWidth>(static_cast<Half*>(row.copy) + chunk.begin + at, wide, left, x);
    }
  }
  raise_bounds<Formula, R>(args.bounds + 4 * static_cast<int64_t>(row.index), largest, shared);
  return squares;
}

template <class Formula, bool plain>
MLPKIT_DEVICE double update_any(const GuardedUpdateArgs& args, const GuardedTensor& row, const Chunk& chunk,
                                double factor, double* shared) {
  if constexpr (plain) {
    return update_chunk<Formula, float, true, 4>(args, row, chunk, factor, shared);
  } else {
    switch (row.dtype) {
      case Dtype::float64:
        return update_chunk<Formula, double, false, 2>(args, row, chunk, factor, shared);
      case Dtype::bfloat16:
        return update_chunk<Formula, BFloat16, false, 8>(args, row, chunk, factor, shared);
      case Dtype::float16:
        return update_chunk<Formula, Half, false, 8>(args, row, chunk, factor, shared);
      default:
        return update_chunk<Formula, float, false, 8>(args, row, chunk, factor, shared);
    }
  }
}

// By the last block of lamb's first part: 1 / |direction| and the rate of every row.
MLPKIT_DEVICE void normalize_row(const GuardedUpdateArgs& args, int32_t i, double squares) {
  OptimizerSettingsOf<double> s = read(&args.settings[i].wide);
  const double norm = ::sqrt(squares);
  const bool normal = norm >= 0x1p-126 && s.rate > 0;
  s.unit = normal ? 1 / norm : 1;
  if (!normal) s.rate = s.lr;
  write(&args.settings[i].wide, s);
  write(&args.settings[i].single, rounded<float>(s));
}
MLPKIT_DEVICE double squares_of_part(const GuardedUpdateArgs& args, const GuardedTensor& row, int64_t begin,
                                     int64_t step) {
  double sum = 0;
  const int64_t end = chunks_of(args, row);
#pragma unroll 4
  for (int64_t c = begin; c < end; c += step) sum += number_at(args.parts + 2 * (row.first_chunk + c));
  return sum;
}
MLPKIT_DEVICE void normalize(const GuardedUpdateArgs& args, double* shared) {
  const int32_t thread = static_cast<int32_t>(device::thread_index());
  const int32_t lane = thread % device::kWarp, warp = thread / device::kWarp;
  for (int32_t i = 0; i < args.by_block; ++i) {
    if (!gradient_of(args, i)) continue;
    const double sum = over_block<Plus>(squares_of_part(args, read(args.table + i), thread, kThreads), shared);
    if (thread == 0) normalize_row(args, i, sum);
  }
  for (int32_t i = args.by_block + warp; i < args.by_warp; i += kWarps) {
    if (!gradient_of(args, i)) continue;
    const double sum = over_warp<Plus>(squares_of_part(args, read(args.table + i), lane, device::kWarp));
    if (lane == 0) normalize_row(args, i, sum);
  }
  for (int32_t i = args.by_warp + thread; i < args.rows; i += kThreads)
    if (gradient_of(args, i)) normalize_row(args, i, squares_of_part(args, read(args.table + i), 0, 1));
}

constexpr int resident(bool plain) { return plain ? 3 : 2; }

template <class Formula, bool plain>
MLPKIT_KERNEL(kThreads, resident(plain))
update(const GuardedUpdateArgs args) {
  constexpr bool moments = Touches<Formula>::moments;
  MLPKIT_SHARED(double, shared, 5 * kWarps);
  if (number_at(&args.decision->taken) == 0) return;
  const double factor = number_at(&args.decision->factor);
  for (int64_t back = device::block_index(); back < args.chunks; back += device::blocks()) {
    const int64_t number = args.chunks - 1 - back;
    const int32_t i = static_cast<int32_t>(device::load4(args.row_of_chunk + number));
    if (!gradient_of(args, i)) continue;
    const GuardedTensor row = read(args.table + i);
    const bool ascends = args.groups ? device::load1(&args.groups[row.group].settings.maximize) != 0
                                     : args.group[row.group].settings.maximize;
    const double squares =
        update_any<Formula, plain>(args, row, chunk_at(args, number, row, i), ascends ? -factor : factor, shared);
    if (!moments) continue;
    const double sum = over_block<Plus>(squares, shared + 4 * kWarps);
    if (device::thread_index() == 0) device::store(args.parts + 2 * number, sum);
  }
  if (moments && last_block(args.finished, shared)) normalize(args, shared);
}

template <class Formula, bool plain>
cudaError_t launch_as(const GuardedUpdateArgs& args, cudaStream_t stream) {
  return device::launch(update<Formula, plain>, {guarded_blocks(args.chunks, resident(plain)), kThreads}, stream, args);
}
template <class Formula>
cudaError_t launch(const GuardedUpdateArgs& args, cudaStream_t stream) {
  return args.plain ? launch_as<Formula, true>(args, stream) : launch_as<Formula, false>(args, stream);
}

}  // namespace

cudaError_t guarded_update(const GuardedUpdateArgs& args, cudaStream_t stream) {
  cudaError_t error = guarded_census(args, stream);
  if (error != cudaSuccess) return error;
  switch (args.kind) {
    case Optimizer::sgd:
    case Optimizer::lars:
      return launch<Sgd>(args, stream);
    case Optimizer::adam:
    case Optimizer::adamw:
      return launch<Adam>(args, stream);
    case Optimizer::rmsprop:
      return launch<Rmsprop>(args, stream);
    case Optimizer::lamb:
      error = launch<LambMoments>(args, stream);
      return error != cudaSuccess ? error : launch<LambParameter>(args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace mlpkit::cuda
