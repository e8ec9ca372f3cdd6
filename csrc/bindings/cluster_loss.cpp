#include "core/cluster_loss.h"

#include "bindings/tensor.h"
#include "cpu/launchers.h"

namespace antdiff {
namespace {

LossKind kind_of(const std::string& kind) {
  if (kind == "mse") return LossKind::mse;
  if (kind == "huber") return LossKind::huber;
  if (kind == "l1") return LossKind::l1;
  throw_value("kind must be 'mse', 'huber' or 'l1'; got '" + kind + "'.");
}

DType loss_dtype(DType d) { return d == DType::f64 ? DType::f64 : DType::f32; }

// Checks and sets the parameters that all functions share. pred and target are [B, ...], with N elements per sample.
struct Call {
  Tensor pred, cluster;
  ClusterLossParams p;

  Call(py::handle pred_, const char* pred_name, py::handle cluster_, py::handle weight_, int64_t k)
      : pred(pred_, pred_name), cluster(cluster_, "cluster") {
    if (k < 1) throw_value("k must be at least 1; got " + std::to_string(k) + ".");
    pred.require_float();
    p.dtype = pred.dtype();
    p.B = pred.size(0);
    p.K = k;
    cluster.require_int64().require_shape({p.B}, "[B], one id for each sample of pred").require_same_device(pred);
    p.cluster = cluster.as<int64_t>();
    if (!weight_.is_none()) {
      Tensor weight(weight_, "weight");
      weight.require_dtype(loss_dtype(p.dtype), "the dtype of the losses")
          .require_shape({p.B}, "[B], one number for each sample of pred")
          .require_same_device(pred);
      p.weight = weight.data();
    }
  }
  void data(py::handle target_, const std::string& kind, double delta) {
    Tensor target(target_, "target");
    target.require_dtype(p.dtype, "the dtype of pred").require_same_device(pred).require_same_shape(pred);
    p.N = 1;
    for (int64_t i = 1; i < pred.dim(); ++i) p.N *= pred.size(i);
    if (p.N == 0) throw_value("pred must have at least one element per sample; got " + pred.describe() + ".");
    p.pred = pred.data();
    p.target = target.data();
    p.kind = kind_of(kind);
    p.delta = delta;
  }
  // antdiff.ops allocates the outputs, so their shapes are correct by construction.
  void results(py::handle losses, py::handle counts, py::handle per_sample) {
    p.losses = Tensor(losses, "losses").data();
    p.counts = Tensor(counts, "counts").as<int64_t>();
    p.per_sample = Tensor(per_sample, "per_sample").data();
  }
};

void forward(py::handle pred, py::handle target, py::handle cluster, py::handle weight, int64_t k,
             const std::string& kind, double delta, py::handle losses, py::handle counts, py::handle per_sample,
             py::handle scratch) {
  Call c(pred, "pred", cluster, weight, k);
  c.data(target, kind, delta);
  c.results(losses, counts, per_sample);
  if (!scratch.is_none()) c.p.scratch = Tensor(scratch, "scratch").as<double>();
  check(ANTDIFF_LAUNCH(c.pred, cluster_loss_forward, c.p), "cluster", k);
}

void mean(py::handle per_sample, py::handle cluster, py::handle weight, int64_t k, py::handle losses,
          py::handle counts) {
  Call c(per_sample, "per_sample", cluster, weight, k);
  c.pred.require_dtype(loss_dtype(c.p.dtype), "the dtype of the losses").require_shape({kAny}, "[B]");
  c.results(losses, counts, per_sample);
  check(ANTDIFF_LAUNCH(c.pred, cluster_loss_forward, c.p), "cluster", k);
}

void backward(py::handle grad_losses, py::handle pred, py::handle target, py::handle cluster, py::handle weight,
              py::handle counts, const std::string& kind, double delta, py::handle grad_pred) {
  Tensor grad(grad_losses, "grad_losses"), numbers(counts, "counts");
  Call c(pred, "pred", cluster, weight, numbers.numel());
  c.data(target, kind, delta);
  grad.require_dtype(loss_dtype(c.p.dtype), "the dtype of the losses")
      .require_shape({c.p.K}, "[k]")
      .require_same_device(c.pred);
  numbers.require_int64().require_shape({c.p.K}, "[k]").require_same_device(c.pred);
  c.p.grad_losses = grad.data();
  c.p.counts = numbers.as<int64_t>();
  c.p.grad_pred = Tensor(grad_pred, "grad_pred").data();
  check(ANTDIFF_LAUNCH(c.pred, cluster_loss_backward, c.p), "cluster", c.p.K);
}

void loss_and_grad(py::handle pred, py::handle target, py::handle cluster, py::handle weight, int64_t k,
                   py::handle cluster_weight, const std::string& kind, double delta, py::handle losses,
                   py::handle counts, py::handle per_sample, py::handle scratch, py::handle grad_pred) {
  Call c(pred, "pred", cluster, weight, k);
  c.data(target, kind, delta);
  c.results(losses, counts, per_sample);
  Tensor upstream(cluster_weight, "cluster_weight");
  upstream.require_dtype(loss_dtype(c.p.dtype), "the dtype of the losses")
      .require_shape({k}, "[k], one number for each cluster")
      .require_same_device(c.pred);
  c.p.grad_losses = upstream.data();
  if (!scratch.is_none()) c.p.scratch = Tensor(scratch, "scratch").as<double>();
  c.p.grad_pred = Tensor(grad_pred, "grad_pred").data();
  check(ANTDIFF_LAUNCH(c.pred, cluster_loss_and_grad, c.p), "cluster", k);
}

}  // namespace

void bind_cluster_loss(py::module_& m) {
  m.def("cluster_loss_forward", &forward, py::arg("pred"), py::arg("target"), py::arg("cluster"), py::arg("weight"),
        py::arg("k"), py::arg("kind"), py::arg("delta"), py::arg("losses"), py::arg("counts"), py::arg("per_sample"),
        py::arg("scratch"));
  m.def("cluster_loss_backward", &backward, py::arg("grad_losses"), py::arg("pred"), py::arg("target"),
        py::arg("cluster"), py::arg("weight"), py::arg("counts"), py::arg("kind"), py::arg("delta"),
        py::arg("grad_pred"));
  m.def("cluster_loss_and_grad", &loss_and_grad, py::arg("pred"), py::arg("target"), py::arg("cluster"),
        py::arg("weight"), py::arg("k"), py::arg("cluster_weight"), py::arg("kind"), py::arg("delta"),
        py::arg("losses"), py::arg("counts"), py::arg("per_sample"), py::arg("scratch"), py::arg("grad_pred"));
  m.def("cluster_mean_forward", &mean, py::arg("per_sample"), py::arg("cluster"), py::arg("weight"), py::arg("k"),
        py::arg("losses"), py::arg("counts"));
  m.def("cluster_loss_tiles", &cluster_loss_tiles, py::arg("B"), py::arg("N"));
}

}  // namespace antdiff
