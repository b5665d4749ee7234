// The pass of mlp_step.h over all rows: each block takes a number of rows from the input to the gradients of every
// weight, then the next ones (cuda). What bounds it is in mlp_plan.h.
#include "cuda/mlp_step.h"

#include "cuda/mlp_loss.h"
#include "cuda/mlp_tile.h"

namespace mlpkit::cuda {
namespace {

template <class T, int kDeep, int kHigh>
class Pass {
 public:
  MLPKIT_DEVICE Pass(const MlpPass& pass, const MlpPlan& plan)
      : p_(pass),
        plan_(plan),
        shared_(device::shared_memory()),
        lane_(device::thread_index() % device::kWarp),
        warp_(static_cast<int>(device::thread_index() / device::kWarp)),
        split_(plan.warps_of_team()),
        team_(warp_ / split_),
        member_(warp_ % split_) {}

  MLPKIT_DEVICE void run() {
    prepare();
    bool first = true;
    for (int64_t block = device::block_index(); block < plan_.row_blocks; block += device::blocks()) {
      first_row_ = block * plan_.block_rows();
      const int64_t left = p_.rows - first_row_;
      rows_ = left < plan_.block_rows() ? static_cast<int>(left) : plan_.block_rows();
      const Matrix inputs = matrix_of(p_.x, p_.x_is_single, p_.rows, p_.layer[0].in);
      fill_tiles(slot(0), plan_.high * plan_.teams, tiles_of(inputs.cols), inputs, first_row_, 0);
      device::sync();
      for (int i = 0; i < p_.layers; ++i) forward(i);
      device::sync();
      if (p_.y) write_outputs();
      if (p_.has_loss) losses();
      device::sync();
      if (p_.parts) backward(first);
      first = false;
    }
    finish();
  }

 private:
  MLPKIT_DEVICE T* slot(int i) const { return reinterpret_cast<T*>(shared_ + plan_.slot[i]); }
  MLPKIT_DEVICE T* slope(int i) const { return reinterpret_cast<T*>(shared_ + plan_.slope[i]); }
  MLPKIT_DEVICE float* floats(int offset) const { return reinterpret_cast<float*>(shared_ + offset); }
  MLPKIT_DEVICE Matrix weight(int i) const {
    const MlpLayer& layer = p_.layer[i];
    return matrix_of(layer.weight, true, layer.out, layer.in);
  }

  // Weights and biases into shared memory, once.
  MLPKIT_DEVICE void prepare() {
    float scale = 1.f;
    if (p_.loss_scale) device::load(p_.loss_scale, scale);
    slope_scale_ = p_.loss.slope_scale * scale;
    for (int i = 0; i < p_.layers; ++i) {
      const MlpLayer& layer = p_.layer[i];
      const int out = tiles_of(layer.out);
      if (plan_.resident)
        fill_tiles(reinterpret_cast<T*>(shared_ + plan_.weight[i]), out, tiles_of(layer.in), weight(i), 0, 0);
      for (int n = static_cast<int>(device::thread_index()); n < 16 * out; n += kMlpThreads) {
        float bias = 0.f;
        if (layer.bias && n < layer.out) device::load(layer.bias + n, bias);
        device::store(floats(plan_.bias[i]) + n, bias);
      }
    }
    const int outputs = p_.layer[p_.layers - 1].out;
    total_ = static_cast<float>(outputs);
    if (p_.has_loss && p_.loss.by_class) {
      double total = 0.0;
      for (int c = 0; c < outputs; ++c) {
        float weight_of_class;
        device::load(p_.loss.by_class + c, weight_of_class);
        total += weight_of_class;
      }
      total_ = static_cast<float>(total);
    }
  }

  // The warps that have the same rows wait for each other; the first barrier is the whole block's.
  MLPKIT_DEVICE void sync_team() const {
    if (split_ == 1)
      device::sync_warp();
    else
      device::sync_part(1 + team_, split_ * device::kWarp);
  }

  using Operand = uint32_t[kHigh][kDeep][4];

