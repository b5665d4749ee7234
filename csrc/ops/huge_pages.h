// Large fresh memory in huge pages, where the system leaves that choice to programs (ops).
#pragma once
#include <ATen/core/Tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mlpkit {

// Asks for huge pages under a tensor about to be written: each fresh small page would cost a fault of about a
// microsecond, more than the writing. A hint that may be refused; small tensors are left alone.
inline const at::Tensor& in_huge_pages(const at::Tensor& fresh) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t{2} << 20;
  const auto data = reinterpret_cast<uintptr_t>(fresh.const_data_ptr());
  const uintptr_t begin = (data + page - 1) / page * page, end = (data + fresh.nbytes()) / page * page;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return fresh;
}

}  // namespace mlpkit
