// A block's pass over some rows of one member (cuda): rows in, all layers forward, the loss, all layers backward. The
// member's job lies in the block's shared memory.
#pragma once
#include <stddef.h>

#include "cuda/population_loss.h"

namespace mlpkit::cuda {

// The block's own words in shared memory. The job is written once a member, before a barrier.
struct MemberHead {
  MemberJob job;
  MemberNow now;
  OptimizerSettings settings;
  int64_t begun_step, begun_taken;  // before this launch
  double loss, weight, counted;     // of the epoch so far; what the batch's rows count
  int taken, batch;                 // steps of the epoch; batches
  double scratch[kMemberWarps], scores[3 * kMemberWarps];
  double squares[kMemberWarps];    // of the gradients
  float slope_sums[kMemberWarps];  // of prelu's slope
  uint32_t largest[kMemberWarps], flags[kMemberWarps];
  uint32_t next;
};
static_assert(sizeof(MemberHead) <= kMemberHead, "the head has its place");

template <class T>
class MemberPass {
 public:
  MLPKIT_DEVICE explicit MemberPass(int warps) : thread_(static_cast<int>(device::thread_index())), warps_(warps) {}

  // The member's job from global memory.
  MLPKIT_DEVICE void take(const MemberJob* job) {
    constexpr int words = sizeof(MemberJob) / 16;
    const unsigned char* from = reinterpret_cast<const unsigned char*>(job);
#pragma unroll 1
    for (int i = thread_; i < words; i += threads())
      device::store_bits16(shared() + offsetof(MemberHead, job) + 16 * i, device::load_bits16(from + 16 * i));
    device::sync();
  }

  MLPKIT_DEVICE T* slot(int i) const { return reinterpret_cast<T*>(shared() + plan().slot[i]); }
  MLPKIT_DEVICE T* slope(int i) const { return reinterpret_cast<T*>(shared() + plan().slope[i]); }
  MLPKIT_DEVICE T* negative(int i) const { return reinterpret_cast<T*>(shared() + plan().negative[i]); }
  MLPKIT_DEVICE T* weight(int i) const { return reinterpret_cast<T*>(shared() + plan().weight[i]); }
  MLPKIT_DEVICE float* floats(int offset) const { return reinterpret_cast<float*>(shared() + offset); }
  // Few of these stay in registers: products need them.
  MLPKIT_DEVICE static unsigned char* shared() { return device::shared_memory(); }
  MLPKIT_DEVICE static MemberHead& head() { return *reinterpret_cast<MemberHead*>(shared()); }
  MLPKIT_DEVICE static const MemberJob& job() { return head().job; }
  MLPKIT_DEVICE static const MemberPlan& plan() { return head().job.plan; }
  MLPKIT_DEVICE int thread() const { return thread_; }
  MLPKIT_DEVICE int warp() const { return thread_ / device::kWarp; }
  MLPKIT_DEVICE uint32_t lane() const { return static_cast<uint32_t>(thread_ % device::kWarp); }
  MLPKIT_DEVICE int warps() const { return warps_; }
  MLPKIT_DEVICE int threads() const { return warps_ * device::kWarp; }
  MLPKIT_DEVICE int outputs() const { return job().layer[job().layers - 1].out; }
  MLPKIT_DEVICE int in_tiles(int i) const { return tiles_of(job().layer[i].in); }
  MLPKIT_DEVICE int out_tiles(int i) const { return tiles_of(job().layer[i].out); }
  MLPKIT_DEVICE int row_tiles() const { return tiles_of(rows_); }

  // Four adjacent numbers of a weight's place in the parameters, rounded to where they are multiplied.
  MLPKIT_DEVICE void put_weights(int i, int quad, const float (&p)[4]) const {
    T* tile = weight(i) + quad / 64 * kTileElements;
    const uint32_t lane = static_cast<uint32_t>(quad % 32);
    const int half = quad / 32 % 2;
    put_pair(tile + pair_place(lane, 2 * half, T{}), p[0], p[1]);
    put_pair(tile + pair_place(lane, 2 * half + 1, T{}), p[2], p[3]);
  }

