// Bounds of in-place operations: |result| from |operands| (ops). Only where a bound passes the dtype's limit is the old
// value copied before it is overwritten.
#include <algorithm>
#include <cmath>
#include <limits>

#include "ops/observed.h"

namespace mlpkit::observing {
namespace {

constexpr double kUnknown = std::numeric_limits<double>::infinity();

struct Bounds {
  double most = 0, least = kUnknown;  // of magnitudes
  void join(double high, double low) {
    if (std::isnan(high)) high = kUnknown;
    most = std::max(most, high);
    least = std::min(least, low);
  }
};

void join(Bounds& bounds, const at::Tensor& tensor, Memory& memory) {
  const Cell* cell = plain(tensor) ? memory.find(tensor) : nullptr;
  const bool known = cell != nullptr && !cell->bad && cell->record;
  bounds.join(known ? cell->absmax : kUnknown, known ? cell->least : 0);
}

// The operand at this position, all entries of a list together; a missing one is 1, as alpha and value are.
Bounds bounds_of(c10::ArrayRef<c10::IValue> arguments, size_t position, Memory& memory) {
  Bounds bounds;
  if (position >= arguments.size() || arguments[position].isNone()) return {1, 1};
  const c10::IValue& value = arguments[position];
  if (const auto number = number_in(value))
    bounds.join(std::abs(*number), std::abs(*number));
  else if (value.isTensor())
    join(bounds, value.toTensor(), memory);
  else if (value.isTensorList())
    for (const at::Tensor& tensor : value.toTensorVector()) join(bounds, tensor, memory);
  else if (value.isList())
    for (const c10::IValue& item : value.toListRef()) {
      const bool number = item.isDouble() || item.isInt();
      bounds.join(number ? std::abs(item.toScalar().toDouble()) : kUnknown,
                  number ? std::abs(item.toScalar().toDouble()) : 0);
    }
  else
    bounds.join(kUnknown, 0);
  return bounds;
}

double limit_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kHalf:
      return 65504;
    case at::kFloat:
      return std::numeric_limits<float>::max();
    case at::kBFloat16:
      return 0x1.fep127;
    default:
      return std::numeric_limits<double>::max();
  }
}

bool given(c10::ArrayRef<c10::IValue> a, size_t position) { return position < a.size() && !a[position].isNone(); }

// w (1 - lr decay) - lr (m / bias) / (sqrt(v) + eps): |m| grows by |g|, the bias is at least 1 - beta1, and eps is all
// that is known of the denominator. v grows by g^2.
double reach_of_adam(c10::ArrayRef<c10::IValue> a, Memory& memory) {
  const auto at = [&](size_t position) { return bounds_of(a, position, memory).most; };
  if (given(a, 13)) return kUnknown;  // a loss scale divides the gradients
  const double gradient = at(1) + at(9) * at(0), rate = at(6), eps = at(10);
  const double step = rate * (at(2) + gradient) / ((1 - std::min(at(7), 1.0)) * eps);
  return std::max({at(0) * (1 + rate * at(9)) + step, at(3) + gradient * gradient, at(2) + gradient});
}

double reach_of(const Traits& traits, c10::ArrayRef<c10::IValue> a, Memory& memory) {
  const auto at = [&](size_t position) { return bounds_of(a, position, memory).most; };
  const auto least = [&](size_t position) { return bounds_of(a, position, memory).least; };
  switch (traits.reach) {
    case Reach::own:
      return at(0);
    case Reach::sum:
      return at(0) + at(2) * at(1);
    case Reach::product:
      return at(0) * at(1);
    case Reach::quotient:
      return at(0) / least(1);
    case Reach::lerp:
      return at(0) + at(2) * (at(0) + at(1));
    case Reach::addcmul:
      return at(0) + at(3) * at(1) * at(2);
    case Reach::addcdiv:
      return at(0) + at(3) * at(1) / least(2);
    case Reach::adam:
      return reach_of_adam(a, memory);
    case Reach::sgd:  // momentum's buffer keeps at most its own size, the decayed gradient comes on top, nesterov twice
      return given(a, 10) ? kUnknown : at(0) + at(5) * (at(4) + 1) * (at(2) * at(4) + at(1) + at(3) * at(0));
    case Reach::unknown:
      break;
  }
  return kUnknown;
}

}  // namespace

bool stays_finite(const Traits& traits, c10::ArrayRef<c10::IValue> arguments, Memory& memory) {
  if (traits.reach == Reach::unknown || arguments.empty()) return false;
  const c10::IValue& own = arguments[0];
  double limit = kUnknown;
  if (own.isTensor())
    limit = limit_of(own.toTensor());
  else if (own.isTensorList())
    for (const at::Tensor& tensor : own.toTensorVector()) limit = std::min(limit, limit_of(tensor));
  // Rounding may add a little; every comparison with NaN is false.
  return reach_of(traits, arguments, memory) * 1.01 < limit;
}

}  // namespace mlpkit::observing
