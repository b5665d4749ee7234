// The visitor nodes of csrc/cuda/wide over a whole output, as CUTLASS's collective epilogue calls them: its layouts of
// accumulators and copies decide which thread has which elements; only the products are the test's (emulation).
#include <cute/algorithm/functional.hpp>
#include <cute/arch/copy_sm90.hpp>
#include <cute/atom/copy_traits_sm90.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>

#include "cuda/column_sums.h"
#include "cuda/wide/act_dropout_node.h"
#include "cuda/wide/shape.h"
#include "cuda/wide/slope_node.h"

using namespace mlpkit;
using namespace mlpkit::cuda;
using cute::_;

namespace {

template <class T>
float at(const void* matrix, int64_t rows, int64_t cols, int64_t row, int64_t col) {
  if (!matrix || row >= rows || col >= cols) return 0;  // as TMA fills it
  float value;
  device::load(static_cast<const T*>(matrix) + row * cols + col, value);
  return value;
}

struct Output {
  int64_t rows, cols;
  const float* product;  // [rows, cols]
  const void* source;    // [rows, cols], T: z, or nullptr
  const void* bias;      // [cols], T, or nullptr
  void* to;              // [rows, cols], T
};

// One block's tile: what CollectiveEpilogue::store does, without shared memory.
template <class T, class Element, WideSchedule schedule, class Node>
void tile(const Output output, const typename Node::Arguments node_args) {
  using Tile = wide::TileOf<schedule>;
  using EpilogueTile = wide::EpilogueTileOf<schedule>;
  const auto tiled_mma = wide::tiled_mma<Element, schedule>();
  const int thread = static_cast<int>(device::thread_index());
  const int across = static_cast<int>((output.cols + cute::size<1>(Tile{}) - 1) / cute::size<1>(Tile{}));
  const int m = static_cast<int>(device::block_index()) / across, n = static_cast<int>(device::block_index()) % across;
  const int rows = static_cast<int>(output.rows), cols = static_cast<int>(output.cols);

  const auto elements = cute::make_identity_tensor(cute::make_shape(rows, cols));
  const auto block = cute::local_tile(elements, cute::take<0, 2>(Tile{}), cute::make_coord(m, n));
  auto accumulators = cute::partition_fragment_C(tiled_mma, cute::take<0, 2>(Tile{}));
  const auto places = tiled_mma.get_slice(thread).partition_C(block);
  for (int i = 0; i < cute::size(accumulators); ++i) {
    const int64_t row = cute::get<0>(places(i)), col = cute::get<1>(places(i));
    accumulators(i) = at<float>(output.product, rows, cols, row, col);
  }

  const auto copy_c = cute::make_tiled_copy_C_atom(wide::CopyAtomC{}, tiled_mma);
  const auto to_shared = cute::make_tiled_copy_S(cute::Copy_Atom<wide::CopyOp, Element>{}, copy_c);
  const auto mine = to_shared.get_slice(thread);
  const auto my_accumulators = mine.retile_S(accumulators);
  const auto absolute = mine.partition_S(cute::flat_divide(block, EpilogueTile{}));
  const auto relative = cute::make_coord_tensor(absolute.layout());
  const auto block_relative = cute::make_coord_tensor(block.layout());
  const auto end = cute::make_coord(rows, cols);
  auto source = cute::make_tensor<Element>(cute::take<0, 3>(cute::shape(absolute)));

  Node node(node_args, {});
  const auto args = cutlass::epilogue::fusion::detail::ConsumerStoreArgs(
      cute::make_tuple(rows, cols, 64, 1), Tile{}, cute::make_coord(m, n, _, 0), tiled_mma, EpilogueTile{}, to_shared,
      block_relative, end - block(cute::_0{}), relative, end - absolute(cute::_0{}), source, thread);
  auto callbacks = node.template get_consumer_store_callbacks<true>(args);
  constexpr int size = wide::kFragmentSize;
  const auto fragments = cute::recast<cutlass::Array<float, size>>(my_accumulators);
  constexpr int visits =
      cute::size<0>(EpilogueTile{}) * cute::size<1>(EpilogueTile{}) / size / wide::kThreads<schedule>;

  callbacks.begin();
  for (int epi_n = 0; epi_n < cute::size<4>(absolute); ++epi_n)
    for (int epi_m = 0; epi_m < cute::size<3>(absolute); ++epi_m) {
      const auto here = absolute(_, _, _, epi_m, epi_n);
      for (int i = 0; i < cute::size(source); ++i) {
        T narrow;
        device::narrow(at<T>(output.source, rows, cols, cute::get<0>(here(i)), cute::get<1>(here(i))), narrow);
        source(i) = Element::bitcast(narrow.bits);
      }
      callbacks.begin_loop(epi_m, epi_n);
      for (int v = 0; v < visits; ++v) {
        cutlass::Array<float, size> input = fragments(_, epi_m, 0)(epi_n * visits + v);
        cutlass::Array<Element, size> result;
        if constexpr (std::is_same_v<typename Node::Arguments, wide::ActDropoutArguments>) {
          for (int i = 0; i < size; ++i) input[i] += at<T>(output.bias, 1, cols, 0, cute::get<1>(here(v * size + i)));
          result = callbacks.visit(input, v, epi_m, epi_n, input);
        } else {
          result = callbacks.visit(input, v, epi_m, epi_n);
        }
        for (int i = 0; i < size; ++i) {
          const int64_t row = cute::get<0>(here(v * size + i)), col = cute::get<1>(here(v * size + i));
          if (row < rows && col < cols)
            device::store(static_cast<T*>(output.to) + row * cols + col, static_cast<float>(result[i]));
        }
      }
    }
  callbacks.end();
}

template <template <class, class> class Node, class Arguments>
int run(int dtype, int schedule, const Output& output, const Arguments& args) {
  const auto with = [&](auto t, auto element, auto kind) {
    using T = decltype(t);
    using Element = decltype(element);
    constexpr WideSchedule schedule = decltype(kind)::value;
    using Tile = wide::TileOf<schedule>;
    const auto tiles = [](int64_t size, int64_t of) { return (size + of - 1) / of; };
    const int64_t blocks = tiles(output.rows, cute::size<0>(Tile{})) * tiles(output.cols, cute::size<1>(Tile{}));
    return device::launch(tile<T, Element, schedule, Node<T, Element>>, {blocks, wide::kThreads<schedule>}, nullptr,
                          output, args);
  };
  const auto with_schedule = [&](auto kind) {
    return static_cast<Dtype>(dtype) == Dtype::float16 ? with(Half{}, cutlass::half_t{}, kind)
                                                       : with(BFloat16{}, cutlass::bfloat16_t{}, kind);
  };
  return static_cast<WideSchedule>(schedule) == WideSchedule::pingpong
             ? with_schedule(std::integral_constant<WideSchedule, WideSchedule::pingpong>{})
             : with_schedule(std::integral_constant<WideSchedule, WideSchedule::cooperative>{});
}

wide::ActDropoutArguments forward_arguments(int activation, double negative_slope, double p, uint32_t stream) {
  wide::ActDropoutArguments args{};
  args.dropout.stream = stream;
  args.dropout.threshold = dropout_threshold(p);
  args.op = {static_cast<Activation>(activation), static_cast<float>(negative_slope),
             static_cast<float>(dropout_scale(args.dropout.threshold))};
  return args;
}

}  // namespace

