// Freed blocks in a short list, oldest first; an allocator of torch's kind in front of it (ops).
#include "ops/kept_memory.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/Allocator.h>
#include <c10/util/Exception.h>

#include <cstdlib>
#include <deque>
#include <mutex>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mlpkit {
namespace {

// Smaller blocks the C library keeps by itself; whenever one of this size is freed, it merges all its small ones.
constexpr size_t kSmallest = size_t{64} << 10;
constexpr size_t kHugePage = size_t{2} << 20, kLine = 64;

struct MemoryBlock {
  void* data;
  size_t bytes;
};

void* fresh(size_t bytes) {
  const size_t alignment = bytes >= kHugePage ? kHugePage : kLine;
  void* data = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  TORCH_CHECK_WITH(OutOfMemoryError, data, "mlpkit: no memory for a tensor of ", bytes, " bytes");
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes >= kHugePage) madvise(data, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
  return data;
}

class FreedBlocks {
 public:
  // A block of just that size, or one without data.
  MemoryBlock take(size_t bytes) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (lock)
      for (auto block = blocks_.rbegin(); block != blocks_.rend(); ++block)
        if (block->bytes == bytes) {
          const MemoryBlock found = *block;
          blocks_.erase(std::next(block).base());
          kept_ -= bytes;
          return found;
        }
    return {nullptr, bytes};
  }

  void give(MemoryBlock block) {
    std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock || block.bytes > kMostKept) return std::free(block.data);
    blocks_.push_back(block);
    kept_ += block.bytes;
    while (kept_ > kMostKept) {
      kept_ -= blocks_.front().bytes;
      std::free(blocks_.front().data);
      blocks_.pop_front();
    }
  }

 private:
  // Only ever tried, never waited for: a child process may inherit it locked.
  std::mutex mutex_;
  std::deque<MemoryBlock> blocks_;
  size_t kept_ = 0;
};

// Never destroyed: tensors may be freed after all else at the process's end.
FreedBlocks& freed() {
  static auto* blocks = new FreedBlocks;
  return *blocks;
}

void release(void* context) {
  auto* block = static_cast<MemoryBlock*>(context);
  freed().give(*block);
  delete block;
}

class KeptMemory final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    MemoryBlock block = freed().take(bytes);
    if (!block.data) block.data = fresh(bytes);
    return {block.data, new MemoryBlock(block), release, at::Device(at::kCPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

}  // namespace

at::Tensor empty_kept(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const c10::ScalarType dtype = c10::typeMetaToScalarType(options.dtype());
  if (c10::multiply_integers(sizes) * c10::elementSize(dtype) < static_cast<int64_t>(kSmallest))
    return at::empty(sizes, options);
  static KeptMemory allocator;
  return at::detail::empty_generic(sizes, &allocator, c10::DispatchKeySet(c10::DispatchKey::CPU), dtype, std::nullopt);
}

}  // namespace mlpkit
