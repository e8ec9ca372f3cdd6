"""Mixture of prompts: it starts as the identity, only the patch is trained and saved, gate and balancing losses."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import pytest
import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from antdiff import ClusterGradients, ops
from antdiff.balancing import UncertaintyWeighting
from antdiff.companions import MixtureOfPrompts, patch_dit, save_patch, unpatch

N, D, L = 16, 16, 3


@functools.cache
def cached() -> Any:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    net = DiTTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=1, num_layers=L, num_attention_heads=2, attention_head_dim=8,
        num_embeds_ada_norm=4,
    )  # fmt: skip
    for block in net.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    for p in net.parameters():
        nn.init.normal_(p, std=0.05)
    return net


def network() -> Any:
    return copy.deepcopy(cached())


def prompts(**options: Any) -> MixtureOfPrompts:
    return MixtureOfPrompts(L, N, D, **options)


def spread(module: MixtureOfPrompts, scale: float = 0.3) -> MixtureOfPrompts:
    """Replace the zeros of all parameters by random values."""
    for i, p in enumerate(module.parameters()):
        nn.init.normal_(p, std=scale, generator=torch.Generator().manual_seed(i))
    return module


def batch(B: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    return (
        torch.randn(B, 1, 8, 8, generator=rng),
        torch.linspace(0, 999, B).long(),
        torch.randint(4, (B,), generator=rng),
    )


def run(net: Any, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    out: Tensor = net(x, timestep=t, class_labels=y, return_dict=False)[0]
    return out


# ---- sizes -----------------------------------------------------------------------------------------------------------


def dit_parameters(depth: int, dim: int) -> int:
    """Count the parameters of DiT/2 on 32x32x4 latents and 1000 classes with learned variance, without positions."""
    block = 12 * dim**2 + 9 * dim + 6 * dim**2 + 6 * dim  # qkv, proj, MLP of 4 dim; adaLN of 6 dim
    head = (2 * dim**2 + 2 * dim) + (32 * dim + 32)
    embed = (16 * dim + dim) + (256 * dim + dim + dim**2 + dim) + 1001 * dim
    return depth * block + head + embed


@pytest.mark.parametrize(
    ("depth", "dim", "extra", "percent"),
    [(12, 768, 2_556_416, "1.96"), (24, 1024, 6_554_112, "1.43"), (28, 1152, 8_552_960, "1.26")],
)
def test_parameter_counts_are_the_published_ones(depth: int, dim: int, extra: int, percent: str) -> None:
    """The published shares of DiT-B, L and XL are truncated to two decimals. They do not count the training noise."""
    with torch.device("meta"):
        patch = MixtureOfPrompts(depth, 256, dim)
    kept = sum(p.numel() for name, p in patch.named_parameters() if not name.startswith("noise"))
    assert kept == extra
    assert f"{100 * kept / dit_parameters(depth, dim):.4f}".startswith(percent)


# ---- in a network ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_a_new_patch_changes_not_one_bit(training: bool) -> None:
    net = network().train(training)
    want = run(net, *batch())
    patched = patch_dit(net, prompts())
    assert torch.equal(run(patched, *batch()), want)
    spread(net.mixture_of_prompts)
    assert not torch.equal(run(patched, *batch()), want)
    assert isinstance(unpatch(patched), MixtureOfPrompts)
    assert torch.equal(run(patched, *batch()), want)


def test_only_the_patch_is_trained_and_it_starts_through_the_prompts() -> None:
    net = network()
    before = copy.deepcopy(net.state_dict())
    trainable = [p.requires_grad for p in net.parameters()]
    mop = prompts()
    patch_dit(net, mop)
    assert {name for name, p in net.named_parameters() if p.requires_grad} == {
        f"mixture_of_prompts.{name}" for name, _ in mop.named_parameters()
    }
    optimizer = torch.optim.AdamW(mop.param_groups(1e-2), weight_decay=0)
    assert [g["lr"] for g in optimizer.param_groups] == [1e-2, 1e-1]
    net.train()
    x, t, y = batch()
    for step in range(2):
        optimizer.zero_grad()
        run(net, x, t, y).square().mean().backward()
        assert mop.prompts.grad is not None
        assert bool((mop.prompts.grad != 0).any())
        assert mop.gate.weight.grad is not None
        assert bool((mop.gate.weight.grad != 0).any()) == (step == 1)  # only after the prompts have changed
        optimizer.step()
    unpatch(net)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert [p.requires_grad for p in net.parameters()] == trainable
    assert all(p.grad is None for p in net.parameters())


def test_the_patch_alone_is_saved_and_loaded() -> None:
    one = patch_dit(network(), spread(prompts())).eval()
    state = save_patch(one)
    assert set(state) == {"prompts", "gate.weight", "gate.bias", "noise.weight"}
    two = patch_dit(network(), prompts()).eval()
    two.mixture_of_prompts.load_state_dict(state)
    assert torch.equal(run(one, *batch()), run(two, *batch()))


def test_a_copy_has_a_patch_of_its_own() -> None:
    net = patch_dit(network(), spread(prompts())).eval()
    want = run(net, *batch())
    other = copy.deepcopy(net)
    nn.init.zeros_(net.mixture_of_prompts.prompts)
    assert torch.equal(run(other, *batch()), want)
    assert not torch.equal(run(net, *batch()), want)
    unpatch(net)
    assert torch.equal(run(other, *batch()), want)


def test_diffusers_block_by_hand() -> None:
    """The gate sees the embedding of t and label of block 0, as diffusers' output layer does."""
    net, (x, t, y) = network().eval(), batch()
    mop = spread(prompts())
    c = net.transformer_blocks[0].norm1.emb(t, y, hidden_dtype=x.dtype)
    tokens = net.pos_embed(x)
    seen: list[Tensor] = []
    patch_dit(net, mop)
    net.transformer_blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        run(net, x, t, y)
        logits = nn.functional.linear(torch.cat([c, torch.zeros(len(c), 1)], 1), mop.gate.weight, mop.gate.bias)
        want = tokens + rearrange(logits.softmax(1), "b n -> b n 1") * mop.prompts[0]
    torch.testing.assert_close(seen[0], want, rtol=1e-6, atol=1e-6)  # float32, the same operations in both