  // The team's rows of a slot, `deep` tiles of columns.
  MLPKIT_DEVICE void load_rows(const T* from, int deep, Operand& a) const {
    const int row = tile_row(lane_, Blocks::lying);
#pragma unroll
    for (int h = 0; h < kHigh; ++h) {
      const T* tiles = from + (team_ * kHigh + h) * deep * kTileElements;
#pragma unroll
      for (int k = 0; k < kDeep; ++k)
        if (k < deep) load_tile<false>(tiles + k * kTileElements, row, a[h][k]);
    }
  }

  // 16 columns of the team's rows: a times the tiles of a panel, `stride` tiles apart, on top of the columns' biases.
  template <bool transposed>
  MLPKIT_DEVICE void multiply(const Operand& a, int deep, const T* panel, int stride, const float* biases,
                              float (&acc)[kHigh][2][4]) const {
    const int row = tile_row(lane_, transposed ? Blocks::lying : Blocks::exchanged);
    float bias[4] = {};
    if constexpr (!transposed)
#pragma unroll
      for (int e = 0; e < 4; ++e) device::load(biases + e / 2 * 8 + lane_ % 4 * 2 + e % 2, bias[e]);
#pragma unroll
    for (int h = 0; h < kHigh; ++h)
#pragma unroll
      for (int e = 0; e < 8; ++e) acc[h][e / 4][e % 4] = bias[e / 4 * 2 + e % 2];
#pragma unroll
    for (int k = 0; k < kDeep; ++k) {
      if (k >= deep) break;
      uint32_t b[4];
      load_tile<transposed>(panel + k * stride * kTileElements, row, b);
#pragma unroll
      for (int h = 0; h < kHigh; ++h) multiply_tile<T>(acc[h], a[h][k], b);
    }
  }

  // Calls done(column tile, row tile, product) for every 16 columns of layer i's outputs, or of its inputs' gradients,
  // that this warp computes. Rows come from slot `from`.
  template <bool transposed, class Done>
  MLPKIT_DEVICE void product(int i, int from, Done&& done) {
    const int out = tiles_of(p_.layer[i].out), in = tiles_of(p_.layer[i].in);
    const int deep = transposed ? out : in, wide = transposed ? in : out;
    const T* resident = reinterpret_cast<const T*>(shared_ + plan_.weight[i]);
    T* stage = reinterpret_cast<T*>(shared_ + plan_.stage);
    const int panel = plan_.panel_bytes / static_cast<int>(sizeof(T));
    Operand a;
    load_rows(slot(from), deep, a);
    for (int first = 0; first < wide; first += plan_.panels) {
      const int c = member_ < plan_.panels ? first + member_ : wide;
      if (!plan_.resident) {
        device::sync();
        for (int n = 0; n < plan_.panels && first + n < wide; ++n)
          fill_tiles(stage + n * panel, transposed ? out : 1, transposed ? 1 : in, weight(i),
                     transposed ? 0 : (first + n) * 16, transposed ? (first + n) * 16 : 0);
        device::sync();
      }
      if (c >= wide) continue;
      const T* tiles = !plan_.resident ? stage + member_ * panel : resident + (transposed ? c : c * in) * kTileElements;
      float acc[kHigh][2][4];
      const float* biases = floats(plan_.bias[i]) + c * 16;
      multiply<transposed>(a, deep, tiles, transposed && plan_.resident ? in : 1, biases, acc);
      // What follows a product is long: its code is there once, not for each row tile.
#pragma unroll 1
      for (int h = 0; h < kHigh; ++h) {
        float z[2][4];
#pragma unroll
        for (int e = 0; e < 8; ++e) z[e / 4][e % 4] = h == 0 ? acc[0][e / 4][e % 4] : acc[kHigh - 1][e / 4][e % 4];
        done(c, team_ * kHigh + h, z);
      }
    }
  }

