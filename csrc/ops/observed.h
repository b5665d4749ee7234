// What the observer of operations keeps: what an operation is, where it ran, what it wrote, and what memory holds
// (ops). All of it is touched with Python's global lock held, which is its mutex.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <pybind11/pybind11.h>

#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "ops/look.h"

namespace mlpkit::observing {

// What one look at a tensor shows. Extremes are those of the finite part; least is 0 where there is a zero.
struct Sight {
  int64_t nan = 0, posinf = 0, neginf = 0, zero = 0, first = -1;
  double absmax = 0, least = 0;
  bool bad() const { return nan + posinf + neginf > 0; }
};
// A number that Python's arithmetic put into a tensor, such as the 2 of x * 2; or a number as it is.
std::optional<double> number_in(const c10::IValue& value);
// Any other device's tensor is looked at on the host.
Sight look(const at::Tensor& tensor);
// A copy of a dense CPU tensor that no dispatcher sees.
at::Tensor copy_of(const at::Tensor& tensor);

enum class Phase : uint8_t { forward, backward, optimizer, source };
enum class Kind : uint8_t { compute, view, allocate, skip };
// Which zeros in the results of an operation may have been rounded: none, those beyond its inputs' zeros, any, or any
// where a tiny number was passed in.
enum class Zeros : uint8_t { none, more, any, tiny };
// How far the results of an in-place operation can reach, given its operands.
enum class Reach : uint8_t { unknown, own, sum, product, quotient, lerp, addcmul, addcdiv, adam, sgd };

struct Traits {
  std::string name;
  Kind kind = Kind::skip;
  bool keeps_old = true, converts = false, reads_out = false, scales = false, multiplies = false, unscales = false,
       ends_step = false, rounds_ones = false;  // rounds_ones: a bound such as 1 - 1e-8 may be rounded to 1
  Zeros zeros = Zeros::none;
  Reach reach = Reach::unknown;
  std::vector<size_t> writes;  // positions of the arguments it writes
};

// Names of modules, autograd nodes and lines are numbers here; 0 is none.
struct Place {
  int step = 0;
  Phase phase = Phase::source;
  int module = 0, line = 0, node = 0;
};

struct Record;
using RecordRef = std::shared_ptr<Record>;

// One operation that ran, or one tensor that came from outside; op is then "input", "param" or "empty".
struct Record {
  int64_t index = 0;
  const char* op = "";
  at::ScalarType dtype = at::kFloat;
  Place place;
  std::vector<RecordRef> parents;
  int64_t zero = 0;
  double absmax = 0;
  double multiplied = -1;  // magnitude of the number that a loss scale multiplied; negative for none
  const char* value = "";
  std::string subject;
  bool consumed = false, derived = false;
  bool nothing = false;   // the (first) result holds zeros only
  int64_t child = -1;     // the latest operation that read it
  pybind11::object twin;  // Python's record, once there is one
};

// One storage. kind: "", "parameter", "buffer" or "optimizer state".
struct Cell {
  explicit Cell(c10::weak_intrusive_ptr<c10::StorageImpl> of) : storage(std::move(of)) {}
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;
  RecordRef record;
  bool bad = false, fresh = false;  // may hold NaN or Inf; fresh: was allocated and not yet written
  std::string kind, name;
  double absmax = 0, least = 0;  // bounds of all that was written since the storage was last written whole
};

class Memory {
 public:
  Cell* find(const at::Tensor& tensor);
  Cell& cell(const at::Tensor& tensor);
  void allocated(const at::Tensor& tensor);
  // A partial write leaves older bad elements in place.
  Cell& wrote(const at::Tensor& tensor, const RecordRef& record, const Sight& sight);
  // Lets go of a few storages that are gone. What is kept of them lies between the blocks that the allocator hands out
  // again and again: kept for long, it drives the program to memory that no cache holds.
  void tidy();
  void sweep();
  std::vector<Cell*> bad_cells();

 private:
  std::unordered_map<c10::StorageImpl*, Cell> cells_;
  std::vector<c10::StorageImpl*> order_;  // the keys of cells_
  size_t next_ = 0;                       // where tidying goes on
};

// Rings of (step, absmax); several values in one step keep the largest.
using Series = std::deque<std::pair<int, double>>;
constexpr size_t kSeries = 256;
void note(Series& series, int step, double value);

// Whether an in-place operation cannot make NaN or Inf of what its operands are known to hold, so that nobody will ask
// for what it overwrote.
bool stays_finite(const Traits& traits, c10::ArrayRef<c10::IValue> arguments, Memory& memory);

}  // namespace mlpkit::observing
