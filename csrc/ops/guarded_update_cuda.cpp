// guarded_update on a CUDA device: the table of tensors, kept from step to step, and the queueing of launches (ops).
//
// All work goes to the current stream of the parameters' device; nothing waits for it. A captured step reads parameters
// and state anew each time, for nobody tells of changes between replays.
#include "cuda/guarded_update.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>

#include "cuda/guarded_plan.h"
#include "ops/dtype.h"
#include "ops/guarded_update_device.h"
#include "ops/guarded_update_lists.h"

namespace mlpkit {
namespace {

void check_like(const char* name, const at::Tensor& tensor, const at::Tensor& p) {
  if (!tensor.defined()) return;
  TORCH_CHECK_VALUE(tensor.sizes() == p.sizes() && same_layout(tensor, p.strides()) && tensor.device() == p.device() &&
                        tensor.scalar_type() == p.scalar_type(),
                    "guarded_update: ", name, " is ", tensor.scalar_type(), " of shape ", tensor.sizes(),
                    " and strides ", tensor.strides(), " on ", tensor.device(), "; its parameter is ", p.scalar_type(),
                    ", ", p.sizes(), ", ", p.strides(), " on ", p.device());
}

void check_row(const GuardedRow& row, const at::Device& device) {
  const at::Tensor& p = row.p;
  dtype_of("guarded_update", "a parameter", p);
  TORCH_CHECK_VALUE(p.device() == device, "guarded_update: parameters are on ", device, " and on ", p.device(),
                    "; one update takes one device");
  TORCH_CHECK_VALUE(p.is_non_overlapping_and_dense(), "guarded_update: a parameter of shape ", p.sizes(),
                    " and strides ", p.strides(), " has gaps or overlaps in memory; make it contiguous");
  check_like("first", row.first, p);
  check_like("second", row.second, p);
  check_like("third", row.third, p);
  const at::Tensor &copy = row.copy, &step = row.step;
  if (copy.defined())
    TORCH_CHECK_VALUE(
        p.scalar_type() == at::kFloat && copy.sizes() == p.sizes() && same_layout(copy, p.strides()) &&
            copy.device() == device && (copy.scalar_type() == at::kHalf || copy.scalar_type() == at::kBFloat16),
        "guarded_update: a copy is ", copy.scalar_type(), " of shape ", copy.sizes(), " on ", copy.device(),
        "; it must be the float16 or bfloat16 form of a float32 parameter, here ", p.scalar_type(), ", ", p.sizes());
  if (step.defined())
    TORCH_CHECK_VALUE(step.device() == device && step.numel() == 1 &&
                          (step.scalar_type() == at::kFloat || step.scalar_type() == at::kDouble),
                      "guarded_update: a step count is ", step.scalar_type(), " of shape ", step.sizes(), " on ",
                      step.device(), "; it must be one float32 or float64 number on ", device);
}

void check_number(const char* name, const at::Tensor& number, at::ScalarType dtype, const at::Device& device) {
  if (number.defined())
    TORCH_CHECK_VALUE(number.device() == device && number.numel() == 1 && number.scalar_type() == dtype,
                      "guarded_update: ", name, " is ", number.scalar_type(), " of shape ", number.sizes(), " on ",
                      number.device(), "; it must be one ", dtype == at::kInt ? "int32" : "float32", " number on ",
                      device);
}

bool capturing() { return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None; }

template <class T>
T* data_of(const at::Tensor& tensor) {
  return tensor.defined() ? static_cast<T*>(tensor.unsafeGetTensorImpl()->mutable_data()) : nullptr;
}

class CudaUpdate final : public DeviceUpdate {
 public:
  CudaUpdate(Optimizer kind, std::vector<GuardedRow> rows) : kind_(kind), rows_(std::move(rows)) {
    TORCH_CHECK_VALUE(!rows_.empty(), "guarded_update: there are no parameters");
    device_ = rows_[0].p.device();
    for (const GuardedRow& row : rows_) check_row(row, device_);
    const c10::cuda::CUDAGuard guard(device_);
    int major = 0, minor = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_.index()));
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device_.index()));
    TORCH_CHECK_NOT_IMPLEMENTED(10 * major + minor >= MLPKIT_CUDA_MINIMUM, "guarded_update: ", device_,
                                " has compute capability ", major, ".", minor,
                                ", and this build of mlpkit does not include it");
  }

  std::tuple<at::Tensor, at::Tensor> run(const std::vector<at::Tensor>& gradients,
                                         const std::vector<GuardedGroup>& groups, const std::vector<at::Tensor>& rates,
                                         const GuardedOptions& options) override;
  at::Tensor log() const override { return log_; }
  at::Tensor bounds() override {
    if (!bounds_.defined())
      bounds_ = at::full({count(), 4}, std::nan(""), at::TensorOptions().dtype(at::kDouble).device(device_));
    return bounds_;
  }
  std::vector<GuardedRow>& rows() override { return rows_; }
  Optimizer kind() const override { return kind_; }
  // What `bounds` holds is true of the tensors as they are.
  void trust_bounds() { remember(true); }

 private:
  int64_t count() const { return static_cast<int64_t>(rows_.size()); }
  bool remember(bool keep);
  at::Tensor dense(const at::Tensor& gradient, const GuardedRow& row) const;
  std::vector<cuda::GuardedTensor> describe(const std::vector<at::Tensor>& gradients) const;
  void upload(std::vector<cuda::GuardedTensor> rows, cudaStream_t stream);
  void fill_arguments(cuda::GuardedUpdateArgs& args, const std::vector<at::Tensor>& gradients,
                      const std::vector<GuardedGroup>& groups, const std::vector<at::Tensor>& rates,
                      cudaStream_t stream);

  Optimizer kind_;
  std::vector<GuardedRow> rows_;
  at::Device device_{at::kCPU};
  std::vector<cuda::GuardedTensor> known_;  // as uploaded, by index
  std::vector<Seen> seen_;
  cuda::GuardedPlan plan_;
  at::Tensor table_, row_of_chunk_, tally_, settings_, parts_, begun_, finished_, more_;
  at::Tensor log_, bounds_;
  std::vector<uint64_t> uploaded_;  // what more_ holds
};

