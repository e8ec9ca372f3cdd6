// The result of a launcher. Launchers know no Python; csrc/bindings turns a Status into an exception.
#pragma once

#include <cstdint>

namespace antdiff {

struct Status {
  enum class Code : int32_t {
    ok,
    bad_id,       // a cluster id outside [0, K): `where` is its row, `value` the id
    not_finite,   // NaN or infinity where finite numbers are required: `where` is the flat index
    bad_gram,     // not a Gram matrix: `where` is the flat index of the entry
    bad_perms,    // an invalid visiting order: `where` is the problem
    infeasible,   // no partition satisfies the constraints
    interrupted,  // the caller's `interrupted` callback returned true
    cuda,         // a CUDA call failed: `value` is the cudaError_t
  };
  Code code = Code::ok;
  int64_t where = 0;
  int64_t value = 0;

  bool ok() const { return code == Code::ok; }
};

}  // namespace antdiff
