// The threaded loops of cpu, for ThreadSanitizer: sizes large enough that several threads start, and the result must
// equal the one-thread result bit for bit.
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

}  // namespace

int main() {
  covers_every_index_once();
  cluster_loss();
  return test::summary();
}
