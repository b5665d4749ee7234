// How the wide kernels cut up their output, and which thread has which element in the epilogue (cuda).
#pragma once
#include <cutlass/numeric_types.h>
#include <cute/arch/copy_sm90.hpp>
#include <cute/atom/copy_traits_sm90.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include "cuda/wide_linear.h"

namespace mlpkit::cuda::wide {

template <class T>
using CutlassElement = std::conditional_t<std::is_same_v<T, Half>, cutlass::half_t, cutlass::bfloat16_t>;

template <WideSchedule schedule>
constexpr bool kCooperative = schedule == WideSchedule::cooperative;

// A tile's accumulators take 128 registers of each of 256 or 128 threads. Two blocks side by side share the columns'
// operand.
template <WideSchedule schedule>
using TileOf = cute::Shape<std::conditional_t<kCooperative<schedule>, cute::_128, cute::_64>, cute::_256, cute::_64>;
using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;

// Of the threads that work on a tile together; the accumulators leave in pieces of the epilogue tile.
template <WideSchedule schedule>
constexpr int kThreads = kCooperative<schedule> ? 256 : 128;
template <WideSchedule schedule>
using EpilogueTileOf = cute::Shape<std::conditional_t<kCooperative<schedule>, cute::_128, cute::_64>, cute::_32>;
constexpr int kFragmentSize = 16;  // of the accumulators that a visitor sees at once

// The operations by which CUTLASS takes accumulators of 16 bits to shared memory.
using CopyOp = cute::SM90_U32x4_STSM_N;
using CopyAtomC = cute::Copy_Atom<CopyOp, cutlass::half_t>;

template <class Element, WideSchedule schedule>
CUTE_HOST_DEVICE auto tiled_mma() {
  using Op = decltype(cute::SM90::GMMA::ss_op_selector<Element, Element, float, TileOf<schedule>>());
  return cute::make_tiled_mma(
      Op{},
      cute::Layout<cute::Shape<std::conditional_t<kCooperative<schedule>, cute::_2, cute::_1>, cute::_1, cute::_1>>{});
}

}  // namespace mlpkit::cuda::wide
