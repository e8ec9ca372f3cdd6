#include "cpu/interval.h"

#include <chrono>

#include "bindings/tensor.h"
#include "cpu/launchers.h"

namespace antdiff {
namespace {

const double* cpu_doubles(const Tensor& t, std::initializer_list<int64_t> shape, const char* rule) {
  t.require_dtype(DType::f64, "the dynamic program compares sums in double precision").require_shape(shape, rule);
  if (!t.is_cpu())
    throw_value(t.name() + " must be on the CPU, where the partition runs; got " + t.describe() + ". Call .cpu().");
  return t.as<double>();
}

// Return a callback that is true after Ctrl-C. Python records the signal, and only a thread that holds the GIL can
// query it. Querying every 50 ms costs nothing, and a person does not notice the delay.
std::function<bool()> keyboard_interrupt() {
  using Clock = std::chrono::steady_clock;
  return [last = Clock::now()]() mutable {
    const auto now = Clock::now();
    if (now - last < std::chrono::milliseconds(50)) return false;
    last = now;
    py::gil_scoped_acquire acquire;
    return PyErr_CheckSignals() != 0;
  };
}

// antdiff.ops.interval has checked the sizes and allocated the outputs.
IntervalParams params(int64_t T, int64_t k, int64_t min_size, int64_t max_size, py::handle starts, py::handle totals) {
  IntervalParams p;
  p.T = T;
  p.K = k;
  p.min_size = min_size;
  p.max_size = max_size;
  const Tensor starts_view(starts, "starts");
  p.all = starts_view.dim() == 2;
  p.starts = starts_view.as<int64_t>();
  p.totals = Tensor(totals, "totals").as<double>();
  p.interrupted = keyboard_interrupt();
  return p;
}

template <class Solve>
Status without_gil(Solve&& solve) {
  py::gil_scoped_release release;
  return solve();
}

void raise(const Status& status, const IntervalParams& p, const double* cost) {
  if (status.code == Status::Code::infeasible)
    throw_value(
        "cost must allow a partition of T=" + std::to_string(p.T) + " points into k=" + std::to_string(p.K) +
        " intervals of " + std::to_string(p.min_size) + " to " + std::to_string(p.max_size) +
        " points; got +inf entries that forbid every partition. Allow more intervals, or change k or the sizes.");
  if (status.code == Status::Code::not_finite && status.where < 0)
    throw_value("cost must sum without overflow; got a total beyond the range of float64. Scale cost down.");
  if (status.code == Status::Code::not_finite)
    throw_value("cost must be finite, or +inf to forbid an interval, where r >= l; got " +
                std::string(cost[status.where] != cost[status.where] ? "NaN" : "-inf") + " at [l, r] = [" +
                std::to_string(status.where / p.T) + ", " + std::to_string(status.where % p.T) + "].");
  check(status);
}

void from_cost(py::handle cost_, int64_t k, int64_t min_size, int64_t max_size, py::handle starts, py::handle totals) {
  const Tensor view(cost_, "cost");
  const int64_t T = view.dim() > 0 ? view.size(0) : 0;
  const double* cost = cpu_doubles(view, {T, T}, "[T, T]");
  const IntervalParams p = params(T, k, min_size, max_size, starts, totals);
  raise(without_gil([&] { return cpu_interval_cost(cost, p); }), p, cost);
}

void from_affinity(py::handle affinity_, int64_t k, int64_t min_size, int64_t max_size, py::handle starts,
                   py::handle totals) {
  const Tensor view(affinity_, "affinity");
  const int64_t T = view.dim() > 0 ? view.size(0) : 0;
  const double* affinity = cpu_doubles(view, {T, T}, "[T, T]");
  const IntervalParams p = params(T, k, min_size, max_size, starts, totals);
  raise(without_gil([&] { return cpu_interval_affinity(affinity, p); }), p, affinity);
}

void from_values(py::handle x_, py::handle weight_, int64_t power, bool scan, int64_t k, int64_t min_size,
                 int64_t max_size, py::handle starts, py::handle totals) {
  const Tensor view(x_, "x");
  const double* x = cpu_doubles(view, {kAny}, "[T]");
  const double* weight = nullptr;
  if (!weight_.is_none()) weight = cpu_doubles(Tensor(weight_, "weight"), {view.size(0)}, "[T]");
  const IntervalParams p = params(view.size(0), k, min_size, max_size, starts, totals);
  const IntervalSolver solver = scan ? IntervalSolver::scan : IntervalSolver::divide_and_conquer;
  raise(without_gil([&] {
          return power == 1 ? cpu_interval_absolute(x, weight, solver, p) : cpu_interval_squared(x, weight, solver, p);
        }),
        p, x);
}

}  // namespace

void bind_interval(py::module_& m) {
  m.def("interval_cost", &from_cost, py::arg("cost"), py::arg("k"), py::arg("min_size"), py::arg("max_size"),
        py::arg("starts"), py::arg("totals"));
  m.def("interval_affinity", &from_affinity, py::arg("affinity"), py::arg("k"), py::arg("min_size"),
        py::arg("max_size"), py::arg("starts"), py::arg("totals"));
  m.def("interval_values", &from_values, py::arg("x"), py::arg("weight").none(true), py::arg("power"), py::arg("scan"),
        py::arg("k"), py::arg("min_size"), py::arg("max_size"), py::arg("starts"), py::arg("totals"));
}

}  // namespace antdiff
