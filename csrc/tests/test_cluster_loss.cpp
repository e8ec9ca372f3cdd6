// Tests of cluster loss: the CPU loops and the emulated CUDA kernels against a plain double-precision evaluation.
#define ANTDIFF_CUDA_EMULATION
#include "cuda/cluster_loss.cu"  // NOLINT: the emulator compiles it as C++

#include <vector>

#include "cpu/launchers.h"
#include "tests/check.h"

namespace antdiff {
uint32_t* device_errors(int) { return &emulated_errors; }
}  // namespace antdiff

using namespace antdiff;
using test::close;
using test::Random;

namespace {

// The relative error of one rounding to T, with a margin for the chain of sums in the accumulation type of T.
template <class T>
double tolerance() {
  return sizeof(T) == 8 ? 1e-13 : sizeof(T) == 4 ? 2e-6 : 1e-2;
}

double value(LossKind kind, double d, double delta) {
  const double a = std::fabs(d);
  return kind == LossKind::mse ? d * d : kind == LossKind::l1 ? a : a <= delta ? .5 * d * d : delta * (a - .5 * delta);
}
double slope(LossKind kind, double d, double delta) {
  const double sign = d > 0 ? 1 : d < 0 ? -1 : 0;
  return kind == LossKind::mse ? 2 * d : kind == LossKind::l1 ? sign : std::fabs(d) <= delta ? d : delta * sign;
}

template <class T>
struct Case {
  using A = accumulate_t<T>;
  int64_t B, N, K;
  LossKind kind;
  std::vector<T> pred, target, grad;
  std::vector<int64_t> cluster, counts;
  std::vector<A> weight, losses, per_sample, upstream;
  std::vector<double> scratch;
  ClusterLossParams p;

  Case(int64_t B, int64_t N, int64_t K, LossKind kind, DType dtype, bool weighted, uint64_t seed)
      : B(B),
        N(N),
        K(K),
        kind(kind),
        pred(B * N),
        target(B * N),
        grad(B * N),
        cluster(B),
        counts(K, -1),
        weight(B),
        losses(K, A(-1)),
        per_sample(B, A(-1)),
        upstream(K),
        scratch(cluster_loss_tiles(B, N)) {
    Random random(seed);
    for (auto& x : pred) x = from_float<T>(float(random.normal()));
    for (auto& x : target) x = from_float<T>(float(random.normal()));
    for (auto& c : cluster) c = K > 2 ? random.below(K - 1) : random.below(K);  // K > 2: the last stays empty
    for (auto& w : weight) w = A(random.uniform() + .5);
    for (auto& g : upstream) g = A(random.normal());
    p.dtype = dtype;
    p.kind = kind;
    p.delta = .7;
    p.B = B, p.N = N, p.K = K;
    p.pred = pred.data(), p.target = target.data(), p.cluster = cluster.data();
    p.weight = weighted ? weight.data() : nullptr;
    p.losses = losses.data(), p.counts = counts.data(), p.per_sample = per_sample.data();
    p.scratch = scratch.data();
    p.grad_losses = upstream.data(), p.grad_pred = grad.data();
  }

