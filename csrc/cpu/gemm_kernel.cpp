// The product of one tile of float32, bfloat16 or float16 in fp32 (cpu; compiled once for each instruction set).
#include "cpu/gemm_block.h"

MLPKIT_BEGIN_ISA
namespace {

template <class A>
void product_with(const GemmTile& g) {
  switch (g.dtype_b) {
    case Dtype::bfloat16:
      return product<Single<A>, Single<BFloat16>>(g);
    case Dtype::float16:
      return product<Single<A>, Single<Half>>(g);
    default:
      return product<Single<A>, Single<float>>(g);
  }
}

}  // namespace

void gemm_tile(const GemmTile& g) {
  switch (g.dtype_a) {
    case Dtype::bfloat16:
      return product_with<BFloat16>(g);
    case Dtype::float16:
      return product_with<Half>(g);
    default:
      return product_with<float>(g);
  }
}

MLPKIT_END_ISA