  MLPKIT_DEVICE void forward(int i) {
    const bool last = i + 1 == p_.layers;
    product<false>(i, i, [&](int c, int row_tile, float (&z)[2][4]) {
      const int place = (row_tile * tiles_of(p_.layer[i].out) + c) * kTileElements + static_cast<int>(lane_) * 2;
      if (last)
        put_out(c, row_tile, place, z);
      else
        visit_activation(p_.activation, [&](auto formula) {
          activate<decltype(formula)>(i, row_tile, place, draw(i, c, row_tile), z);
        });
    });
    sync_team();
  }

  // The random bits of a tile.
  MLPKIT_DEVICE Words draw(int i, int c, int row_tile) const {
    const uint32_t threshold = p_.layer[i].threshold;
    if (threshold == 0 || threshold >= 65536) return {};
    int64_t seed, offset;
    device::load(p_.seed, seed);
    device::load(p_.seed + 1, offset);
    Dropout dropout;
    dropout.seed = static_cast<uint64_t>(seed);
    dropout.offset = static_cast<uint32_t>(offset);
    dropout.stream = static_cast<uint32_t>(i);
    return mask_words(dropout, static_cast<uint64_t>(first_row_ / 16 + row_tile) * tiles_of(p_.layer[i].out) + c,
                      lane_);
  }

  // The row within the block of word j of a row tile.
  MLPKIT_DEVICE int row_of(int row_tile, int j) const {
    return row_tile * 16 + (j & 1) * 8 + static_cast<int>(lane_ / 4);
  }

  // place: of word 0 of this lane in a slot; word j is 64 elements further.
  template <class A>
  MLPKIT_DEVICE void activate(int i, int row_tile, int place, const Words& words, const float (&z)[2][4]) {
    const MlpLayer& layer = p_.layer[i];
    const bool ragged = rows_ < plan_.block_rows(), slopes = plan_.slope[i] != 0;
    const float a = p_.negative_slope;
    // Nothing is drawn for a threshold of 65536: all bits are 0, and below it.
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float y[2], by_z[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float at = z[j / 2][j % 2 * 2 + e];
        const bool kept = (e ? words.v[j] >> 16 : words.v[j] & 0xffffu) >= layer.threshold;
        y[e] = A::value(at, a);
        if (layer.threshold) y[e] *= kept ? layer.scale : 0.f;
        if (ragged && row_of(row_tile, j) >= rows_) y[e] = 0.f;
        by_z[e] = slopes ? A::slope(at, a) * (kept ? 1.f : 0.f) : 0.f;
      }
      device::store4(slot(i + 1) + place + j * 64, device::narrow_pair(y[0], y[1], T{}));
      if (slopes) device::store4(slope(i) + place + j * 64, device::narrow_pair(by_z[0], by_z[1], T{}));
    }
  }

  // The last layer's outputs: rounded into the last slot where the caller wants them, as they are for the loss.
  MLPKIT_DEVICE void put_out(int c, int row_tile, int place, const float (&z)[2][4]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float left = z[j / 2][j % 2 * 2], right = z[j / 2][j % 2 * 2 + 1];
      if (p_.y) device::store4(slot(p_.layers) + place + j * 64, device::narrow_pair(left, right, T{}));
      if (!p_.has_loss) continue;
      float* logits =
          floats(plan_.logits) + row_of(row_tile, j) * plan_.logits_stride + c * 16 + j / 2 * 8 + lane_ % 4 * 2;
      device::store(logits, left);
      device::store(logits + 1, right);
    }
  }

  MLPKIT_DEVICE void write_outputs() const {
    const int outputs = p_.layer[p_.layers - 1].out;
    const Matrix y = matrix_of(p_.y, false, p_.rows, outputs);
    write_tiles(slot(p_.layers), rows_, tiles_of(outputs), static_cast<T*>(p_.y), y.aligned, first_row_, outputs);
    device::sync();  // the slopes of the loss go to the same place
  }