  // What is multiplied, from the parameters.
  MLPKIT_DEVICE void load_weights(const float* values) const {
    for (int i = 0; i < job().layers; ++i) {
      const int quads = 64 * in_tiles(i) * out_tiles(i);
#pragma unroll 1
      for (int quad = thread_; quad < quads; quad += threads()) {
        float p[4];
        device::load16(device::global(values + job().layer[i].weight) + 4 * quad, p);
        put_weights(i, quad, p);
      }
#pragma unroll 1
      for (int n = thread_; n < 16 * out_tiles(i); n += threads()) {
        float bias;
        device::load(device::global(values + job().layer[i].bias) + n, bias);
        device::store(floats(plan().bias[i]) + n, bias);
      }
    }
    device::sync();
  }

  // Rows index[first ..] of x, or rows first .. where index is nullptr, into slot 0; zeros up to whole tiles.
  MLPKIT_DEVICE void gather(const MemberTable& table, const int32_t* index, int64_t first, int count) {
    rows_ = count;
    const int padded = 16 * row_tiles();
#pragma unroll 1
    for (int r = thread_; r < padded; r += threads()) {
      uint32_t row = 0xffffffffu;
      float weight = 0.f;
      if (r < count) {
        row = index ? device::load4(device::global(index + first) + r) : static_cast<uint32_t>(first + r);
        weight = 1.f;
        if (table.weights) device::load(table.weights + row, weight);
      }
      device::store4(shared() + plan().index + 4 * r, row);
      device::store(floats(plan().by_row) + r, weight);
    }
    device::sync();
    constexpr int wide = 16 / sizeof(T), at_once = 4;
    const int parts = row_tiles() * in_tiles(0) * (kTileElements / wide), in = job().layer[0].in;
    const bool aligned = in % wide == 0 && reinterpret_cast<uintptr_t>(rows_in(table, T{})) % 16 == 0;
#pragma unroll 1
    for (int part = thread_; part < parts; part += at_once * threads()) {
      float values[at_once][wide];
#pragma unroll
      for (int n = 0; n < at_once; ++n) load_part(table, part + n * threads(), parts, in, aligned, values[n]);
#pragma unroll
      for (int n = 0; n < at_once; ++n)
        if (part + n * threads() < parts) device::store16(slot(0) + (part + n * threads()) * wide, values[n]);
    }
    device::sync();
  }

