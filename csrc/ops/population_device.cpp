// A population's members on a device: what lies there, in the device's order and back in the host's (ops).
#include "ops/population_device.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "ops/cuda_kernels.h"
#include "ops/population_tables.h"

namespace mlpkit {
namespace {

// One part of a member's state between the host's order and the device's; to_device: from `host` to `device`.
void move_part(const PopulationMember& member, const cuda::MemberPlaces& places, float* host, float* device,
               bool to_device) {
  const auto move = [&](float& here, float& there) { to_device ? there = here : here = there; };
  for (size_t i = 0; i < member.layers.size(); ++i) {
    const MemberLayer& layer = member.layers[i];
    for (int64_t o = 0; o < layer.out; ++o) {
      for (int64_t c = 0; c < layer.in; ++c)
        move(host[layer.weight + (layer.across ? c * layer.across + o : o * layer.in + c)],
             device[places.weight[i] +
                    cuda::weight_place(static_cast<int>(o), static_cast<int>(c), static_cast<int>(layer.in))]);
      move(host[layer.bias + o], device[places.bias[i] + o]);
    }
    if (layer.slope >= 0) move(host[layer.slope], device[places.slope[i]]);
  }
}

}  // namespace

const PopulationBackend& offered_device() {
  const PopulationBackend* found = population_backend();
  TORCH_CHECK_NOT_IMPLEMENTED(found, "population: mlpkit was built without CUDA");
  return *found;
}

void check_device(const char* error) { TORCH_CHECK(!error, "population: the device reports: ", error); }

cuda::MemberShape member_shape(const MemberNetwork& network, const MemberRecipe& recipe, int64_t rows) {
  cuda::MemberShape shape{};
  shape.dtype = network.bfloat16 ? Dtype::bfloat16 : Dtype::float32;
  shape.layers = static_cast<int>(network.widths.size()) - 1;
  for (int i = 0; i <= shape.layers && i <= cuda::kMemberLayers; ++i)
    shape.widths[i] = static_cast<int>(std::min<int64_t>(network.widths[i], 1 << 20));
  shape.batch = static_cast<int>(std::min<int64_t>(recipe.batch_size, rows));
  bool drops = false;
  for (const double p : recipe.dropout) drops = drops || dropout_threshold(p) > 0;
  const bool linear = network.activation == Activation::identity && !drops;
  shape.keeps_slopes = !(network.activation == Activation::relu || linear);
  shape.prelu = network.activation == Activation::prelu;
  const bool adam = network.optimizer == Optimizer::adam || network.optimizer == Optimizer::adamw;
  shape.moments = (adam || network.with_momentum) + (network.optimizer != Optimizer::sgd);
  return shape;
}

const PopulationBackend*& population_backend() {
  static const PopulationBackend* offered = nullptr;
  return offered;
}

DeviceMemory::DeviceMemory(int device, int64_t bytes) : device_(device), bytes_(bytes) {
  if (bytes == 0) return;
  backend_ = &offered_device();
  memory_ = backend_->allocate(device, bytes);
  TORCH_CHECK(memory_, "population: the device has no ", bytes, " bytes left");
}
DeviceMemory& DeviceMemory::operator=(DeviceMemory&& other) noexcept {
  std::swap(backend_, other.backend_);
  std::swap(device_, other.device_);
  std::swap(memory_, other.memory_);
  std::swap(bytes_, other.bytes_);
  return *this;
}
DeviceMemory::~DeviceMemory() {
  if (memory_) backend_->release(device_, memory_);
}
void DeviceMemory::fill(const void* from, int64_t bytes) const {
  if (bytes) check_device(backend_->copy(device_, memory_, from, bytes, true));
}
void DeviceMemory::read(void* to, int64_t bytes) const {
  if (bytes) check_device(backend_->copy(device_, to, memory_, bytes, false));
}

void PopulationDevice::Table::upload(int device, const PopulationData& data) {
  const auto copied = [&](const at::Tensor& tensor) {
    if (!tensor.defined()) return DeviceMemory();
    DeviceMemory memory(device, static_cast<int64_t>(tensor.nbytes()));
    memory.fill(tensor.const_data_ptr(), memory.bytes());
    return memory;
  };
  x = copied(data.x);
  classes = copied(data.classes);
  target = copied(data.target);
  weights = copied(data.weights);
  at = {x.as<float>(), nullptr, classes.as<int32_t>(), target.as<float>(), weights.as<float>()};
}

// Once, with the first member that multiplies bfloat16.
void PopulationDevice::Table::round(int device, const at::Tensor& x) {
  if (at.rounded) return;
  const at::Tensor half = x.to(at::kBFloat16);
  rounded = DeviceMemory(device, static_cast<int64_t>(half.nbytes()));
  rounded.fill(half.const_data_ptr(), rounded.bytes());
  at.rounded = rounded.as<BFloat16>();
}

PopulationDevice::PopulationDevice(int device, const PopulationTask& task, const PopulationData& data,
                                   const PopulationData& validation)
    : device_(device), task_(task), x_(data.x), validation_x_(validation.x) {
  const PopulationBackend& offered = offered_device();
  TORCH_CHECK_NOT_IMPLEMENTED(cuda_kernels() == CudaKernels::all,
                              "population: the CUDA kernels wait for their proof on a device; "
                              "MLPKIT_CUDA_KERNELS=all takes them");
  const char* obstacle = offered.obstacle(device);
  TORCH_CHECK_NOT_IMPLEMENTED(!obstacle, "population: ", obstacle);
  facts_ = offered.describe(device);
  data_.upload(device, data);
  one_table_ = data.x.is_same(validation.x) && data.weights.is_same(validation.weights);
  if (!one_table_) validation_.upload(device, validation);
}

std::string PopulationDevice::obstacle(const MemberNetwork& network, const MemberRecipe& recipe, int64_t rows) const {
  if (network.norm != Norm::none) return "norm is set; members on CUDA have none so far";
  const int64_t layers = static_cast<int64_t>(network.widths.size()) - 1;
  if (layers > cuda::kMemberLayers)
    return "hidden has " + std::to_string(layers - 1) + " layers; on CUDA it must have at most " +
           std::to_string(cuda::kMemberLayers - 1);
  cuda::MemberPlan plan{};
  const int64_t widest = *std::max_element(network.widths.begin(), network.widths.end());
  if (widest > 16384 || !cuda::plan_member(member_shape(network, recipe, rows), facts_, plan))
    return "hidden makes a network whose weights do not fit the " + std::to_string(facts_.shared_bytes) +
           " bytes of shared memory that a block of this device has; train it on the CPU";
  return "";
}

PopulationDevice::Resident& PopulationDevice::resident(PopulationMember& member) {
  Resident& found = residents_[&member];
  if (found.values) return found;
  found.places = cuda::member_places(member_shape(member.network, member.recipe, member.rows.numel()));
  const int64_t floats = found.places.floats;
  found.memory =
      DeviceMemory(device_, 4 * floats * (1 + member.has_first() + member.has_second() + member.validates()));
  float* next = found.values = found.memory.as<float>();
  next += floats;
  const auto take = [&](bool wanted) {
    float* taken = wanted ? next : nullptr;
    next += wanted ? floats : 0;
    return taken;
  };
  found.first = take(member.has_first());
  found.second = take(member.has_second());
  found.best = take(member.validates());
  return found;
}

void PopulationDevice::upload(PopulationMember& member, Resident& to) {
  if (!to.newer_there) return;
  std::vector<float> parts(to.memory.bytes() / 4, 0.f);
  const auto pack = [&](float* host, const float* place) {
    if (place) move_part(member, to.places, host, parts.data() + (place - to.values), true);
  };
  pack(member.values(), to.values);
  pack(member.first(), to.first);
  pack(member.second(), to.second);
  pack(member.validates() ? member.best_values() : nullptr, to.best);
  to.memory.fill(parts.data(), to.memory.bytes());
  to.newer_there = false;
}

void PopulationDevice::fetch(PopulationMember& member) {
  const auto found = residents_.find(&member);
  if (found == residents_.end()) return;
  Resident& from = found->second;
  if (from.newer_here) {
    std::vector<float> parts(from.memory.bytes() / 4);
    from.memory.read(parts.data(), from.memory.bytes());
    const auto unpack = [&](float* host, const float* place) {
      if (place) move_part(member, from.places, host, parts.data() + (place - from.values), false);
    };
    unpack(member.values(), from.values);
    unpack(member.first(), from.first);
    unpack(member.second(), from.second);
    unpack(member.validates() ? member.best_values() : nullptr, from.best);
  }
  from.newer_here = false;
  from.newer_there = true;
}

}  // namespace mlpkit
