// The steps of a product of float32, bfloat16 or float16 in fp32 (cpu; compiled once for each instruction set).
#include "cpu/gemm_block.h"

MLPKIT_BEGIN_ISA

void gemm_pack(const GemmPack& g) {
  switch (g.dtype) {
    case Dtype::bfloat16:
      return pack<Single<BFloat16>>(g);
    case Dtype::float16:
      return pack<Single<Half>>(g);
    default:
      return pack<Single<float>>(g);
  }
}

void gemm_lanes(const GemmLanes& g) {
  switch (g.dtype) {
    case Dtype::bfloat16:
      return copy_lanes<Single<BFloat16>>(g);
    case Dtype::float16:
      return copy_lanes<Single<Half>>(g);
    default:
      return copy_lanes<Single<float>>(g);
  }
}

void gemm_multiply(const GemmMultiply& g) { multiply<Single<float>>(g); }

MLPKIT_END_ISA