  MLPKIT_DEVICE void forward(bool training) {
    for (int i = 0; i < job().layers; ++i) {
      const bool last = i + 1 == job().layers;
      const Tiles<T> a{slot(i), in_tiles(i), 1}, b{weight(i), in_tiles(i), 1};
      product<false, false>(a, b, row_tiles(), out_tiles(i), in_tiles(i), [&](int r, int c, float (&z)[2][4]) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          float bias;
          device::load(floats(plan().bias[i]) + c * 16 + e / 4 * 8 + static_cast<int>(lane() % 4) * 2 + e % 2, bias);
          z[e / 4][e % 4] += bias;
        }
        if (last) return put_logits(r, c, z);
        const Words words = training ? draw(i, r, c) : Words{};
        visit_activation(job().activation,
                         [&](auto formula) { activate<decltype(formula)>(i, r, c, training, words, z); });
      });
      device::sync();
    }
  }

  // The rows' share of the loss, added to the warps' scores, and where slopes are wanted these in the place of the
  // outputs.
  MLPKIT_DEVICE void score(const MemberLoss& loss, bool slopes, bool wants_right, bool first) const {
    const int wide = out_tiles(job().layers - 1);
    RowScore to;
#pragma unroll 1
    for (int r = thread_ / kLossLanes; r < 16 * row_tiles(); r += threads() / kLossLanes) {
      MemberRow row{};
      row.logits = floats(plan().logits) + r * plan().logits_stride;
      row.index = static_cast<int32_t>(device::load4(shared() + plan().index + 4 * r));
      device::load(floats(plan().by_row) + r, row.weight);
      row.first = thread_ % kLossLanes * 2;
      row.outputs = loss.outputs;
      row.tile_lane = static_cast<uint32_t>(r % 8 * 4 + thread_ % 4);
      row.lower = r % 16 / 8;
      score_row(loss, row, slopes ? slot(job().layers) + r / 16 * wide * kTileElements : static_cast<T*>(nullptr),
                wants_right, to);
    }
    double values[3] = {to.loss, to.weight, to.right};
#pragma unroll
    for (int n = 0; n < 3; ++n) {
#pragma unroll
      for (int lanes = 1; lanes < device::kWarp; lanes *= 2) values[n] += device::shuffle_xor(values[n], lanes);
      if (lane() != 0) continue;
      double before = 0.0;
      if (!first) device::load(head().scores + 3 * warp() + n, before);
      device::store(head().scores + 3 * warp() + n, before + values[n]);
    }
    device::sync();
  }

  // Gradients of all parameters, added to those before unless these are the first rows of the batch; with its last rows
  // the warps know their squares.
  MLPKIT_DEVICE void backward(float* gradients, bool first, bool last) {
    if (lane() == 0) device::store(head().squares + warp(), 0.0);
    for (int i = job().layers - 1; i >= 0; --i) {
      weight_gradients(i, gradients, first, last);
      device::sync();
      if (i == 0) return;
      float slope_sum = 0.f;
      const Tiles<T> a{slot(i + 1), out_tiles(i), 1}, b{weight(i), 1, in_tiles(i)};
      product<false, true>(a, b, row_tiles(), in_tiles(i), out_tiles(i),
                           [&](int r, int c, float (&dy)[2][4]) { deactivate(i - 1, r, c, dy, slope_sum); });
      if (job().layer[i - 1].slope >= 0) slope_gradient(i - 1, slope_sum, gradients, first, last);
      device::sync();
    }
  }

  // The sum over all threads, in a fixed order, in every thread.
  MLPKIT_DEVICE double sum_of_block(double value) const {
#pragma unroll
    for (int lanes = 1; lanes < device::kWarp; lanes *= 2) value += device::shuffle_xor(value, lanes);
    if (lane() == 0) device::store(head().scratch + warp(), value);
    device::sync();
    const double sum = sum_of_warps(head().scratch, 1);
    device::sync();
    return sum;
  }
  MLPKIT_DEVICE double sum_of_warps(const double* of_warps, int apart) const {
    double sum = 0.0;
    for (int warp = 0; warp < warps_; ++warp) {
      double one;
      device::load(of_warps + apart * warp, one);
      sum += one;
    }
    return sum;
  }

 protected:
  MLPKIT_DEVICE static const float* rows_in(const MemberTable& table, float) { return table.x; }
  MLPKIT_DEVICE static const BFloat16* rows_in(const MemberTable& table, BFloat16) { return table.rounded; }

  MLPKIT_DEVICE void load_part(const MemberTable& table, int part, int parts, int in, bool aligned,
                               float (&to)[16 / sizeof(T)]) const {
    constexpr int wide = 16 / sizeof(T), per_tile = kTileElements / wide;
#pragma unroll
    for (int i = 0; i < wide; ++i) to[i] = 0.f;
    if (part >= parts) return;
    const TilePart at = part_of_tile(part % per_tile, T{});
    const int tile = part / per_tile, col = tile % in_tiles(0) * 16 + at.col;
    const int32_t row =
        static_cast<int32_t>(device::load4(shared() + plan().index + 4 * (tile / in_tiles(0) * 16 + at.row)));
    if (row < 0 || col >= in) return;
    const T* from = rows_in(table, T{}) + static_cast<int64_t>(row) * in + col;
    if (aligned && col + wide <= in) return device::load16(from, to);
#pragma unroll
    for (int i = 0; i < wide; ++i)
      if (col + i < in) device::load(from + i, to[i]);
  }

  // Calls done(row tile, column tile, product) for all tiles of a result that this warp computes.
  template <bool a_by_sum, bool b_by_sum, class Done>
  MLPKIT_DEVICE void product(const Tiles<T>& a, const Tiles<T>& b, int rows, int cols, int deep, Done&& done) const {
    each_item(rows, cols, [&](const Item& item) {
      Products<T> products = {};
      float sums[2][4];
      multiply_item<a_by_sum, b_by_sum>(a, b, item, deep, lane(), products, false, sums);
      // What follows a product is long: its code is there once, not for each tile.
#pragma unroll 1
      for (int n = 0; n < 2 * kTileCols<T>; ++n) {
        const int h = n / kTileCols<T>, w = n % kTileCols<T>;
        if (h >= item.rows || w >= item.cols) continue;
        float z[2][4];
        pick(products, n, z);
        done(item.row + h, item.col + w, z);
      }
    });
  }
  MLPKIT_DEVICE static void pick(const Products<T>& products, int n, float (&z)[2][4]) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      z[e / 4][e % 4] = products[0][0][e / 4][e % 4];
