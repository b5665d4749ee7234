// Sixteen elements of a row, and the 16x16 tiles of the mask contract, for element-wise kernels (cpu). Included by
// *_kernel.cpp files only.
#pragma once
#include "core/dropout_mask.h"
#include "cpu/simd.h"

MLPKIT_BEGIN_ISA

// Calls body(T{}, C{}) with the storage and the compute type of a dtype.
template <class Body>
MLPKIT_HD void visit_storage(Dtype dtype, Body&& body) {
  switch (dtype) {
    case Dtype::float64:
      return body(double{}, double{});
    case Dtype::float32:
      return body(float{}, float{});
    case Dtype::bfloat16:
      return body(BFloat16{}, float{});
    case Dtype::float16:
      return body(Half{}, float{});
  }
}

template <class T>
MLPKIT_HD T* element(void* base, int64_t index) {
  return static_cast<T*>(base) + index;
}
template <class T>
MLPKIT_HD const T* element(const void* base, int64_t index) {
  return static_cast<const T*>(base) + index;
}

MLPKIT_HD int tile_extent(int64_t rest) { return rest < kMaskTile ? static_cast<int>(rest) : kMaskTile; }

// As many vectors as sixteen elements take.
template <class C>
struct TileRow {
  using V = typename Wide<C>::type;
  static constexpr int lanes = Wide<C>::lanes, count = kMaskTile / lanes;
  V v[count];

  // The first n elements from memory, the rest zero, so that ragged edges read nothing that is not theirs.
  template <class T>
  MLPKIT_HD void read(const T* from, int n) {
    if (n == kMaskTile) {
      for (int i = 0; i < count; ++i) load(from + i * lanes, v[i]);
    } else {
      T padded[kMaskTile] = {};
      __builtin_memcpy(padded, from, n * sizeof(T));
      for (int i = 0; i < count; ++i) load(padded + i * lanes, v[i]);
    }
  }
  template <class T>
  MLPKIT_HD void write(T* to, int n) const {
    if (n == kMaskTile) {
      for (int i = 0; i < count; ++i) store(to + i * lanes, v[i]);
    } else {
      T padded[kMaskTile];
      for (int i = 0; i < count; ++i) store(padded + i * lanes, v[i]);
      __builtin_memcpy(to, padded, n * sizeof(T));
    }
  }
  MLPKIT_HD void fill(C value) {
    for (int i = 0; i < count; ++i) v[i] = V{} + value;
  }
  // [total_cols] values at a column, or one value where there are none.
  MLPKIT_HD void read_or_fill(const void* from, int64_t col, int n, C value) {
    if (from)
      read(element<C>(from, col), n);
    else
      fill(value);
  }
  MLPKIT_HD void add(const TileRow& other) {
    for (int i = 0; i < count; ++i) v[i] += other.v[i];
  }
  // Elements from the n-th on become zero.
  MLPKIT_HD void keep_first(int n) {
    if (n == kMaskTile) return;
    C padded[kMaskTile];
    write(padded, kMaskTile);
    for (int i = n; i < kMaskTile; ++i) padded[i] = 0;
    read(padded, kMaskTile);
  }
  // The sum of all sixteen, by pairs.
  MLPKIT_HD C sum() const {
    C part[kMaskTile];
    write(part, kMaskTile);
    for (int width = kMaskTile / 2; width; width /= 2)
      for (int i = 0; i < width; ++i) part[i] += part[i + width];
    return part[0];
  }
};

MLPKIT_END_ISA
