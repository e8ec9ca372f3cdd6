"""Several ranks compute the results of one process, send the bytes of the formulas, and raise named errors."""

from __future__ import annotations

import math
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import distributed_cases as cases
import pytest
import torch
from ranks import run
from tolerances import UNIT_ROUNDOFF

from antdiff import (
    BalancedBackward,
    ClusterGradients,
    StratifiedTimesteps,
    TimestepClusters,
    balancing,
    distributed,
)
from antdiff.train.run import start_run

# Largest allowed error of p.grad of several ranks relative to one process, in norm. Sums of some hundred terms in
# another order have far smaller errors, 1e-15 and 1e-6.
LIMIT = {"torch.float64": 1e-12, "torch.float32": 1e-5}
Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("sharded") / "checkpoints"
    (folder / ".step-00000002.tmp").mkdir(parents=True)  # left by a rank that died while it saved
    (folder / ".step-00000002.tmp" / "__0_0.distcp").write_bytes(b"half")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANTDIFF_TEST_CHECKPOINTS", str(folder))
        yield folder


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory, checkpoints: Path) -> Results:
    return run(4, cases.FOUR, tmp_path_factory.mktemp("four") / "ranks")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, four: Results) -> Results:
    return run(2, cases.TWO, tmp_path_factory.mktemp("two") / "ranks", lost=1)


def test_p_grad_is_that_of_one_process(four: Results) -> None:
    for results in four:
        errors = results["every_scheme_and_method"]
        assert {case[0] for case in errors} == set(cases.METHODS)
        for case, (gradient, losses) in errors.items():
            assert gradient < LIMIT[case[-1]], (case, gradient)
            assert losses < LIMIT[case[-1]], (case, losses)


@pytest.mark.parametrize("case", ["other_routes", "wrapped", "groups_of_some_ranks", "balanced_backward"])
def test_every_way_through_gives_the_same_gradients(four: Results, case: str) -> None:
    for results in four:
        for name, error in results[case].items():
            assert max(error) < LIMIT["torch.float64"], (name, error)
    assert "a group of two" in four[1]["other_routes"]


def test_graddrop_chooses_for_shards_as_for_whole_parameters(four: Results) -> None:
    """With numbers drawn for each shard alone, all shards would repeat the choices of the first."""
    for results in four:
        for name, value in results["a_choice_per_parameter_of_shards"].items():
            if name[1] == "generator":
                assert torch.equal(value, four[0]["a_choice_per_parameter_of_shards"][name])
            else:
                assert value < LIMIT["torch.float64"], (name, value)


def test_a_jacobian_on_several_ranks_is_stale_after_any_later_use_of_the_buffers(four: Results) -> None:
    for results in four:
        assert len(results["stale_jacobians"]) == 12
        for later, answers in results["stale_jacobians"].items():
            assert len(answers) == 5
            assert all("stale" in answer for answer in answers), (later, answers)


def test_mistakes_on_several_ranks_are_named(four: Results) -> None:
    texts = {
        "nested": "ValueError: model must be a DistributedDataParallel wrapper or contain none; got one inside it",
        "verify": "ValueError: model must have whole parameters for verify().",
        "local shards": "ValueError: group must be the 4 ranks of model's mesh; got 1",
        "cluster": "ValueError: scheme must not be 'cluster' to accumulate",
        "nan": "NonFiniteError: the losses of ranks 0, 1, 2, 3 are not finite",
        "the jacobian of nan": "RuntimeError: jacobian exists once the with block",
        "gram": "ValueError: hold must be 'jacobian' on several ranks",
        "ragged": "ValueError: counts must have k=5 ints for each rank; got lists of [5, 5, 5, 1]",
        "sizes": "ValueError: B must be at least 0; got -1",
        "empty": "ValueError: batch must hold a sample on every rank under FSDP2",
    }
    for rank, results in enumerate(four):
        messages = results["refused_on_ranks"]
        for name, text in texts.items():
            assert messages[name].startswith(text), (name, messages[name])
        assert ("Error: group must" in messages["not a member"]) == (rank in (0, 2)), messages["not a member"]
        assert "route 'grouped': asked for" in messages["explain"]


