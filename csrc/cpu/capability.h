// Which instruction set the CPU kernels use: found at first use, visible, and forceable (MLPKIT_CPU_CAPABILITY or
// force_capability).
#pragma once
#include <string>
#include <vector>

namespace mlpkit::cpu {

enum class Capability : int { basic, avx2, avx512, avx512_bf16 };

// The one in force. Throws std::invalid_argument when MLPKIT_CPU_CAPABILITY names an unknown or unsupported one.
Capability capability();
const char* capability_name(Capability);
// Those this machine can run, slowest first; names as MLPKIT_CPU_CAPABILITY takes them.
std::vector<std::string> supported_capabilities();
// Throws std::invalid_argument when the name is unknown or this machine lacks it.
void force_capability(const std::string& name);

}  // namespace mlpkit::cpu

// Declares kernel `name(const Args&)` in every instruction set's namespace and a function of that name that calls the
// one in force.
#if defined(__x86_64__)
#define MLPKIT_CPU_KERNEL(name, Args)   \
  namespace mlpkit {                    \
  namespace isa_default {               \
  void name(const Args&);               \
  }                                     \
  namespace isa_avx2 {                  \
  void name(const Args&);               \
  }                                     \
  namespace isa_avx512 {                \
  void name(const Args&);               \
  }                                     \
  namespace cpu {                       \
  inline void name(const Args& args) {  \
    switch (capability()) {             \
      case Capability::avx512_bf16:     \
      case Capability::avx512:          \
        return isa_avx512::name(args);  \
      case Capability::avx2:            \
        return isa_avx2::name(args);    \
      case Capability::basic:           \
        return isa_default::name(args); \
    }                                   \
  }                                     \
  }                                     \
  }
#else
#define MLPKIT_CPU_KERNEL(name, Args)                             \
  namespace mlpkit {                                              \
  namespace isa_default {                                         \
  void name(const Args&);                                         \
  }                                                               \
  namespace cpu {                                                 \
  inline void name(const Args& args) { isa_default::name(args); } \
  }                                                               \
  }
#endif
