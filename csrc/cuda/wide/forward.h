// The forward kernel: wgmma fed by TMA, warp-specialised, persistent, with the layer's epilogue as a visitor tree
// (cuda). One file instantiates it for each dtype and schedule; the activation is a run-time switch.
//
//   y <- ActDropout(z),  z -> memory by TMA where the backward pass needs it,  z = accumulator + bias
//
// Napkin for 8192 x 4096 -> 4096, bf16, on an H200 (132 multiprocessors, 1.75 GHz, 790 TFLOP/s and 4.3 TB/s measured):
// 275 GFLOP, 348 us; x, W, y and live bits are 172 MB, 40 us beneath it (z: 16 us more); one launch. The epilogue has
// 254,000 elements a multiprocessor: relu with dropout costs about 15 instructions an element, 6 of them Philox, that
// is 0.12 M warp instructions, 17 us at four a clock; gelu twice that. 1024 tiles of 128 x 256 are 7.8 waves of 132,
// so that 0.97 of the machine is busy. Cooperative: both groups of warps run the epilogue of one tile while the
// producer fetches the next tile's operands into 4 stages of shared memory; the tensor cores wait, 17 of 348 us or 5 %.
// Pingpong hides that behind the other group's products, and pays with tiles of 64 x 256, whose operands are read from
// shared memory more often. To reach: 365 us, 1.05 of the bare product.
#pragma once
#include <cutlass/epilogue/fusion/operations.hpp>

#include "cuda/wide/act_dropout_node.h"
#include "cuda/wide/launch.h"

namespace mlpkit::cuda::wide {

template <class T, WideSchedule schedule>
struct Forward {
  using Element = CutlassElement<T>;
  using Tile = TileOf<schedule>;
  using Epilogue = EpilogueOf<Tile, Element, void, schedule>;
  using SavedZ = typename Epilogue::template Store<Element>;
  using Bias = cutlass::epilogue::fusion::Sm90RowBroadcast<0, Tile, Element, float>;
  using Sum =
      cutlass::epilogue::fusion::Sm90Compute<cutlass::plus, float, float, cutlass::FloatRoundStyle::round_to_nearest>;
  template <class Node, class... Inputs>
  using Tree = cutlass::epilogue::fusion::Sm90EVT<Node, Inputs...>;
  using Visitor =
      Tree<ActDropoutNode<T, Element>, Tree<SavedZ, Tree<Sum, cutlass::epilogue::fusion::Sm90AccFetch, Bias>>>;
  // x by rows times the transpose of W, also by rows: "column major"
  using Gemm = GemmOf<Element, cutlass::layout::ColumnMajor, typename Epilogue::template Collective<Visitor>, schedule>;

  static cudaError_t run(const WideForward& args, cudaStream_t stream) {
    typename Gemm::Arguments all = problem<Gemm>(args.rows, args.cols, args.depth, args.x, args.weight, args.y);
    const ActDropoutArguments node{
        {args.activation, static_cast<float>(args.negative_slope), static_cast<float>(args.dropout.scale)},
        args.dropout,
        args.seed,
        args.keep,
        args.positive,
        args.census};
    auto& [saved, root] = all.epilogue.thread;
    auto& [sum, store] = saved;
    sum.op_1.ptr_row = static_cast<const Element*>(args.bias);
    store.ptr_aux = static_cast<Element*>(args.z);
    store.dAux = cute::make_stride(args.cols, cute::_1{}, int64_t{0});
    root = node;
    return launch<Gemm>(all, stream);
  }
};

}  // namespace mlpkit::cuda::wide
