// Tests of the threaded loops of cpu, for ThreadSanitizer. The sizes are large enough for several threads to start.
// Results must be bitwise reproducible and equal to the results of one thread.
#include <vector>

#include "cpu/launchers.h"
#include "cpu/parallel.h"
#include "tests/check.h"

using namespace antdiff;

namespace {

void covers_every_index_once() {
  std::vector<int> seen(1000, 0);
  parallel_for(1000, 4, [&](int64_t i) { ++seen[i]; });
  int64_t wrong = 0;
  for (int n : seen) wrong += n != 1;
  CHECK(wrong == 0);
  parallel_for(0, 4, [&](int64_t) { CHECK(false); });
}

void cluster_loss() {
  const int64_t B = 64, N = 8192, K = 5;
  test::Random random(1);
  std::vector<float> pred(B * N), target(B * N), grad(B * N), upstream(K, 1.f), losses(K), per_sample(B);
  for (auto& x : pred) x = float(random.uniform());
  for (auto& x : target) x = float(random.uniform());
  std::vector<int64_t> cluster(B), counts(K);
  for (auto& c : cluster) c = random.below(K);
  ClusterLossParams p;
  p.B = B, p.N = N, p.K = K;
  p.pred = pred.data(), p.target = target.data(), p.cluster = cluster.data();
  p.losses = losses.data(), p.counts = counts.data(), p.per_sample = per_sample.data();
  p.grad_losses = upstream.data(), p.grad_pred = grad.data();
  CHECK(cpu_cluster_loss_and_grad(p).ok());
  const auto losses_again = losses, grad_again = grad;
  for (auto& g : grad) g = -1;
  CHECK(cpu_cluster_loss_and_grad(p).ok());
  CHECK(losses == losses_again);
  CHECK(grad == grad_again);
}

void weights() {
  const int64_t n = 600, K = 8;
  test::Random random(2);
  std::vector<double> gram(n * K * K), keys(n * K * K), out(n * K), alone(K), J(K * K);
  for (auto& x : keys) x = random.uniform();
  for (int64_t i = 0; i < n; ++i) {
    for (auto& x : J) x = random.normal();
    for (int64_t e = 0; e < K * K; ++e)
      for (int64_t l = 0; l < K; ++l) gram[i * K * K + e] += J[e / K * K + l] * J[e % K * K + l];
  }
  PcgradParams p;
  p.n = n, p.K = K, p.gram = gram.data(), p.keys = keys.data(), p.weights = out.data();
  CHECK(cpu_pcgrad_weights(p).ok());
  p.n = 1, p.gram += (n - 1) * K * K, p.keys += (n - 1) * K * K, p.weights = alone.data();
  CHECK(cpu_pcgrad_weights(p).ok());
  for (int64_t i = 0; i < K; ++i) CHECK(alone[i] == out[(n - 1) * K + i]);

  // The first of two bad problems is reported, regardless of the order of the threads.
  gram[5 * K * K] = gram[500 * K * K] = -1;
  NashParams q;
  q.n = n, q.K = K, q.gram = gram.data(), q.weights = out.data();
  const Status s = cpu_nash_weights(q);
  CHECK(s.code == Status::Code::bad_gram && s.where == 5 * K * K);
}

}  // namespace

int main() {
  covers_every_index_once();
  cluster_loss();
  weights();
  return test::summary();
}
