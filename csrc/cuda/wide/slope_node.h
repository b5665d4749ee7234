// The backward epilogue as a visitor of CUTLASS: the gradient by a layer's output comes in as the accumulator, that by
// its z goes out, dz = dy * mask * scale * act'(z), and column sums of it go to memory from here (cuda).
#pragma once
#include "cuda/wide/place.h"

namespace mlpkit::cuda::wide {

struct SlopeArguments {
  FragmentOp op;
  const uint8_t* keep;  // or nullptr, as the next
  const uint8_t* positive;
  bool reads_z;    // the slope depends on z itself, which comes as the collective's source
  float* sums;     // [row tiles, stride]: column sums over the rows of a tile, or nullptr
  int64_t stride;  // whole tiles
};

// Sums over the lanes that have the same columns: `of` holds those of the lane's four columns, and column
// sum_column(lane) of the tile is returned. The order is fixed. Every lane of the warp calls it.
MLPKIT_DEVICE int sum_column(uint32_t lane) { return (lane >> 4) * 8 + (lane & 3) * 2 + (lane >> 3 & 1); }
MLPKIT_DEVICE float sum_rows(const float (&of)[4], uint32_t lane) {
  const bool right = lane >> 4 & 1, odd = lane >> 3 & 1;
  const float even_sum = (right ? of[2] : of[0]) + device::shuffle_xor(right ? of[0] : of[2], 16);
  const float odd_sum = (right ? of[3] : of[1]) + device::shuffle_xor(right ? of[1] : of[3], 16);
  const float half = (odd ? odd_sum : even_sum) + device::shuffle_xor(odd ? even_sum : odd_sum, 8);
  return half + device::shuffle_xor(half, 4);
}

template <class T, class Element>
struct SlopeNode : PlainNode<SlopeArguments> {
  using PlainNode<SlopeArguments>::PlainNode;

  CUTLASS_DEVICE bool is_producer_load_needed() const { return this->params->reads_z; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return this->params->reads_z; }

  template <class Place, class Source>
  struct Callbacks : cutlass::epilogue::fusion::EmptyConsumerStoreCallbacks {
    static constexpr int tiles = Place::elements / kFragment;

    const SlopeArguments& params;
    Place place;
    const Source& source;  // z of the subtile
    uint32_t keep[tiles / 4], positive[tiles / 4];

    CUTLASS_DEVICE Callbacks(const SlopeArguments& params, const Place& place, const Source& source)
        : params(params), place(place), source(source) {}

    // All bits of the thread at once: the loads are on their way together.
    CUTLASS_DEVICE void begin() {
      load_bits(params.keep, keep);
      load_bits(params.positive, positive);
    }

    template <class Accumulator, int size>
    CUTLASS_DEVICE cutlass::Array<Element, size> visit(const cutlass::Array<Accumulator, size>& input, int epi_v,
                                                       int epi_m, int epi_n) {
      static_assert(size % kFragment == 0, "a fragment is a whole number of mask tiles");
      const auto& zs = cute::recast<cutlass::Array<Element, size>>(source)(epi_v);
      cutlass::Array<Element, size> output;
#pragma unroll
      for (int first = 0; first < size; first += kFragment) {
        float z[kFragment] = {}, d[kFragment];
#pragma unroll
        for (int i = 0; i < kFragment; ++i) d[i] = input[first + i];
        if (params.reads_z) {
#pragma unroll
          for (int i = 0; i < kFragment / 2; ++i) {
            const float2 pair = device::widen_pair(reinterpret_cast<const uint32_t*>(zs.data() + first)[i], T{});
            z[2 * i] = pair.x, z[2 * i + 1] = pair.y;
          }
        }
        const int index = Place::index(epi_v * size + first, epi_m, epi_n) / kFragment, shift = index % 4 * 8;
        const FragmentBits bits{keep[index / 4] >> shift & kAllOfFragment,
                                positive[index / 4] >> shift & kAllOfFragment};
        backward_fragment(params.op, bits, z, d);
#pragma unroll
        for (int i = 0; i < kFragment / 2; ++i)
          reinterpret_cast<uint32_t*>(output.data() + first)[i] = device::narrow_pair(d[2 * i], d[2 * i + 1], T{});
        if (params.sums) write_sums(place.tile(index * kFragment), d);
      }
      return output;
    }

   private:
    CUTLASS_DEVICE void load_bits(const uint8_t* plane, uint32_t (&to)[tiles / 4]) const {
#pragma unroll
      for (int i = 0; i < tiles / 4; ++i) to[i] = 0xffffffffu;
      if (!plane) return;
#pragma unroll
      for (int i = 0; i < tiles; ++i) {
        const auto tile = place.tile(i * kFragment);
        const uint32_t bits = tile.inside ? device::load1(plane + tile.number * kMaskLanes + place.lane()) : 0;
        to[i / 4] = i % 4 == 0 ? bits : to[i / 4] | bits << (i % 4 * 8);
      }
    }

    // Rows below the last one are left out: 0 * slope is NaN where the slope is Inf or NaN.
    template <class Tile>
    CUTLASS_DEVICE void write_sums(const Tile& tile, const float (&d)[kFragment]) const {
      const uint32_t lane = place.lane();
      const int row = tile.row + static_cast<int>(lane / 4);
      float of[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int upper = i / 2 * 4 + i % 2;
        of[i] = (row < place.rows ? d[upper] : 0.f) + (row + 8 < place.rows ? d[upper + 2] : 0.f);
      }
      const float sum = sum_rows(of, lane);
      if (tile.inside && (lane & 4) == 0)
        device::store(params.sums + tile.row / kMaskTile * params.stride + tile.col + sum_column(lane), sum);
    }
  };

  template <bool reference_source, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(const cutlass::epilogue::fusion::ConsumerStoreArgs<Args...>& args) {
    const Place place(args);
    return Callbacks<decltype(Place(args)), std::remove_reference_t<decltype(args.tCrC)>>(*this->params, place,
                                                                                          args.tCrC);
  }
};

}  // namespace mlpkit::cuda::wide
