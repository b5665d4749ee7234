// The observer's life, where it stands in the dispatcher, and its face in Python. Part of the module mlpkit._C.
#include "bindings_observe.h"

#include <c10/util/irange.h>
#include <pthread.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <optional>

#include "bindings_follow.h"
#include "ops/observed_key.h"

namespace mlpkit::observing {
namespace {

constexpr c10::DispatchKeySet kBelow(c10::DispatchKeySet::FULL_AFTER, kObserved);
constexpr int kSlots = 8;  // observers at once

std::array<std::atomic<Observer*>, kSlots> slots{};
std::atomic<int> forks{0};
thread_local unsigned own_slots = 0;  // of the observers that began in this thread

struct Watcher {
  Watcher(int slot, Observer* observer) : slot(slot), observer(observer) {}
  Watcher(const Watcher&) = delete;
  Watcher& operator=(const Watcher&) = delete;
  // Records may be held by nothing else, and hold objects of Python.
  ~Watcher() {
    if (call.parents.empty() && call.bad.empty()) return;
    const py::gil_scoped_acquire lock;
    call.parents.clear();
    call.bad.clear();
  }
  int slot;
  Observer* observer;
  Call call;
};

// Those of this thread; in a thread of autograd's engine, those that wait for it.
bool concerned(int slot, const Observer& observer) {
  return own_slots ? (own_slots >> slot) & 1u : observer.in_backward();
}

void observe(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard inside(kObserved);
  std::array<std::optional<Watcher>, kSlots> watchers;
  for (const int slot : c10::irange(kSlots)) {
    Observer* observer = Observer::at_slot(slot);
    if (observer == nullptr || !concerned(slot, *observer)) continue;
    Call& call = watchers[slot].emplace(slot, observer).call;
    if (!observer->before(op, torch::jit::last(*stack, op.schema().arguments().size()), call)) watchers[slot].reset();
  }
  op.redispatchBoxed(keys & kBelow, stack);
  for (auto watcher = watchers.rbegin(); watcher != watchers.rend(); ++watcher)
    if (*watcher && Observer::at_slot((*watcher)->slot) == (*watcher)->observer)
      (*watcher)->observer->after(torch::jit::last(*stack, op.schema().returns().size()), (*watcher)->call);
}

// Once for the process; without an observer the key is in no thread's set, and nothing of this is on any path.
void stand_in_the_dispatcher() {
  static torch::Library* const every = [] {
    auto* library = new torch::Library(torch::Library::IMPL, "_", kObserved, __FILE__, __LINE__);
    library->fallback(torch::CppFunction::makeFromBoxedFunction<&observe>());
    return library;
  }();
  // A transposed weight stands before nearly every product; its gradient is a view too.
  static torch::Library* const passed = [] {
    auto* library = new torch::Library(torch::Library::IMPL, "aten", kObserved, __FILE__, __LINE__);
    for (const char* name : {"t", "detach", "alias"}) library->impl(name, torch::CppFunction::makeFallthrough());
    return library;
  }();
  (void)every;
  (void)passed;
}

const char* phase_name(Phase phase) {
  constexpr std::array names{"forward", "backward", "optimizer", "source"};
  return names[static_cast<size_t>(phase)];
}

py::list listed(const Series& series) {
  py::list list;
  for (const auto& [step, value] : series) list.append(py::make_tuple(step, value));
  return list;
}

}  // namespace

Observer* Observer::at_slot(int slot) {
  Observer* observer = slots[slot];
  return observer != nullptr && observer->forks_ == forks ? observer : nullptr;
}

Observer::Observer(py::object host, py::object kind_of_file, size_t most_records)
    : host_(std::move(host)), lines_(std::move(kind_of_file)), most_records_(most_records), forks_(forks) {
  static const int once = pthread_atfork(nullptr, nullptr, [] { ++forks; });
  (void)once;
}

// Records and their twins in Python hold each other.
Observer::~Observer() {
  stop();
  *alive_ = nullptr;
  for (const RecordRef& record : records_) {
    record->parents.clear();
    record->twin = py::object();
  }
}

bool Observer::start() {
  stand_in_the_dispatcher();
  for (const int slot : c10::irange(kSlots)) {
    if (slots[slot] != nullptr) continue;
    slots[slot] = this;
    slot_ = slot;
    own_slots |= 1u << slot;
    c10::impl::tls_set_dispatch_key_included(kObserved, true);
    return true;
  }
  return false;
}

void Observer::stop() {
  if (slot_ < 0) return;
  *alive_ = nullptr;
  slots[slot_] = nullptr;
  own_slots &= ~(1u << slot_);
  slot_ = -1;
  if (own_slots == 0) c10::impl::tls_set_dispatch_key_included(kObserved, false);
}

bool Observer::here() const { return slot_ >= 0 && forks_ == forks && (own_slots >> slot_) & 1u; }

const Operation& Observer::operation_of(const c10::OperatorHandle& handle) {
  const auto found = operations_.find(handle);
  if (found != operations_.end()) return found->second;
  Operation& operation = operations_[handle];
  operation.schema = &handle.schema();
  const py::dict known = host_.attr("learn")(handle.schema().name(), handle.schema().overload_name());
  Traits& traits = operation.traits;
  operation.function = known["function"];
  operation.described = known["traits"];
  traits.name = known["name"].cast<std::string>();
  traits.kind = static_cast<Kind>(known["kind"].cast<int>());
  traits.keeps_old = known["keeps_old"].cast<bool>();
  traits.zeros = static_cast<Zeros>(known["zeros"].cast<int>());
  traits.reach = static_cast<Reach>(known["reach"].cast<int>());
  traits.writes = known["writes"].cast<std::vector<size_t>>();
  traits.rounds_ones = known["rounds_ones"].cast<bool>();
  traits.scales = known["scales"].cast<bool>();
  traits.converts = traits.name == "_to_copy" || traits.name == "copy_";
  traits.reads_out = traits.name == "_local_scalar_dense";
  traits.multiplies = traits.name == "mul";
  traits.unscales = traits.name == "_amp_foreach_non_finite_check_and_unscale_";
  traits.ends_step = traits.name == "_amp_update_scale_";
  return operation;
}

void Observer::name(const at::Tensor& tensor, const std::string& kind, const std::string& name) {
  if (!plain(tensor)) return;
  if (kind == "parameter")
    leaves_.insert_or_assign(tensor.unsafeGetTensorImpl(),
                             c10::weak_intrusive_ptr<c10::TensorImpl>(tensor.getIntrusivePtr()));
  Cell& cell = memory_.cell(tensor);
  cell.kind = kind;
  cell.name = name;
}

py::object Observer::find(const at::Tensor& tensor) {
  const Cell* cell = plain(tensor) ? memory_.find(tensor) : nullptr;
  if (cell == nullptr) return py::none();
  py::object record = py::none();
  if (cell->record) record = twin(cell->record);
  return py::make_tuple(record, cell->bad, cell->kind, cell->name);
}

py::list Observer::bad_records() {
  py::list found;
  for (const Cell* cell : memory_.bad_cells()) found.append(twin(cell->record));
  return found;
}

bool Observer::any_bad() { return ever_bad_ && !memory_.bad_cells().empty(); }

double Observer::unscaled(const at::Tensor& loss) {
  Cell* cell = plain(loss) ? memory_.find(loss) : nullptr;
  if (cell == nullptr || !cell->record || cell->bad) return -1;
  double value = look(loss).absmax;
  for (RecordRef record = cell->record; record && record->place.phase == Phase::optimizer;
       record = record->parents.empty() ? nullptr : record->parents[0])
    if (record->multiplied >= 0) value = record->multiplied;
  return value;
}

bool Observer::any_gradient_of_zeros() {
  for (auto leaf = leaves_.begin(); leaf != leaves_.end();) {
    if (leaf->second.expired()) {
      leaf = leaves_.erase(leaf);
      continue;
    }
    const at::Tensor gradient = at::Tensor(leaf->second.lock()).grad();
    const Cell* cell = gradient.defined() && plain(gradient) ? memory_.find(gradient) : nullptr;
    if (cell && cell->record && cell->record->zero && !cell->bad && cell->absmax == 0) return true;
    ++leaf;
  }
  return false;
}

py::object Observer::twin(const RecordRef& record) {
  if (!record->twin) record->twin = host_.attr("recall")(record);
  return record->twin;
}

size_t Observer::SiteHash::operator()(const Site& site) const {
  const size_t numbers = (static_cast<size_t>(site.module) << 24) ^ (static_cast<size_t>(site.line) << 2) ^
                         static_cast<size_t>(site.phase);
  return numbers * 0x9e3779b97f4a7c15u ^ reinterpret_cast<size_t>(site.op);
}

py::list Observer::series_of(const Record& record) const {
  const Place& place = record.place;
  const auto found = sites_.find({place.phase, place.module, place.line, record.op});
  return found == sites_.end() ? py::list() : listed(found->second);
}

py::list Observer::sites() const {
  py::list all;
  for (const auto& [site, series] : sites_)
    all.append(py::make_tuple(phase_name(site.phase), site.module, site.op, site.line, listed(series)));
  return all;
}

py::dict Observer::modules() const {
  py::dict all;
  for (size_t i = 1; i < module_series_.size(); ++i)
    if (!module_series_[i].empty()) all[py::int_(i)] = listed(module_series_[i]);
  return all;
}

py::dict Observer::parameters() {
  py::dict all;
  for (const auto& [name, parameter] : parameters_) {
    py::object update = py::none();
    if (parameter.update) update = twin(parameter.update);
    all[py::str(name)] = py::make_tuple(listed(parameter.series), update);
  }
  return all;
}

void bind_observe(py::module_& m) {
  m.def("observed", &observed);
  m.def("followed", [] { return observed() || outputs_followed(); });
  py::class_<Record, RecordRef>(m, "ObservedRecord")
      .def_readonly("index", &Record::index)
      .def_readonly("op", &Record::op)
      .def_property_readonly("dtype", [](const Record& record) { return std::string(c10::toString(record.dtype)); })
      .def_property_readonly("place",
                             [](const Record& record) {
                               const Place& place = record.place;
                               return py::make_tuple(place.step, phase_name(place.phase), place.module, place.line,
                                                     place.node);
                             })
      .def_readonly("parents", &Record::parents)
      .def_readonly("zero", &Record::zero)
      .def_readonly("absmax", &Record::absmax)
      .def_readonly("multiplied", &Record::multiplied)
      .def_readonly("value", &Record::value)
      .def_readonly("subject", &Record::subject)
      .def_readonly("consumed", &Record::consumed)
      .def_readonly("derived", &Record::derived)
      .def_readonly("nothing", &Record::nothing);

  py::class_<Observer>(m, "Observer")
      .def(py::init<py::object, py::object, size_t>(), py::arg("host"), py::arg("kind_of_file"),
           py::arg("most_records"))
      .def("start", &Observer::start)
      .def("stop", &Observer::stop)
      .def("here", &Observer::here)
      .def("follow", &Observer::follow)
      .def("adopt", &Observer::adopt)
      .def("forget", &Observer::forget)
      .def("remember", &Observer::remember)
      .def("follow_backward", &Observer::follow_backward)
      .def("next_step", &Observer::next_step)
      .def("name", &Observer::name)
      .def("find", &Observer::find)
      .def("twin", &Observer::twin)
      .def("bad_records", &Observer::bad_records)
      .def("any_bad", &Observer::any_bad)
      .def("unscaled", &Observer::unscaled)
      .def("any_gradient_of_zeros", &Observer::any_gradient_of_zeros)
      .def("begin_update", &Observer::begin_update)
      .def("end_update", &Observer::end_update)
      .def("unmoved", &Observer::unmoved)
      .def("series_of", &Observer::series_of)
      .def("sites", &Observer::sites)
      .def("modules", &Observer::modules)
      .def("parameters", &Observer::parameters)
      .def("line", &Observer::line)
      .def("node", &Observer::node)
      .def_property_readonly("depth", &Observer::depth)
      .def_readonly("operations", &Observer::operations)
      .def_readwrite("step", &Observer::step)
      .def_readwrite("counting", &Observer::counting)
      .def_readwrite("ended", &Observer::ended)
      .def_readwrite("scaling", &Observer::scaling)
      .def_readwrite("in_optimizer", &Observer::in_optimizer)
      .def_readonly("learning_rate", &Observer::learning_rate)
      .def_readwrite("paused", &Observer::paused);
}

}  // namespace mlpkit::observing
