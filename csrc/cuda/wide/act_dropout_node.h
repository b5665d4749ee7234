// The forward epilogue as a node of a CUTLASS visitor tree: z comes in, y = act(z) * mask * scale goes out in its
// dtype, the bits that the backward pass needs and the census go to memory from here (cuda).
#pragma once
#include "cuda/wide/place.h"
#include "cuda/wide_linear.h"

namespace mlpkit::cuda::wide {

struct ActDropoutArguments {
  FragmentOp op;
  Dropout dropout;      // its seed and offset are read from
  const int64_t* seed;  // [2], or nullptr where the threshold is 0 or 65536
  uint8_t* keep;        // or nullptr, as the next
  uint8_t* positive;
  WideCensus* census;
};

template <class T, class Element>
struct ActDropoutNode : PlainNode<ActDropoutArguments> {
  using PlainNode<ActDropoutArguments>::PlainNode;

  template <class Place>
  struct Callbacks : cutlass::epilogue::fusion::EmptyConsumerStoreCallbacks {
    const ActDropoutArguments& params;
    Place place;
    Dropout dropout;
    FragmentCensus<T> census;

    CUTLASS_DEVICE Callbacks(const ActDropoutArguments& params, const Place& place)
        : params(params), place(place), dropout(params.dropout) {}

    CUTLASS_DEVICE void begin() {
      if (!params.seed) return;
      int64_t seed, offset;
      device::load(params.seed, seed);
      device::load(params.seed + 1, offset);
      dropout.seed = static_cast<uint64_t>(seed);
      dropout.offset = static_cast<uint32_t>(offset);
    }

    template <class Accumulator, class Input, int size>
    CUTLASS_DEVICE cutlass::Array<Element, size> visit(const cutlass::Array<Accumulator, size>&, int epi_v, int epi_m,
                                                       int epi_n, const cutlass::Array<Input, size>& input) {
      static_assert(size % kFragment == 0, "a fragment is a whole number of mask tiles");
      cutlass::Array<Element, size> output;
#pragma unroll
      for (int first = 0; first < size; first += kFragment) {
        const auto tile = place.tile(Place::index(epi_v * size + first, epi_m, epi_n));
        uint32_t pairs[kFragment / 2];
        visit_tile(tile, input.data() + first, pairs);
#pragma unroll
        for (int i = 0; i < kFragment / 2; ++i) reinterpret_cast<uint32_t*>(output.data() + first)[i] = pairs[i];
      }
      return output;
    }

    CUTLASS_DEVICE void end() {
      if (params.census) add_to_census(census.largest, census.nonfinite, params.census, place.lane());
    }

   private:
    template <class Tile>
    CUTLASS_DEVICE void visit_tile(const Tile& tile, const float* input, uint32_t (&pairs)[kFragment / 2]) {
      float z[kFragment];
#pragma unroll
      for (int i = 0; i < kFragment; ++i) z[i] = input[i];
      uint32_t keep = dropout.threshold ? 0 : kAllOfFragment;
      if (params.seed) keep = draw_fragment(dropout, tile.number, place.lane());
      const FragmentBits bits = forward_fragment(params.op, keep, z);
#pragma unroll
      for (int i = 0; i < kFragment / 2; ++i) pairs[i] = device::narrow_pair(z[2 * i], z[2 * i + 1], T{});
      if (!tile.inside) return;
      const int64_t at = tile.number * kMaskLanes + place.lane();
      if (params.keep) device::store1(params.keep + at, bits.keep);
      if (params.positive) device::store1(params.positive + at, bits.positive);
      if (params.census) census.add(pairs);
    }
  };

  template <bool reference_source, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(const cutlass::epilogue::fusion::ConsumerStoreArgs<Args...>& args) {
    const Place place(args);
    return Callbacks<decltype(Place(args))>(*this->params, place);
  }
};

}  // namespace mlpkit::cuda::wide
