// Where an operation runs: step, phase, module, line, autograd node. Part of the module mlpkit._C.
#include <ATen/SequenceNumber.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>

#include <algorithm>
#include <limits>

#include "bindings_observe_tell.h"

namespace mlpkit::observing {
namespace {

constexpr size_t kMostNodes = 1 << 17;  // of forward operations that backward ones can be mapped to, per step

std::string parent_of(const std::string& name) {
  const size_t dot = name.rfind('.');
  return dot == std::string::npos ? "" : name.substr(0, dot);
}

bool from_outside(const Record& record) { return record.place.phase == Phase::source || !record.subject.empty(); }

}  // namespace

// Fills in call.place, given call.parents (the writers of its inputs, and stand-ins for inputs not met before).
void Observer::locate(Call& call) {
  const auto node = torch::autograd::get_current_node();
  const bool inside = stack_.size() > (depths_.empty() ? 0 : depths_.back());
  // A module that runs during backward is a checkpointed forward, run again.
  if (node && !inside) return backward_place(call, *node);
  const Lines::Spot spot = spot_of(call, inside);
  scaling = scaling || spot.scaling;
  Phase phase = Phase::forward;
  if (!inside) {
    if (spot.updating || (spot.guarding && !call.builds_graph) || in_optimizer || is_update(call))
      phase = Phase::optimizer;
    else if (is_conversion(call))
      phase = Phase::source;
  }
  if (ended && counting && is_fresh(call, phase)) {
    next_step();
    tell("stepped");
  }
  call.place = {step, phase, stack_.empty() ? 0 : stack_.back(), spot.line, 0};
  note_sequence(call.place);
}

// Inside a step of torch's optimizers every operation stands on the line that called it.
Lines::Spot Observer::spot_of(const Call& call, bool inside) {
  const bool same = in_optimizer && update_spot_ && !inside && !call.builds_graph;
  return same ? *update_spot_ : lines_.here();
}

void Observer::backward_place(Call& call, const torch::autograd::Node& node) {
  const int name = node_name(node);
  call.place = {step, Phase::backward, 0, backward_line_, name};
  const uint64_t number = node.sequence_nr();
  if (number >= std::numeric_limits<int64_t>::max()) {
    const auto* accumulates = dynamic_cast<const torch::autograd::AccumulateGrad*>(&node);
    Cell* cell = accumulates && plain(accumulates->variable) ? memory_.find(accumulates->variable) : nullptr;
    if (cell) call.place.module = host_.attr("number_of")(parent_of(cell->name)).cast<int>();
  } else if (const Place* origin = origin_of(number)) {
    call.place.module = origin->module;
    call.place.line = origin->line;
  }
}

int Observer::node_name(const torch::autograd::Node& node) {
  // All of Python's own functions are of one type, which torch keeps to itself.
  if (std::string_view(typeid(node).name()).ends_with("6PyNodeE")) return node_number(node.name());
  int& number = node_types_[typeid(node)];
  if (number == 0) number = node_number(node.name());
  return number;
}

int Observer::node_number(const std::string& full) {
  const std::string prefix = "torch::autograd::";
  const std::string name = full.rfind(prefix, 0) == 0 ? full.substr(prefix.size()) : full;
  int& number = node_numbers_[name];
  if (number == 0) {
    nodes_.push_back(name);
    number = static_cast<int>(nodes_.size());
  }
  return number;
}

// A hand-written update, clip or unscale: no graph is built and gradients flow in.
bool Observer::is_update(const Call& call) const {
  if (call.builds_graph) return false;
  return std::any_of(call.parents.begin(), call.parents.end(), [&](const RecordRef& record) {
    const Place& place = record->place;
    return place.step == step &&
           (place.phase == Phase::backward || (place.phase == Phase::optimizer && record->subject.empty()));
  });
}

// A cast of data or of a parameter, outside any forward.
bool Observer::is_conversion(const Call& call) const {
  if (!call.operation->traits.converts || call.builds_graph) return false;
  if (call.parents.empty()) return call.operation->traits.name == "_to_copy";  // integers
  return std::all_of(call.parents.begin(), call.parents.end(),
                     [](const RecordRef& record) { return !record->derived || !record->subject.empty(); });
}

// Work of the next step: neither an update nor something that merely looks at this step's results.
bool Observer::is_fresh(const Call& call, Phase phase) const {
  if (phase == Phase::optimizer) return false;
  if (!stack_.empty()) return true;
  const auto result = [&](const RecordRef& record) { return record->place.step == step && !from_outside(*record); };
  return call.builds_graph ? !std::all_of(call.parents.begin(), call.parents.end(), result)
                           : std::none_of(call.parents.begin(), call.parents.end(), result);
}

// Autograd made the node of this operation, or of the custom function that it runs in, just before; the first operation
// after it is the one.
void Observer::note_sequence(const Place& place) {
  const uint64_t next = at::sequence_number::peek();
  if (next == 0 || (!sequence_.empty() && sequence_.back().first >= next - 1)) return;
  if (sequence_.size() > kMostNodes) {
    older_ = std::move(sequence_);
    sequence_.clear();
  }
  sequence_.emplace_back(next - 1, place);
}

const Place* Observer::origin_of(uint64_t number) const {
  for (const Sequence* numbers : {&sequence_, &older_}) {
    const auto found = std::lower_bound(numbers->begin(), numbers->end(), number,
                                        [](const auto& entry, uint64_t value) { return entry.first < value; });
    if (found != numbers->end() && found->first == number) return &found->second;
  }
  return nullptr;
}

void Observer::next_step() {
  ++step;
  ended = false;
  older_ = std::move(sequence_);
  sequence_.clear();
  retire();
}

// Records older than the previous step let go of each other.
void Observer::retire() {
  while (!records_.empty() && records_.front()->index < step_began_) {
    records_.front()->parents.clear();
    if (records_.front()->twin) records_.front()->twin.attr("forget")();
    records_.pop_front();
  }
  step_began_ = operations;
}

void Observer::enter(py::handle module) {
  const auto known = modules_.find(reinterpret_cast<uintptr_t>(module.ptr()));
  if (stack_.empty()) {
    const auto root = roots_.find(reinterpret_cast<uintptr_t>(module.ptr()));
    const bool same =
        !relearn_ && root != roots_.end() &&
        std::all_of(root->second.begin(), root->second.end(), [](const auto& entry) {
          const auto& [tensor, storage] = entry;
          return !tensor.expired() && tensor._unsafe_get_target()->unsafe_storage().unsafeGetStorageImpl() == storage;
        });
    if (!same) {
      relearn_ = false;
      tell("on_root", module);
    }
  }
  const auto now = known != modules_.end() ? known : modules_.find(reinterpret_cast<uintptr_t>(module.ptr()));
  stack_.push_back(now != modules_.end() ? now->second : stack_.empty() ? 0 : stack_.back());
}

void Observer::leave(py::handle module, py::handle output) {
  if (!stack_.empty()) stack_.pop_back();
  if (output && stack_.empty() && !at::GradMode::is_enabled() && torch::autograd::get_current_graph_task_id() == -1)
    tell("on_output", module, output);
}

void Observer::adopt(py::handle module, int name) { modules_[reinterpret_cast<uintptr_t>(module.ptr())] = name; }

void Observer::remember(py::handle root, const std::vector<at::Tensor>& tensors) {
  auto& known = roots_[reinterpret_cast<uintptr_t>(root.ptr())];
  known.clear();
  for (const at::Tensor& tensor : tensors)
    known.emplace_back(tensor.getIntrusivePtr(),
                       tensor.has_storage() ? tensor.storage().unsafeGetStorageImpl() : nullptr);
}

}  // namespace mlpkit::observing
