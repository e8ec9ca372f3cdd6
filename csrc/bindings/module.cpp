// antdiff._C: what Python can call. One bind_ function a family of ops, in the order of the data's way.
#include <pybind11/pybind11.h>

namespace antdiff {

void bind_tensor(pybind11::module_& m);
void bind_cluster_loss(pybind11::module_& m);
void bind_gram(pybind11::module_& m);
void bind_combine(pybind11::module_& m);
void bind_pcgrad(pybind11::module_& m);
void bind_nash(pybind11::module_& m);
void bind_gram_weights(pybind11::module_& m);
void bind_interval(pybind11::module_& m);

}  // namespace antdiff

PYBIND11_MODULE(_C, m) {
  antdiff::bind_tensor(m);
  antdiff::bind_cluster_loss(m);
  antdiff::bind_gram(m);
  antdiff::bind_combine(m);
  antdiff::bind_pcgrad(m);
  antdiff::bind_nash(m);
  antdiff::bind_gram_weights(m);
  antdiff::bind_interval(m);
}
