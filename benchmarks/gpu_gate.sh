#!/usr/bin/env bash
# Run the checks and measurements that need a GPU. The script works offline. It needs nvcc, torch >= 2.10 for CUDA,
# scikit-build-core, pybind11, ninja, pytest, hypothesis, and cvxpy, which the tests use as a second solver (if cvxpy is
# missing, install it and clarabel from wheels).
#
#   benchmarks/gpu_gate.sh              run every stage that has not passed yet on this commit
#   benchmarks/gpu_gate.sh test bench   run these stages, even if they have passed
#
# The stages are build, test, sanitize and bench. Each takes less than ten minutes, so they can be run in separate calls
# on a machine that is available only for short periods: a stage that passed leaves a stamp in $GATE and is not
# repeated. Results go to $OUT (default benchmarks/results).
set -uo pipefail
cd "$(dirname "$0")/.."
commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
GATE=${GATE:-${TMPDIR:-/tmp}/antdiff-gate-$commit}
OUT=${OUT:-$PWD/benchmarks/results}
mkdir -p "$GATE" "$OUT"
export PYTHONPATH=$GATE/site ANTDIFF_REQUIRE_CUDA=1 PYTHONUNBUFFERED=1

build() {
  arch=$(python3 -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') &&
    rm -rf "$GATE/site" &&
    ANTDIFF_CUDA=ON CMAKE_CUDA_ARCHITECTURES="$arch" python3 -m pip install --no-index --no-build-isolation --no-deps \
      --target "$GATE/site" -C build-dir="$GATE/build" . &&
    python3 -m antdiff.info
}
# The tests of the op families. The training command is left out: it has no kernels of its own, and it needs packages
# that a GPU machine may lack.
families="tests/test_cluster_loss.py tests/test_gram.py tests/test_combine.py tests/test_pcgrad.py tests/test_nash.py tests/test_gram_weights.py tests/test_gradients.py tests/test_timesteps.py tests/test_cuda.py"
gate_test() { python3 -m pytest $families -p no:cacheprovider; }
# Run one example of each kernel, since the tools slow a program down a hundredfold. Leak checks are off, because torch
# caches memory.
sanitize() {
  for tool in memcheck racecheck; do
    timeout 280 compute-sanitizer --tool "$tool" --error-exitcode 9 --kernel-name-exclude kernel_substring=at:: \
      python3 -m pytest $families -m sanitize -p no:cacheprovider || return 1
  done
}
bench() {
  status=0
  for family in cluster_loss gram weights gradients; do
    timeout 140 python3 "benchmarks/bench_$family.py" --device cuda --csv "$OUT/${family}_cuda.csv" || status=1
  done
  return $status
}

failed=0
for stage in "${@:-build test sanitize bench}"; do
  for one in $stage; do
    [ $# -eq 0 ] && [ -e "$GATE/$one.passed" ] && { echo "== $one: passed before"; continue; }
    echo "== $one"
    rm -f "$GATE/$one.passed"
    case "$one" in test) run=gate_test ;; build | sanitize | bench) run=$one ;; *) echo "unknown stage: $one" >&2; exit 2 ;; esac
    if $run 2>&1 | tee "$OUT/gate_$one.log"; then touch "$GATE/$one.passed"; else echo "== $one FAILED"; failed=1; fi
    [ "$one" = build ] && [ ! -e "$GATE/build.passed" ] && exit 1
  done
done
exit $failed
