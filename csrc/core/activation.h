// Activations and their slopes, each formula once (core; host and device). F is float, double or a SIMD vector of
// floats. Every function takes `a`, the negative slope, which only leaky_relu and prelu read.
#pragma once
#include "core/macros.h"
#include "core/math.h"

namespace mlpkit {

enum class Activation : int { identity, relu, leaky_relu, prelu, gelu, gelu_tanh, silu, sigmoid, tanh };

// What the backward pass needs of the forward one: nothing, the sign of z (one bit an element), or z itself.
enum class Needs : int { nothing, sign, preactivation };

}  // namespace mlpkit

MLPKIT_BEGIN_ISA

// identity(z) = z
struct Identity {
  static constexpr Needs needs = Needs::nothing;
  template <class F>
  MLPKIT_HD static F value(F z, F) {
    return z;
  }
  template <class F>
  MLPKIT_HD static F slope(F, F) {
    return F{} + 1.f;
  }
};

// relu(z) = max(z, 0), relu'(0) = 0; NaN passes in both directions
struct Relu {
  static constexpr Needs needs = Needs::sign;
  template <class F>
  MLPKIT_HD static F value(F z, F) {
    return z <= 0.f ? 0.f : z;
  }
  template <class F>
  MLPKIT_HD static F slope(F z, F) {
    return z <= 0.f ? F{} : F{} + 1.f;
  }
};

// leaky_relu(z) = z if z > 0, a z otherwise
struct LeakyRelu {
  static constexpr Needs needs = Needs::sign;
  template <class F>
  MLPKIT_HD static F value(F z, F a) {
    return z > 0.f ? z : a * z;
  }
  template <class F>
  MLPKIT_HD static F slope(F z, F a) {
    return z > 0.f ? F{} + 1.f : a;
  }
};

// prelu(z) = z if z > 0, a z otherwise; d prelu / d a = min(z, 0)
struct Prelu {
  static constexpr Needs needs = Needs::preactivation;
  template <class F>
  MLPKIT_HD static F value(F z, F a) {
    return z > 0.f ? z : a * z;
  }
  template <class F>
  MLPKIT_HD static F slope(F z, F a) {
    return z > 0.f ? F{} + 1.f : a;
  }
  template <class F>
  MLPKIT_HD static F slope_by_a(F z) {
    return z > 0.f ? 0.f : z;
  }
};

// gelu(z) = z Phi(z),  gelu'(z) = Phi(z) + z phi(z)
struct Gelu {
  static constexpr Needs needs = Needs::preactivation;
  template <class F>
  MLPKIT_HD static F value(F z, F) {
    return math::normal(z).x_phi;
  }
  template <class F>
  MLPKIT_HD static F slope(F z, F) {
    const math::Normal<F> at = math::normal(z);
    return at.phi + z * (math::constant<F>(0.3989422804014327) * at.bell);
  }
};

// gelu_tanh(z) = z (1 + tanh u) / 2,  u = sqrt(2 / pi) (z + 0.044715 z^3)
struct GeluTanh {
  static constexpr Needs needs = Needs::preactivation;
  template <class F>
  MLPKIT_HD static F value(F z, F) {
    return 0.5f * z * (1.f + math::tanh(inner(z)));
  }
  template <class F>
  MLPKIT_HD static F slope(F z, F) {
    const F t = math::tanh(inner(z));
    const F inner_slope = math::constant<F>(0.7978845608028654) * (1.f + math::constant<F>(3 * 0.044715) * (z * z));
    return 0.5f * (1.f + t) + 0.5f * z * (1.f - t * t) * inner_slope;
  }

 private:
  template <class F>
  MLPKIT_HD static F inner(F z) {
    return math::constant<F>(0.7978845608028654) * (z + math::constant<F>(0.044715) * (z * z * z));
  }
};

// silu(z) = z s,  silu'(z) = s (1 + z (1 - s)),  s = sigmoid(z)
struct Silu {
  static constexpr Needs needs = Needs::preactivation;
  template <class F>
  MLPKIT_HD static F value(F z, F) {
    return z * math::sigmoid(z);
  }
  template <class F>
  MLPKIT_HD static F slope(F z, F) {
    const F s = math::sigmoid(z);
    return s * (1.f + z * (1.f - s));
  }
};

// sigmoid'(z) = s (1 - s)
struct Sigmoid {
  static constexpr Needs needs = Needs::preactivation;
  template <class F>
  MLPKIT_HD static F value(F z, F) {
    return math::sigmoid(z);
  }
  template <class F>
  MLPKIT_HD static F slope(F z, F) {
    const F s = math::sigmoid(z);
    return s * (1.f - s);
  }
};

// tanh'(z) = 1 - tanh(z)^2
struct Tanh {
  static constexpr Needs needs = Needs::preactivation;
  template <class F>
  MLPKIT_HD static F value(F z, F) {
    return math::tanh(z);
  }
  template <class F>
  MLPKIT_HD static F slope(F z, F) {
    const F t = math::tanh(z);
    return 1.f - t * t;
  }
};

// Calls body(A{}) with the formula struct of `activation`: the one run-time to compile-time switch.
template <class Body>
MLPKIT_HD void visit_activation(Activation activation, Body&& body) {
  switch (activation) {
    case Activation::identity:
      return body(Identity{});
    case Activation::relu:
      return body(Relu{});
    case Activation::leaky_relu:
      return body(LeakyRelu{});
    case Activation::prelu:
      return body(Prelu{});
    case Activation::gelu:
      return body(Gelu{});
    case Activation::gelu_tanh:
      return body(GeluTanh{});
    case Activation::silu:
      return body(Silu{});
    case Activation::sigmoid:
      return body(Sigmoid{});
    case Activation::tanh:
      return body(Tanh{});
  }
}

MLPKIT_END_ISA
