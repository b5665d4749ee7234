// A population's members on a device: their memory there, the jobs of a launch, and what comes back (ops).
#pragma once
#include <map>
#include <string>
#include <vector>

#include "ops/population_backend.h"
#include "ops/population_tables.h"

namespace mlpkit {

// What offers the device. Raises NotImplementedError where there is none.
const PopulationBackend& offered_device();
// Raises RuntimeError for what a device reports.
void check_device(const char* error);
cuda::MemberShape member_shape(const MemberNetwork& network, const MemberRecipe& recipe, int64_t rows);

// Memory of a device, given back with its owner.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  DeviceMemory(int device, int64_t bytes);
  DeviceMemory(DeviceMemory&& other) noexcept { *this = std::move(other); }
  DeviceMemory& operator=(DeviceMemory&& other) noexcept;
  ~DeviceMemory();
  template <class T>
  T* as() const {
    return static_cast<T*>(memory_);
  }
  int64_t bytes() const { return bytes_; }
  void fill(const void* from, int64_t bytes) const;
  void read(void* to, int64_t bytes) const;

 private:
  const PopulationBackend* backend_ = nullptr;  // whose memory it is
  int device_ = 0;
  void* memory_ = nullptr;
  int64_t bytes_ = 0;
};

struct MemberPlace {  // in a queue: a member and how many more epochs it is to be trained
  PopulationMember* member;
  int64_t epochs;
  double work;
};

struct MemberLaunched {  // what the last launch did of a member
  int64_t epochs = 0, steps = 0;
};

class PopulationDevice {
 public:
  // Raises NotImplementedError where there is no such device, or its kernels are not allowed (ops/cuda_kernels.h).
  PopulationDevice(int device, const PopulationTask& task, const PopulationData& data,
                   const PopulationData& validation);
  // Why a member cannot be trained there; empty if it can.
  std::string obstacle(const MemberNetwork& network, const MemberRecipe& recipe, int64_t rows) const;

  // `epochs` epochs of each; returns after all of them.
  void train(const std::vector<MemberPlace>& queue, int64_t epochs);
  const MemberLaunched& launched(const PopulationMember& member) const { return residents_.at(&member).launched; }
  at::Tensor predict(const std::vector<PopulationMember*>& members, const at::Tensor& x, bool best);
  // The member's state on the host becomes that of the device, where that is newer; from then on the host's counts.
  void fetch(PopulationMember& member);

 private:
  struct Resident {
    DeviceMemory memory;  // parameters, first, second, best: plan floats each
    bool newer_here = false, newer_there = true;
    MemberLaunched launched;
    cuda::MemberPlaces places{};
    float *values = nullptr, *first = nullptr, *second = nullptr, *best = nullptr;
  };
  struct Group {  // members that one launch takes
    Dtype dtype;
    int warps, resident;
    bool operator<(const Group& other) const;
  };
  struct Batch {  // a launch
    Group group;
    std::vector<PopulationMember*> members;
    std::vector<cuda::MemberJob> jobs;
    int shared_bytes;
    std::vector<StepTables::Places> tables = {};
  };
  struct Table {
    DeviceMemory x, rounded, classes, target, weights;
    cuda::MemberTable at{};
    void upload(int device, const PopulationData& data);
    void round(int device, const at::Tensor& x);
  };

  Resident& resident(PopulationMember& member);
  void upload(PopulationMember& member, Resident& resident);
  const int32_t* rows_of(const at::Tensor& rows);
  cuda::MemberJob job_of(PopulationMember& member, const cuda::MemberPlan& plan, const cuda::MemberShape& shape);
  std::vector<Batch> grouped(const std::vector<PopulationMember*>& members, bool training);
  void run(std::vector<Batch>& batches, int64_t count);
  cuda::MemberLaunch launch_of(const Batch& batch, const cuda::MemberJob* jobs, uint32_t* next,
                               std::vector<DeviceMemory>& work) const;
  int blocks_of(const Batch& batch) const;
  static cuda::MemberNow now_of(const PopulationMember& member);
  static void note(PopulationMember& member, const cuda::MemberNow& now, const double* curves, int64_t stride);

  int device_;
  PopulationTask task_;
  cuda::MemberDevice facts_;
  at::Tensor x_, validation_x_;
  bool one_table_ = false;  // members are validated on rows of the table that they are trained on
  Table data_, validation_;
  std::map<const PopulationMember*, Resident> residents_;
  std::map<const void*, std::pair<at::Tensor, DeviceMemory>> rows_;  // by where they lie on the host
};

}  // namespace mlpkit
