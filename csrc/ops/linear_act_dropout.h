// What the CPU and the CUDA side of linear_act_dropout share: argument checks, sizes of what is saved, dtypes (ops).
#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <string_view>
#include <tuple>

#include "core/activation.h"
#include "core/dropout_mask.h"
#include "core/dtype.h"

namespace mlpkit {

using OptionalTensor = std::optional<at::Tensor>;
using ForwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor>;               // y, z, bits
using WatchedResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;   // y, z, bits, absmax
using BackwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;  // dx, dweight, dbias, dslope

// The problem as two-dimensional sizes: y is [rows, cols], x is [rows, depth], weight is [cols, depth].
struct LinearActDropout {
  int64_t rows = 0, cols = 0, depth = 0;
  Activation activation = Activation::identity;
  Needs needs = Needs::nothing;
  Dtype dtype = Dtype::float32;
  uint32_t threshold = 0;  // of the mask contract
  double scale = 1.0;

  bool draws() const { return threshold > 0 && threshold < 65536; }
  bool keeps_bits() const { return draws() || activation == Activation::relu; }
  bool keeps_sign() const { return activation == Activation::leaky_relu; }
  int64_t plane_bytes() const {  // one bit an element, whole 16x16 tiles
    return ((rows + kMaskTile - 1) / kMaskTile) * ((cols + kMaskTile - 1) / kMaskTile) * kMaskLanes;
  }
  int64_t bits_bytes() const { return plane_bytes() * (keeps_bits() + keeps_sign()); }
};

// Checks everything that can be checked without reading data; raises ValueError or TypeError.
LinearActDropout check_linear_act_dropout(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                          const OptionalTensor& slope, const OptionalTensor& seed,
                                          std::string_view activation, double p, int64_t stream);

// The same for the backward pass, whose mask comes from `bits`; z, bits and dy must be what the forward pass gives.
LinearActDropout check_linear_act_dropout_backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                                                   const OptionalTensor& slope, const at::Tensor& z,
                                                   const at::Tensor& bits, std::string_view activation, double p);

// The dtype of what the forward pass saves as z. The CPU saves slopes but for prelu; in bfloat16 these are float16,
// three bits finer, since rounding them must not add to the rounding of dz.
c10::ScalarType saved_dtype(const at::Tensor& x, Activation activation);

// Parts of these checks that other ops with an activation and dropout share; name is the op's, for the message.
Activation activation_from_name(std::string_view activation, const char* name);
void check_slope_is_there(const char* name, const LinearActDropout& op, const OptionalTensor& slope);
void take_dropout(const char* name, LinearActDropout& op, double p);  // sets threshold and scale
void check_mask_source(const char* name, const LinearActDropout& op, double p, const OptionalTensor& seed,
                       at::Device device, int64_t stream);
void check_bits(const char* name, const LinearActDropout& op, const at::Tensor& bits, at::Device device);

// The operator, through the dispatcher: what pybind11 exposes as the quick eager path.
at::Tensor linear_act_dropout(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                              const OptionalTensor& slope, const OptionalTensor& seed, std::string_view activation,
                              double negative_slope, double p, int64_t stream);

// Its two halves, through the dispatcher too.
ForwardResult linear_act_dropout_forward(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                         const OptionalTensor& slope, const OptionalTensor& seed,
                                         std::string_view activation, double negative_slope, double p, int64_t stream,
                                         bool save);
BackwardResult linear_act_dropout_backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                                           const OptionalTensor& slope, const at::Tensor& z, const at::Tensor& bits,
                                           std::string_view activation, double negative_slope, double p,
                                           std::array<bool, 4> needs);

// Raises NotImplementedError where a tensor carries a forward-mode tangent: dropping it in silence would be a wrong
// zero.
void refuse_tangent(const char* op, const char* name, const at::Tensor& tensor);

inline OptionalTensor optional(const at::Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}
inline at::Tensor undefined_if_absent(const OptionalTensor& tensor) { return tensor.value_or(at::Tensor()); }

// sizes of x with the last one replaced by cols
std::vector<int64_t> output_sizes(const at::Tensor& x, int64_t cols);

}  // namespace mlpkit
