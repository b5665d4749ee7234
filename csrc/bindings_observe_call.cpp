// One operation: its inputs before it runs, what it wrote after. Part of the module mlpkit._C.
#include <torch/csrc/DynamicTypes.h>
#include <torch/csrc/jit/python/pybind_utils.h>
#include <torch/csrc/utils/tensor_memoryformats.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "bindings_observe_tell.h"

namespace mlpkit::observing {
namespace {

// Calls `use` with each tensor of a value, one level of lists deep, as schemas have them.
template <class Use>
void each_tensor(const c10::IValue& value, Use use) {
  if (value.isTensor()) {
    if (!value.toTensor().defined() || !value.toTensor().unsafeGetTensorImpl()->is_wrapped_number())
      use(value.toTensor());
  } else if (value.isList()) {
    for (const c10::IValue& item : value.toListRef())
      if (item.isTensor()) use(item.toTensor());
  }
}

// What a program trains; views made without a graph look like leaves too.
bool is_leaf(const at::Tensor& tensor) { return tensor.requires_grad() && tensor.is_leaf() && !tensor.is_view(); }

const char* word(const Sight& sight) { return sight.nan ? "NaN" : sight.posinf ? "Inf" : sight.neginf ? "-Inf" : ""; }

// The magnitude of a tensor that holds a single number, such as a loss; -1 for others.
double number(const c10::IValue& value) {
  if (!value.isTensor() || !plain(value.toTensor()) || value.toTensor().numel() != 1) return -1;
  const Sight sight = look(value.toTensor());
  return sight.nan ? NAN : sight.bad() ? INFINITY : sight.absmax;
}

// A number that some dtype rounds to zero, such as an eps.
bool has_tiny(c10::ArrayRef<c10::IValue> arguments) {
  return std::any_of(arguments.begin(), arguments.end(), [](const c10::IValue& value) {
    const double size = std::abs(number_in(value).value_or(0));
    return size > 0 && size < 1e-6;
  });
}

bool has_almost_one(c10::ArrayRef<c10::IValue> arguments) {
  return std::any_of(arguments.begin(), arguments.end(), [](const c10::IValue& value) {
    const double distance = std::abs(std::abs(number_in(value).value_or(1)) - 1);
    return distance > 0 && distance < 1e-2;
  });
}

bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  return a.is_cpu() && b.is_cpu() && a.is_contiguous() && b.is_contiguous() && a.nbytes() == b.nbytes() &&
         std::memcmp(a.const_data_ptr(), b.const_data_ptr(), a.nbytes()) == 0;
}

bool builds_graph(c10::ArrayRef<c10::IValue> arguments) {
  if (!at::GradMode::is_enabled()) return false;
  bool found = false;
  for (const c10::IValue& value : arguments)
    each_tensor(value, [&](const at::Tensor& tensor) {
      found = found || (tensor.defined() && tensor.requires_grad() && plain(tensor));
    });
  return found;
}

bool same(const at::Tensor& a, const at::Tensor& b) { return a.unsafeGetTensorImpl() == b.unsafeGetTensorImpl(); }

bool among(const at::Tensor& tensor, c10::ArrayRef<at::Tensor> others) {
  return std::any_of(others.begin(), others.end(), [&](const at::Tensor& other) { return same(tensor, other); });
}

py::tuple told(const Sight& sight) {
  return py::make_tuple(sight.nan, sight.posinf, sight.neginf, sight.zero, sight.absmax, sight.first);
}

// An argument as Python's own dispatch would give it.
py::object python_of(const c10::Argument& argument, const c10::IValue& value) {
  c10::TypePtr type = argument.real_type();
  if (auto optional = type->cast<c10::OptionalType>()) type = optional->getElementType();
  if (value.isInt()) switch (type->kind()) {
      case c10::TypeKind::ScalarTypeType:
        return py::reinterpret_borrow<py::object>(
            reinterpret_cast<PyObject*>(torch::getTHPDtype(static_cast<at::ScalarType>(value.toInt()))));
      case c10::TypeKind::LayoutType:
        return py::reinterpret_borrow<py::object>(
            reinterpret_cast<PyObject*>(torch::getTHPLayout(static_cast<at::Layout>(value.toInt()))));
      case c10::TypeKind::MemoryFormatType:
        return py::reinterpret_borrow<py::object>(
            torch::utils::getTHPMemoryFormat(static_cast<at::MemoryFormat>(value.toInt())));
      default:
        break;
    }
  if (value.isTensor())
    if (const auto number = number_in(value))
      return value.toTensor().scalar_type() == at::kDouble ? py::object(py::float_(*number))
                                                           : py::object(py::int_(static_cast<int64_t>(*number)));
  return torch::jit::toPyObject(value);
}

bool is_default(const c10::Argument& argument, const c10::IValue& value) {
  if (!argument.default_value()) return false;
  const c10::IValue& usual = *argument.default_value();
  if (usual.isNone() || value.isNone()) return usual.isNone() && value.isNone();
  const bool simple =
      (usual.isDouble() || usual.isInt() || usual.isBool()) && (value.isDouble() || value.isInt() || value.isBool());
  return simple && usual.toScalar().toDouble() == value.toScalar().toDouble();
}

}  // namespace

