"""The README's code runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

import antdiff
from antdiff import ops

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def block(marker: str) -> str:
    found = re.search(rf"<!-- {marker} -->\n```\w+\n(.*?)```", README, re.DOTALL)
    assert found, f"README has no block marked {marker}"
    return found.group(1)


def test_the_loop_of_the_readme_trains() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 64), nn.SiLU(), nn.Linear(64, 8))
    data = torch.randn(64, 1) * torch.ones(8)  # every sample is one number, eight times over

    def denoising_losses(x0: Tensor, t: Tensor, weight: Tensor) -> Tensor:
        noise = torch.randn_like(x0)
        alpha = torch.cos(t / 1000 * torch.pi / 2)[:, None]
        noisy = alpha * x0 + (1 - alpha**2).sqrt() * noise
        pred = model(torch.cat([noisy, t[:, None] / 1000], dim=1))
        return (pred - noise).square().mean(dim=1) * weight

    t = torch.randint(0, 1000, (64,), generator=torch.Generator().manual_seed(1))
    before = denoising_losses(data, t, torch.ones(64)).mean().item()
    names = {
        "model": model,
        "loader": [data] * 150,
        "denoising_losses": denoising_losses,
        "optimizer": torch.optim.Adam(model.parameters(), lr=3e-3),
    }
    exec(block("example"), names)
    after = denoising_losses(data, t, torch.ones(64)).mean().item()
    assert after < 0.8 * before  # a model that ignores its input stays at 1
    assert [tuple(rows.shape) for rows in names["jacobian"].rows] == [(5, *p.shape) for p in model.parameters()]


def test_the_line_that_replaces_backward_writes_the_gradients() -> None:
    model = nn.Linear(8, 8)
    names = {
        "antdiff": antdiff,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "denoising_losses": lambda x0, t, weight: (model(x0) - t[:, None] / 1000).square().mean(1) * weight,
        "x0": torch.randn(10, 8),
        "t": torch.arange(10) * 100,
        "weight": torch.ones(10),
        "cluster": torch.arange(10) // 2,
    }
    exec(block("balanced"), names)
    result = names["result"]
    assert [x.shape for x in (result.losses, result.counts, result.weights, result.gram)] == [(5,), (5,), (5,), (5, 5)]
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_the_loop_of_ops_alone_trains() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(9, 32), nn.SiLU(), nn.Linear(32, 8))

    def batch() -> tuple[Tensor, ...]:
        t = torch.randint(0, 1000, (40,))
        noise, alpha = torch.randn(40, 8), torch.cos(t / 1000 * torch.pi / 2)[:, None]
        return alpha * torch.randn(40, 1) + (1 - alpha**2).sqrt() * noise, noise, t, t // 200

    def model(noisy: Tensor, t: Tensor) -> Tensor:
        return net(torch.cat([noisy, t[:, None] / 1000], dim=1))

    def loss() -> float:
        noisy, noise, t, _ = batch()
        return (model(noisy, t) - noise).square().mean().item()

    before = loss()
    names = {
        "torch": torch,
        "ops": ops,
        "model": model,
        "params": list(net.parameters()),
        "batches": [batch() for _ in range(200)],
        "optimizer": torch.optim.Adam(net.parameters(), lr=3e-3),
    }
    exec(block("ops"), names)
    assert loss() < 0.8 * before


def test_the_two_commands_are_there() -> None:
    assert "antdiff train" in block("train")
    assert "pytest" in block("tests")
    for name in ("train", "tests"):
        assert block(name).count("\n") == 1, "one line each, to be pasted whole"
