// The observer of operations: a kernel in the dispatcher sees each with its arguments and results; Python is called
// only where something is wrong, is met for the first time, or a step ends. Part of the module mlpkit._C.
#pragma once
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <typeindex>

#include "ops/observed.h"

namespace mlpkit::observing {

namespace py = pybind11;

// Lines of the program, numbered from 1. Files are of five kinds, by the judgement of a Python function.
class Lines {
 public:
  enum Kind : int { user, passed, update, scaler, guard };
  struct Spot {
    int line = 0;
    bool updating = false, scaling = false, guarding = false;
  };
  explicit Lines(py::object kind_of_file) : kind_of_file_(std::move(kind_of_file)) {}
  Spot here();                                     // the nearest user frame of this thread
  std::pair<std::string, int> at(int line) const;  // file and line; "" and 0 for 0

 private:
  Kind kind_of(PyCodeObject* code);
  py::object kind_of_file_;
  std::unordered_map<PyCodeObject*, Kind> kinds_;  // code objects are kept
  std::unordered_map<PyCodeObject*, std::unordered_map<int, int>> numbers_;
  std::vector<std::pair<PyCodeObject*, int>> spots_;
};

// An operation as Python knows it.
struct Operation {
  Traits traits;
  py::object function, described;
  const c10::FunctionSchema* schema = nullptr;
};

// A non-finite input of an operation.
struct BadInput {
  RecordRef record;
  Sight sight;
};

struct Call {
  const Operation* operation = nullptr;
  c10::SmallVector<c10::IValue, 12> arguments;
  c10::SmallVector<at::Tensor, 4> reads, mutated;
  c10::SmallVector<at::Tensor, 2> old;  // parallel to mutated; undefined where it was not kept
  std::vector<RecordRef> parents;
  std::vector<BadInput> bad;
  Place place;
  bool builds_graph = false;
};

class Observer {
 public:
  Observer(py::object host, py::object kind_of_file, size_t most_records);
  ~Observer();
  Observer(const Observer&) = delete;
  Observer& operator=(const Observer&) = delete;

  bool start();  // false where as many as can be are at work
  void stop();
  bool here() const;  // whether this thread is observed
  bool in_backward() const { return !depths_.empty(); }
  // A forked process inherits the observers, but not the program that is traced.
  static Observer* at_slot(int slot);

  // False where what the operation does is of no interest.
  bool before(const c10::OperatorHandle& handle, c10::ArrayRef<c10::IValue> arguments, Call& call);
  void after(c10::ArrayRef<c10::IValue> results, Call& call);

  // What the program tells about itself.
  // Module.__call__ in place of the one given: it goes by here on its way in and out.
  py::object follow(py::object call);
  void enter(py::handle module);
  void leave(py::handle module, py::handle output);
  void adopt(py::handle module, int name);
  void forget(uintptr_t module) { modules_.erase(module); }
  void remember(py::handle root, const std::vector<at::Tensor>& tensors);
  // The engine's entry in place of the one given.
  py::object follow_backward(py::object engine);
  void begin_backward(py::handle roots);
  void end_backward(bool done);
  void next_step();
  void name(const at::Tensor& tensor, const std::string& kind, const std::string& name);
  int depth() const { return static_cast<int>(stack_.size()); }

  // What Python asks for.
  py::object find(const at::Tensor& tensor);
  py::list bad_records();
  bool any_bad();
  // The magnitude of a loss before a loss scale multiplied it; -1 where it is not known, or bad.
  double unscaled(const at::Tensor& loss);
  // Whether a parameter's gradient was last written with zeros, and nothing else.
  bool any_gradient_of_zeros();
  // An optimizer's step begins, or is over. Whether Python must look: the optimizer is not what it was when these were
  // last asked, or parameters with a gradient did not move.
  bool begin_update(py::handle optimizer);
  bool end_update(py::handle optimizer);
  // Parameters that the last update did not move, and of how many.
  std::pair<std::vector<at::Tensor>, size_t> unmoved();
  py::object twin(const RecordRef& record);
  py::list series_of(const Record& record) const;
  py::list sites() const;
  py::dict modules() const;
  py::dict parameters();
  std::pair<std::string, int> line(int number) const { return lines_.at(number); }
  std::string node(int number) const { return number ? nodes_[number - 1] : ""; }

