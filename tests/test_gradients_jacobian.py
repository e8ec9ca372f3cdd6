"""A jacobian gives the numbers of its own call or raises; what a call, a recording and an accumulation leave behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradient_cases import SIZES, DiT, K, by_hand, cluster_ids, denoising, diffusion_batch, spread, worst
from torch import Tensor

from antdiff import BalancedBackward, ClusterGradients, balancing
from antdiff.gradients import ClusterJacobian
from antdiff.gradients.routes import Route

EXACT = 1e-11  # as in test_gradients_grouped


def dit() -> DiT:
    torch.manual_seed(0)
    return spread(DiT()).double()  # type: ignore[return-value]


def failing(*batch: Tensor) -> Tensor:
    raise KeyError("an error of the user")


def require_stale(jacobian: ClusterJacobian, losses: Tensor) -> None:
    for use in (jacobian.gram, lambda: jacobian.combine(torch.ones(K)), lambda: jacobian.nbytes, lambda: jacobian.rows):
        with pytest.raises(RuntimeError, match="stale"):
            use()
    assert torch.equal(jacobian.losses, losses)
    assert jacobian.counts.tolist() == SIZES


@pytest.mark.parametrize("route", ["grouped", "split", "loop"])
def test_a_jacobian_is_stale_after_any_later_use_of_the_buffers(route: Route) -> None:
    model, batch, cluster = dit(), diffusion_batch(), cluster_ids()
    cg = ClusterGradients(model, K, route)

    def add() -> None:
        with cg.accumulate() as total:
            total.add(denoising(model), batch, cluster)
            require_stale(jacobian, losses)  # before the block has ended

    def record() -> None:
        with cg.record(cluster) as recording:
            require_stale(jacobian, losses)  # before the backward
            recording.backward(denoising(model)(*batch))

    def fail() -> None:
        with pytest.raises(KeyError):
            cg(failing, batch, cluster)

    def fail_to_add() -> None:
        with pytest.raises(KeyError), cg.accumulate() as total:
            total.add(failing, batch, cluster)

    for later in (add, fail, fail_to_add, *([] if route == "split" else [record])):
        jacobian = cg(denoising(model), batch, cluster)
        losses = jacobian.losses.clone()
        later()
        require_stale(jacobian, losses)
    with cg.accumulate() as total:
        total.add(denoising(model), batch, cluster)
    jacobian, losses = total.jacobian, total.jacobian.losses.clone()
    cg(denoising(model), batch, cluster)
    require_stale(jacobian, losses)


def test_deferred_rows_are_stale_after_a_call_that_fails() -> None:
    model, batch, cluster = dit(), diffusion_batch(), cluster_ids()
    cg = ClusterGradients(model, K, hold="gram")
    jacobian = cg(denoising(model), batch, cluster)
    with pytest.raises(KeyError):
        cg(failing, batch, cluster)
    for use in (jacobian.gram, lambda: jacobian.combine(torch.ones(K))):
        with pytest.raises(RuntimeError, match="stale"):
            use()


def test_a_recording_ends_when_another_call_reuses_its_buffers() -> None:
    model, batch, cluster = dit(), diffusion_batch(), cluster_ids()
    want = by_hand(model, denoising(model)(*batch), cluster)
    cg = ClusterGradients(model, K, "loop")
    inner: list[ClusterJacobian] = []

    def interrupted_by_a_call() -> None:
        with cg.record(cluster) as recording:
            losses = denoising(model)(*batch)
            inner.append(cg(denoising(model), batch, cluster))
            recording.backward(losses)

    with pytest.raises(ValueError, match="before another call"):
        interrupted_by_a_call()
    assert worst(inner[0].rows, want) < EXACT

    def interrupted_by_a_recording() -> None:
        with cg.accumulate() as total:
            total.add(denoising(model), batch, cluster)
            with cg.record(cluster) as recording:
                recording.backward(denoising(model)(*batch))
            total.add(denoising(model), batch, cluster)

    with pytest.raises(RuntimeError, match="another call has reused"):
        interrupted_by_a_recording()


def test_an_accumulation_ends_with_its_block() -> None:
    model, batch, cluster = dit(), diffusion_batch(), cluster_ids()
    cg = ClusterGradients(model, K, "split")
    totals: list[Any] = []

    def interrupted() -> None:
        with cg.accumulate() as total:
            totals.append(total)
            total.add(denoising(model), batch, cluster)
            raise KeyError("an error of the user, outside of add()")

    with pytest.raises(KeyError):
        interrupted()
    (total,) = totals
    with pytest.raises(RuntimeError, match="this accumulation has ended"):
        total.add(denoising(model), batch, cluster)
    with pytest.raises(RuntimeError, match="after the block"):
        _ = total.jacobian


def test_counts_of_all_ranks_are_accepted_wherever_counts_are() -> None:
    model, batch, cluster = dit(), diffusion_batch(), cluster_ids()
    want = by_hand(model, denoising(model)(*batch), cluster)
    cg = ClusterGradients(model, K, "grouped")
    assert worst(cg(denoising(model), batch, cluster, counts=[SIZES]).rows, want) < EXACT
    with cg.accumulate() as total:
        total.add(denoising(model), batch, cluster, counts=[SIZES])
    assert worst(total.jacobian.rows, want) < EXACT
    with cg.record(cluster, counts=[SIZES]) as recording:
        assert worst(recording.backward(denoising(model)(*batch)).rows, want) < EXACT
    assert cg.verify(denoising(model), batch, cluster, counts=[SIZES]) < EXACT
    backward = BalancedBackward(model, balancing.PCGrad(update_every=2), K, "grouped")
    for _ in range(2):
        assert backward(denoising(model), batch, cluster, counts=[SIZES]).counts.tolist() == SIZES
    with pytest.raises(ValueError, match=r"counts must have k=5 ints for each rank; got lists of \[4\]"):
        cg(denoising(model), batch, cluster, counts=[[7, 1, 6, 6]])


@pytest.mark.parametrize("use", ["call", "accumulate", "record", "between", "losses"])
def test_a_batch_without_samples_has_zero_gradients(use: str) -> None:
    model, (x, *others), cluster = dit(), diffusion_batch(), cluster_ids()
    batch, cluster = [y[:0] for y in (x, *others)], cluster[:0]
    routes: list[Route] = ["auto", "grouped", "split", "loop"]
    for route in routes:
        if use in ("between", "losses"):
            balancer = balancing.PCGrad(update_every=2) if use == "between" else balancing.UncertaintyWeighting(K)
            backward = BalancedBackward(model, balancer, K, route)
            for _ in range(2):
                result = backward(denoising(model), batch, cluster)
            assert result.counts.tolist() == [0] * K
            continue
        cg = ClusterGradients(model, K, route)
        if use == "call":
            jacobian: ClusterJacobian = cg(denoising(model), batch, cluster)
        elif use == "accumulate":
            with cg.accumulate() as total:
                total.add(denoising(model), batch, cluster)
            jacobian = total.jacobian
        else:
            return
        assert jacobian.losses.tolist() == jacobian.counts.tolist() == [0] * K
        assert all(not rows.any() for rows in jacobian.rows if rows is not None)
        jacobian.combine(torch.ones(K))
        assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_a_direction_has_the_shapes_of_the_parameters() -> None:
    model, batch, cluster = dit(), diffusion_batch(), cluster_ids()
    jacobian = ClusterGradients(model, K, "split")(denoising(model), batch, cluster)
    wrong = [None if rows is None else rows.sum(0)[..., :1] for rows in jacobian.rows]
    with pytest.raises(ValueError, match="direction must have a tensor for each tensor of"):
        jacobian.write(wrong)


def test_rows_that_are_not_held_take_no_memory() -> None:
    model, batch, cluster = dit(), diffusion_batch(), cluster_ids()
    cg = ClusterGradients(model, K, hold="gram")
    jacobian = cg(denoising(model), batch, cluster)
    assert cg.nbytes() == jacobian.nbytes == 0
    assert "the rows are not held" in cg.explain()
    held = ClusterGradients(model, K)
    assert (
        held(denoising(model), batch, cluster).nbytes
        == held.nbytes()
        == K * 8 * sum(p.numel() for p in model.parameters())
    )


def test_the_dtype_of_rows_that_are_not_held_is_refused() -> None:
    with pytest.raises(ValueError, match="dtype must be None with hold='gram'"):
        ClusterGradients(dit(), K, hold="gram", dtype=torch.bfloat16)


@pytest.mark.parametrize("route", ["auto", "grouped", "split", "loop"])
def test_an_empty_batch_cannot_be_verified(route: Route) -> None:
    model = dit()
    with pytest.raises(ValueError, match="batch must hold a sample for verify"):
        ClusterGradients(model, K, route).verify(
            denoising(model), [x[:0] for x in diffusion_batch()], cluster_ids()[:0]
        )


def test_an_object_made_before_the_process_group_is_refused_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, cluster = dit(), diffusion_batch(), cluster_ids()
    cg, local = ClusterGradients(model, K, "loop"), ClusterGradients(model, K, "loop", group="local")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)

    def record(cg: ClusterGradients) -> None:
        with cg.record(cluster) as recording:
            recording.backward(denoising(model)(*batch))

    def accumulate(cg: ClusterGradients) -> None:
        with cg.accumulate() as total:
            total.add(denoising(model), batch, cluster)

    uses: list[Callable[[ClusterGradients], Any]] = [
        record,
        accumulate,
        lambda cg: cg(denoising(model), batch, cluster),
    ]
    for use in uses:
        with pytest.raises(RuntimeError, match="must be made after"):
            use(cg)
        use(local)