bool Observer::before(const c10::OperatorHandle& handle, c10::ArrayRef<c10::IValue> arguments, Call& call) {
  const py::gil_scoped_acquire lock;
  if (paused) return false;
  const Operation& operation = operation_of(handle);
  const Traits& traits = operation.traits;
  if (traits.kind == Kind::skip) return false;
  call.operation = &operation;
  memory_.tidy();
  if (traits.kind == Kind::allocate) {  // set_ and resize_ give back what they were given
    for (const c10::IValue& value : arguments)
      each_tensor(value, [&](const at::Tensor& tensor) { call.mutated.push_back(tensor); });
    return true;
  }
  if (traits.kind == Kind::view) {
    if (builds_graph(arguments) && !torch::autograd::get_current_node())
      note_sequence({step, Phase::forward, stack_.empty() ? 0 : stack_.back(), lines_.here().line, 0});
    return false;
  }
  call.arguments.assign(arguments.begin(), arguments.end());
  call.builds_graph = builds_graph(arguments);
  gather(call);
  keep_old(call);
  return true;
}

// The tensors it reads, their cells and writers, and its place.
void Observer::gather(Call& call) {
  for (const c10::IValue& value : call.arguments)
    each_tensor(value, [&](const at::Tensor& tensor) {
      if (plain(tensor)) call.reads.push_back(tensor);
    });
  const Traits& traits = call.operation->traits;
  for (const size_t position : traits.writes)
    if (position < call.arguments.size())
      each_tensor(call.arguments[position], [&](const at::Tensor& tensor) {
        if (plain(tensor)) call.mutated.push_back(tensor);
      });
  int64_t child = ++children_;
  const auto add = [&](const RecordRef& record) {
    if (record->child != child) call.parents.push_back(record);
    record->child = child;
  };
  bool strange = false;
  for (const at::Tensor& tensor : call.reads) {
    const Cell* cell = memory_.find(tensor);
    strange = strange || cell == nullptr;
    if (cell == nullptr || !cell->record) continue;
    if (!cell->record->consumed && cell->record->twin) cell->record->twin.attr("consumed") = true;
    cell->record->consumed = true;
    add(cell->record);
  }
  if (strange) {  // a stand-in for inputs not met yet, so that their conversion is recognised as such
    auto stranger = std::make_shared<Record>();
    stranger->op = "input";
    stranger->place.step = step;
    call.parents.push_back(std::move(stranger));
  }
  locate(call);
  call.parents.clear();
  child = ++children_;
  for (const at::Tensor& tensor : call.reads) {
    Cell& cell = memory_.cell(tensor);
    if (cell.kind.empty() && call.place.phase != Phase::backward && is_leaf(tensor)) {
      relearn_ = true;
      tell("unknown_leaf", tensor);
    }
    if (!cell.record) meet(call, tensor, cell);
    if (cell.record) add(cell.record);
    if (!cell.bad || !cell.record) continue;
    const Sight sight = look(tensor);
    if (sight.bad()) call.bad.push_back({cell.record, sight});
  }
}

