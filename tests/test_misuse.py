"""Random calls of every op, most of them invalid, in a separate process. Crashes, hangs and unexpected errors fail."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from antdiff import ops

PROGRAM = """
import random, sys, warnings
import torch
from antdiff import ops

warnings.simplefilter("ignore")
seed, calls, names = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
rng = random.Random(seed)
torch.manual_seed(seed)
DTYPES = [torch.float32] * 3 + [torch.float64] * 3 + [torch.int64] * 2 + [
    torch.float16, torch.bfloat16, torch.int32, torch.bool, torch.complex64, torch.uint8]


def tensor():
    shape = [rng.choice([0, 1, 1, 2, 3, 5, 17]) for _ in range(rng.choice([0, 1, 1, 2, 2, 3, 4]))]
    return twisted(torch.randn(shape).mul(3).to(rng.choice(DTYPES)))


def twisted(x):
    '''Return the tensor or, at random, a variant that is hard to handle: a view, another layout, device or dtype.'''
    twist = rng.randrange(12)
    if twist == 0 and x.dim() >= 2: return x.transpose(0, 1)
    if twist == 1: return x.to("meta")
    if twist == 2 and x.dim() >= 1 and x.numel(): return x[:1].expand(3, *x.shape[1:])
    if twist == 3 and x.dim() >= 1: return x.to_sparse()
    if twist == 4 and x.is_floating_point(): return x.detach().requires_grad_()
    if twist == 5 and x.is_floating_point() and x.numel():
        x = x.detach().clone()
        x.view(-1)[rng.randrange(x.numel())] = rng.choice([float("nan"), float("inf"), -1e30])
        return x
    if twist == 6: return x.to(rng.choice(DTYPES))
    if twist == 7 and x.dim() >= 1: return x[:-1]
    if twist == 8: return x[None]
    if twist == 9 and x.dim() >= 1 and x.numel(): return x.repeat_interleave(2, -1)[..., ::2]
    return x


def anything():
    kind = rng.random()
    if kind < 0.5: return tensor()
    if kind < 0.65: return [rng.choice([tensor, lambda: None])() for _ in range(rng.randint(0, 4))]
    if kind < 0.85: return rng.choice([-1, 0, 1, 2, 3, 5, 64, True])
    return rng.choice([None, "mse", "sum", 0.5, float("nan"), (), {}, object(), torch.Generator()])


def valid(name):
    B, N, k, P = rng.choice([0, 1, 4, 9]), rng.choice([1, 3, 20]), rng.choice([1, 2, 5]), rng.choice([1, 7, 40])
    float_ = rng.choice([torch.float32, torch.float64, torch.float16, torch.bfloat16])
    wide = torch.float64 if float_ == torch.float64 else torch.float32
    pair = dict(pred=torch.randn(B, N).to(float_), target=torch.randn(B, N).to(float_))
    ids = dict(cluster=torch.randint(0, k, (B,)), k=k, weight=rng.choice([None, torch.rand(B, dtype=wide)]))
    J = rng.choice([torch.randn(k, P).to(float_), [torch.randn(k, 2, P).to(float_), None, torch.randn(k).to(float_)]])
    rows = torch.randn(k, P, dtype=torch.float64)
    gram = rows @ rows.T
    perms = torch.tensor([rng.sample([j for j in range(k) if j != i], k - 1) for i in range(k)]).reshape(k, k - 1)
    cost = torch.rand(P, P, dtype=torch.float64)
    return {
        "cluster_loss": dict(**pair, **ids, kind=rng.choice(["mse", "huber", "l1"])),
        "cluster_loss_and_grad": dict(**pair, **ids, cluster_weight=rng.choice([None, torch.rand(k, dtype=wide)])),
        "cluster_mean": dict(per_sample=torch.rand(B, dtype=wide), **ids),
        "gram": dict(J=J),
        "gram_": dict(out=torch.zeros(k, k, dtype=torch.float64), J=J),
        "combine": dict(weights=torch.rand(k, dtype=torch.float64), J=J),
        "pcgrad_weights": dict(gram=gram, perms=rng.choice([None, perms.long()])),
        "nash_weights": dict(gram=gram),
        "gram_weights": dict(gram=gram, method=rng.choice(["upgrad", "mgda", "cagrad", "config", "fairgrad"])),
        "gradvac_weights": dict(gram=gram, targets=torch.zeros_like(gram), beta=0.1),
        "precision_of": dict(gram=gram),
        "pcgrad": dict(J=J),
        "nash": dict(J=J),
        "nash_residual": dict(gram=gram, weights=torch.rand(k, dtype=torch.float64)),
        "interval_partition": dict(cost=cost, k=min(k, P)),
        "interval_partition_all": dict(cost=cost, k=min(k, P)),
        "interval_partition_affinity": dict(affinity=cost, k=min(k, P)),
        "interval_partition_values": dict(x=cost[0], k=min(k, P), p=rng.choice([1, 2])),
    }[name]


for name in names:
    good = bad = 0
    for call in range(calls):
        kwargs = valid(name)
        for key, value in list(kwargs.items()):
            if rng.random() < 0.25:
                plain = isinstance(value, torch.Tensor) and rng.random() < 0.6
                kwargs[key] = twisted(value) if plain else anything()
                if isinstance(value, list) and value and rng.random() < 0.6:
                    kwargs[key] = [twisted(x) if isinstance(x, torch.Tensor) else x for x in value]
        try:
            getattr(ops, name)(**kwargs)
            good += 1
        except (TypeError, ValueError) as error:
            bad += 1
            assert str(error), "an error without a message"
        except BaseException:
            print(name)
            for key, x in kwargs.items():
                print(key, (x.dtype, x.shape, x.stride() if x.layout == torch.strided else x.layout, x.device)
                      if isinstance(x, torch.Tensor) else x)
            raise
    print(name, good, bad, flush=True)
"""

OPS = [name for name in ops.__all__ if name not in ("check_errors", "reference", "with_precision")]


def test_the_precision_of_a_gram_matrix_is_that_of_gradients() -> None:  # its dtypes are positional
    gram = torch.eye(2, dtype=torch.float64)
    assert ops.precision_of(ops.with_precision(gram, torch.float32, torch.bfloat16)) == torch.bfloat16
    with pytest.raises(TypeError, match="gram must be a tensor; got list"):
        ops.with_precision([gram], torch.float32)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one dtype"):
        ops.with_precision(gram)
    with pytest.raises(ValueError, match=r"precision must be one of .*got torch\.int64"):
        ops.with_precision(gram, torch.int64)


def test_random_calls_end_in_a_result_or_a_clear_error() -> None:
    calls = 600
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "7", str(calls), *OPS], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-1500:]}\n{done.stderr[-2500:]}"
    for line in done.stdout.splitlines():
        _, good, bad = line.split()
        assert int(good) + int(bad) == calls
        assert min(int(good), int(bad)) > calls / 20, line
    assert len(done.stdout.splitlines()) == len(OPS)
