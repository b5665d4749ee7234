// Parameters that an update does not move. Part of the module mlpkit._C.
#include <cstring>

#include "bindings_observe.h"

namespace mlpkit::observing {
namespace {

constexpr int64_t kYoung = 4;  // updates after which a parameter that moved is taken to move on

std::vector<char> bits_of(const at::Tensor& tensor) {
  const at::Tensor whole = tensor.is_contiguous() ? tensor : copy_of(tensor);
  const char* data = static_cast<const char*>(whole.const_data_ptr());
  return {data, data + whole.nbytes()};
}

// Some lines of memory, spread over a contiguous tensor.
std::vector<char> few_bits_of(const at::Tensor& tensor) {
  constexpr size_t kLine = 64, kLines = 16;
  const size_t bytes = tensor.nbytes();
  if (bytes <= 2 * kLine * kLines) return bits_of(tensor);
  const char* data = static_cast<const char*>(tensor.const_data_ptr());
  std::vector<char> found(kLine * kLines);
  for (size_t i = 0; i < kLines; ++i)
    std::memcpy(found.data() + i * kLine, data + (bytes - kLine) * i / (kLines - 1), kLine);
  return found;
}

}  // namespace

void Observer::before_update(const std::vector<at::Tensor>& parameters) {
  for (const at::Tensor& parameter : parameters) {
    const at::Tensor& gradient = parameter.grad();
    if (!gradient.defined() || !gradient.is_cpu() || !plain(gradient) || !parameter.is_cpu() || !plain(parameter))
      continue;
    const Cell* cell = memory_.find(gradient);
    if (cell != nullptr && cell->bad) continue;
    // All bits are kept while it is young, and once a few of them did not move.
    const bool whole = !parameter.is_contiguous() || updates_ < kYoung || suspicious_;
    moving_.push_back({parameter, whole ? bits_of(parameter) : few_bits_of(parameter), whole});
  }
  ++updates_;
}

std::pair<std::vector<at::Tensor>, size_t> Observer::unmoved() {
  std::vector<at::Tensor> still;
  for (const Moving& one : moving_)
    if (one.parameter.grad().defined() && one.bits == (one.whole ? bits_of(one.parameter) : few_bits_of(one.parameter)))
      still.push_back(one.parameter);
  const size_t total = moving_.size();
  suspicious_ = !still.empty();
  moving_.clear();
  return {still, total};
}

}  // namespace mlpkit::observing