// First sight of memory that no observed operation wrote.
void Observer::meet(Call& call, const at::Tensor& tensor, Cell& cell) {
  if (!call.operation->traits.keeps_old && among(tensor, call.mutated)) return;  // what it holds is of no interest
  const Sight sight = look(tensor);
  const RecordRef met = source(tensor, cell,
                               cell.bad            ? "empty"
                               : cell.kind.empty() ? "input"
                                                   : "param",
                               call.place, sight);
  cell.bad = sight.bad();
  cell.fresh = false;
  const bool whole = tensor.nbytes() >= tensor.storage().nbytes();
  cell.absmax = whole ? sight.absmax : INFINITY;
  cell.least = whole ? sight.least : 0;
  if (cell.kind == "parameter") {
    Series& series = parameters_[cell.name].series;
    if (series.empty()) series.emplace_back(-1, sight.absmax);
  }
  if (sight.bad()) tell("external", twin(met), tensor, told(sight));
}

// The record of what came from outside; the cell's from now on.
RecordRef Observer::source(const at::Tensor& tensor, Cell& cell, const char* op, const Place& at, const Sight& sight) {
  Place place = at;
  place.phase = Phase::source;
  place.node = 0;
  const size_t dot = cell.name.rfind('.');
  const bool owned = !cell.kind.empty() && dot != std::string::npos;
  place.module = owned ? host_.attr("number_of")(cell.name.substr(0, dot)).cast<int>() : 0;
  const RecordRef met = record(op, tensor, place, {});
  met->zero = sight.zero;
  met->absmax = sight.absmax;
  met->value = word(sight);
  met->nothing = sight.zero > 0 && sight.absmax == 0 && !sight.bad();
  met->subject = cell.name;
  cell.record = met;
  ever_bad_ = ever_bad_ || sight.bad();
  return met;
}

// Inputs that went bad since they were last written: by NumPy, another library or another thread.
void Observer::meet_again(Call& call) {
  for (const at::Tensor& tensor : call.reads) {
    const auto place = std::find_if(call.mutated.begin(), call.mutated.end(),
                                    [&](const at::Tensor& written) { return same(written, tensor); });
    const bool written = place != call.mutated.end();
    if (written && !call.operation->traits.keeps_old) continue;
    // Of what was overwritten unseen, because bounds said that it could not go bad, only the result is left to look at.
    const at::Tensor before = written && !call.old.empty() ? call.old[place - call.mutated.begin()] : tensor;
    const Sight sight = look(before);
    if (!sight.bad()) continue;
    Cell& cell = memory_.cell(tensor);
    const RecordRef met = source(tensor, cell, cell.kind.empty() ? "input" : "param", call.place, sight);
    cell.bad = true;
    tell("external", twin(met), before, told(sight));
    call.bad.push_back({met, sight});
  }
}

// Copies what the operation is about to overwrite, if its result may come out bad.
void Observer::keep_old(Call& call) {
  const Traits& traits = call.operation->traits;
  if (!traits.keeps_old || call.mutated.empty()) return;
  const bool by_hand = !in_optimizer && call.place.phase == Phase::optimizer;
  if (!by_hand && stays_finite(traits, call.arguments, memory_)) return;
  for (const at::Tensor& tensor : call.mutated) call.old.push_back(copy_of(tensor));
}

