// The pybind11 module mlpkit._C: importing it registers the operators; what it exports is the quick eager path and
// facts about the build.
#include <torch/csrc/utils/pybind.h>

#include <array>

#include "bindings_follow.h"
#include "bindings_observe.h"
#include "bindings_population.h"
#include "bindings_scaler.h"
#include "bindings_step.h"
#include "bindings_update.h"
#include "core/philox.h"
#include "cpu/capability.h"
#include "ops/cuda_kernels.h"
#include "ops/drawn_seed.h"
#include "ops/gemm.h"
#include "ops/linear_act_dropout.h"
#include "ops/look.h"
#include "ops/mlp.h"
#include "ops/mlp_norm.h"
#include "ops/norm_act_dropout.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native part of mlpkit.";
  m.def("linear_act_dropout", &mlpkit::linear_act_dropout, py::arg("x"), py::arg("weight"), py::arg("bias"),
        py::arg("slope"), py::arg("seed"), py::arg("activation"), py::arg("negative_slope"), py::arg("p"),
        py::arg("stream"), py::call_guard<py::gil_scoped_release>());

  m.def("norm_act_dropout", &mlpkit::norm_act_dropout, py::arg("z"), py::arg("weight"), py::arg("bias"),
        py::arg("mean"), py::arg("variance"), py::arg("slope"), py::arg("seed"), py::arg("norm"), py::arg("eps"),
        py::arg("activation"), py::arg("negative_slope"), py::arg("p"), py::arg("stream"),
        py::call_guard<py::gil_scoped_release>());

  m.def(
      "mlp",
      [](const at::Tensor& x, const std::vector<at::Tensor>& weights,
         const std::vector<std::optional<at::Tensor>>& biases, const std::vector<std::optional<at::Tensor>>& slopes,
         const std::optional<at::Tensor>& seed, std::string_view activation, double negative_slope,
         const std::vector<double>& p) {
        const auto list = [](const auto& tensors) { return c10::List<std::optional<at::Tensor>>(tensors); };
        return mlpkit::mlp(x, weights, list(biases), list(slopes), seed, activation, negative_slope, p);
      },
      py::arg("x"), py::arg("weights"), py::arg("biases"), py::arg("slopes"), py::arg("seed"), py::arg("activation"),
      py::arg("negative_slope"), py::arg("p"), py::call_guard<py::gil_scoped_release>());

  m.def(
      "mlp_norm",
      [](const at::Tensor& x, const std::vector<at::Tensor>& weights,
         const std::vector<std::optional<at::Tensor>>& biases, const std::vector<std::optional<at::Tensor>>& slopes,
         const std::vector<std::optional<at::Tensor>>& norm_weights,
         const std::vector<std::optional<at::Tensor>>& norm_biases, const std::vector<std::optional<at::Tensor>>& means,
         const std::vector<std::optional<at::Tensor>>& variances, const std::optional<at::Tensor>& seed,
         std::string_view norm, double eps, std::string_view activation, double negative_slope,
         const std::vector<double>& p) {
        const auto list = [](const auto& tensors) { return c10::List<std::optional<at::Tensor>>(tensors); };
        return mlpkit::mlp_norm(x, weights, list(biases), list(slopes), list(norm_weights), list(norm_biases),
                                list(means), list(variances), seed, norm, eps, activation, negative_slope, p);
      },
      py::arg("x"), py::arg("weights"), py::arg("biases"), py::arg("slopes"), py::arg("norm_weights"),
      py::arg("norm_biases"), py::arg("means"), py::arg("variances"), py::arg("seed"), py::arg("norm"), py::arg("eps"),
      py::arg("activation"), py::arg("negative_slope"), py::arg("p"), py::call_guard<py::gil_scoped_release>());

  m.def("drawn_seed", &mlpkit::drawn_seed, py::arg("device"), py::call_guard<py::gil_scoped_release>());

  mlpkit::observing::bind_observe(m);
  mlpkit::bind_outputs(m);
  mlpkit::bind_population(m);
  mlpkit::bind_step(m);
  mlpkit::bind_update(m);
  mlpkit::bind_scaler(m);

  // -1 for what cannot be looked at.
  m.def(
      "peaks",
      [](const std::vector<std::optional<at::Tensor>>& tensors) {
        std::vector<double> found;
        for (const auto& tensor : tensors)
          found.push_back(tensor && mlpkit::plain(*tensor) ? mlpkit::peak(*tensor) : -1.0);
        return found;
      },
      py::arg("tensors"), py::call_guard<py::gil_scoped_release>());

  m.def("cpu_capability", [] { return mlpkit::cpu::capability_name(mlpkit::cpu::capability()); });
  m.def("cpu_capabilities", &mlpkit::cpu::supported_capabilities);
  m.def("force_cpu_capability", &mlpkit::cpu::force_capability, py::arg("name"));
  m.def("cuda_kernels", [] { return mlpkit::cuda_kernels_name(mlpkit::cuda_kernels()); });
  m.def("force_cuda_kernels", &mlpkit::force_cuda_kernels, py::arg("name"));
  m.def("fp32_precision", [] { return mlpkit::fp32_products_name(mlpkit::fp32_products()); });
  m.def("set_fp32_precision", &mlpkit::set_fp32_products, py::arg("precision"));
  m.def("gemm_library", &mlpkit::gemm_library);
  m.def(
      "philox4x32",
      [](std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
        const mlpkit::Words words =
            mlpkit::philox4x32({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
        return std::array<uint32_t, 4>{words.v[0], words.v[1], words.v[2], words.v[3]};
      },
      py::arg("counter"), py::arg("key"));
}
