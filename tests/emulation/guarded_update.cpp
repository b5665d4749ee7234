// A guarded update of csrc/cuda/guarded_update.h from step to step, for ctypes (emulation).
#include "cuda/guarded_update.h"

#include <cstring>

#include "cuda/guarded_plan.h"

using namespace mlpkit;

extern "C" void emulator_allow(const void* from, int64_t bytes, int writable);

namespace {

struct Session {
  Optimizer kind;
  cuda::GuardedPlan plan;
  std::vector<cuda::GuardedTensor> table;
  std::vector<int32_t> row_of_chunk;
  std::vector<cuda::GuardedTally> tally;
  std::vector<cuda::GuardedRowSettings> settings;
  std::vector<double> parts, bounds, log;
  std::vector<uint32_t> begun, finished;
  std::vector<const void*> gradients;
};

template <class T>
void allow(std::vector<T>& of) {
  emulator_allow(of.data(), static_cast<int64_t>(of.size() * sizeof(T)), 1);
}

}  // namespace

extern "C" {

int64_t emulate_bytes_of_tensor() { return sizeof(cuda::GuardedTensor); }
int64_t emulate_bytes_of_group() { return sizeof(cuda::GuardedGroupOnDevice); }

// chunk: 0 as the library chooses. The table goes to the device as it does there.
void* emulate_guarded_new(int kind, const cuda::GuardedTensor* rows, int64_t count, int64_t chunk) {
  auto* session = new Session{static_cast<Optimizer>(kind),
                              cuda::plan_guarded({rows, rows + count}, chunk),
                              {},
                              {},
                              {},
                              {},
                              {},
                              {},
                              {},
                              {},
                              {},
                              {}};
  Session& s = *session;
  s.table.resize(count);
  s.row_of_chunk.assign(s.plan.chunks + 1, -1);
  s.tally.assign(count, cuda::GuardedTally{});
  s.settings.resize(count);
  std::memset(static_cast<void*>(s.settings.data()), 0xff, count * sizeof(s.settings[0]));
  s.parts.assign(2 * s.plan.chunks + 2, __builtin_nan(""));
  s.bounds.assign(4 * count, __builtin_nan(""));
  s.log.assign(2 + cuda::kGuardedSkips * cuda::kGuardedSkip, 0);
  s.begun.assign(count, 0);
  s.finished.assign(2, 0);
  return session;
}
void emulate_guarded_delete(Session* session) { delete session; }
double* emulate_guarded_log(Session* session) { return session->log.data(); }
double* emulate_guarded_bounds(Session* session) { return session->bounds.data(); }

int emulate_guarded_prepare(Session* session) {
  Session& s = *session;
  allow(s.table);
  allow(s.row_of_chunk);
  const int error = cuda::guarded_upload(reinterpret_cast<uint64_t*>(s.table.data()),
                                         reinterpret_cast<const uint64_t*>(s.plan.table.data()),
                                         static_cast<int64_t>(s.table.size() * sizeof(s.table[0]) / 8), nullptr);
  if (error) return error;
  return cuda::guarded_number_chunks(s.table.data(), static_cast<int32_t>(s.table.size()), s.plan.chunks,
                                     s.row_of_chunk.data(), nullptr);
}

// gradients: by index, nullptr where a row takes no part. inline_: pass gradients and groups in the arguments.
int emulate_guarded_step(Session* session, const void* const* gradients, cuda::GuardedGroupOnDevice* groups,
                         int64_t group_count, int inline_, int tries, int force, const double* rule, int64_t interval,
                         double clip, float* scale, int32_t* clean, float* found, cuda::GuardedDecision* decision,
                         double* census) {
  Session& s = *session;
  allow(s.table);
  allow(s.row_of_chunk);
  allow(s.tally);
  allow(s.settings);
  allow(s.parts);
  allow(s.bounds);
  allow(s.log);
  allow(s.begun);
  allow(s.finished);
  cuda::GuardedUpdateArgs args{};
  args.kind = s.kind;
  args.force = force != 0;
  args.plain = s.plan.plain;
  std::vector<GuardedGroup> settings;
  for (int64_t i = 0; i < group_count; ++i) settings.push_back(groups[i].settings);
  args.tries = tries || cuda::guarded_tries(s.plan, s.kind, settings.data(), settings.size());
  args.rule = {rule[0], rule[1], rule[2], rule[3], interval};
  args.clip = clip;
  args.rows = static_cast<int32_t>(s.table.size());
  args.by_block = s.plan.by_block;
  args.by_warp = s.plan.by_warp;
  args.chunks = s.plan.chunks;
  args.chunk = s.plan.chunk;
  args.table = s.table.data();
  args.row_of_chunk = s.row_of_chunk.data();
  args.scale = scale;
  args.clean = clean;
  args.found = found;
  args.decision = decision;
  args.census = census;
  args.bounds = s.bounds.data();
  args.log = s.log.data();
  args.parts = s.parts.data();
  args.tally = s.tally.data();
  args.settings = s.settings.data();
  args.begun = s.begun.data();
  args.finished = s.finished.data();
  s.gradients.clear();
  for (const cuda::GuardedTensor& row : s.plan.table) s.gradients.push_back(gradients[row.index]);
  if (inline_) {
    std::copy(s.gradients.begin(), s.gradients.end(), args.gradient);
    std::copy(groups, groups + group_count, args.group);
  } else {
    allow(s.gradients);
    emulator_allow(groups, group_count * static_cast<int64_t>(sizeof(*groups)), 0);
    args.gradients = s.gradients.data();
    args.groups = groups;
  }
  const int error = cuda::guarded_update(args, nullptr);
  for (const cuda::GuardedTally& tally : s.tally) {
    const cuda::GuardedTally zeros{};
    if (!error && std::memcmp(&tally, &zeros, sizeof(zeros)) != 0) return -1;
  }
  return error ? error : s.finished[0] || s.finished[1] ? -2 : 0;
}

}  // extern "C"
