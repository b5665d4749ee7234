// torch_update: torch/optim/{sgd,adam,rmsprop}.py in C++ (ops).
#include "ops/torch_update.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/_fused_adam.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/_fused_sgd.h>
#include <ATen/ops/maximum.h>

#include <cmath>

namespace mlpkit {
namespace {

at::Tensor decayed(const GuardedGroup& group, const at::Tensor& p, const at::Tensor& gradient) {
  at::Tensor g = group.maximize ? gradient.neg() : gradient;
  return group.weight_decay != 0 ? g.add(p, group.weight_decay) : g;
}

void sgd(const GuardedGroup& group, const GuardedRow& row, const at::Tensor& gradient) {
  at::Tensor g = decayed(group, row.p, gradient);
  if (group.momentum != 0) {
    if (row.fresh)
      row.first.copy_(g);
    else
      row.first.mul_(group.momentum).add_(g, 1 - group.dampening);
    g = group.nesterov ? g.add(row.first, group.momentum) : row.first;
  }
  row.p.add_(g, -group.lr);
}

void adam(bool decoupled, const GuardedGroup& group, const GuardedRow& row, const at::Tensor& gradient, double step) {
  at::Tensor g = group.maximize ? gradient.neg() : gradient;
  if (group.weight_decay != 0) {
    if (decoupled)
      row.p.mul_(1 - group.lr * group.weight_decay);
    else
      g = g.add(row.p, group.weight_decay);
  }
  row.first.lerp_(g, 1 - group.beta1);
  row.second.mul_(group.beta2).addcmul_(g, g, 1 - group.beta2);
  const double correction1 = 1 - std::pow(group.beta1, step), correction2 = 1 - std::pow(group.beta2, step);
  at::Tensor third = row.third;
  if (group.amsgrad) at::maximum_out(third, row.third, row.second);
  const at::Tensor& variance = group.amsgrad ? row.third : row.second;
  // pow, as Python's ** 0.5 is.
  const at::Tensor divisor = variance.sqrt().div(std::pow(correction2, 0.5)).add_(group.eps);
  row.p.addcdiv_(row.first, divisor, -(group.lr / correction1));
}

void rmsprop(const GuardedGroup& group, const GuardedRow& row, const at::Tensor& gradient) {
  const at::Tensor g = decayed(group, row.p, gradient);
  row.second.mul_(group.beta2).addcmul_(g, g, 1 - group.beta2);
  const at::Tensor divisor = row.second.sqrt().add_(group.eps);
  if (group.momentum > 0) {
    row.first.mul_(group.momentum).addcdiv_(g, divisor);
    row.p.add_(row.first, -group.lr);
  } else {
    row.p.addcdiv_(g, divisor, -group.lr);
  }
}

std::vector<at::Tensor> all(const std::vector<const GuardedRow*>& rows, at::Tensor GuardedRow::* which) {
  std::vector<at::Tensor> found;
  for (const GuardedRow* row : rows)
    if ((row->*which).defined()) found.push_back(row->*which);
  return found;
}

void fused(Optimizer kind, const GuardedGroup& group, const std::vector<const GuardedRow*>& rows,
           const std::vector<at::Tensor>& gradients) {
  const std::vector<at::Tensor> p = all(rows, &GuardedRow::p), first = all(rows, &GuardedRow::first);
  if (kind == Optimizer::sgd)
    return at::_fused_sgd_(p, gradients, first, group.weight_decay, group.momentum, group.lr, group.dampening,
                           group.nesterov, group.maximize, group.momentum != 0 && rows[0]->fresh);
  const std::vector<at::Tensor> second = all(rows, &GuardedRow::second), third = all(rows, &GuardedRow::third),
                                steps = all(rows, &GuardedRow::step);
  const auto call = [&](auto step) {
    step(p, gradients, first, second, group.amsgrad ? third : std::vector<at::Tensor>{}, steps, group.lr, group.beta1,
         group.beta2, group.weight_decay, group.eps, group.amsgrad, group.maximize);
  };
  if (kind == Optimizer::adam)
    call([](const auto&... x) { at::_fused_adam_(x...); });
  else
    call([](const auto&... x) { at::_fused_adamw_(x...); });
}

}  // namespace

void scale_gradient(const at::Tensor& gradient, double factor) {
  if (gradient.scalar_type() == at::kDouble) {
    gradient.mul_(factor);
    return;
  }
  const Factors<float> factors = factors_of<float>(factor);
  gradient.mul_(factors.first);
  if (factors.second != 1) gradient.mul_(factors.second);
}

void torch_update(Optimizer kind, bool by_fused_kernels, const GuardedGroup& group,
                  const std::vector<const GuardedRow*>& rows, const std::vector<at::Tensor>& gradients,
                  const std::vector<double>& steps) {
  // Nothing here is autograd's, and version counters are raised by the caller, once.
  const at::AutoDispatchBelowADInplaceOrView below;
  if (by_fused_kernels) return fused(kind, group, rows, gradients);
  for (size_t i = 0; i < rows.size(); ++i) {
    if (kind == Optimizer::sgd)
      sgd(group, *rows[i], gradients[i]);
    else if (kind == Optimizer::rmsprop)
      rmsprop(group, *rows[i], gradients[i]);
    else
      adam(kind == Optimizer::adamw, group, *rows[i], gradients[i], steps[i]);
  }
}

}  // namespace mlpkit