#pragma unroll
      for (int m = 1; m < 2 * kTileCols<T>; ++m)
        z[e / 4][e % 4] = n == m ? products[m / kTileCols<T>][m % kTileCols<T>][e / 4][e % 4] : z[e / 4][e % 4];
    }
  }

  // The largest pieces of a result of which every warp gets one.
  template <class Body>
  MLPKIT_DEVICE void each_item(int rows, int cols, Body&& body) const {
    constexpr int widest = kTileCols<T>;
    int high = 2, wide = widest;
    if ((rows + 1) / 2 * ((cols + wide - 1) / wide) < warps_) wide = 1;
    if ((rows + 1) / 2 * cols < warps_) high = 1;
    const int across = (cols + wide - 1) / wide, items = (rows + high - 1) / high * across;
    for (int item = warp(); item < items; item += warps_) {
      const int row = item / across * high, col = item % across * wide;
      body(Item{row, rows - row < high ? rows - row : high, col, cols - col < wide ? cols - col : wide});
    }
  }

  // The random bits of a tile.
  MLPKIT_DEVICE Words draw(int i, int r, int c) const {
    const uint32_t threshold = job().layer[i].threshold;
    if (threshold == 0 || threshold >= 65536) return {};
    Dropout dropout;
    dropout.seed = job().seed;
    dropout.offset = static_cast<uint32_t>(head().now.step);
    dropout.stream = static_cast<uint32_t>(i);
    return mask_words(dropout, static_cast<uint64_t>(first_tile_ + r) * out_tiles(i) + c, lane());
  }

  MLPKIT_DEVICE int row_of(int row_tile, int j) const {
    return row_tile * 16 + (j & 1) * 8 + static_cast<int>(lane() / 4);
  }

  template <class A>
  MLPKIT_DEVICE void activate(int i, int r, int c, bool training, const Words& words, const float (&z)[2][4]) {
    const MemberLayer& layer = job().layer[i];
    const uint32_t threshold = training ? layer.threshold : 0;
    const bool slopes = training && plan().slope[i] >= 0, prelu = training && plan().negative[i] >= 0;
    const int tile = (r * out_tiles(i) + c) * kTileElements;
    float a = job().negative_slope;
    if (layer.slope >= 0) device::load(device::global(job().values + layer.slope), a);
    // Nothing is drawn for a threshold of 65536: all bits are 0, and below it.
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int place = tile + pair_place(lane(), j, T{});
      float y[2], by_z[2], by_a[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float at = z[j / 2][j % 2 * 2 + e];
        const bool kept = (e ? words.v[j] >> 16 : words.v[j] & 0xffffu) >= threshold;
        y[e] = A::value(at, a);
        if (threshold) y[e] *= kept ? layer.scale : 0.f;
        if (row_of(r, j) >= rows_) y[e] = 0.f;
        by_z[e] = slopes ? A::slope(at, a) * (kept ? 1.f : 0.f) : 0.f;
        by_a[e] = prelu ? Prelu::slope_by_a(at) * (kept ? 1.f : 0.f) : 0.f;
      }
      put_pair(slot(i + 1) + place, y[0], y[1]);
      if (slopes) put_pair(slope(i) + place, by_z[0], by_z[1]);
      if (prelu) put_pair(negative(i) + place, by_a[0], by_a[1]);
    }
  }

  MLPKIT_DEVICE void put_logits(int r, int c, const float (&z)[2][4]) const {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      device::store_pair(floats(plan().logits) + row_of(r, j) * plan().logits_stride + c * 16 + j / 2 * 8 +
                             static_cast<int>(lane() % 4) * 2,
                         z[j / 2][j % 2 * 2], z[j / 2][j % 2 * 2 + 1]);
  }

  // Gradients by layer i's outputs become those by what its activation was applied to, in the place of the outputs.
  MLPKIT_DEVICE void deactivate(int i, int r, int c, const float (&dy)[2][4], float& slope_sum) const {
    const MemberLayer& layer = job().layer[i];
    const bool slopes = plan().slope[i] >= 0, relu = job().activation == Activation::relu;
    const float scale = layer.threshold ? layer.scale : 1.f;
    const int tile = (r * out_tiles(i) + c) * kTileElements;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int place = tile + pair_place(lane(), j, T{});
      float left = dy[j / 2][j % 2 * 2], right = dy[j / 2][j % 2 * 2 + 1];
      if (plan().negative[i] >= 0) {
        const float2 by_a = get_pair(negative(i) + place);
        slope_sum += left * scale * by_a.x + right * scale * by_a.y;
      }
      if (slopes) {
        const float2 by_z = get_pair(slope(i) + place);
        left *= by_z.x * scale, right *= by_z.y * scale;
      } else if (relu) {
        const float2 y = get_pair(slot(i + 1) + place);
        left *= y.x <= 0.f ? 0.f : scale;  // a NaN stays one
        right *= y.y <= 0.f ? 0.f : scale;
      }
      put_pair(slot(i + 1) + place, left, right);
    }
  }

  // dW = dz^T x and db = dz^T 1 over the pass's rows.
  MLPKIT_DEVICE void weight_gradients(int i, float* gradients, bool first, bool last) const {
    double squares = 0.0;
    const int out = out_tiles(i), in = in_tiles(i);
    const Tiles<T> a{slot(i + 1), 1, out}, b{slot(i), 1, in};
    each_item(out, in, [&](const Item& item) {
      Products<T> products = {};
      float sums[2][4] = {};
      const bool bias = item.col == 0;
      multiply_item<true, true>(a, b, item, row_tiles(), lane(), products, bias, sums);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (h >= item.rows) continue;
#pragma unroll
        for (int w = 0; w < kTileCols<T>; ++w) {
          if (w >= item.cols) continue;
          float* tile = gradients + job().layer[i].weight + ((item.row + h) * in + item.col + w) * kTileElements +
                        static_cast<int>(lane()) * 4;
          squares += add(tile, products[h][w][0], first) + add(tile + 128, products[h][w][1], first);
        }
        if (!bias || lane() % 4 != 0) continue;
        float* to = gradients + job().layer[i].bias + (item.row + h) * 16 + lane() / 4;
        squares += add_one(to, sums[h][0], first) + add_one(to + 8, sums[h][2], first);
      }
    });
    if (!last) return;