def test_ranks_out_of_step_do_not_wait_for_each_other(four: Results) -> None:
    for results in four:
        for name, error in results["out_of_step"].items():
            assert error < LIMIT["torch.float64"], (name, error)


def test_one_process_goes_on_with_the_numbers_of_several_ranks() -> None:
    clusters = TimestepClusters.uniform(1000, 3)
    seeded = StratifiedTimesteps(clusters, seed=0)  # the default of several ranks
    seeded.sample(7)
    resumed = StratifiedTimesteps(clusters)
    resumed.load_state_dict(seeded.state_dict())
    for _ in range(2):
        assert all(map(torch.equal, resumed.sample(7), seeded.sample(7)))


def test_a_validation_between_steps_of_fsdp_changes_nothing(four: Results) -> None:
    for results in four:
        for name, error in results["fsdp_after_a_forward_without_backward"].items():
            assert error < LIMIT["torch.float64"], (name, error)


def test_timesteps_go_on_where_the_state_was_taken() -> None:
    clusters = TimestepClusters.uniform(1000, 3)
    sampler = StratifiedTimesteps(clusters, seed=0)
    sampler.sample(7)
    state = sampler.state_dict()
    want = [sampler.sample(7) for _ in range(2)]
    other = StratifiedTimesteps(clusters, seed=1)
    other.load_state_dict(state)
    for drawn in want:
        assert all(map(torch.equal, other.sample(7), drawn))


def test_ranks_stay_alike_without_a_broadcast(four: Results) -> None:
    results = [r["the_same_everywhere"] for r in four]
    for other in results[1:]:
        for (w, gradients), (w0, gradients0) in zip(other["steps"], results[0]["steps"], strict=True):
            assert torch.equal(w, w0)
            assert all(map(torch.equal, gradients, gradients0))
        assert torch.equal(other["state"]["generator"], results[0]["state"]["generator"])
    for step, whole in enumerate(results[0]["whole"]):  # the chunks make up the batch of one process
        for part in range(3):
            assert torch.equal(torch.cat([r["chunks"][step][part] for r in results]), whole[part])
    assert "all_reduce" in results[0]["explain"], "so small a network is fastest with one message"


def test_a_nan_is_named_on_every_rank(four: Results) -> None:
    for results in four:
        messages = results["a_nan_on_rank_2"]
        for name in ("reduce_scatter", "all_reduce", "pcgrad", "uw", "between"):
            assert messages[name] == (
                "the losses of rank 2 are not finite. Check the batch and the weights on rank 2.",
                [2],
            )
        assert messages["slope"][1] == []
        assert "a backward produced it" in messages["slope"][0]


@pytest.mark.parametrize("name", ["nash", "linear"])
def test_beside_a_scaler_every_rank_skips_the_step(four: Results, name: str) -> None:
    histories = [results["a_nan_on_rank_2"]["history", name] for results in four]
    for (first, _, scale), (second, _, halved), (third, losses, _) in histories:
        assert scale == 2.0**10
        assert halved == 2.0**9
        assert all(map(torch.equal, first, second))
        assert not torch.equal(second[0], third[0])
        assert losses.isfinite().all()
    for history in histories[1:]:
        assert all(
            torch.equal(a, b)
            for step, step0 in zip(history, histories[0], strict=True)
            for a, b in zip(step[0], step0[0], strict=True)
        )


def test_half_precision(four: Results) -> None:
    # Weights, activations and gradients are rounded to bfloat16 about ten times, so the error is a few roundoffs.
    limit = 4 * UNIT_ROUNDOFF[torch.bfloat16]
    for results in four:
        for name, (error, rows, gradient) in results["half_precision"].items():
            assert error < limit, name
            assert rows == ("torch.float32" if "float32" in name else "torch.bfloat16")
            assert gradient == "torch.bfloat16"


def test_sockets_send_what_the_formulas_say(four: Results) -> None:
    for results in four:
        for case, (sent, formula) in results["bytes_on_the_wire"].items():
            # More than the formula: P is padded to a multiple of 4, and K x K numbers and gloo's headers are sent.
            assert formula <= sent < 1.02 * formula, (case, sent / formula)


