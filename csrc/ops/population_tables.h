// What the steps of a launch need and only the host computes: factors of learning rates, powers of the betas; the same
// ones once (ops).
#pragma once
#include <cmath>
#include <map>
#include <tuple>
#include <vector>

#include "ops/population_member.h"

namespace mlpkit {

struct StepTables {
  struct Places {  // in `numbers`; -1: none is needed
    int64_t factors = -1, powers = -1;
    double largest_factor = 1.0;
  };

  std::vector<double> numbers;

  // For the next `steps` steps of a member.
  Places add(const PopulationMember& member, int64_t steps) {
    Places places;
    const MemberRecipe& recipe = member.recipe;
    const ScheduleSettings& s = recipe.schedule;
    if (s.kind != Schedule::constant || s.warmup > 0.0) {
      const int64_t per_epoch = member.steps_per_epoch(), first = member.progress.step;
      const auto [at, fresh] =
          factors_.try_emplace({s.kind, s.warmup, s.floor, s.gamma, s.every, per_epoch, recipe.epochs, first, steps},
                               std::pair<int64_t, double>{static_cast<int64_t>(numbers.size()), 0.0});
      for (int64_t step = 0; step < steps && fresh; ++step) {
        numbers.push_back(schedule_factor(s, first + step, per_epoch, per_epoch * recipe.epochs));
        at->second.second = std::fmax(at->second.second, std::fabs(numbers.back()));
      }
      std::tie(places.factors, places.largest_factor) = at->second;
    }
    if (member.network.optimizer == Optimizer::adam || member.network.optimizer == Optimizer::adamw) {
      const auto [at, fresh] = powers_.try_emplace({recipe.beta1, recipe.beta2, member.progress.taken, steps},
                                                   static_cast<int64_t>(numbers.size()));
      for (int64_t step = 1; step <= steps && fresh; ++step) {
        const double t = static_cast<double>(member.progress.taken + step);
        numbers.push_back(std::pow(recipe.beta1, t));
        numbers.push_back(std::pow(recipe.beta2, t));
      }
      places.powers = at->second;
    }
    return places;
  }

 private:
  std::map<std::tuple<Schedule, double, double, double, int64_t, int64_t, int64_t, int64_t, int64_t>,
           std::pair<int64_t, double>>
      factors_;
  std::map<std::tuple<double, double, int64_t, int64_t>, int64_t> powers_;
};

}  // namespace mlpkit
