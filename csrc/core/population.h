// What the engines of a population agree on beside formulas: how members are scored, when a step does not count and
// when a member has diverged (core; host and device).
#pragma once
#include "core/macros.h"

namespace mlpkit {

enum class PopulationMetric : int { loss, accuracy, r2, mae, rmse };

// Parameters, state and gradients within this bound, and settings within those below, cannot overflow in an update
// (mlpkit/guard/bounds.py). Beyond, the update is made and looked at before it counts.
constexpr double kMemberLargest = 1099511627776.0;  // 2^40
constexpr double kMemberLargestSetting = 1024.0, kMemberLargestBeta = 1.0 - 0x1p-20, kMemberSmallestEps = 0x1p-40;
// Steps in a row that could not be taken, until the member counts as diverged.
constexpr int64_t kMemberMostSkips = 8;

// Why a step was not taken, or a member stopped.
enum class MemberCause : int { none, loss_nan, loss_inf, gradient, average, update, validation };

inline const char* text_of(MemberCause cause) {
  switch (cause) {
    case MemberCause::none:
      break;
    case MemberCause::loss_nan:
      return "the loss is NaN";
    case MemberCause::loss_inf:
      return "the loss is Inf";
    case MemberCause::gradient:
      return "a gradient is not finite";
    case MemberCause::average:
      return "a running average would not be finite";
    case MemberCause::update:
      return "the update would not be finite";
    case MemberCause::validation:
      return "the validation loss is not finite";
  }
  return "";
}

}  // namespace mlpkit
