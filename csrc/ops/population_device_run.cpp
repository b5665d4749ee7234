// Launches of a population on a device: jobs, their tables, and what comes back (ops).
#include <ATen/ops/empty.h>

#include <algorithm>
#include <tuple>

#include "ops/population_device.h"

namespace mlpkit {
namespace {

constexpr const char* kStatus[] = {"alive", "epochs", "patience", "diverged"};

bool any_rounds(const std::vector<PopulationMember*>& members) {
  return std::any_of(members.begin(), members.end(), [](const auto* member) { return member->network.bfloat16; });
}

}  // namespace

const int32_t* PopulationDevice::rows_of(const at::Tensor& rows) {
  if (!rows.defined() || rows.numel() == 0) return nullptr;
  auto& [kept, memory] = rows_[rows.const_data_ptr()];
  if (!kept.defined()) {
    kept = rows;
    memory = DeviceMemory(device_, 4 * rows.numel());
    memory.fill(rows.const_data_ptr(), memory.bytes());
  }
  return memory.as<int32_t>();
}

cuda::MemberJob PopulationDevice::job_of(PopulationMember& member, const cuda::MemberPlan& plan,
                                         const cuda::MemberShape& shape) {
  const MemberNetwork& network = member.network;
  const MemberRecipe& recipe = member.recipe;
  Resident& at = resident(member);
  upload(member, at);
  cuda::MemberJob job{};
  job.plan = plan;
  job.layers = shape.layers;
  for (int i = 0; i < shape.layers; ++i) {
    const uint32_t threshold = i + 1 < shape.layers ? dropout_threshold(recipe.dropout[i]) : 0;
    job.layer[i] = {
        shape.widths[i],     shape.widths[i + 1], threshold,         static_cast<float>(dropout_scale(threshold)),
        at.places.weight[i], at.places.bias[i],   at.places.slope[i]};
  }
  job.activation = network.activation;
  job.negative_slope = static_cast<float>(network.negative_slope);
  job.optimizer = network.optimizer;
  job.group = member.group(recipe.lr);
  job.clip_norm = recipe.clip_norm;
  job.min_delta = recipe.min_delta;
  job.certain = static_cast<float>(1.0 - recipe.label_smoothing);
  job.spread = static_cast<float>(recipe.label_smoothing / static_cast<double>(network.widths.back()));
  job.seed = network.seed;
  job.patience = recipe.patience;
  job.last_epoch = recipe.epochs;
  job.batch = shape.batch;
  job.rows = static_cast<int>(member.rows.numel());
  job.validation_rows = member.validates() ? static_cast<int>(member.validation_rows.numel()) : 0;
  job.steps = static_cast<int>(member.steps_per_epoch());
  job.row = rows_of(member.rows);
  job.validation_row = rows_of(member.validation_rows);
  job.values = at.values;
  job.first = at.first;
  job.second = at.second;
  job.best = at.best;
  return job;
}

bool PopulationDevice::Group::operator<(const Group& other) const {
  return std::tie(dtype, warps, resident) < std::tie(other.dtype, other.warps, other.resident);
}

std::vector<PopulationDevice::Batch> PopulationDevice::grouped(const std::vector<PopulationMember*>& members,
                                                               bool training) {
  std::vector<Batch> batches;
  std::map<Group, size_t> known;
  for (PopulationMember* member : members) {
    cuda::MemberShape shape = member_shape(member->network, member->recipe, member->rows.numel());
    if (!training) {
      shape.batch = cuda::kMemberRows;
      shape.keeps_slopes = false;
    }
    cuda::MemberPlan plan{};
    TORCH_CHECK(cuda::plan_member(shape, facts_, plan), "population: a member does not fit the device any more");
    const Group group{shape.dtype, plan.warps, std::min(plan.resident, 8)};
    const auto [at, fresh] = known.try_emplace(group, batches.size());
    if (fresh) batches.push_back({group, {}, {}, 0});
    Batch& batch = batches[at->second];
    batch.members.push_back(member);
    batch.jobs.push_back(job_of(*member, plan, shape));
    batch.shared_bytes = std::max(batch.shared_bytes, plan.shared_bytes);
  }
  return batches;
}

int PopulationDevice::blocks_of(const Batch& batch) const {
  return std::min(static_cast<int>(batch.jobs.size()), facts_.multiprocessors * batch.group.resident);
}

void PopulationDevice::train(const std::vector<MemberPlace>& queue, int64_t epochs) {
  std::vector<PopulationMember*> members;
  std::map<const PopulationMember*, int> epochs_of;
  for (const MemberPlace& place : queue) {
    members.push_back(place.member);
    epochs_of[place.member] = static_cast<int>(std::min({epochs, place.epochs, int64_t{1} << 20}));
  }
  std::vector<Batch> batches = grouped(members, true);
  if (any_rounds(members)) {
    data_.round(device_, x_);
    if (!one_table_) validation_.round(device_, validation_x_);
  }
  for (Batch& batch : batches)
    for (size_t i = 0; i < batch.jobs.size(); ++i) batch.jobs[i].epochs = epochs_of[batch.members[i]];
  run(batches, static_cast<int64_t>(members.size()));
}

// Tables and results of all launches, each at its place in one piece of memory.
void PopulationDevice::run(std::vector<Batch>& batches, int64_t count) {
  StepTables tables;
  int64_t curves = 0;
  for (Batch& batch : batches)
    for (size_t i = 0; i < batch.jobs.size(); ++i) {
      cuda::MemberJob& job = batch.jobs[i];
      const PopulationMember& member = *batch.members[i];
      batch.tables.push_back(tables.add(member, int64_t{job.steps} * job.epochs));
      job.modest = member.recipe.modest(member.recipe.lr * batch.tables.back().largest_factor);
      curves += 3 * job.epochs;
    }
  const auto bytes_of = [&](size_t one) { return static_cast<int64_t>(one) * count; };
  const DeviceMemory numbers(device_, 8 * static_cast<int64_t>(tables.numbers.size())), scores(device_, 8 * curves),
      state(device_, bytes_of(sizeof(cuda::MemberNow))), jobs(device_, bytes_of(sizeof(cuda::MemberJob))),
      next(device_, 4 * static_cast<int64_t>(batches.size()));
  numbers.fill(tables.numbers.data(), numbers.bytes());
  const std::vector<uint32_t> zeros(batches.size(), 0);
  next.fill(zeros.data(), next.bytes());
  std::vector<cuda::MemberNow> now;
  std::vector<cuda::MemberJob> all;
  double* curve = scores.as<double>();
  for (Batch& batch : batches)
    for (size_t i = 0; i < batch.jobs.size(); ++i) {
      cuda::MemberJob& job = batch.jobs[i];
      job.factors = batch.tables[i].factors < 0 ? nullptr : numbers.as<double>() + batch.tables[i].factors;
      job.powers = batch.tables[i].powers < 0 ? nullptr : numbers.as<double>() + batch.tables[i].powers;
      job.train_loss = curve;
      job.validation_loss = curve += job.epochs;
      job.metric = curve += job.epochs;
      curve += job.epochs;
      job.now = state.as<cuda::MemberNow>() + now.size();
      now.push_back(now_of(*batch.members[i]));
      all.push_back(job);
    }
  state.fill(now.data(), state.bytes());
  jobs.fill(all.data(), jobs.bytes());
  std::vector<cuda::MemberLaunch> launches;
  std::vector<DeviceMemory> work;
  const cuda::MemberJob* job = jobs.as<cuda::MemberJob>();
  for (const Batch& batch : batches) {
    launches.push_back(launch_of(batch, job, next.as<uint32_t>() + launches.size(), work));
    job += batch.jobs.size();
  }
  check_device(offered_device().train(device_, launches.data(), static_cast<int>(launches.size())));
  state.read(now.data(), state.bytes());
  std::vector<double> values(curves);
  scores.read(values.data(), scores.bytes());
  const double* at = values.data();
  size_t place = 0;
  for (const Batch& batch : batches)
    for (size_t i = 0; i < batch.jobs.size(); at += 3 * batch.jobs[i++].epochs, ++place) {
      Resident& resident = residents_[batch.members[i]];
      resident.newer_here = true;
      resident.launched = {now[place].epochs_of_launch, now[place].step - batch.members[i]->progress.step};
      note(*batch.members[i], now[place], at, batch.jobs[i].epochs);
    }
}

// work: keeps the memory that the launch works in.
cuda::MemberLaunch PopulationDevice::launch_of(const Batch& batch, const cuda::MemberJob* jobs, uint32_t* next,
                                               std::vector<DeviceMemory>& work) const {
  cuda::MemberLaunch launch{};
  launch.dtype = batch.group.dtype;
  launch.task = {task_.loss, static_cast<float>(task_.delta), task_.metric};
  launch.table = data_.at;
  launch.validation = one_table_ ? data_.at : validation_.at;
  launch.jobs = jobs;
  launch.count = static_cast<int>(batch.jobs.size());
  launch.next = next;
  launch.warps = batch.group.warps;
  launch.shared_bytes = batch.shared_bytes;
  launch.blocks = blocks_of(batch);
  for (const cuda::MemberJob& one : batch.jobs) {
    launch.most_rows = std::max<int64_t>(launch.most_rows, one.rows);
    if (one.plan.gradients < 0) launch.most_floats = std::max<int64_t>(launch.most_floats, one.plan.floats);
  }
  const cuda::MemberJob& any = batch.jobs.front();
  const auto take = [&](int64_t bytes_of_block) {
    work.emplace_back(device_, launch.blocks * bytes_of_block);
    return work.back().as<void>();
  };
  launch.order = static_cast<int32_t*>(take(8 * launch.most_rows));
  launch.gradients = static_cast<float*>(take(4 * launch.most_floats));
  launch.columns = static_cast<double*>(take(32 * int64_t{any.layer[any.layers - 1].out}));
  return launch;
}

cuda::MemberNow PopulationDevice::now_of(const PopulationMember& member) {
  const MemberProgress& from = member.progress;
  cuda::MemberNow now{};
  now.epoch = from.epoch;
  now.step = from.step;
  now.taken = from.taken;
  now.skipped = from.skipped;
  now.skips_in_a_row = from.skips_in_a_row;
  now.waited = from.waited;
  now.best_epoch = from.best_epoch;
  now.stopped_step = from.stopped_step;
  now.best = from.best;
  now.mark = from.mark;
  return now;
}

// What a launch says of a member. curves: train loss, validation loss and metric, `stride` epochs each.
void PopulationDevice::note(PopulationMember& member, const cuda::MemberNow& now, const double* curves,
                            int64_t stride) {
  MemberProgress& to = member.progress;
  const int64_t begun = to.step, steps = member.steps_per_epoch();
  to.epoch = now.epoch;
  to.step = now.step;
  to.taken = now.taken;
  to.skipped = now.skipped;
  to.skips_in_a_row = now.skips_in_a_row;
  to.waited = now.waited;
  to.best_epoch = now.best_epoch;
  to.stopped_step = now.stopped_step;
  to.best = now.best;
  to.mark = now.mark;
  to.status = kStatus[static_cast<int>(now.status)];
  if (now.status == cuda::MemberStatus::diverged) to.cause = text_of(now.cause);
  for (int64_t epoch = 0; epoch < now.epochs_of_launch; ++epoch) {
    to.train_loss.push_back(curves[epoch]);
    to.validation_loss.push_back(curves[stride + epoch]);
    to.metric.push_back(curves[2 * stride + epoch]);
    const int64_t last = std::min(begun + (epoch + 1) * steps, now.step) - 1;
    to.lr.push_back(member.recipe.lr *
                    schedule_factor(member.recipe.schedule, last, steps, steps * member.recipe.epochs));
  }
}

at::Tensor PopulationDevice::predict(const std::vector<PopulationMember*>& members, const at::Tensor& x, bool best) {
  const int64_t rows = x.size(0), out = members.front()->layers.back().out, each = rows * out;
  at::Tensor y = at::empty({static_cast<int64_t>(members.size()), rows, out}, at::kFloat);
  std::vector<Batch> batches = grouped(members, false);
  const DeviceMemory to(device_, static_cast<int64_t>(y.nbytes())),
      jobs(device_, static_cast<int64_t>(sizeof(cuda::MemberJob) * members.size())),
      next(device_, 4 * static_cast<int64_t>(batches.size()));
  Table asked;
  asked.upload(device_, {x, {}, {}, {}});
  if (any_rounds(members)) asked.round(device_, x);
  std::vector<uint32_t> zeros(batches.size(), 0);
  next.fill(zeros.data(), next.bytes());
  std::map<const PopulationMember*, std::vector<int64_t>> places;  // a member may be asked for twice
  for (size_t i = 0; i < members.size(); ++i) places[members[i]].push_back(static_cast<int64_t>(i));
  std::vector<cuda::MemberJob> all;
  std::vector<cuda::MemberOutputs> launches;
  for (Batch& batch : batches) {
    launches.push_back({batch.group.dtype, jobs.as<cuda::MemberJob>() + all.size(), static_cast<int>(batch.jobs.size()),
                        batch.group.warps, batch.shared_bytes, blocks_of(batch), next.as<uint32_t>() + launches.size(),
                        asked.at, rows});
    for (size_t i = 0; i < batch.jobs.size(); ++i) {
      cuda::MemberJob& job = batch.jobs[i];
      const PopulationMember& member = *batch.members[i];
      job.outputs = to.as<float>() + places[&member].back() * each;
      places[&member].pop_back();
      if (best && member.keeps_best()) job.values = job.best;
      all.push_back(job);
    }
  }
  jobs.fill(all.data(), jobs.bytes());
  check_device(offered_device().predict(device_, launches.data(), static_cast<int>(launches.size())));
  to.read(y.mutable_data_ptr(), to.bytes());
  return y;
}

}  // namespace mlpkit