// Whether nobody else has changed a row since the last call. keep: take them as they are.
bool CudaUpdate::remember(bool keep) {
  bool same = seen_.size() == rows_.size();
  seen_.resize(rows_.size());
  for (size_t i = 0; i < rows_.size(); ++i) {
    const Seen now = seen(rows_[i]);
    same = same && now == seen_[i];
    if (keep) seen_[i] = now;
  }
  return same;
}

// The gradient as it lies in its parameter's order, checked.
at::Tensor CudaUpdate::dense(const at::Tensor& gradient, const GuardedRow& row) const {
  TORCH_CHECK_VALUE(
      gradient.layout() == at::kStrided && gradient.device() == device_ && gradient.sizes() == row.p.sizes(),
      "guarded_update: a gradient is ", gradient.layout(), " on ", gradient.device(), " of shape ", gradient.sizes(),
      "; it must be dense like its parameter, on ", device_, ", ", row.p.sizes());
  const Dtype dtype = dtype_of("guarded_update", "a gradient", gradient);
  TORCH_CHECK_TYPE((dtype == Dtype::float64) == (row.p.scalar_type() == at::kDouble), "guarded_update: a gradient is ",
                   gradient.scalar_type(), ", its parameter ", row.p.scalar_type());
  if (same_layout(gradient, row.p.strides()) && !gradient.is_neg()) return gradient;
  at::Tensor copy = at::empty_like(row.p, row.p.options().dtype(gradient.scalar_type()).requires_grad(false));
  return copy.copy_(gradient);
}

