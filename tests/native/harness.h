// What the checks of the CPU kernels share: memory of exactly the bytes asked for, draws, comparison with a bound
// (tests). A check is a file check_<kernel>.cpp that ends in NATIVE_CHECK(<kernel>, function); nothing else lists it.
#pragma once
#include <random>
#include <string>
#include <vector>

#include "numbers.h"

namespace native {

// The largest relative error of one rounding in the type that kernels compute in. Every bound below is a small multiple
// of it times a sum of magnitudes, plus half an ulp where the result is rounded to a narrower type.
inline Real unit(Dtype dtype) { return dtype == Dtype::float64 ? 0x1p-53L : 0x1p-24L; }

class Draw {
 public:
  explicit Draw(uint64_t seed) : engine_(seed) {}
  uint64_t bits() { return engine_(); }
  int64_t below(int64_t count) { return static_cast<int64_t>(engine_() % static_cast<uint64_t>(count)); }
  bool coin() { return below(2) != 0; }
  Real uniform(Real low, Real high) { return low + (high - low) * std::ldexp(Real(engine_() >> 11), -53); }
  template <class T>
  T of(const std::vector<T>& choices) {
    return choices[static_cast<size_t>(below(static_cast<int64_t>(choices.size())))];
  }

 private:
  std::mt19937_64 engine_;
};

// Exactly the bytes asked for, full of `poison`. It lies, by a draw, on the heap, where AddressSanitizer watches both
// ends; there but one element off every alignment; or against a page that may not be touched, which also stops masked
// loads and stores, since these are not instrumented.
class Memory {
 public:
  Memory(int64_t bytes, int64_t element, Draw& draw, int poison = 0xff);
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  char* data() { return data_; }
  const char* data() const { return data_; }

 private:
  char *base_, *data_;
  size_t mapped_ = 0;
};

// Exactly `count` numbers of one type; NaN until set or written.
class Numbers {
 public:
  Numbers(Dtype dtype, int64_t count, Draw& draw) : Numbers(dtype, count, size_of(dtype), draw) {}
  // Of numbers that kernels take several at a time, `element` is the bytes of what they take.
  Numbers(Dtype dtype, int64_t count, int64_t element, Draw& draw)
      : dtype_(dtype), count_(count), memory_(count * size_of(dtype), element, draw) {}
  void* data() { return memory_.data(); }
  int64_t count() const { return count_; }
  Real get(int64_t index) const { return native::get(dtype_, memory_.data(), index); }
  void set(int64_t index, Real value);
  void draw(Draw& draw, Real low, Real high) {
    for (int64_t i = 0; i < count_; ++i) set(i, draw.uniform(low, high));
  }
  bool untouched(int64_t index) const {
    for (int64_t i = 0; i < size_of(dtype_); ++i)
      if (memory_.data()[index * size_of(dtype_) + i] != static_cast<char>(0xff)) return false;
    return true;
  }

 private:
  Dtype dtype_;
  int64_t count_;
  Memory memory_;
};

// Collects what a check finds; the first few failures are printed.
class Report {
 public:
  void near(const std::string& what, int64_t index, Real ours, Real exact, Real bound);
  void that(const std::string& what, int64_t index, bool holds);
  int64_t comparisons = 0, failures = 0;
  Real worst = 0;  // largest error as a part of its bound
};

using Body = void (*)(Report&);
bool add_check(const char* name, Body body);
#define NATIVE_CHECK(name, body) static const bool name##_is_listed = native::add_check(#name, body)

}  // namespace native