void Observer::after(c10::ArrayRef<c10::IValue> results, Call& call) {
  const Traits& traits = call.operation->traits;
  std::vector<at::Tensor> written;
  for (const c10::IValue& value : results)
    each_tensor(value, [&](const at::Tensor& tensor) {
      if (plain(tensor) && !among(tensor, call.mutated)) written.push_back(tensor);
    });
  if (traits.kind == Kind::allocate) {
    const py::gil_scoped_acquire lock;
    for (const at::Tensor& tensor : written) memory_.allocated(tensor);
    return;
  }
  const size_t outputs = written.size();
  written.insert(written.end(), call.mutated.begin(), call.mutated.end());
  std::vector<Sight> sights;
  for (const at::Tensor& tensor : written) sights.push_back(look(tensor));
  const py::gil_scoped_acquire lock;
  ++operations;
  if (traits.ends_step) ended = true;  // the scaler ends a step even where it skipped the optimizer's
  if (written.empty()) {
    if (traits.reads_out && !call.bad.empty()) {
      py::list records;
      for (const BadInput& bad : call.bad) records.append(twin(bad.record));
      tell("escaped", records, call.place.step, static_cast<int>(call.place.phase), call.place.module, call.place.line);
    }
    return;
  }
  settle(call, written, outputs, sights);
  call.parents.clear();
  call.bad.clear();
}

// Whether Python must ask if a number became 0 (or 1) that is not: zeros that the inputs do not explain, a whole result
// of zeros out of something, a bound that the dtype cannot hold.
bool Observer::may_have_rounded(const Call& call, const Record& made) const {
  const Traits& traits = call.operation->traits;
  const bool backward = call.place.phase == Phase::backward;
  if (!backward && traits.rounds_ones && has_almost_one(call.arguments)) return true;
  if (made.zero == 0) return false;
  int64_t inherited = 0;
  bool handed_on = call.parents.empty();
  for (const RecordRef& parent : call.parents) {
    inherited += parent->zero;
    handed_on = handed_on || parent->nothing;
  }
  if (made.nothing && !handed_on) return true;
  if (backward || (traits.scales && call.place.phase == Phase::optimizer)) return false;
  return traits.zeros == Zeros::any || (traits.zeros == Zeros::more && made.zero > inherited) ||
         (traits.zeros == Zeros::tiny && has_tiny(call.arguments));
}

// The record of what it wrote, Python's judgement where that is bad or was rounded to zero, and the memory it lies in.
void Observer::settle(Call& call, const std::vector<at::Tensor>& written, size_t outputs,
                      const std::vector<Sight>& sights) {
  const Traits& traits = call.operation->traits;
  bool bad = std::any_of(sights.begin(), sights.end(), [](const Sight& sight) { return sight.bad(); });
  if (bad && call.bad.empty()) meet_again(call);
  const RecordRef made = record(traits.name.c_str(), written[0], call.place, call.parents);
  bad = false;
  for (const Sight& sight : sights) {
    made->zero += sight.zero;
    made->absmax = std::max(made->absmax, sight.absmax);
    if (!bad) made->value = word(sight);
    bad = bad || sight.bad();
  }
  if (traits.multiplies && call.place.phase == Phase::optimizer) made->multiplied = number(call.arguments[0]);
  made->nothing = sights[0].zero > 0 && sights[0].absmax == 0 && !sights[0].bad();
  const bool rounded = !bad && may_have_rounded(call, *made);
  if (bad || rounded) {
    py::list seen, inputs;
    for (const Sight& sight : sights) seen.append(told(sight));
    for (const BadInput& input : call.bad) inputs.append(py::make_tuple(twin(input.record), told(input.sight)));
    tell(bad ? "judge" : "rounded", twin(made), call_of(call, written, outputs), seen, inputs);
  }
  const Place& place = call.place;
  note(sites_[{place.phase, place.module, place.line, made->op}], place.step, made->absmax);
  if (place.phase == Phase::forward && place.module) {
    if (module_series_.size() <= static_cast<size_t>(place.module)) module_series_.resize(place.module + 1);
    note(module_series_[place.module], place.step, made->absmax);
  }
  for (size_t i = 0; i < written.size(); ++i) {
    wrote(written[i], made, sights[i]);
    if (i >= outputs && !in_optimizer && !call.old.empty() && place.phase == Phase::optimizer &&
        same_bits(call.old[i - outputs], written[i]) && memory_.cell(written[i]).kind == "parameter")
      tell("unmoved", twin(made), call_of(call, written, outputs), written[i]);
  }
  if (traits.unscales && !call.bad.empty()) {
    py::list records;
    for (const BadInput& input : call.bad) records.append(twin(input.record));
    tell("unscaled", records, call.arguments[2].toTensor().item<double>());
  }
}