std::vector<cuda::GuardedTensor> CudaUpdate::describe(const std::vector<at::Tensor>& gradients) const {
  std::vector<cuda::GuardedTensor> result(rows_.size());
  std::memset(static_cast<void*>(result.data()), 0, result.size() * sizeof(result[0]));
  for (size_t i = 0; i < rows_.size(); ++i) {
    const GuardedRow& row = rows_[i];
    cuda::GuardedTensor& to = result[i];
    to.p = data_of<void>(row.p);
    to.first = data_of<void>(row.first);
    to.second = data_of<void>(row.second);
    to.third = data_of<void>(row.third);
    to.copy = data_of<void>(row.copy);
    to.step = data_of<void>(row.step);
    to.count = row.p.numel();
    to.index = static_cast<int32_t>(i);
    to.group = static_cast<int32_t>(row.group);
    to.dtype = dtype_of("", "", row.p);
    to.gradient_dtype = gradients[i].defined() ? dtype_of("", "", gradients[i])
                        : i < known_.size()    ? known_[i].gradient_dtype
                                               : to.dtype;
    to.copy_dtype = row.copy.defined() ? dtype_of("", "", row.copy) : Dtype::float64;
    to.wide_step = row.step.defined() && row.step.scalar_type() == at::kDouble;
  }
  return result;
}

// The table, and scratch as the kernels want to find it. What is known of rows and their steps lasts.
void CudaUpdate::upload(std::vector<cuda::GuardedTensor> rows, cudaStream_t stream) {
  const auto bytes = at::TensorOptions().dtype(at::kByte).device(device_);
  const auto of = [&](int64_t number, size_t size) { return at::empty({number * static_cast<int64_t>(size)}, bytes); };
  const auto zeros = [&](int64_t number, size_t size) {
    return at::zeros({number * static_cast<int64_t>(size)}, bytes);
  };
  known_ = rows;
  plan_ = cuda::plan_guarded(std::move(rows));
  TORCH_CHECK_VALUE(plan_.chunks >= 0, "guarded_update: there are too many elements for one update");
  table_ = of(count(), sizeof(cuda::GuardedTensor));
  row_of_chunk_ = of(plan_.chunks + 1, sizeof(int32_t));
  parts_ = of(plan_.chunks + 1, 2 * sizeof(double));
  settings_ = of(count(), sizeof(cuda::GuardedRowSettings));
  tally_ = zeros(count(), sizeof(cuda::GuardedTally));
  finished_ = zeros(2, sizeof(uint32_t));
  if (!log_.defined()) log_ = at::zeros({2 + cuda::kGuardedSkips * cuda::kGuardedSkip}, bytes.dtype(at::kDouble));
  if (!begun_.defined()) {
    std::vector<uint64_t> begun((rows_.size() + 1) / 2);
    for (size_t i = 0; i < rows_.size(); ++i)
      if (!rows_[i].fresh) begun[i / 2] |= uint64_t{1} << 32 * (i % 2);
    begun_ = of(static_cast<int64_t>(begun.size()), sizeof(uint64_t));
    C10_CUDA_CHECK(
        cuda::guarded_upload(data_of<uint64_t>(begun_), begun.data(), static_cast<int64_t>(begun.size()), stream));
  }
  C10_CUDA_CHECK(cuda::guarded_upload(data_of<uint64_t>(table_), reinterpret_cast<const uint64_t*>(plan_.table.data()),
                                      static_cast<int64_t>(plan_.table.size() * sizeof(cuda::GuardedTensor) / 8),
                                      stream));
  C10_CUDA_CHECK(cuda::guarded_number_chunks(data_of<cuda::GuardedTensor>(table_), static_cast<int32_t>(count()),
                                             plan_.chunks, data_of<int32_t>(row_of_chunk_), stream));
}

