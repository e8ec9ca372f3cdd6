"""Tests that only a GPU can run: graphs, streams, several devices, deferred errors, and sizes beyond 2^31."""

from __future__ import annotations

import pytest
import torch
from devices import HAS_CUDA
from tolerances import summed

import antdiff
from antdiff import ops
from antdiff.ops import reference

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not HAS_CUDA, reason="needs a GPU; the GPU gate runs these tests")]


def inputs(device: str = "cuda", B: int = 40, k: int = 5) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    pred, target = torch.randn(2, B, 4, 16, 16, generator=g)
    J = torch.randn(k, 3000, generator=g)
    cluster = torch.arange(B) % k
    return tuple(x.to(device) for x in (pred, target, cluster, J))


def test_a_step_of_ops_replays_from_one_graph() -> None:
    pred, target, cluster, J = inputs()
    out = torch.zeros(3000, device="cuda")
    generator = torch.Generator("cuda").manual_seed(1)

    def step() -> tuple[torch.Tensor, ...]:
        losses, counts, grad = ops.cluster_loss_and_grad(pred, target, cluster, 5)
        G = ops.gram(J)
        w = ops.pcgrad_weights(G, generator=generator) + ops.nash_weights(G)
        ops.combine(w, J, out=out)
        return losses, counts, grad, G, w

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm-up: loads the modules and allocates the error flag
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        captured = step()
    J.copy_(torch.randn_like(J))
    pred.copy_(torch.randn_like(pred))
    graph.replay()
    losses, counts, grad, G, w = (x.clone() for x in captured)
    first = w.clone()
    want = ops.cluster_loss_and_grad(pred, target, cluster, 5)
    assert torch.equal(losses, want[0])
    assert torch.equal(counts, want[1])
    assert torch.equal(grad, want[2])
    assert torch.equal(G, ops.gram(J))
    torch.testing.assert_close(
        out.double(), reference.combine(w, J.double()), rtol=0, atol=1e-5 * float(out.abs().max())
    )
    orders = {tuple(first.tolist())}
    for _ in range(20):
        graph.replay()
        orders.add(tuple(captured[4].tolist()))
    assert len(orders) > 1, "every replay draws new visiting orders"


def test_the_caller_s_stream_is_used() -> None:
    J = inputs()[-1]
    want = ops.gram(J)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # keeps the stream busy, so that work on another stream would read the old J
        J.mul_(2)
        G = ops.gram(J)
    stream.synchronize()
    assert torch.equal(G, 4 * want)


def test_errors_are_sticky_until_read() -> None:
    pred, target, cluster, J = inputs()
    ops.check_errors("cuda")
    cluster[3] = 7
    losses, _ = ops.cluster_loss(pred, target, cluster, 5)
    assert losses.isnan().all()
    G = ops.gram(J)
    G[1, 2] = float("nan")
    assert ops.nash_weights(G).isnan().all()
    with pytest.raises(ValueError, match=r"cluster must be.*gram must be"):
        ops.check_errors("cuda")
    ops.check_errors("cuda")
    assert ops.pcgrad_weights(G, nonfinite="poison").isnan().all()
    ops.check_errors("cuda")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_a_device_that_is_not_current() -> None:
    pred, target, cluster, J = inputs("cuda:1")
    with torch.cuda.device(0):
        G = ops.gram(J)
        losses, _, _ = ops.cluster_loss_and_grad(pred, target, cluster, 5)
        assert torch.cuda.current_device() == 0
    want, _ = reference.cluster_loss(pred.double(), target.double(), cluster, 5)
    torch.testing.assert_close(losses.double(), want, rtol=summed(torch.float32), atol=0)
    assert G.device == J.device
    with pytest.raises(ValueError, match="device"):
        ops.cluster_loss(pred, target.to("cuda:0"), cluster, 5)


def test_more_than_2_to_the_31_elements() -> None:
    B, N = 3, 2**30 // 2 * 2 + 2**29  # 4.8e9 elements in bfloat16: 9.7 GB each
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GB of free GPU memory")
    pred = torch.ones(B, N, dtype=torch.bfloat16, device="cuda")
    target = torch.zeros(B, N, dtype=torch.bfloat16, device="cuda")
    target[-1, -1] = 1
    losses, _, grad = ops.cluster_loss_and_grad(pred, target, torch.tensor([0, 1, 1], device="cuda"), 2)
    assert losses[0] == 1
    assert grad[-1, -1] == 0
    assert grad[-1, -2] != 0
    G = ops.gram(pred)
    assert torch.equal(G, torch.full_like(G, float(N)))
    out = ops.combine(torch.ones(B, dtype=torch.float64, device="cuda"), pred)
    assert out[-1] == B
    assert out[0] == B


def test_a_training_step_waits_for_nothing() -> None:
    """Sampling, K gradients, Gram matrix, weights and combination: none of them synchronises with the host."""
    model = torch.nn.Linear(8, 8).cuda()
    clusters = antdiff.TimestepClusters.uniform(100, 5)
    sampler = antdiff.StratifiedTimesteps(clusters)
    cg = antdiff.ClusterGradients(model, 5)
    x = torch.randn(20, 8, device="cuda")

    def step() -> None:
        t, cluster, _ = sampler.sample(20, device="cuda")
        jacobian = cg(lambda x, t: (model(x) - x).square().mean(1), (x, t), cluster, counts=[4] * 5)
        jacobian.combine(ops.pcgrad_weights(jacobian.gram()))

    for _ in range(6):
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_backward_of_a_bad_id_is_nan_too() -> None:
    pred, target, cluster, _ = inputs()
    cluster[3] = -2
    weight = torch.ones(40, device="cuda", requires_grad=True)
    losses, _ = ops.cluster_loss(pred.requires_grad_(), target, cluster, 5, weight)
    losses.sum().backward()
    assert pred.grad is not None
    assert pred.grad[3].isnan().all()
    assert weight.grad is not None
    assert weight.grad[3].isnan()
    with pytest.raises(ValueError, match="cluster must be"):
        ops.check_errors("cuda")
