// Looks at tensors, and the cells of what memory holds (ops).
#include "ops/observed.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "cpu/scan.h"
#include "ops/census.h"
#include "ops/dtype.h"
#include "ops/observed_key.h"

namespace mlpkit::observing {
namespace {

constexpr int64_t kChunk = 1 << 16;  // elements a thread looks at at once
constexpr c10::DispatchKeySet kInterposers({kObserved, c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot,
                                            c10::DispatchKey::FuncTorchDynamicLayerFrontMode,
                                            c10::DispatchKey::FuncTorchDynamicLayerBackMode});

// The tensor's elements in logical order, by a copy that neither autograd nor anybody's mode sees.
at::Tensor dense(const at::Tensor& tensor) {
  if (tensor.is_cpu() && tensor.is_contiguous() && !tensor.is_neg()) return tensor;
  const c10::impl::ExcludeDispatchKeyGuard alone(kInterposers);
  const at::AutoDispatchBelowADInplaceOrView below;
  return tensor.to(at::kCPU).contiguous().resolve_neg();
}

ScanResult scan(const at::Tensor& tensor) {
  const Dtype dtype = dtype_of("observe", "the tensor", tensor);
  const int64_t count = tensor.numel(), chunks = (count + kChunk - 1) / kChunk;
  const char* data = static_cast<const char*>(tensor.const_data_ptr());
  ScanResult total{};
  if (chunks <= 1 || at::get_num_threads() == 1) {
    cpu::scan({dtype, data, count, &total});
    return total;
  }
  std::vector<ScanResult> parts(chunks);
  at::parallel_for(0, chunks, 2, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      cpu::scan({dtype, data + i * kChunk * tensor.element_size(), std::min(kChunk, count - i * kChunk), &parts[i]});
  });
  total = {0, std::numeric_limits<double>::infinity(), 0, true};
  for (const ScanResult& part : parts) {
    total.finite = total.finite && part.finite;
    total.zero += part.zero;
    total.absmax = std::max(total.absmax, part.absmax);
    total.absmin = std::min(total.absmin, part.absmin);
  }
  return total;
}

}  // namespace

std::optional<double> number_in(const c10::IValue& value) {
  if (value.isDouble() || value.isInt()) return value.toScalar().toDouble();
  if (!value.isTensor()) return std::nullopt;
  const at::Tensor& tensor = value.toTensor();
  if (!tensor.defined() || !tensor.unsafeGetTensorImpl()->is_wrapped_number() || !tensor.is_cpu()) return std::nullopt;
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return *static_cast<const double*>(tensor.const_data_ptr());
    case at::kLong:
      return static_cast<double>(*static_cast<const int64_t*>(tensor.const_data_ptr()));
    default:
      return std::nullopt;
  }
}

Sight look(const at::Tensor& tensor) {
  // The order of elements matters only for the place of a bad one.
  const bool whole = tensor.is_cpu() && (tensor.is_contiguous() || tensor.is_non_overlapping_and_dense());
  const at::Tensor seen = whole ? tensor : dense(tensor);
  const ScanResult quick = scan(seen);
  Sight sight;
  if (quick.finite) {
    sight.zero = quick.zero;
    sight.absmax = quick.absmax;
    sight.least = quick.absmin;
    return sight;
  }
  const CensusResult slow = census_of(dense(tensor), false);
  return {slow.counts.nan,
          slow.counts.posinf,
          slow.counts.neginf,
          slow.counts.zero,
          slow.counts.first,
          slow.absmax,
          slow.counts.zero ? 0 : slow.min_nonzero};
}

at::Tensor copy_of(const at::Tensor& tensor) {
  if (!tensor.is_cpu() || !tensor.is_non_overlapping_and_dense()) {
    const c10::impl::ExcludeDispatchKeyGuard alone(kInterposers);
    const at::AutoDispatchBelowADInplaceOrView below;
    return tensor.clone();
  }
  at::Tensor copy(at::detail::empty_strided_cpu(tensor.sizes(), tensor.strides(), tensor.scalar_type()));
  std::memcpy(copy.mutable_data_ptr(), tensor.const_data_ptr(), tensor.nbytes());
  return copy;
}

Cell* Memory::find(const at::Tensor& tensor) {
  const auto found = cells_.find(tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl());
  return found == cells_.end() ? nullptr : &found->second;
}

Cell& Memory::cell(const at::Tensor& tensor) {
  if (Cell* found = find(tensor)) return *found;
  const c10::Storage& storage = tensor.storage();
  Cell cell(storage.getWeakStorageImpl());
  cell.absmax = std::numeric_limits<double>::infinity();
  order_.push_back(storage.unsafeGetStorageImpl());
  return cells_.emplace(storage.unsafeGetStorageImpl(), std::move(cell)).first->second;
}

void Memory::allocated(const at::Tensor& tensor) {
  Cell& cell = this->cell(tensor);
  cell.record = nullptr;
  cell.bad = cell.fresh = true;
  cell.absmax = std::numeric_limits<double>::infinity();
}

Cell& Memory::wrote(const at::Tensor& tensor, const RecordRef& record, const Sight& sight) {
  Cell& cell = this->cell(tensor);
  const bool bad = sight.bad(), whole = tensor.nbytes() >= tensor.storage().nbytes();
  if (whole || bad || !cell.bad) cell.record = record;
  cell.bad = bad || (cell.bad && !whole);
  cell.fresh = false;
  cell.absmax = whole ? sight.absmax : std::max(cell.absmax, sight.absmax);
  cell.least = whole ? sight.least : std::min(cell.least, sight.least);
  return cell;
}

void Memory::tidy() {
  constexpr size_t kMost = 12;
  for (size_t looks = std::min(kMost, order_.size()); looks > 0; --looks) {
    if (next_ >= order_.size()) next_ = 0;
    c10::StorageImpl* storage = order_[next_];
    if (c10::raw::intrusive_ptr::use_count(storage) > 0) {
      ++next_;
      continue;
    }
    order_[next_] = order_.back();
    order_.pop_back();
    cells_.erase(storage);
    if (order_.empty()) return;
  }
}

void Memory::sweep() {
  std::erase_if(cells_, [](const auto& entry) { return entry.second.storage.expired(); });
  order_.clear();
  for (const auto& [storage, cell] : cells_) order_.push_back(storage);
}

std::vector<Cell*> Memory::bad_cells() {
  sweep();
  std::vector<Cell*> found;
  for (auto& [storage, cell] : cells_)
    if (cell.bad && cell.record) found.push_back(&cell);
  return found;
}

void note(Series& series, int step, double value) {
  if (!series.empty() && series.back().first == step) {
    series.back().second = std::max(series.back().second, value);
    return;
  }
  series.emplace_back(step, value);
  if (series.size() > kSeries) series.pop_front();
}

}  // namespace mlpkit::observing