  MLPKIT_DEVICE void losses() {
    const int outputs = p_.layer[p_.layers - 1].out, wide = tiles_of(outputs);
    const int thread = static_cast<int>(device::thread_index());
    for (int r = thread / kLossLanes; r < plan_.block_rows(); r += kLossRows) {
      const LossRow row{p_.loss,      floats(plan_.logits) + r * plan_.logits_stride,
                        outputs,      thread % kLossLanes * 2,
                        slope_scale_, first_row_ + r,
                        r < rows_};
      T* tile_row = p_.parts ? slot(p_.layers) + r / 16 * wide * kTileElements + r % 16 / 8 * 64 + r % 8 * 8 : nullptr;
      const MlpValues of_row = loss_of(row, total_, tile_row);
      values_.loss += of_row.loss;
      values_.counted += of_row.counted;
      values_.out_of_range += of_row.out_of_range;
    }
  }

  MLPKIT_DEVICE void backward(bool first) {
    for (int i = p_.layers - 1; i >= 0; --i) {
      weight_gradients(i, first);
      device::sync();
      if (i == 0) return;
      const int wide = tiles_of(p_.layer[i].in);
      product<true>(i, i + 1, [&](int c, int row_tile, const float (&dy)[2][4]) {
        deactivate(i - 1, (row_tile * wide + c) * kTileElements + static_cast<int>(lane_) * 2, dy);
      });
      device::sync();
    }
  }

  // Gradients by layer i's outputs become those by what its activation was applied to, in the place of the outputs.
  MLPKIT_DEVICE void deactivate(int i, int place, const float (&dy)[2][4]) {
    const MlpLayer& layer = p_.layer[i];
    const bool slopes = plan_.slope[i] != 0, relu = p_.activation == Activation::relu;
    const float scale = layer.threshold ? layer.scale : 1.f;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      T* at = slot(i + 1) + place + j * 64;
      float left = dy[j / 2][j % 2 * 2], right = dy[j / 2][j % 2 * 2 + 1];
      if (slopes) {
        const float2 by_z = device::widen_pair(device::load4(slope(i) + place + j * 64), T{});
        left *= by_z.x * scale, right *= by_z.y * scale;
      } else if (relu) {
        const float2 y = device::widen_pair(device::load4(at), T{});
        left *= y.x <= 0.f ? 0.f : scale;  // a NaN stays one
        right *= y.y <= 0.f ? 0.f : scale;
      }
      device::store4(at, device::narrow_pair(left, right, T{}));
    }
  }

  // dW = dz^T x and db = dz^T 1 over the block's rows. A warp has 16 outputs by 32 inputs at a time, always the same.
  MLPKIT_DEVICE void weight_gradients(int i, bool first) {
    const MlpLayer& layer = p_.layer[i];
    const int out = tiles_of(layer.out), in = tiles_of(layer.in), pairs = (in + 1) / 2, row_tiles = (rows_ + 15) / 16;
    const int dz_row = tile_row(lane_, Blocks::exchanged), x_row = tile_row(lane_, Blocks::lying);
    const uint32_t one = device::narrow_pair(1.f, 1.f, T{}), ones[2] = {one, one};
    for (int item = warp_; item < out * pairs; item += kMlpWarps) {
      const int o = item / pairs, left = item % pairs * 2;
      const T* dz = slot(i + 1) + o * kTileElements;
      const T* x = slot(i) + left * kTileElements;
      const bool both = left + 1 < in, bias = left == 0;
      float acc[2][2][4] = {}, sum[4] = {};
      for (int r = 0; r < row_tiles; ++r) {
        uint32_t a[4], b[4];
        load_tile<true>(dz + r * out * kTileElements, dz_row, a);
        load_tile<true>(x + r * in * kTileElements, x_row, b);
        multiply_tile<T>(acc[0], a, b);
        if (bias) device::multiply_add(sum, a, ones, T{});
        if (!both) continue;
        load_tile<true>(x + (r * in + 1) * kTileElements, x_row, b);
        multiply_tile<T>(acc[1], a, b);
      }
      float* tile = sums() + plan_.dweight[i] + int64_t{o * in + left} * kTileElements + lane_ * 4;
#pragma unroll
      for (int half = 0; half < 4; ++half)
        if (half < 2 || both) add(tile + half * 128, acc[half / 2][half % 2], first);
      if (bias && lane_ % 4 == 0) add_bias(sums() + plan_.dbias[i] + o * 16 + lane_ / 4, sum, first);
    }
  }

  MLPKIT_DEVICE float* part() const { return p_.parts + plan_.floats * device::block_index(); }
  MLPKIT_DEVICE float* sums() const { return plan_.shared_sums ? floats(plan_.sums) : part(); }

  MLPKIT_DEVICE static void add(float* to, const float (&values)[4], bool first) {
    float sum[4] = {};
    if (!first) device::load16(to, sum);
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[e] += values[e];
    device::store16(to, sum);
  }
  MLPKIT_DEVICE static void add_bias(float* to, const float (&values)[4], bool first) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = 0.f;
      if (!first) device::load(to + 8 * half, sum);
      device::store(to + 8 * half, sum + values[2 * half]);
    }
  }

  // What the block leaves: its part of the gradients, and its values.
  MLPKIT_DEVICE void finish() {
    const int thread = static_cast<int>(device::thread_index());
    if (p_.parts && plan_.shared_sums) {
      device::sync();
      for (int64_t at = thread * 4; at < plan_.floats; at += kMlpThreads * 4)
        device::store_bits16(part() + at, device::load_bits16(sums() + at));
    }
    if (!p_.has_loss) return;
    double of_warp[3] = {values_.loss, values_.counted, values_.out_of_range};
    double* scratch = reinterpret_cast<double*>(shared_ + plan_.scratch);
#pragma unroll
    for (int n = 0; n < 3; ++n) {
#pragma unroll
      for (int lanes = 1; lanes < device::kWarp; lanes *= 2) of_warp[n] += device::shuffle_xor(of_warp[n], lanes);
      if (lane_ == 0) device::store(scratch + warp_ * 3 + n, of_warp[n]);
    }
    device::sync();
    if (thread >= 3) return;
    double sum = 0.0;
    for (int w = 0; w < kMlpWarps; ++w) {
      double one;
      device::load(scratch + w * 3 + thread, one);
      sum += one;
    }
    device::store(reinterpret_cast<double*>(p_.values + device::block_index()) + thread, sum);
  }

  const MlpPass& p_;
  const MlpPlan& plan_;
  unsigned char* shared_;
  uint32_t lane_;
  int warp_, split_, team_, member_;
  float slope_scale_ = 1.f, total_ = 1.f;
  int64_t first_row_ = 0;
  int rows_ = 0;
  MlpValues values_{};
};