#pragma unroll
    for (int lanes = 1; lanes < device::kWarp; lanes *= 2) squares += device::shuffle_xor(squares, lanes);
    if (lane() == 0) add_square(squares);
  }
  // These return the square of what they leave.
  MLPKIT_DEVICE static double add(float* to, const float (&values)[4], bool first) {
    float sum[4] = {};
    if (!first) device::load16(to, sum);
    double square = 0.0;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      sum[e] += values[e];
      square += static_cast<double>(sum[e]) * sum[e];
    }
    device::store16(to, sum);
    return square;
  }
  MLPKIT_DEVICE static double add_one(float* to, float value, bool first) {
    float sum = 0.f;
    if (!first) device::load(to, sum);
    device::store(to, sum += value);
    return static_cast<double>(sum) * sum;
  }
  MLPKIT_DEVICE void add_square(double square) const {
    double before;
    device::load(head().squares + warp(), before);
    device::store(head().squares + warp(), before + square);
  }

  MLPKIT_DEVICE void slope_gradient(int i, float sum, float* gradients, bool first, bool last) const {
#pragma unroll
    for (int lanes = 1; lanes < device::kWarp; lanes *= 2) sum += device::shuffle_xor(sum, lanes);
    if (lane() == 0) device::store(head().slope_sums + warp(), sum);
    device::sync();
    if (thread_ != 0) return;
    float all = 0.f;
    for (int warp = 0; warp < warps_; ++warp) {
      float one;
      device::load(head().slope_sums + warp, one);
      all += one;
    }
    const double square = add_one(gradients + job().layer[i].slope, all, first);
    if (last) add_square(square);
  }

  int thread_, warps_;
  int rows_ = 0, first_tile_ = 0;  // of the pass; where it begins in the batch
};

}  // namespace mlpkit::cuda
