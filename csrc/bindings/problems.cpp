#include "bindings/problems.h"

#include <cmath>
#include <cstdio>

namespace antdiff {
namespace {

std::string number_text(double x) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", x);
  return std::isnan(x) ? "nan" : text;
}

// Return the index, for example "[0, 2, 1]", of flat index `where` into the first `dims` dimensions of a tensor.
std::string index_text(const Tensor& tensor, int64_t dims, int64_t where) {
  std::string text;
  for (int64_t i = dims - 1; i >= 0; --i) {
    text = std::to_string(where % tensor.size(i)) + (text.empty() ? "" : ", ") + text;
    where /= tensor.size(i);
  }
  return "[" + text + "]";
}

[[noreturn]] void throw_bad_gram(const Tensor& gram, int64_t where) {
  const int64_t K = gram.size(gram.dim() - 1), i = where / K % K, j = where % K;
  const double* G = gram.as<double>() + where / (K * K) * K * K;
  const double entry = G[i * K + j];
  const std::string got = "got " + number_text(entry) + " at " + index_text(gram, gram.dim(), where);
  if (!std::isfinite(entry))
    throw_value("gram must be finite; " + got + ". Skip the step, or pass nonfinite='poison' to get NaN weights.");
  if (i == j)
    throw_value("gram must have a non-negative diagonal (squared norms); " + got +
                ". Compute it with antdiff.ops.gram.");
  throw_value("gram must be a Gram matrix J J^T, symmetric with |G_ij| <= |g_i| |g_j|; " + got +
              ", where the mirrored entry is " + number_text(G[j * K + i]) + " and the diagonal entries are " +
              number_text(G[i * K + i]) + " and " + number_text(G[j * K + j]) + ". Compute it with antdiff.ops.gram.");
}

}  // namespace

void check_problems(const Status& status, const Tensor& gram) {
  if (status.code == Status::Code::bad_gram) throw_bad_gram(gram, status.where);
  if (status.code == Status::Code::bad_perms) {
    const int64_t dims = gram.dim() - 2;
    throw_value("perms must list in row i the k-1 other rows, each once; got a row that does not" +
                (dims ? " in problem " + index_text(gram, dims, status.where) : std::string()) +
                ". Omit perms to draw the orders at random.");
  }
  check(status);
}

}  // namespace antdiff
