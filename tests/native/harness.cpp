// Runs the checks, each once for every instruction set of this machine: native_checks [name ...] (tests).
#include "harness.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>

#include "cpu/capability.h"

namespace native {
namespace {

std::map<std::string, Body>& checks() {
  static std::map<std::string, Body> all;
  return all;
}

enum class Place { heap, off_alignment, before_guard, after_guard };

int run(const std::string& name, Body body) {
  int failed = 0;
  for (const std::string& capability : mlpkit::cpu::supported_capabilities()) {
    mlpkit::cpu::force_capability(capability);
    Report report;
    body(report);
    std::printf("%s %s: %lld comparisons, largest error %.3Lf of its bound\n", name.c_str(), capability.c_str(),
                static_cast<long long>(report.comparisons), report.worst);
    if (report.failures || !report.comparisons) ++failed;
  }
  return failed;
}

}  // namespace

Memory::Memory(int64_t bytes, int64_t element, Draw& draw, int poison) {
  const size_t size = static_cast<size_t>(bytes), page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const Place place = static_cast<Place>(draw.below(4));
  if (place == Place::heap || place == Place::off_alignment) {
    const size_t shift = place == Place::heap ? 0 : static_cast<size_t>(element);
    base_ = static_cast<char*>(std::malloc(size + shift));
    data_ = base_ + shift;
  } else {
    const size_t inside = std::max<size_t>(1, (size + page - 1) / page) * page;
    mapped_ = inside + page;
    base_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED) std::abort();
    const bool before = place == Place::before_guard;
    if (mprotect(base_ + (before ? inside : 0), page, PROT_NONE) != 0) std::abort();
    data_ = before ? base_ + inside - size : base_ + page;
  }
  if (size) std::memset(data_, poison, size);
}

Memory::~Memory() {
  if (mapped_)
    munmap(base_, mapped_);
  else
    std::free(base_);
}

void Numbers::set(int64_t index, Real value) {
  const Real number = rounded(value, dtype_);
  char* to = memory_.data() + index * size_of(dtype_);
  if (dtype_ == Dtype::float64) {
    const double wide = static_cast<double>(number);
    std::memcpy(to, &wide, sizeof wide);
  } else if (dtype_ == Dtype::float32) {
    const float narrow = static_cast<float>(number);
    std::memcpy(to, &narrow, sizeof narrow);
  } else {
    const uint16_t bits = encode(number, dtype_);
    std::memcpy(to, &bits, sizeof bits);
  }
}

void Report::near(const std::string& what, int64_t index, Real ours, Real exact, Real bound) {
  const Real error = std::fabs(ours - exact);
  if (error > 0 && bound > 0) worst = std::max(worst, error / bound);
  // Written so that NaN fails.
  that(what, index, error <= bound);
  if (!(error <= bound) && failures <= 10)
    std::printf("  ours %.17Lg, exact %.17Lg, bound %.3Lg\n", ours, exact, bound);
}

void Report::that(const std::string& what, int64_t index, bool holds) {
  ++comparisons;
  if (holds) return;
  if (++failures <= 10)
    std::printf("FAILED: %s at %lld (%s)\n", what.c_str(), static_cast<long long>(index),
                mlpkit::cpu::capability_name(mlpkit::cpu::capability()));
}

bool add_check(const char* name, Body body) { return checks().emplace(name, body).second; }

}  // namespace native

// With no name given, all checks but the planted faults, which must fail.
int main(int count, char** names) {
  int failed = 0;
  for (const auto& [name, body] : native::checks())
    if (count == 1 ? name.rfind("planted_", 0) != 0 : std::find(names + 1, names + count, name) != names + count)
      failed += native::run(name, body);
  return failed ? 1 : 0;
}