class OriginalDiT(nn.Module):
    """Network whose blocks are called as block(x, c), without adaLN."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TwoInputs() for _ in range(L))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        c = torch.stack([torch.cos(t.float() * i) for i in range(D)], 1)
        for block in self.blocks:
            x = block(x, c)
        return x


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x) + c[:, None])


def test_the_original_form_of_dit_and_a_condition_of_ones_own() -> None:
    x, t = torch.randn(2, N, D), torch.tensor([1, 900])
    net = OriginalDiT().eval()
    want = net(x, t)
    patch_dit(net, prompts())
    assert torch.equal(net(x, t), want)
    spread(net.mixture_of_prompts)
    first = net(x, t)
    mop = unpatch(net)
    patch_dit(net, mop, condition=lambda x, t: torch.stack([torch.cos(t.float() * i) for i in range(D)], 1))
    torch.testing.assert_close(net(x, t), first, rtol=0, atol=0)


def test_fewer_sets_than_blocks_reach_the_first_blocks_only() -> None:
    net, (x, t, y) = network().eval(), batch()
    patch_dit(net, spread(MixtureOfPrompts(1, N, D)))
    assert len([b for b in net.transformer_blocks if b._forward_pre_hooks]) == 1
    run(net, x, t, y)


# ---- the gate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [None, 1, 5, N])
@pytest.mark.parametrize("training", [False, True])
def test_gates_sum_to_one_over_exactly_k_prompts(k: int | None, training: bool) -> None:
    mop = spread(prompts(k=k)).train(training)
    g = mop.gates(1, torch.randn(50, D))
    torch.testing.assert_close(g.sum(1), torch.ones(50), rtol=1e-6, atol=0.0)  # float32 softmax
    assert bool(((g > 0).sum(1) == (k or N)).all())


def test_noise_only_while_training_and_from_the_generator() -> None:
    mop = spread(prompts(generator=torch.Generator().manual_seed(5)))
    c = torch.randn(4, D)
    assert torch.equal(mop.eval().gates(0, c), mop.gates(0, c))
    mop.train()
    first, second = mop.gates(0, c), mop.gates(0, c)
    assert not torch.equal(first, second)
    mop.generator = torch.Generator().manual_seed(5)
    assert torch.equal(mop.gates(0, c), first)


def test_inference_table_holds_the_gates_of_every_block() -> None:
    mop = spread(prompts()).train()
    c = torch.randn(7, D)
    table = mop.inference_table(c)
    assert table.shape == (7, L, N)
    assert mop.training
    mop.eval()
    for i in range(L):
        assert torch.equal(table[:, i], mop.gates(i, c))
    x = torch.randn(7, N, D)
    torch.testing.assert_close(
        mop(2, x, c), x + rearrange(table[:, 2], "b n -> b n 1") * mop.prompts[2], rtol=0, atol=0
    )


def test_published_importance_at_the_start() -> None:
    """Gates of one block are the softmax of N normals with standard deviation s = ln 2 + 0.01.

    Their squared variation is exp(s^2) - 1 = 0.64 for N -> inf. Twelve blocks with independent noise reduce it to a
    twelfth, 0.053 (published 0.052).
    """
    for depth, want in ((1, math.exp(0.703**2) - 1), (12, 0.052)):
        mop = MixtureOfPrompts(depth, 256, 8, balancing="published", generator=torch.Generator().manual_seed(0))
        for i in range(depth):
            mop.gates(i, torch.zeros(200, 8))
        # There are 51,200 heavy-tailed entries and a bias of 1/256 from the sum in the softmax, hence 5 %.
        assert mop.auxiliary_losses()["importance"].item() == pytest.approx(want, rel=0.05)


def test_corrected_importance_sums_over_the_batch_first() -> None:
    """Each sample uses one prompt, and all prompts are used equally: balanced for Shazeer et al., not as published."""
    losses = {}
    for balancing in ("corrected", "published"):
        mop = MixtureOfPrompts(1, 8, 8, noisy=False, balancing=balancing)  # type: ignore[arg-type]
        with torch.no_grad():
            mop.gate.weight[:, :8] = 100 * torch.eye(8)
        mop.gates(0, torch.eye(8))
        losses[balancing] = mop.auxiliary_losses()["importance"].item()
    assert losses["corrected"] == pytest.approx(0, abs=1e-12)
    # One in eight of the 64 entries is 1, so the variance is 7/64 * 64/63 and the mean 1/8.
    assert losses["published"] == pytest.approx(7 / 64 * 64 / 63 * 64, rel=1e-5)


def test_load_is_the_probability_to_be_kept_over_a_new_draw_of_ones_own_noise() -> None:
    """Check the definition of Shazeer et al. by redrawing the noise of one prompt while that of the others stays."""
    mop = spread(prompts(k=4))
    c = torch.randn(1, D, generator=torch.Generator().manual_seed(0))
    mop.generator = torch.Generator().manual_seed(7)
    mop.gates(0, c)
    load = mop._loads[0]
    assert mop.noise is not None
    with torch.no_grad():
        clean = mop.gate(torch.cat([c, torch.zeros(1, 1)], 1))[0]  # [N]
        std = nn.functional.softplus(mop.noise(c))[0] + 0.01
        noisy = clean + std * torch.randn(1, N, generator=torch.Generator().manual_seed(7))[0]
        n = 20_000
        for i in range(N):
            others = torch.cat([noisy[:i], noisy[i + 1 :]])
            drawn = clean[i] + std[i] * torch.randn(n, generator=torch.Generator().manual_seed(i))
            kept = (drawn > others.sort(descending=True).values[3]).float().mean()
            # The bound is four standard deviations of a share of 20,000 draws.
            assert abs(float(load[i]) - float(kept)) < 4 * 0.5 / n**0.5
    assert mop.auxiliary_losses()["load"].requires_grad


def test_with_all_prompts_kept_the_load_is_flat_and_the_published_one_counts_nothing() -> None:
    for balancing, count in (("corrected", 3.0), ("published", 0.0)):
        mop = spread(prompts(balancing=balancing))
        mop.gates(0, torch.randn(3, D))
        assert mop._loads[0].tolist() == [count] * N
        assert mop.auxiliary_losses()["load"].item() == 0


def test_the_published_load_of_some_prompts_is_the_sum_of_the_mean_over_blocks() -> None:
    """DMP adds ``load.mean(blocks).sum(prompts)``. The load is the probability, over new noise, of being kept."""
    B, k, depth = 6, 3, 2
    mop = spread(MixtureOfPrompts(depth, N, D, k=k, balancing="published", generator=torch.Generator().manual_seed(3)))
    mop.train()
    c = torch.randn(B, D, generator=torch.Generator().manual_seed(4))
    noise = torch.Generator().manual_seed(3)
    total = 0.0
    for i in range(depth):
        mop.gates(i, c)
        with torch.no_grad():
            clean = mop.gate(torch.cat([c, torch.full((B, 1), float(i))], 1))
            std = nn.functional.softplus(mop.noise(c)) + 0.01
            noisy = clean + std * torch.randn(B, N, generator=noise)
        for b in range(B):
            for n in range(N):
                others = torch.cat([noisy[b, :n], noisy[b, n + 1 :]]).sort(descending=True).values
                total += float(torch.distributions.Normal(clean[b, n], std[b, n]).cdf(others[k - 1]).neg().add(1))
    got = mop.auxiliary_losses()["load"]
    assert got.requires_grad
    assert got.item() == pytest.approx(total / depth, rel=1e-5)
    assert 0.5 * B * k < got.item() < 2 * B * k
    assert mop.balancing_loss().item() == pytest.approx(sum(x.item() for x in mop.auxiliary_losses().values()))


def test_balancing_losses_are_of_the_latest_forward() -> None:
    net = patch_dit(network(), spread(prompts(noisy=False))).train()
    run(net, *batch())
    first = net.mixture_of_prompts.balancing_loss().item()
    run(net, *batch())
    assert net.mixture_of_prompts.balancing_loss().item() == first > 0
    net.eval()
    run(net, *batch())
    assert net.mixture_of_prompts.balancing_loss().item() == 0


# ---- composition -----------------------------------------------------------------------------------------------------


def test_patching_takes_any_balancing_method() -> None:
    """Check PCGrad on the cluster gradients, which frozen parameters do not have, and Uncertainty Weighting."""
    net = patch_dit(network(), spread(prompts(noisy=False))).train()
    mop = net.mixture_of_prompts
    x, t, y = batch()
    cluster = torch.tensor([0, 0, 1, 1, 2, 2])

    def losses(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return reduce((run(net, x, t, y) - x).square(), "b ... -> b", "mean") + mop.balancing_loss()

    cluster_gradients = ClusterGradients(net, 3, route="split")
    jacobian = cluster_gradients(losses, (x, t, y), cluster)
    assert sum(row is not None for row in jacobian.rows) == 3  # prompts, the gate's weight and bias
    for i in range(3):
        mop.zero_grad()
        losses(*(value[cluster == i] for value in (x, t, y))).mean().backward()
        for row, p in zip((row for row in jacobian.rows if row is not None), mop.parameters(), strict=True):
            torch.testing.assert_close(row[i], p.grad, rtol=1e-4, atol=1e-7)  # float32 through a whole network
    weights = ops.pcgrad_weights(jacobian.gram(), generator=torch.Generator().manual_seed(0))
    jacobian.combine(weights)
    assert all((p.grad is not None) == p.requires_grad for p in net.parameters())

    uw = UncertaintyWeighting(3)
    mop.zero_grad()
    values, counts = ops.cluster_mean(losses(x, t, y), cluster, 3)
    uw.loss(values, counts).backward()
    assert mop.prompts.grad is not None
    assert uw.log_variance.grad is not None


# ---- bad input -------------------------------------------------------------------------------------------------------


def no_dit() -> None:
    from diffusers import UNet2DModel

    patch_dit(
        UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1,
            down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4, add_attention=False,
        ),
        prompts(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (no_dit, "must hold a DiT.*UNet2DModel holds none"),
        (lambda: run(patch_dit(network(), MixtureOfPrompts(L, 9, D)), *batch()), r"x must be \[B, 9, 16\] tokens; got"),
        (lambda: run(patch_dit(network(), MixtureOfPrompts(L, N, 8, D)), *batch()), r"x must be \[B, 16, 8\] tokens"),
        (lambda: run(patch_dit(network(), MixtureOfPrompts(L, N, D, 8)), *batch()), r"cond must be \[B=6, 8\]; got"),
        (lambda: patch_dit(network(), MixtureOfPrompts(L + 1, N, D)), "depth <= 3; got depth 4"),
        (lambda: patch_dit(patch_dit(network(), prompts()), prompts()), "must not be patched already"),
        (lambda: unpatch(network()), "must be patched by patch_dit"),
        (lambda: save_patch(network()), "must be patched by patch_dit"),
        (lambda: prompts()(L, torch.zeros(1, N, D), torch.zeros(1, D)), "0 <= i < 3; got 3"),
        (lambda: prompts(k=N + 1), r"k must be in \[1, n_tokens=16\]; got 17"),
        (lambda: prompts(balancing="none"), "balancing must be"),
        (lambda: MixtureOfPrompts(0, N, D), "depth must be at least 1"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