  int step = 0;
  bool counting = true, ended = false, scaling = false, in_optimizer = false;
  int64_t operations = 0;
  int paused = 0;
  std::optional<double> learning_rate;  // the largest one of the last optimizer

 private:
  struct Site {
    Phase phase;
    int module, line;
    const char* op;
    bool operator==(const Site&) const = default;
  };
  struct SiteHash {
    size_t operator()(const Site& site) const;
  };
  // A parameter before its update: a few of its bits, or all of them.
  struct Moving {
    at::Tensor parameter;
    std::vector<char> bits;
    bool whole;
  };
  struct Parameter {
    Series series;
    RecordRef update;
  };
  using Sequence = std::vector<std::pair<uint64_t, Place>>;

  const Operation& operation_of(const c10::OperatorHandle& handle);
  void gather(Call& call);
  void locate(Call& call);
  void backward_place(Call& call, const torch::autograd::Node& node);
  bool is_update(const Call& call) const;
  bool is_conversion(const Call& call) const;
  bool is_fresh(const Call& call, Phase phase) const;
  void meet(Call& call, const at::Tensor& tensor, Cell& cell);
  bool is_new(py::handle optimizer);
  void keep_bits(py::handle parameters);
  void keep_old(Call& call);
  void meet_again(Call& call);
  RecordRef source(const at::Tensor& tensor, Cell& cell, const char* op, const Place& place, const Sight& sight);
  void note_sequence(const Place& place);
  const Place* origin_of(uint64_t sequence) const;
  RecordRef record(const char* op, const at::Tensor& tensor, const Place& place, std::vector<RecordRef> parents);
  void wrote(const at::Tensor& tensor, const RecordRef& made, const Sight& sight);
  Lines::Spot spot_of(const Call& call, bool inside);
  void retire();
  int node_name(const torch::autograd::Node& node);
  int node_number(const std::string& full);
  bool may_have_rounded(const Call& call, const Record& made) const;
  void settle(Call& call, const std::vector<at::Tensor>& written, size_t outputs, const std::vector<Sight>& sights);
  py::object call_of(const Call& call, const std::vector<at::Tensor>& written, size_t outputs) const;
  template <class Work>
  void quietly(Work work);
  template <class... Args>
  void tell(const char* method, Args&&... args);

  py::object host_;
  Lines lines_;
  std::shared_ptr<Observer*> alive_ = std::make_shared<Observer*>(this);
  size_t most_records_;
  int slot_ = -1;
  int forks_;
  std::unordered_map<c10::OperatorHandle, Operation> operations_;
  Memory memory_;
  std::deque<RecordRef> records_;
  int64_t step_began_ = 0;
  std::unordered_map<uintptr_t, int> modules_;
  std::unordered_map<uintptr_t, std::vector<std::pair<c10::weak_intrusive_ptr<c10::TensorImpl>, void*>>> roots_;
  std::unordered_map<c10::TensorImpl*, c10::weak_intrusive_ptr<c10::TensorImpl>> leaves_;
  bool relearn_ = true;  // names of a root's tensors may have changed
  bool ever_bad_ = false;
  std::vector<Moving> moving_;
  std::vector<at::Tensor> still_;
  size_t moved_ = 0;                                                   // of how many still_ are the rest
  std::unordered_map<PyObject*, std::vector<Py_ssize_t>> optimizers_;  // what was last seen of each
  std::optional<Lines::Spot> update_spot_;  // of the step of one of torch's optimizers, which no user code is in
  int64_t updates_ = 0, children_ = 0;
  bool suspicious_ = false;  // the last update left a parameter where it was
  std::vector<int> stack_;
  std::vector<size_t> depths_;  // of the stack when each running backward pass began
  int backward_line_ = 0;
  Sequence sequence_, older_;
  std::vector<std::string> nodes_;
  std::unordered_map<std::string, int> node_numbers_;
  std::unordered_map<std::type_index, int> node_types_;
  std::unordered_map<Site, Series, SiteHash> sites_;
  std::vector<Series> module_series_;
  std::unordered_map<std::string, Parameter> parameters_;
};

void bind_observe(py::module_& m);

}  // namespace mlpkit::observing
