// The BLAS inside libtorch, called without the dispatcher; where torch carries none, at::mm (ops).
#include "ops/gemm.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

// libtorch_cpu exports the BLAS it was linked with; on builds that do not, these stay null.
extern "C" {
__attribute__((weak)) void sgemm_(const char*, const char*, const int*, const int*, const int*, const float*,
                                  const float*, const int*, const float*, const int*, const float*, float*, const int*);
__attribute__((weak)) void dgemm_(const char*, const char*, const int*, const int*, const int*, const double*,
                                  const double*, const int*, const double*, const int*, const double*, double*,
                                  const int*);
__attribute__((weak)) int MKL_Set_Num_Threads_Local(int);
}

namespace mlpkit {
namespace {

// Without a way to keep the library to one thread, its bits could depend on the number of threads: then at::mm inside
// our own parallel region is what remains.
bool use_blas() { return sgemm_ && dgemm_ && MKL_Set_Num_Threads_Local; }

// A row-major product is the column-major product of the transposes, in the other order.
template <class C, class Function>
void call_blas(Function function, const Gemm& g) {
  const char* op_a = g.transpose_a ? "T" : "N";
  const char* op_b = g.transpose_b ? "T" : "N";
  const int m = static_cast<int>(g.m), n = static_cast<int>(g.n), k = static_cast<int>(g.k);
  const int lda = static_cast<int>(g.lda), ldb = static_cast<int>(g.ldb), ldc = static_cast<int>(g.ldc);
  const C one = 1, zero = 0;
  function(op_b, op_a, &n, &m, &k, &one, static_cast<const C*>(g.b), &ldb, static_cast<const C*>(g.a), &lda, &zero,
           static_cast<C*>(g.c), &ldc);
}

at::Tensor view(const void* data, int64_t rows, int64_t cols, int64_t stride, bool transpose, c10::ScalarType dtype) {
  const auto sizes = transpose ? std::array<int64_t, 2>{cols, rows} : std::array<int64_t, 2>{rows, cols};
  at::Tensor matrix = at::from_blob(const_cast<void*>(data), sizes, {stride, 1}, at::TensorOptions().dtype(dtype));
  return transpose ? matrix.t() : matrix;
}

bool fits_int(const Gemm& g) {
  constexpr int64_t limit = INT32_MAX;
  return g.m < limit && g.n < limit && g.k < limit && g.lda < limit && g.ldb < limit && g.ldc < limit;
}

}  // namespace

const char* gemm_library() { return use_blas() ? "mkl" : "aten"; }

SingleThreadedBlas::SingleThreadedBlas() {
  if (use_blas()) previous_ = MKL_Set_Num_Threads_Local(1);
}
SingleThreadedBlas::~SingleThreadedBlas() {
  if (use_blas()) MKL_Set_Num_Threads_Local(previous_);
}

void gemm(const Gemm& g) {
  if (g.m == 0 || g.n == 0) return;
  if (use_blas() && g.k > 0 && fits_int(g)) {
    if (g.dtype == c10::kDouble) return call_blas<double>(dgemm_, g);
    return call_blas<float>(sgemm_, g);
  }
  at::Tensor c = view(g.c, g.m, g.n, g.ldc, false, g.dtype);
  at::mm_out(c, view(g.a, g.m, g.k, g.lda, g.transpose_a, g.dtype), view(g.b, g.k, g.n, g.ldb, g.transpose_b, g.dtype));
}

}  // namespace mlpkit
