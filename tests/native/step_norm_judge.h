// What a norm makes of z and of du, in long double with the error that fp32 may add on the way (tests).
#pragma once
#include "step_norm.h"

namespace native {

using Table = std::vector<Bounded>;  // [rows, columns]

// A result that is rounded to fp32 once more; subnormals lose less than the least of them.
inline Bounded once(Real value, Real error) { return {value, error + kUnit * (std::fabs(value) + error) + 0x1p-149L}; }
inline Bounded plus(const Bounded& a, const Bounded& b) { return once(a.value + b.value, a.error + b.error); }
inline Bounded minus(const Bounded& a, const Bounded& b) { return once(a.value - b.value, a.error + b.error); }
inline Bounded times(const Bounded& a, const Bounded& b) {
  return once(a.value * b.value, std::fabs(a.value) * b.error + std::fabs(b.value) * a.error + a.error * b.error);
}

class BoundedSum {  // in any order
 public:
  void add(const Bounded& term) {
    value_ += term.value;
    error_ += term.error;
    magnitude_ += std::fabs(term.value) + term.error;
    ++count_;
  }
  Bounded total() const { return once(value_, error_ + static_cast<Real>(count_) * kUnit * magnitude_); }
  Bounded mean() const { return once(total().value / Real(count_), total().error / Real(count_)); }

 private:
  Real value_ = 0, error_ = 0, magnitude_ = 0;
  int64_t count_ = 0;
};

class NormJudge {
 public:
  NormJudge(const NetNorm& norm, Table z) : norm_(norm), z_(std::move(z)), u_(norm.here() ? Table{} : z_) {
    for (int64_t row = 0; row < norm_.rows && norm_.here(); ++row) normalise(row);
  }

  // What the activation is applied to.
  const Table& u() const { return u_; }

  void compare_moments(Report& report) const {
    for (int64_t panel = 0; panel < panels_of(norm_.rows) && norm_.moments.count(); ++panel)
      for (int64_t col = 0; col < norm_.out; ++col) compare_moments(panel, col, report);
  }

  void compare_sums(const Table& du, Report& report) const {
    for (int64_t panel = 0; panel < panels_of(norm_.rows) && norm_.here(); ++panel)
      for (int64_t col = 0; col < norm_.out; ++col) {
        BoundedSum sum, sum_x;
        for (int64_t i = 0; i < norm_.rows_of(panel); ++i) {
          const size_t here = at(panel * kPanel + i, col);
          sum.add(du[here]);
          sum_x.add(times(du[here], x_[here]));
        }
        near("sums of du", norm_.sums, norm_.place(panel, 0, col), sum.total(), report);
        near("sums of du x", norm_.sums, norm_.place(panel, 1, col), sum_x.total(), report);
      }
  }

  // dz = inverse (g - mean(g) - x mean(g x)),  g = du weight
  Table gradients(const Table& du) const {
    if (!norm_.here()) return du;
    Table dz;
    for (int64_t row = 0; row < norm_.rows; ++row) {
      BoundedSum sum_g, sum_gx;
      const auto g = [&](int64_t col) { return times(du[at(row, col)], exactly(norm_.weight_of(col))); };
      for (int64_t col = 0; col < norm_.out; ++col) {
        sum_g.add(g(col));
        sum_gx.add(times(g(col), x_[at(row, col)]));
      }
      for (int64_t col = 0; col < norm_.out; ++col) {
        const Bounded mean_g = norm_.batch() ? given(norm_.mean_g, col) : sum_g.mean();
        const Bounded mean_gx = norm_.batch() ? given(norm_.mean_gx, col) : sum_gx.mean();
        dz.push_back(times(inverse(row, col), minus(minus(g(col), mean_g), times(x_[at(row, col)], mean_gx))));
      }
    }
    return dz;
  }

 private:
  size_t at(int64_t row, int64_t col) const { return static_cast<size_t>(row * norm_.out + col); }
  static Bounded exactly(Real value) { return {value, 0}; }
  static Bounded given(const Numbers& numbers, int64_t col) { return exactly(numbers.count() ? numbers.get(col) : 0); }
  static void near(const char* what, const Numbers& ours, int64_t index, const Bounded& exact, Report& report) {
    report.near(what, index, ours.get(index), exact.value, exact.error);
  }

  Bounded inverse(int64_t row, int64_t col) const {
    return norm_.batch() ? exactly(norm_.inverse.get(col)) : of_row_[static_cast<size_t>(row)];
  }

  // u = x weight + bias,  x = (z - mean) inverse
  void normalise(int64_t row) {
    BoundedSum sum, squares;
    for (int64_t col = 0; col < norm_.out; ++col) sum.add(z_[at(row, col)]);
    for (int64_t col = 0; col < norm_.out; ++col) {
      const Bounded d = minus(z_[at(row, col)], sum.mean());
      squares.add(times(d, d));
    }
    of_row_.push_back(inverse_of(squares.mean()));
    for (int64_t col = 0; col < norm_.out; ++col) {
      const Bounded mean = norm_.batch() ? given(norm_.mean, col) : sum.mean();
      x_.push_back(times(minus(z_[at(row, col)], mean), inverse(row, col)));
      u_.push_back(plus(times(x_.back(), exactly(norm_.weight_of(col))), exactly(norm_.bias_of(col))));
    }
  }
  // eps as well as the sum, the root and its inverse are rounded. The root is steepest where the variance is least.
  Bounded inverse_of(const Bounded& variance) const {
    const Real eps = norm_.eps, least = std::max<Real>(variance.value - variance.error, 0) + eps;
    const Real value = 1 / std::sqrt(variance.value + eps), most = 1 / std::sqrt(least);
    return {value, most - value + 4 * kUnit * most};
  }

  // Sums of a panel's rows are of at most 9 in a chain, and of deviations from a mean that was rounded, which is put
  // right again: an error of that mean is as small as that of z. The rest is in fp64.
  void compare_moments(int64_t panel, int64_t col, Report& report) const {
    const Real rows = static_cast<Real>(norm_.rows_of(panel));
    Real mean = 0, errors = 0, deviations = 0, squares = 0, by_errors = 0;
    for (int64_t i = 0; i < norm_.rows_of(panel); ++i) {
      const Bounded& z = z_[at(panel * kPanel + i, col)];
      mean += z.value / rows;
      errors += z.error / rows;
    }
    for (int64_t i = 0; i < norm_.rows_of(panel); ++i) {
      const Bounded& z = z_[at(panel * kPanel + i, col)];
      const Real d = std::fabs(z.value - mean);
      deviations += d / rows;
      squares += d * d;
      by_errors += (2 * d + z.error) * z.error;
    }
    near("means of a panel", norm_.moments, norm_.place(panel, 0, col),
         {mean, errors + 12 * kUnit * (deviations + errors) + 0x1p-50L * std::fabs(mean)}, report);
    near("squares of a panel", norm_.moments, norm_.place(panel, 1, col),
         {squares, by_errors + 24 * kUnit * (squares + by_errors)}, report);
  }

  const NetNorm& norm_;
  Table z_, x_, u_, of_row_;  // of_row: a layer norm's inverse deviations
};

}  // namespace native
