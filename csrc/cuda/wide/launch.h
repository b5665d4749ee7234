// What the wide kernels have in common: tiles, schedules, the collectives of CUTLASS, and the launch (cuda).
#pragma once
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "cuda/device.h"
#include "cuda/wide/shape.h"

namespace mlpkit::cuda::wide {

template <class Tile_, class Element, class Source, WideSchedule schedule>
struct EpilogueOf {
  using Schedule = std::conditional_t<kCooperative<schedule>, cutlass::epilogue::TmaWarpSpecializedCooperative,
                                      cutlass::epilogue::TmaWarpSpecialized>;
  using Auto = cutlass::epilogue::collective::EpilogueTileAuto;
  using Description = cutlass::epilogue::collective::detail::EpilogueDescriptor<Tile_, Auto, Source, Element, Schedule>;

  template <class Aux>
  using AuxDescription =
      cutlass::epilogue::collective::detail::AuxStoreDescriptor<Description, cutlass::layout::RowMajor, Aux>;
  // What the emulated epilogue takes for granted.
  static_assert(std::is_same_v<typename Description::EpilogueTile, EpilogueTileOf<schedule>>);
  static_assert(std::is_same_v<CopyOp, typename AuxDescription<Element>::CopyOpR2S>);
  static_assert(Description::DispatchPolicy::FragmentSize == kFragmentSize);

  // A second output, by TMA; none where its pointer is null.
  template <class Aux>
  using Store = cutlass::epilogue::fusion::Sm90AuxStore<
      AuxDescription<Aux>::Stages, typename Description::EpilogueTile, Aux, cutlass::FloatRoundStyle::round_to_nearest,
      typename AuxDescription<Aux>::Stride, typename AuxDescription<Aux>::SmemLayoutAtom,
      typename AuxDescription<Aux>::CopyOpR2S>;

  template <class Visitor>
  using Collective = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile_, Cluster, Auto, float, float, Source,
      cutlass::layout::RowMajor, 8, Element, cutlass::layout::RowMajor, 8, Schedule, Visitor>::CollectiveOp;
};

// [M, K] by rows times [K, N] in the given layout, sums in fp32.
template <class Element, class LayoutB, class Epilogue, WideSchedule schedule>
struct KernelOf {
  using Schedule = std::conditional_t<kCooperative<schedule>, cutlass::gemm::KernelTmaWarpSpecializedCooperative,
                                      cutlass::gemm::KernelTmaWarpSpecializedPingpong>;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, cutlass::layout::RowMajor, 8, Element, LayoutB, 8,
      float, TileOf<schedule>, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      Schedule>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue,
                                                      cutlass::gemm::PersistentScheduler>;
  static_assert(cute::size(typename Mainloop::TiledMma{}) == kThreads<schedule>);
};
template <class Element, class LayoutB, class Epilogue, WideSchedule schedule>
using GemmOf =
    cutlass::gemm::device::GemmUniversalAdapter<typename KernelOf<Element, LayoutB, Epilogue, schedule>::Kernel>;

// Of a matrix without gaps whose rows (or columns, where those are contiguous) hold this many elements.
template <class Stride>
Stride packed(int64_t length) {
  Stride stride{};
  if constexpr (cute::is_static_v<std::decay_t<decltype(cute::get<0>(Stride{}))>>)
    cute::get<1>(stride) = length;
  else
    cute::get<0>(stride) = length;
  return stride;
}

// d = a b with the epilogue's arguments still empty.
template <class Gemm>
typename Gemm::Arguments problem(int64_t m, int64_t n, int64_t k, const void* a, const void* b, void* d) {
  using Kernel = typename Gemm::GemmKernel;
  const int rows = static_cast<int>(m), cols = static_cast<int>(n), depth = static_cast<int>(k);
  const int64_t b_length = cute::is_static_v<std::decay_t<decltype(cute::get<0>(typename Kernel::StrideB{}))>> ? n : k;
  typename Gemm::Arguments args{};
  args.mode = cutlass::gemm::GemmUniversalMode::kGemm;
  args.problem_shape = cute::make_shape(rows, cols, depth, 1);
  args.mainloop.ptr_A = static_cast<const typename Gemm::ElementA*>(a);
  args.mainloop.dA = packed<typename Kernel::StrideA>(k);
  args.mainloop.ptr_B = static_cast<const typename Gemm::ElementB*>(b);
  args.mainloop.dB = packed<typename Kernel::StrideB>(b_length);
  args.epilogue.dC = packed<typename Kernel::StrideC>(n);
  args.epilogue.ptr_D = static_cast<typename Gemm::ElementD*>(d);
  args.epilogue.dD = packed<typename Kernel::StrideD>(n);
  args.hw_info.sm_count = device::multiprocessors();
  return args;
}

template <class Gemm>
cudaError_t launch(const typename Gemm::Arguments& args, cudaStream_t stream) {
  Gemm gemm;
  if (gemm.can_implement(args) != cutlass::Status::kSuccess || Gemm::get_workspace_size(args) != 0)
    return cudaErrorInvalidValue;
  if (gemm.initialize(args, nullptr, stream) != cutlass::Status::kSuccess) return cudaErrorInvalidConfiguration;
  if (gemm.run(stream) != cutlass::Status::kSuccess) return cudaErrorLaunchFailure;
  return cudaGetLastError();
}

}  // namespace mlpkit::cuda::wide