def test_bytes_that_wait_in_a_socket_or_are_sent_twice_are_counted_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        peer, _ = server.accept()  # does not read, so that the queues fill up
        with peer:
            client.setblocking(False)
            before, written = cases.socket_bytes(), 0
            with suppress(BlockingIOError):
                while True:
                    written += client.send(b"x" * 100_000)
            assert cases.socket_bytes() - before == written


def test_a_sharded_checkpoint_goes_from_four_ranks_to_two(four: Results, two: Results, checkpoints: Path) -> None:
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000002", "step-00000003"]
    saved_weights, saved_state = four[0]["sharded_checkpoint_save"]
    for results in two:
        weights, state, step, note, nothing = results["sharded_checkpoint_load"]
        assert (step, note, nothing) == (3, 3, None)
        assert all(map(torch.equal, weights, saved_weights))
        assert all(map(torch.equal, state, saved_state))
        assert len(state) == len(saved_state) == 12


def test_the_documented_loops_train_all_ranks_alike(two: Results) -> None:
    for name, (weights, moved) in two[0]["the_documented_loops"].items():
        assert moved, name
        assert all(map(torch.equal, weights, two[1]["the_documented_loops"][name][0])), name


def test_the_training_loop_is_that_of_one_process(two: Results, checkpoints: Path, tmp_path: Path) -> None:
    from antdiff.train.checkpoint import latest_checkpoint, load_checkpoint
    from antdiff.train.generators import make_generators
    from antdiff.train.prepare import make_model

    assert two
    cases.train_into(tmp_path)
    for name, config in cases.loop_settings().items():
        one, both = (
            latest_checkpoint(runs / name / "checkpoints") for runs in (tmp_path, checkpoints.parent / "runs of two")
        )
        assert one is not None
        assert both is not None
        a, b = load_checkpoint(one), load_checkpoint(both)
        assert all(torch.equal(state, b["rng"][key]) for key, state in a["rng"].items()), name
        assert a["timesteps"] == b["timesteps"] or name == "curriculum"
        # Adam turns the sign of a gradient near zero into a whole step of the learning rate, so the difference is
        # compared with the distance from the initial weights.
        seed = make_generators(config.seed, torch.device("cpu"))["weights"].initial_seed()
        with cases.loop_dtype(config):
            start = make_model(config, (1, 8, 8), tmp_path / name, seed=seed).state_dict()
        names = [key for key in start if start[key].is_floating_point()]
        distance = sum(float((a["model"][key] - start[key]).square().sum()) for key in names)
        difference = sum(float((a["model"][key] - b["model"][key]).square().sum()) for key in names)
        assert difference < (1e-3) ** 2 * distance, (name, (difference / distance) ** 0.5)


def test_a_run_goes_on_with_another_number_of_ranks(two: Results, checkpoints: Path, tmp_path: Path) -> None:
    from antdiff.data import load_data
    from antdiff.train.log import read_csv
    from antdiff.train.loop import train

    assert two
    config = replace(cases.loop_settings()["pcgrad"], steps=8)
    runs = [tmp_path / "two", tmp_path / "one"]
    shutil.copytree(checkpoints.parent / "runs of two" / "pcgrad", runs[0])  # another test reads the original
    start_run(config, runs[1])
    for run_ in runs:
        assert train(config, load_data("digits"), run_, progress=False)
    both, one = (read_csv(run_ / "metrics.csv") for run_ in runs)
    assert [row["step"] for row in both] == [2, 4, 6, 8]
    assert both[-1]["loss"] == pytest.approx(one[-1]["loss"], rel=1e-3)


def test_a_lost_rank_is_an_error_with_a_name(two: Results) -> None:
    name, message = two[0]["a_rank_that_dies"]
    assert name == "LostRankError"
    assert "rank 0 waited in" in message


# ---- arithmetic --------------------------------------------------------------------------------------------------


