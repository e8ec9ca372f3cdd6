#include <algorithm>

#include "bindings/jacobian.h"
#include "cpu/launchers.h"

namespace antdiff {
namespace {

struct Range {
  const char *begin, *end;
  const Tensor* tensor;
  bool written;
};

// Throw if an output shares memory with J or with another output, since the kernels read and write in no fixed order.
void refuse_overlap(const JacobianView& jacobian, const std::vector<Tensor>& outs) {
  std::vector<Range> ranges;
  ranges.reserve(jacobian.tensors.size() + outs.size());
  const auto add = [&](const Tensor& x, DType dtype, bool written) {
    const auto* begin = static_cast<const char*>(x.data());
    if (x.numel()) ranges.push_back({begin, begin + x.numel() * size_of(dtype), &x, written});
  };
  for (const Tensor& x : jacobian.tensors) add(x, jacobian.dtype, false);
  for (const Tensor& x : outs) add(x, x.dtype(), true);
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  // Of the ranges so far: the one that ends last, and the written one that ends last.
  const Range *reach = nullptr, *write_reach = nullptr;
  for (const Range& r : ranges) {
    const Range* other = r.written ? reach : write_reach;
    if (other && other->end > r.begin)
      throw_value((r.written ? r : *other).tensor->name() + " must not share memory with " +
                  (r.written ? *other : r).tensor->name() + ". Pass separate tensors.");
    if (!reach || r.end > reach->end) reach = &r;
    if (r.written && (!write_reach || r.end > write_reach->end)) write_reach = &r;
  }
}

// `out` is a list as long as J, with None where J has None. Its shapes are those of J without the first dimension.
void combine(py::handle weights, py::handle J, py::handle out) {
  JacobianView jacobian(J);
  Tensor w(weights, "weights");
  w.require_dtype(DType::f64, "the dtype of G and its weights")
      .require_shape({jacobian.K}, ("[k] with k=" + std::to_string(jacobian.K) + ", one weight per row of J").c_str())
      .require_same_device(jacobian.first());
  const auto list = py::reinterpret_borrow<py::list>(out);
  const auto source = py::reinterpret_borrow<py::list>(J);
  std::vector<Tensor> outs;
  outs.reserve(jacobian.tensors.size());
  for (size_t i = 0; i < list.size(); ++i) {
    if (source[i].is_none()) continue;
    const Tensor& x = jacobian.tensors[outs.size()];
    outs.emplace_back(list[i], list.size() == 1 ? "out" : "out[" + std::to_string(i) + "]");
    Tensor& o = outs.back();
    o.require_float().require_same_device(jacobian.first());
    bool same = o.dim() == x.dim() - 1;
    for (int64_t d = 0; same && d < o.dim(); ++d) same = o.size(d) == x.size(d + 1);
    if (!same)
      throw_value(o.name() + " must have the shape of one row of J; got " + o.describe() + " for " + x.describe() +
                  ".");
    if (o.dtype() != DType::f32 && o.dtype() != jacobian.dtype)
      throw_type(o.name() + " must be float32 or have the dtype of J; got " + o.describe() + " for " + x.describe() +
                 ".");
    if (o.dtype() != outs.front().dtype())
      throw_type(o.name() + " must have the dtype of the other entries of out; got " + o.describe() + " after " +
                 outs.front().describe() + ".");
    jacobian.pieces[outs.size() - 1].out = o.data();
  }
  refuse_overlap(jacobian, outs);
  CombineParams p;
  p.dtype = jacobian.dtype;
  p.out_dtype = outs.front().dtype();
  p.K = jacobian.K;
  p.pieces = jacobian.pieces.data();
  p.count = int64_t(jacobian.pieces.size());
  p.weights = w.as<double>();
  check(ANTDIFF_LAUNCH(jacobian.first(), combine, p));
}

}  // namespace

void bind_combine(py::module_& m) { m.def("combine", &combine, py::arg("weights"), py::arg("J"), py::arg("out")); }

}  // namespace antdiff
