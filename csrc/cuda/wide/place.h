// Where a thread of a CUTLASS epilogue stands in the output, in units of the mask contract (cuda).
//
// The collective hands a visitor its accumulators in fragments of 16: two mask tiles side by side, eight elements of a
// lane each, in the order of cuda/mask_fragment.h. Its coordinates are static but for the thread's first element.
#pragma once
#include <cutlass/numeric_conversion.h>  // what the next header forgets

#include <cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp>

#include "cuda/mask_fragment.h"
#include "cuda/wide_linear.h"

namespace mlpkit::cuda::wide {

// What a visitor node without shared memory and workspace tells the collective.
template <class Arguments_>
struct PlainNode : cutlass::epilogue::fusion::Sm90VisitorImpl<> {
  struct SharedStorage {};
  using Arguments = Arguments_;
  using Params = Arguments_;

  template <class Shape>
  static constexpr Params to_underlying_arguments(const Shape&, const Arguments& args, void*) {
    return args;
  }
  template <class Shape>
  static bool can_implement(const Shape&, const Arguments&) {
    return true;
  }
  template <class Shape>
  static size_t get_workspace_size(const Shape&, const Arguments&) {
    return 0;
  }
  template <class Shape>
  static cutlass::Status initialize_workspace(const Shape&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  CUTLASS_HOST_DEVICE PlainNode() {}
  CUTLASS_HOST_DEVICE PlainNode(const Params& params, const SharedStorage&) : params(&params) {}
  const Params* params;
};

template <class Coordinates>  // (CPY, CPY_M, CPY_N, EPI_M, EPI_N) -> (row, column), from the thread's first element
struct Place {
  static constexpr int elements = decltype(cute::size(Coordinates{}))::value;  // of a thread in a tile of the block
  static constexpr int subtiles_down = decltype(cute::size<3>(Coordinates{}))::value;
  static constexpr int subtile = elements / subtiles_down / decltype(cute::size<4>(Coordinates{}))::value;

  Coordinates coordinates;
  int rows, cols;  // of the output
  int row, col;    // of the thread's first element

  template <class Args>
  CUTLASS_DEVICE explicit Place(const Args& args) : coordinates(args.tCcD) {
    rows = static_cast<int>(cute::get<0>(args.problem_shape_mnkl));
    cols = static_cast<int>(cute::get<1>(args.problem_shape_mnkl));
    row = rows - static_cast<int>(cute::get<0>(args.residue_tCcD));
    col = cols - static_cast<int>(cute::get<1>(args.residue_tCcD));
  }

  // Of element `first` of the fragments of a subtile among all that the thread has.
  CUTLASS_DEVICE static constexpr int index(int first, int epi_m, int epi_n) {
    return first + subtile * (epi_m + subtiles_down * epi_n);
  }

  // The tile that holds element `index`, the first of eight.
  struct Tile {
    int row, col;  // of the tile's corner
    int64_t number;
    bool inside;
  };
  CUTLASS_DEVICE Tile tile(int index) const {
    const auto at = coordinates(index);
    Tile tile;
    tile.row = row / kMaskTile * kMaskTile + static_cast<int>(cute::get<0>(at));
    tile.col = col / kMaskTile * kMaskTile + static_cast<int>(cute::get<1>(at));
    tile.inside = tile.row < rows && tile.col < cols;
    const int col_tiles = (cols + kMaskTile - 1) / kMaskTile;
    tile.number = static_cast<int64_t>(tile.row / kMaskTile) * col_tiles + tile.col / kMaskTile;
    return tile;
  }
  CUTLASS_DEVICE uint32_t lane() const { return mask_lane(row, col); }
};
template <class Args>
Place(const Args&) -> Place<decltype(Args::tCcD)>;

// Adds what a warp has seen to the census of the launch. Every lane of the warp calls it.
MLPKIT_DEVICE void add_to_census(uint32_t largest, bool nonfinite, WideCensus* census, uint32_t lane) {
  largest = device::reduce_max(largest);
  nonfinite = device::ballot(nonfinite) != 0;
  if (lane != 0) return;
  device::atomic_max(&census->largest, largest);
  if (nonfinite) device::atomic_max(&census->nonfinite, 1u);
}

}  // namespace mlpkit::cuda::wide
