// Products on a CUDA device by torch, or for float32 by two numbers of tf32 each; an operator that takes the latter
// whatever the choice of kernels (ops). All work goes to the current stream; nothing waits for it.
#include "cuda/split_product.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <optional>

#include "ops/cuda_kernels.h"
#include "ops/linear_act_dropout_cuda.h"
#include "ops/split_product.h"

namespace mlpkit {
namespace {

bool on_16_bytes(const at::Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0; }

// The problem, if the matrices lie as the kernel wants them; without c.
std::optional<cuda::SplitProduct> as_split(const at::Tensor& a, const at::Tensor& b) {
  if (a.scalar_type() != at::kFloat || b.scalar_type() != at::kFloat || !on_16_bytes(a) || !on_16_bytes(b))
    return std::nullopt;
  cuda::SplitProduct args{};
  if (a.is_contiguous() && b.t().is_contiguous())
    args.layout = cuda::SplitLayout::of_weight;
  else if (a.is_contiguous() && b.is_contiguous())
    args.layout = cuda::SplitLayout::plain;
  else if (a.t().is_contiguous() && b.is_contiguous())
    args.layout = cuda::SplitLayout::of_transposed_a;
  else
    return std::nullopt;
  args.rows = a.size(0);
  args.cols = b.size(1);
  args.depth = a.size(1);
  args.a = a.const_data_ptr<float>();
  args.b = b.const_data_ptr<float>();
  if (!cuda::split_takes(args)) return std::nullopt;
  return args;
}

void run(cuda::SplitProduct args, const at::Tensor& to) {
  args.c = to.mutable_data_ptr<float>();
  C10_CUDA_CHECK(cuda::split_product(args, c10::cuda::getCurrentCUDAStream().stream()));
}

std::optional<cuda::SplitProduct> wanted(const at::Tensor& a, const at::Tensor& b) {
  if (fp32_products() != Fp32Products::split || cuda_kernels() != CudaKernels::all) return std::nullopt;
  const auto args = as_split(a, b);
  return args && cuda::split_pays(*args) ? args : std::nullopt;
}

at::Tensor split_product_op(const at::Tensor& a, const at::Tensor& b) {
  TORCH_CHECK_VALUE(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0), "split_product: a has shape ", a.sizes(),
                    " and b ", b.sizes(), "; they must be (rows, depth) and (depth, cols)");
  TORCH_CHECK_VALUE(a.device() == b.device(), "split_product: a is on ", a.device(), " and b on ", b.device());
  const CudaCall call(a);
  const auto args = as_split(a, b);
  TORCH_CHECK_NOT_IMPLEMENTED(args,
                              "split_product: the kernel takes float32 on compute capability 8.0 and newer, a and "
                              "b contiguous or transposed (not both), sizes along memory and cols in multiples of 4, "
                              "16-byte boundaries; a is ",
                              a.scalar_type(), " ", a.sizes(), " by strides ", a.strides(), ", b ", b.scalar_type(),
                              " ", b.sizes(), " by strides ", b.strides());
  const at::Tensor c = at::empty({a.size(0), b.size(1)}, a.options());
  run(*args, c);
  return c;
}

}  // namespace

bool takes_split_product(const at::Tensor& a, const at::Tensor& b) { return wanted(a, b).has_value(); }

at::Tensor matrix_product(const at::Tensor& a, const at::Tensor& b) {
  const auto args = wanted(a, b);
  if (!args) return at::mm(a, b);
  const at::Tensor c = at::empty({a.size(0), b.size(1)}, a.options());
  run(*args, c);
  return c;
}

void matrix_product_out(const at::Tensor& to, const at::Tensor& a, const at::Tensor& b) {
  const auto args =
      to.is_contiguous() && to.scalar_type() == at::kFloat && on_16_bytes(to) ? wanted(a, b) : std::nullopt;
  at::Tensor out = to;
  if (args)
    run(*args, to);
  else
    at::mm_out(out, a, b);
}

TORCH_LIBRARY_FRAGMENT(mlpkit, m) { m.def("split_product(Tensor a, Tensor b) -> Tensor"); }
TORCH_LIBRARY_IMPL(mlpkit, CUDA, m) { m.impl("split_product", split_product_op); }

}  // namespace mlpkit
