// Column sums in a fixed order, without atomics: the second half of a bias gradient (cuda).
#pragma once
#include <cuda_runtime_api.h>

#include "core/dtype.h"

namespace mlpkit::cuda {

struct ColumnSums {  // to[col] = sum over rows of from[row, col]; with `total`, to[0] = sum of those over the columns
  int64_t rows, cols;
  int64_t stride;  // of a row of from: a multiple of 8, cols or more
  Dtype dtype;     // T; C is double for double, else float
  void* from;      // [rows, stride], C, 16-byte aligned, then room for the levels between: column_sums_elements in all
  void* to;        // [cols] or [1], T
  bool total;
};

int64_t column_sums_elements(int64_t rows, int64_t stride);

cudaError_t column_sums(const ColumnSums&, cudaStream_t);

}  // namespace mlpkit::cuda