def test_rows_of_contiguous_chunks() -> None:
    for K, R in product(range(1, 13), range(1, 25)):
        counts = distributed.contiguous_counts([R] * K, [K] * R)
        assert all(sum(row) == K for row in counts)
        held = sum(n > 0 for row in counts for n in row)
        assert held == R + K - math.gcd(R, K)
        assert [sum(column) for column in zip(*counts, strict=True)] == [R] * K
        if R > 1:
            given, derived = (distributed.cost_model(1000, K, R, counts=c)["cluster"].bytes for c in (counts, None))
            assert given == derived == pytest.approx((R - 1) / R * (held / R + 1) * 4000)


def test_costs_are_those_of_the_formulas() -> None:
    P, K = 10**6, 5
    for R in (2, 8, 1024):
        rho = (R - 1) / R
        costs = distributed.cost_model(P, K, R, itemsize=2)
        assert costs["ddp"].bytes == pytest.approx(2 * rho * P * 2)
        assert costs["all_reduce"].bytes == pytest.approx(2 * rho * K * P * 2)
        assert costs["reduce_scatter"].bytes == pytest.approx(rho * (K + 1) * P * 2)
        for cost in costs.values():
            assert cost.exposed <= cost.seconds
    assert distributed.cost_model(P, K, 10 * K)["cluster"].bytes == pytest.approx(costs_of_ddp(P, 10 * K))
    slow, fast = (distributed.cost_model(P, K, 64, step=0.1, network=n)["cluster"].seconds for n in (1e9, 1e11))
    assert slow > fast
    assert all(cost.seconds == 0 for cost in distributed.cost_model(P, K, 1).values())


def costs_of_ddp(P: int, R: int) -> float:
    return distributed.cost_model(P, 5, R)["ddp"].bytes


def test_the_tables_of_the_documentation_are_those_of_the_code() -> None:
    script = Path(__file__).resolve().parents[1] / "docs" / "distributed_table.py"
    assert subprocess.run([sys.executable, str(script), "--check"], check=False).returncode == 0, f"run {script}"


def test_one_process_needs_no_torch_distributed() -> None:
    model = cases.network()
    with pytest.raises(ValueError, match=r"scheme 'cluster' needs the counts of all ranks.*got micro_batch=2"):
        BalancedBackward(model, balancing.PCGrad(), 5, scheme="cluster", micro_batch=2)
    cluster = cases.mixed(5, 23)
    want, losses = cases.one_process("nash", 5, cluster, torch.float64)
    got, jacobian = cases.step("nash", 5, cluster, torch.ones(23, dtype=torch.bool), torch.float64, "auto", model=model)
    assert cases.relative(got, want) < LIMIT["torch.float64"]
    assert cases.relative([jacobian.losses], [losses]) < LIMIT["torch.float64"]
    sampler = StratifiedTimesteps(TimestepClusters.uniform(10, 5), seed=0)
    assert sampler.counts(5) == [[1, 1, 1, 1, 1]]
    sampler.sample(7)
    again = StratifiedTimesteps(TimestepClusters.uniform(10, 5), seed=1)
    again.load_state_dict(sampler.state_dict())
    assert all(map(torch.equal, sampler.sample(7), again.sample(7)))
    values = torch.ones(3)
    assert distributed.global_losses(values, values)[0] is values


# ---- misuse ------------------------------------------------------------------------------------------------------


def test_mistakes_are_named() -> None:
    model = cases.network()
    with pytest.raises(ValueError, match="scheme must be one of 'auto'"):
        ClusterGradients(model, 5, scheme="ring")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="group must be a process group, None or 'local'; got 'all'"):
        ClusterGradients(model, 5, group="all")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="group must be a process group that this process is in"):
        ClusterGradients(model, 5, group=object())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="group must be a process group, None or 'local'; got 'all'"):
        StratifiedTimesteps(TimestepClusters.uniform(10, 5), group="all")  # type: ignore[arg-type]
    cg = ClusterGradients(model, 5)
    x, y = cases.samples(10)
    with pytest.raises(ValueError, match="k ints for each of the 1 ranks; got 2 lists"):
        cg(cases.losses_of(model), (x, y), torch.arange(10) % 5, counts=[[2] * 5, [0] * 5])
    with pytest.raises(ValueError, match="samples of this rank, or of each of the 1 ranks"):
        StratifiedTimesteps(TimestepClusters.uniform(10, 5)).sample([5, 5])
