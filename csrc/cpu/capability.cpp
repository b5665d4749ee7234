// Detection and choice of the CPU instruction set (cpu).
#include "cpu/capability.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace mlpkit::cpu {
namespace {

constexpr Capability kAll[] = {Capability::basic, Capability::avx2, Capability::avx512, Capability::avx512_bf16};

bool supported(Capability capability) {
#if defined(__x86_64__)
  switch (capability) {
    case Capability::basic:
      return true;
    case Capability::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case Capability::avx512:
      return supported(Capability::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case Capability::avx512_bf16:
      return supported(Capability::avx512) && __builtin_cpu_supports("avx512bf16");
  }
#endif
  return capability == Capability::basic;
}

std::string supported_list() {
  std::string list;
  for (const std::string& name : supported_capabilities()) list += (list.empty() ? "" : ", ") + name;
  return list;
}

Capability from_name(const std::string& name, const char* source) {
  for (Capability capability : kAll)
    if (name == capability_name(capability) && supported(capability)) return capability;
  throw std::invalid_argument(std::string(source) + " is '" + name + "'; this machine runs " + supported_list());
}

Capability initial() {
  if (const char* name = std::getenv("MLPKIT_CPU_CAPABILITY"); name && *name)
    return from_name(name, "MLPKIT_CPU_CAPABILITY");
  Capability best = Capability::basic;
  for (Capability capability : kAll)
    if (supported(capability)) best = capability;
  return best;
}

std::atomic<int>& current() {
  static std::atomic<int> value{static_cast<int>(initial())};
  return value;
}

}  // namespace

Capability capability() { return static_cast<Capability>(current().load(std::memory_order_relaxed)); }

const char* capability_name(Capability capability) {
  switch (capability) {
    case Capability::avx512_bf16:
      return "avx512_bf16";
    case Capability::avx512:
      return "avx512";
    case Capability::avx2:
      return "avx2";
    case Capability::basic:
      break;
  }
  return "default";
}

std::vector<std::string> supported_capabilities() {
  std::vector<std::string> names;
  for (Capability capability : kAll)
    if (supported(capability)) names.emplace_back(capability_name(capability));
  return names;
}

void force_capability(const std::string& name) { current() = static_cast<int>(from_name(name, "cpu capability")); }

}  // namespace mlpkit::cpu