extern "C" {

int emulate_wide_forward(int64_t rows, int64_t cols, int dtype, int schedule, int activation, double negative_slope,
                         double p, uint32_t stream, const int64_t* seed, const float* product, const void* bias,
                         void* y, uint8_t* keep, uint8_t* positive, WideCensus* census) {
  wide::ActDropoutArguments args = forward_arguments(activation, negative_slope, p, stream);
  args.seed = seed;
  args.keep = keep;
  args.positive = positive;
  args.census = census;
  return run<wide::ActDropoutNode>(dtype, schedule, {rows, cols, product, nullptr, bias, y}, args);
}

int64_t emulate_column_sums_elements(int64_t rows, int64_t stride) { return column_sums_elements(rows, stride); }

int emulate_wide_backward(int64_t rows, int64_t cols, int dtype, int activation, double negative_slope, double p,
                          const float* product, const void* z, const uint8_t* keep, const uint8_t* positive, void* dz,
                          void* dbias, float* sums, int64_t stride) {
  const wide::ActDropoutArguments forward = forward_arguments(activation, negative_slope, p, 0);
  const wide::SlopeArguments args{forward.op, keep, positive, z != nullptr, sums, stride};
  const int error = run<wide::SlopeNode>(dtype, 0, {rows, cols, product, z, nullptr, dz}, args);
  const int64_t row_tiles = (rows + kMaskTile - 1) / kMaskTile;
  return error ? error : column_sums({row_tiles, cols, stride, static_cast<Dtype>(dtype), sums, dbias, false}, nullptr);
}

}  // extern "C"