// Addresses of gradients and groups: in the arguments, or on the device where there are too many.
void CudaUpdate::fill_arguments(cuda::GuardedUpdateArgs& args, const std::vector<at::Tensor>& gradients,
                                const std::vector<GuardedGroup>& groups, const std::vector<at::Tensor>& rates,
                                cudaStream_t stream) {
  std::vector<cuda::GuardedGroupOnDevice> all(groups.size());
  std::memset(static_cast<void*>(all.data()), 0, all.size() * sizeof(all[0]));
  for (size_t i = 0; i < groups.size(); ++i) {
    all[i].settings = groups[i];
    if (i < rates.size()) all[i].rate = data_of<const float>(rates[i]);
  }
  const auto address = [&](size_t i) -> const void* {
    const at::Tensor& gradient = gradients[plan_.table[i].index];
    if (!gradient.defined()) return nullptr;
    const void* data = gradient.const_data_ptr();
    return data ? data : table_.const_data_ptr();  // no element, but a part in the step
  };
  if (rows_.size() <= cuda::kGuardedGradients && groups.size() <= cuda::kGuardedGroups) {
    for (size_t i = 0; i < rows_.size(); ++i) args.gradient[i] = address(i);
    std::copy(all.begin(), all.end(), args.group);
    return;
  }
  constexpr size_t words = sizeof(cuda::GuardedGroupOnDevice) / 8;
  std::vector<uint64_t> now(rows_.size() + words * all.size());
  for (size_t i = 0; i < rows_.size(); ++i) now[i] = reinterpret_cast<uint64_t>(address(i));
  std::memcpy(now.data() + rows_.size(), all.data(), words * all.size() * 8);
  if (now != uploaded_ || capturing()) {
    if (now.size() != uploaded_.size())
      more_ = at::empty({static_cast<int64_t>(now.size())}, at::TensorOptions().dtype(at::kLong).device(device_));
    C10_CUDA_CHECK(
        cuda::guarded_upload(data_of<uint64_t>(more_), now.data(), static_cast<int64_t>(now.size()), stream));
    uploaded_ = std::move(now);
  }
  args.gradients = data_of<const void*>(more_);
  args.groups = reinterpret_cast<const cuda::GuardedGroupOnDevice*>(data_of<uint64_t>(more_) + rows_.size());
}

