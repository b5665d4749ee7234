// The backward kernel: the product that gives the gradient by a layer's output, from the layer that follows, with that
// layer's slope, mask and column sums as its epilogue, so that the gradient by y is never in memory (cuda).
//
// Napkin for 8192 x 4096 <- 4096, bf16, on an H200: 348 us of products. Beneath them next_dz, W and dz are 168 MB, live
// bits 4 and partial sums 8: 42 us (z: 16 us more). The epilogue costs about 5 instructions an element for relu, its
// sums included, and gelu' about 50. Against the product and the element-wise kernel apart: one read and one write of
// the gradient by y less, 31 us. To reach: 360 us.
#pragma once
#include "cuda/wide/launch.h"
#include "cuda/wide/slope_node.h"

namespace mlpkit::cuda::wide {

template <class T, WideSchedule schedule>
struct Backward {
  using Element = CutlassElement<T>;
  using Tile = TileOf<schedule>;
  using Epilogue = EpilogueOf<Tile, Element, Element, schedule>;
  using Visitor = SlopeNode<T, Element>;
  // W by rows, as it is
  using Gemm = GemmOf<Element, cutlass::layout::RowMajor, typename Epilogue::template Collective<Visitor>, schedule>;

  static cudaError_t run(const WideBackward& args, float* sums, int64_t stride, cudaStream_t stream) {
    typename Gemm::Arguments all = problem<Gemm>(args.rows, args.cols, args.depth, args.next_dz, args.weight, args.dz);
    // A descriptor needs an address even where nothing is read.
    all.epilogue.ptr_C = static_cast<const Element*>(args.z ? args.z : args.dz);
    all.epilogue.thread = {{args.activation, static_cast<float>(args.negative_slope), static_cast<float>(args.scale)},
                           args.keep,
                           args.positive,
                           args.z != nullptr,
                           sums,
                           stride};
    return launch<Gemm>(all, stream);
  }
};

}  // namespace mlpkit::cuda::wide