  void check_values() const {
    std::vector<double> want(K, 0);
    std::vector<int64_t> number(K, 0);
    for (int64_t b = 0; b < B; ++b) {
      double sum = 0;
      for (int64_t n = 0; n < N; ++n)
        sum += value(kind, double(to_float(pred[b * N + n])) - double(to_float(target[b * N + n])), .7);
      want[cluster[b]] += sum / double(N) * (p.weight ? double(weight[b]) : 1);
      ++number[cluster[b]];
    }
    for (int64_t i = 0; i < K; ++i) {
      CHECK(counts[i] == number[i]);
      CHECK(close(double(losses[i]), number[i] ? want[i] / double(number[i]) : 0, tolerance<A>()));
    }
  }
  void check_grads() const {
    std::vector<int64_t> number(K, 0);
    for (auto c : cluster) ++number[c];
    int64_t wrong = 0;
    for (int64_t b = 0; b < B; ++b)
      for (int64_t n = 0; n < N; ++n) {
        const double d = double(to_float(pred[b * N + n])) - double(to_float(target[b * N + n]));
        const double factor = double(upstream[cluster[b]]) * (p.weight ? double(weight[b]) : 1) /
                              (double(number[cluster[b]]) * double(N));
        // float16 loses relative accuracy below its smallest normal number, where half a step of 2^-24 is allowed.
        const double want = factor * slope(kind, d, .7), got = double(to_float(grad[b * N + n]));
        wrong += !(close(got, want, tolerance<T>()) || (p.dtype == DType::f16 && std::fabs(got - want) <= 0x1p-24));
      }
    CHECK(wrong == 0);
  }
  void reset() {
    for (auto& x : losses) x = A(-1);
    for (auto& x : counts) x = -1;
    for (auto& x : grad) x = from_float<T>(-1.f);
  }
};

template <class T>
void all_paths(DType dtype, int64_t B, int64_t N, int64_t K) {
  for (LossKind kind : {LossKind::mse, LossKind::huber, LossKind::l1})
    for (bool weighted : {false, true}) {
      if (weighted && kind == LossKind::l1) continue;  // the emulator is slow, and weight and kind do not interact
      Case<T> c(B, N, K, kind, dtype, weighted, uint64_t(B * 1000 + N * 10 + K));
      for (bool cuda : test::sides()) {
        c.reset();
        CHECK((cuda ? cuda_cluster_loss_forward(c.p, {}) : cpu_cluster_loss_forward(c.p)).ok());
        c.check_values();
        CHECK((cuda ? cuda_cluster_loss_backward(c.p, {}) : cpu_cluster_loss_backward(c.p)).ok());
        c.check_grads();
        c.reset();
        CHECK((cuda ? cuda_cluster_loss_and_grad(c.p, {}) : cpu_cluster_loss_and_grad(c.p)).ok());
        c.check_values();
        c.check_grads();
      }
    }
}

void conversions() {
  // Every float16 and bfloat16 number survives the round trip through float, and NaN stays NaN.
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const Half h{uint16_t(bits)};
    const BFloat16 b{uint16_t(bits)};
    const float fh = to_float(h), fb = to_float(b);
    if (fh != fh)
      CHECK(to_float(from_float<Half>(fh)) != to_float(from_float<Half>(fh)));
    else
      CHECK(from_float<Half>(fh).bits == h.bits);
    if (fb != fb)
      CHECK(to_float(from_float<BFloat16>(fb)) != to_float(from_float<BFloat16>(fb)));
    else
      CHECK(from_float<BFloat16>(fb).bits == b.bits);
  }
  CHECK(from_float<Half>(65519.f).bits == 0x7bff && from_float<Half>(65520.f).bits == 0x7c00);
  CHECK(from_float<Half>(0x1p-25f).bits == 0 && from_float<Half>(0x1.8p-25f).bits == 1);
  CHECK(from_float<Half>(1.f + 0x1p-11f).bits == 0x3c00 && from_float<Half>(1.f + 0x3p-11f).bits == 0x3c02);
}

void bad_ids() {
  Case<float> c(6, 10, 3, LossKind::mse, DType::f32, false, 5);
  c.cluster[4] = 3;
  const Status s = cpu_cluster_loss_forward(c.p);
  CHECK(s.code == Status::Code::bad_id && s.where == 4 && s.value == 3);
  emulated_errors = 0;
  CHECK(cuda_cluster_loss_and_grad(c.p, {}).ok());
  CHECK(emulated_errors == kBadClusterId);
  for (float loss : c.losses) CHECK(loss != loss);
  CHECK(c.grad[40] != c.grad[40]);
}

}  // namespace

int main() {
  conversions();
  bad_ids();
  const int64_t shapes[][3] = {{1, 1, 1}, {7, 33, 3}, {5, 4096, 5}, {3, 4104, 2}, {2, 99, 70}, {0, 4, 2}};
  for (auto& s : shapes) {
    all_paths<float>(DType::f32, s[0], s[1], s[2]);
    all_paths<double>(DType::f64, s[0], s[1], s[2]);
    all_paths<Half>(DType::f16, s[0], s[1], s[2]);
    all_paths<BFloat16>(DType::bf16, s[0], s[1], s[2]);
  }
  return test::summary();
}
