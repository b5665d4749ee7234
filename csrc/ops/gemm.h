// A library matrix product for one tile, row-major and single-threaded, so that its bits do not depend on the number of
// threads (ops).
#pragma once
#include <c10/core/ScalarType.h>

#include <cstdint>

namespace mlpkit {

struct Gemm {             // c = op(a) op(b);  op(a) is [m, k], op(b) is [k, n], c is [m, n]
  c10::ScalarType dtype;  // kFloat or kDouble
  bool transpose_a, transpose_b;
  int64_t m, n, k;
  const void* a;  // [m, k] with row stride lda, or [k, m] where transpose_a
  int64_t lda;
  const void* b;  // [k, n] with row stride ldb, or [n, k] where transpose_b
  int64_t ldb;
  void* c;
  int64_t ldc;
};

void gemm(const Gemm&);

// "mkl" or "aten": whose product `gemm` calls in this process.
const char* gemm_library();

// While one lives, the BLAS called by this thread uses this thread alone.
class SingleThreadedBlas {
 public:
  SingleThreadedBlas();
  ~SingleThreadedBlas();
  SingleThreadedBlas(const SingleThreadedBlas&) = delete;
  SingleThreadedBlas& operator=(const SingleThreadedBlas&) = delete;

 private:
  int previous_ = 0;
};

}  // namespace mlpkit
