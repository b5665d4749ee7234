// The steps of a product of bfloat16 by dot products of pairs (VDPBF16PS), at twice the rate of fp32 (cpu; AVX-512
// with bf16 alone).
#include "cpu/gemm_block.h"

MLPKIT_BEGIN_ISA
namespace {

struct Pair {  // two numbers, neighbours along the depth; a missing second one is zero
  using Number = BFloat16;
  static constexpr int64_t per_lane = 2;
  MLPKIT_HD static FloatVec along(const BFloat16* from, int64_t numbers) { return load_part<FloatVec>(from, numbers); }
  MLPKIT_HD static FloatVec across(const BFloat16* from, int64_t stride, int64_t lines, int64_t numbers) {
    const UintVec first = __builtin_convertvector(load_part<ShortVec>(from, numbers), UintVec);
    if (lines < 2) return (FloatVec)first;
    return (FloatVec)(first | __builtin_convertvector(load_part<ShortVec>(from + stride, numbers), UintVec) << 16);
  }
  MLPKIT_HD static FloatVec multiply_add(FloatVec a, FloatVec b, FloatVec sum) {
    return (FloatVec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};

}  // namespace

void gemm_pack_pairs(const GemmPack& g) { pack<Pair>(g); }
void gemm_lanes_pairs(const GemmLanes& g) { copy_lanes<Pair>(g); }
void gemm_multiply_pairs(const GemmMultiply& g) { multiply<Pair>(g); }

MLPKIT_END_ISA