std::tuple<at::Tensor, at::Tensor> CudaUpdate::run(const std::vector<at::Tensor>& gradients,
                                                   const std::vector<GuardedGroup>& groups,
                                                   const std::vector<at::Tensor>& rates,
                                                   const GuardedOptions& options) {
  const c10::cuda::CUDAGuard guard(device_);
  const at::AutoDispatchBelowADInplaceOrView below;
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream().stream();
  check_number("scale", options.scale, at::kFloat, device_);
  check_number("found_inf", options.found, at::kFloat, device_);
  check_number("clean_steps", options.clean, at::kInt, device_);
  for (const at::Tensor& rate : rates) check_number("a learning rate", rate, at::kFloat, device_);
  std::vector<at::Tensor> lying(gradients.size());
  for (size_t i = 0; i < gradients.size(); ++i)
    if (gradients[i].defined()) lying[i] = dense(gradients[i], rows_[i]);
  std::vector<cuda::GuardedTensor> table = describe(lying);
  if (known_.size() != table.size() || std::memcmp(known_.data(), table.data(), table.size() * sizeof(table[0])) != 0) {
    for (const GuardedRow& row : rows_) check_row(row, device_);
    upload(std::move(table), stream);
  }
  const auto float64 = at::TensorOptions().dtype(at::kDouble).device(device_);
  at::Tensor outcome = at::empty({kGuardedOutcome}, float64), census = at::empty({count(), kGuardedCensus}, float64);
  const at::Tensor limits = bounds();
  if (!remember(false) || capturing()) limits.fill_(std::nan(""));
  cuda::GuardedUpdateArgs args{};
  args.kind = kind_;
  args.force = options.force;
  args.plain = plan_.plain;
  args.tries = cuda::guarded_tries(plan_, kind_, groups.data(), groups.size());
  args.rule = options.rule;
  args.clip = options.clip;
  args.rows = static_cast<int32_t>(count());
  args.by_block = plan_.by_block;
  args.by_warp = plan_.by_warp;
  args.chunks = plan_.chunks;
  args.chunk = plan_.chunk;
  args.table = data_of<cuda::GuardedTensor>(table_);
  args.row_of_chunk = data_of<int32_t>(row_of_chunk_);
  args.scale = data_of<float>(options.scale);
  args.clean = data_of<int32_t>(options.clean);
  args.found = data_of<float>(options.found);
  args.decision = data_of<cuda::GuardedDecision>(outcome);
  args.census = data_of<double>(census);
  args.bounds = data_of<double>(limits);
  args.log = data_of<double>(log_);
  args.parts = data_of<double>(parts_);
  args.tally = data_of<cuda::GuardedTally>(tally_);
  args.settings = data_of<cuda::GuardedRowSettings>(settings_);
  args.begun = data_of<uint32_t>(begun_);
  args.finished = data_of<uint32_t>(finished_);
  fill_arguments(args, lying, groups, rates, stream);
  C10_CUDA_CHECK(cuda::guarded_update(args, stream));
  // Whether the step is taken is not known here: whoever holds on to an old value must be told.
  for (size_t i = 0; i < rows_.size(); ++i) {
    if (!gradients[i].defined()) continue;
    const GuardedRow& row = rows_[i];
    for (const at::Tensor* tensor : {&row.p, &row.first, &row.second, &row.third, &row.copy, &row.step})
      if (tensor->defined() && !tensor->is_inference()) tensor->unsafeGetTensorImpl()->bump_version();
  }
  remember(true);
  return {outcome, census};
}

std::unique_ptr<DeviceUpdate> make_cuda_update(Optimizer kind, std::vector<GuardedRow> rows) {
  return std::make_unique<CudaUpdate>(kind, std::move(rows));
}
[[maybe_unused]] const bool registered = [] {
  device_update_maker() = make_cuda_update;
  return true;
}();

// An update that lives for one call: the table goes up anew. guard.optim's live as long as their optimizer.
std::tuple<at::Tensor, at::Tensor> guarded_update_cuda(
    at::TensorList params, at::TensorList grads, at::TensorList first, at::TensorList second, at::TensorList third,
    at::TensorList copies, at::TensorList steps, const std::optional<at::Tensor>& scale,
    const std::optional<at::Tensor>& clean_steps, const std::optional<at::Tensor>& found_inf,
    const std::optional<at::Tensor>& bounds, c10::string_view kind, at::IntArrayRef groups,
    at::ArrayRef<double> settings, double clip_norm, double growth, double backoff, int64_t growth_interval,
    double floor, double ceiling, bool force) {
  const Optimizer optimizer = guarded_kind_from_name(kind);
  const std::vector<GuardedGroup> all = guarded_groups_of(settings);
  const GuardedOptions options = guarded_options_of(scale, clean_steps, found_inf, clip_norm,
                                                    {growth, backoff, floor, ceiling, growth_interval}, force);
  std::unique_ptr<DeviceUpdate> update =
      make_device_update(optimizer, guarded_rows_of({params, grads, first, second, third, copies, steps, groups}));
  check_guarded_state(optimizer, update->rows(), all);
  if (bounds) {
    check_bounds(*bounds, static_cast<int64_t>(params.size()));
    update->bounds().copy_(*bounds);
    static_cast<CudaUpdate&>(*update).trust_bounds();
  }
  auto result = update->run(grads.vec(), all, {}, options);
  if (bounds) bounds->copy_(update->bounds());
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(mlpkit, CUDA, m) { m.impl("guarded_update", guarded_update_cuda); }

}  // namespace mlpkit
