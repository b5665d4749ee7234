// The part of mlpkit._C that trains populations: what Python has checked, as ops/population.h takes it.
#include "bindings_population.h"

#include <string>
#include <utility>

#include "ops/linear_act_dropout.h"
#include "ops/mlp_step.h"
#include "ops/population.h"

namespace mlpkit {
namespace {

template <class Value, size_t count>
Value named(const std::string& name, const char* what, const std::pair<const char*, Value> (&known)[count]) {
  for (const auto& [each, value] : known)
    if (name == each) return value;
  throw py::value_error("population: " + std::string(what) + " is '" + name + "'");
}

Loss loss_named(const std::string& name) {
  return named<Loss>(name, "loss",
                     {{"cross_entropy", Loss::cross_entropy},
                      {"bce", Loss::bce},
                      {"mse", Loss::mse},
                      {"l1", Loss::l1},
                      {"huber", Loss::huber},
                      {"log_mse", Loss::log_mse},
                      {"brier", Loss::brier}});
}

PopulationMetric metric_named(const std::string& name) {
  return named<PopulationMetric>(name, "metric",
                                 {{"loss", PopulationMetric::loss},
                                  {"accuracy", PopulationMetric::accuracy},
                                  {"r2", PopulationMetric::r2},
                                  {"mae", PopulationMetric::mae},
                                  {"rmse", PopulationMetric::rmse}});
}

Schedule schedule_named(const std::string& name) {
  return named<Schedule>(name, "schedule",
                         {{"constant", Schedule::constant},
                          {"cosine", Schedule::cosine},
                          {"step", Schedule::step},
                          {"exponential", Schedule::exponential},
                          {"one_cycle", Schedule::one_cycle},
                          {"coslog4", Schedule::coslog4}});
}

PopulationData data_of(const py::tuple& parts) {
  const auto tensor = [&](size_t i) { return parts[i].is_none() ? at::Tensor() : parts[i].cast<at::Tensor>(); };
  return {tensor(0), tensor(1), tensor(2), tensor(3)};
}

template <class Value>
void read(const py::dict& from, const char* key, Value& to) {
  to = from[key].cast<Value>();
}

MemberRecipe recipe_of(const py::dict& from) {
  MemberRecipe to;
  read(from, "dropout", to.dropout);
  read(from, "lr", to.lr);
  read(from, "momentum", to.momentum);
  read(from, "beta1", to.beta1);
  read(from, "beta2", to.beta2);
  read(from, "eps", to.eps);
  read(from, "weight_decay", to.weight_decay);
  read(from, "l1", to.l1);
  read(from, "clip_norm", to.clip_norm);
  read(from, "label_smoothing", to.label_smoothing);
  read(from, "min_delta", to.min_delta);
  read(from, "nesterov", to.nesterov);
  read(from, "batch_size", to.batch_size);
  read(from, "epochs", to.epochs);
  read(from, "patience", to.patience);
  to.schedule = {schedule_named(from["schedule"].cast<std::string>()), from["warmup"].cast<double>(),
                 from["floor"].cast<double>(), from["gamma"].cast<double>(), from["every"].cast<int64_t>()};
  return to;
}

MemberNetwork network_of(const py::dict& from) {
  MemberNetwork to;
  read(from, "widths", to.widths);
  to.activation = activation_from_name(from["activation"].cast<std::string>(), "population");
  to.norm = named<Norm>(from["norm"].cast<std::string>(), "norm",
                        {{"none", Norm::none}, {"batch", Norm::batch}, {"layer", Norm::layer}});
  to.optimizer = optimizer_from_name(from["optimizer"].cast<std::string>());
  read(from, "with_momentum", to.with_momentum);
  read(from, "bfloat16", to.bfloat16);
  read(from, "seed", to.seed);
  return to;
}

// Views of a member's parameters and averages, by the names that nn.MLP gives them.
py::dict tensors_of(PopulationMember& member, bool best) {
  const bool kept = best && member.keeps_best();
  const int64_t values = kept ? member.best_values() - member.values() : 0;
  const int64_t running = kept ? values + member.parameters : member.running() - member.values();
  py::dict found;
  const auto add = [&](const std::string& name, int64_t base, int64_t offset, at::IntArrayRef shape) {
    if (offset >= 0)
      found[py::str(name)] = member.state.narrow(0, base + offset, c10::multiply_integers(shape)).view(shape);
  };
  for (size_t i = 0; i < member.layers.size(); ++i) {
    const MemberLayer& layer = member.layers[i];
    const std::string number = std::to_string(i), linear = "layers." + number + ".", block = "blocks." + number + ".";
    if (layer.across)
      found[py::str(linear + "weight")] = member.state.narrow(0, values + layer.weight, layer.in * layer.across)
                                              .view({layer.in, layer.across})
                                              .narrow(1, 0, layer.out)
                                              .t();
    else
      add(linear + "weight", values, layer.weight, {layer.out, layer.in});
    add(linear + "bias", values, layer.bias, {layer.out});
    add(block + "0.weight", values, layer.norm_weight, {layer.out});
    add(block + "0.bias", values, layer.norm_bias, {layer.out});
    add(block + "0.running_mean", running, layer.mean, {layer.out});
    add(block + "0.running_var", running, layer.variance, {layer.out});
    add(layer.norm_weight < 0 ? linear + "slope" : block + "1.weight", values, layer.slope, {1});
  }
  return found;
}

void bind_progress(py::module_& m) {
  py::class_<MemberProgress>(m, "MemberProgress")
      .def_readwrite("epoch", &MemberProgress::epoch)
      .def_readwrite("step", &MemberProgress::step)
      .def_readwrite("taken", &MemberProgress::taken)
      .def_readwrite("skipped", &MemberProgress::skipped)
      .def_readwrite("skips_in_a_row", &MemberProgress::skips_in_a_row)
      .def_readwrite("waited", &MemberProgress::waited)
      .def_readwrite("best_epoch", &MemberProgress::best_epoch)
      .def_readwrite("stopped_step", &MemberProgress::stopped_step)
      .def_readwrite("best", &MemberProgress::best)
      .def_readwrite("mark", &MemberProgress::mark)
      .def_readwrite("status", &MemberProgress::status)
      .def_readwrite("cause", &MemberProgress::cause)
      .def_readwrite("seconds", &MemberProgress::seconds)
      .def_readwrite("train_loss", &MemberProgress::train_loss)
      .def_readwrite("validation_loss", &MemberProgress::validation_loss)
      .def_readwrite("metric", &MemberProgress::metric)
      .def_readwrite("lr", &MemberProgress::lr);
}

}  // namespace

void bind_population(py::module_& m) {
  bind_progress(m);
  py::class_<Population>(m, "Population")
      .def(py::init([](const std::string& loss, double delta, const std::string& metric, const py::tuple& data,
                       const py::tuple& validation, int device) {
             return Population({loss_named(loss), delta, metric_named(metric)}, data_of(data), data_of(validation),
                               device);
           }),
           py::arg("loss"), py::arg("delta"), py::arg("metric"), py::arg("data"), py::arg("validation"),
           py::arg("device"))
      .def(
          "obstacle",
          [](Population& self, const py::dict& network, const py::dict& recipe, int64_t rows) {
            return self.obstacle(network_of(network), recipe_of(recipe), rows);
          },
          py::arg("network"), py::arg("recipe"), py::arg("rows"))
      .def(
          "add",
          [](Population& self, const py::dict& network, const py::dict& recipe, const at::Tensor& rows,
             const std::optional<at::Tensor>& validation_rows) {
            return self.add(network_of(network), recipe_of(recipe), rows, validation_rows.value_or(at::Tensor()));
          },
          py::arg("network"), py::arg("recipe"), py::arg("rows"), py::arg("validation_rows"))
      .def("state", [](Population& self, int64_t id) { return self.fetched(id).state; })
      .def("tensors", [](Population& self, int64_t id, bool best) { return tensors_of(self.fetched(id), best); })
      .def(
          "progress", [](Population& self, int64_t id) -> MemberProgress& { return self.member(id).progress; },
          py::return_value_policy::reference_internal)
      .def("steps_per_epoch", [](Population& self, int64_t id) { return self.member(id).steps_per_epoch(); })
      .def("work_per_epoch", [](Population& self, int64_t id) { return self.member(id).work_per_epoch(); })
      .def("set_recipe",
           [](Population& self, int64_t id, const py::dict& recipe) { self.member(id).recipe = recipe_of(recipe); })
      .def(
          "train",
          [](Population& self, const std::vector<int64_t>& ids, int64_t epochs, int64_t threads,
             const py::function& poll, bool in_order) {
            const Population::Poll with_lock = [&](const PopulationTally& now) {
              const py::gil_scoped_acquire gil;
              return poll(now.steps, now.running, now.stopped, now.share, now.best).cast<bool>();
            };
            const py::gil_scoped_release no_gil;
            return self.train(ids, epochs, threads, with_lock, in_order);
          },
          py::arg("ids"), py::arg("epochs"), py::arg("threads"), py::arg("poll"), py::arg("in_order"))
      .def("predict", &Population::predict, py::arg("ids"), py::arg("x"), py::arg("best"), py::arg("threads"),
           py::call_guard<py::gil_scoped_release>());
  // Tests offer an emulated device by the address of a PopulationBackend; returns that of the one before, or 0.
  m.def("offer_population_device", [](uintptr_t address) {
    const PopulationBackend* before = population_backend();
    population_backend() = reinterpret_cast<const PopulationBackend*>(address);
    return reinterpret_cast<uintptr_t>(before);
  });
}

}  // namespace mlpkit