// Two blocks of the narrow instance fit a multiprocessor where shared memory lets them.
template <class T, int kDeep, int kHigh>
MLPKIT_KERNEL(kMlpThreads, kDeep == 4 ? 2 : 1)
pass_rows(const MlpPass pass, const MlpPlan plan) {
  if constexpr (device::kTensorCores) Pass<T, kDeep, kHigh>(pass, plan).run();
}

template <class T>
cudaError_t launch_pass(const MlpPass& pass, const MlpPlan& plan, cudaStream_t stream) {
  const device::Grid grid{plan.blocks, kMlpThreads, plan.shared_bytes};
  if (plan.deep == 4) return device::launch(pass_rows<T, 4, 2>, grid, stream, pass, plan);
  if (plan.deep == 8) return device::launch(pass_rows<T, 8, 2>, grid, stream, pass, plan);
  return device::launch(pass_rows<T, 16, 1>, grid, stream, pass, plan);
}

}  // namespace

cudaError_t mlp_pass(const MlpPass& pass, const MlpPlan& plan, cudaStream_t stream) {
  if (device::capability() < 80) return cudaErrorNoKernelImageForDevice;
  if (pass.dtype == Dtype::bfloat16) return launch_pass<BFloat16>(pass, plan, stream);
  return launch_pass<Half>(pass, plan, stream);
}

}  // namespace mlpkit::cuda