RecordRef Observer::record(const char* op, const at::Tensor& tensor, const Place& place,
                           std::vector<RecordRef> parents) {
  auto made = std::make_shared<Record>();
  made->index = operations;
  made->op = op;
  made->dtype = tensor.scalar_type();
  made->place = place;
  const std::string_view name = op;
  if (name != "input" && name != "empty")
    made->derived =
        name == "param" || place.module || (place.phase != Phase::forward && place.phase != Phase::source) ||
        std::any_of(parents.begin(), parents.end(), [](const RecordRef& parent) { return parent->derived; });
  made->parents = std::move(parents);
  records_.push_back(made);
  if (records_.size() > most_records_) {
    records_.front()->parents.clear();
    if (records_.front()->twin) records_.front()->twin.attr("forget")();
    records_.pop_front();
  }
  return made;
}

void Observer::wrote(const at::Tensor& tensor, const RecordRef& made, const Sight& sight) {
  const Cell* before = memory_.find(tensor);
  const double size = before && before->record ? before->absmax : NAN;
  Cell& cell = memory_.wrote(tensor, made, sight);
  ever_bad_ = ever_bad_ || sight.bad();
  if (cell.kind.empty()) return;
  if (made->subject.empty()) {
    made->subject = cell.name.empty() ? cell.kind : cell.name;
    if (made->twin) made->twin.attr("subject") = made->subject;
  }
  if (cell.kind == "parameter" && made->place.phase == Phase::optimizer) {
    ended = true;
    Parameter& parameter = parameters_[cell.name];
    if (parameter.series.empty() && std::isfinite(size)) parameter.series.emplace_back(-1, size);
    note(parameter.series, made->place.step, sight.absmax);
    parameter.update = made;
  }
  if (!sight.bad()) return;
  relearn_ = true;
  tell("reached", twin(made), cell.kind, cell.name);
}

// The call as Python's half of the observer takes it.
py::object Observer::call_of(const Call& call, const std::vector<at::Tensor>& written, size_t outputs) const {
  const auto& schema = call.operation->schema->arguments();
  py::list positional, reads, results, mutated, old;
  py::dict named;
  size_t given = 0;
  for (size_t i = 0; i < call.arguments.size(); ++i)
    if (!schema[i].kwarg_only() && !is_default(schema[i], call.arguments[i])) given = i + 1;
  for (size_t i = 0; i < call.arguments.size(); ++i) {
    if (!schema[i].kwarg_only()) {
      if (i < given) positional.append(python_of(schema[i], call.arguments[i]));
    } else if (!is_default(schema[i], call.arguments[i])) {
      named[schema[i].name().c_str()] = python_of(schema[i], call.arguments[i]);
    }
  }
  for (const at::Tensor& tensor : call.reads) reads.append(tensor);
  for (size_t i = 0; i < written.size(); ++i) (i < outputs ? results : mutated).append(written[i]);
  for (const at::Tensor& tensor : call.old) old.append(tensor);
  return host_.attr("call")(call.operation->function, call.operation->described, py::tuple(positional), named, reads,
                            mutated, call.builds_graph, results, old);
}

}  // namespace mlpkit::observing
