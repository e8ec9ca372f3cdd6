"""Channel routing: windows, effect on diffusers' networks, and composition with gradient balancing."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from antdiff import ClusterGradients, ops
from antdiff.companions import ChannelRouting, edm_rank, route, start_table

T = 1000


@functools.cache
def cached(name: str) -> nn.Module:
    from diffusers import DiTTransformer2DModel, UNet2DModel

    torch.manual_seed(0)
    net: nn.Module
    if name == "dit":
        net = DiTTransformer2DModel(
            sample_size=8, patch_size=4, in_channels=1, num_layers=2, num_attention_heads=2, attention_head_dim=8,
            num_embeds_ada_norm=1,
        )  # fmt: skip
        for block in net.transformer_blocks:
            block.norm1.emb.class_embedder.dropout_prob = 0.0
    else:
        net = UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(16, 32), layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8, attention_head_dim=16,
        )  # fmt: skip
    for p in net.parameters():  # includes parameters that start at zero
        nn.init.normal_(p, std=0.05)
    return net


def network(name: str) -> Any:
    return copy.deepcopy(cached(name)).double()


def run(net: Any, x: Tensor, t: Tensor | int) -> Tensor:
    labels = {} if "UNet" in type(net).__name__ else {"class_labels": torch.zeros(len(x), dtype=torch.int64)}
    t = t if isinstance(t, Tensor) else torch.full((len(x),), t)
    return net(x, t, **labels, return_dict=False)[0]


def images(B: int = 3) -> Tensor:
    return torch.randn(B, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


NETWORKS = ["dit", "unet"]


# ---- the windows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "width", "starts", "first"),
    [
        (384, 307, [0, 0, 5, 24, 51, 77], 284),
        (768, 614, [0, 1, 10, 49, 101, 154], 239),
        (1024, 819, [0, 1, 13, 65, 135, 205], 223),
        (1152, 921, [0, 1, 14, 73, 152, 231], 216),
    ],
)
def test_start_table_is_the_published_one(channels: int, width: int, starts: list[int], first: int) -> None:
    table, n = start_table(channels)
    assert n == width
    assert table[[0, 250, 500, 750, 900, 999]].tolist() == starts
    assert int((table >= 1).nonzero()[0]) == first
    assert bool((table.diff() >= 0).all())


def test_the_printed_formula_differs_by_at_most_one_channel() -> None:
    """For C = 1024, the printed bounds differ at 149 lower and 56 upper ends, each by one channel."""
    table, n = start_table(1024)
    last = 1024 - n
    t = torch.arange(1, T + 1, dtype=torch.float64)
    lower = (last * ((t - 1) / T) ** 4).round().long()
    upper = (last * (t / T) ** 4).round().long() + n
    assert int((lower != table).sum()) == 149
    assert int((upper != table + n).sum()) == 56
    assert int((lower - table).abs().max()) == int((upper - table - n).abs().max()) == 1


@pytest.mark.parametrize("mode", ["window", "random"])
def test_every_timestep_reads_exactly_n_channels(mode: Any) -> None:
    routing = ChannelRouting(network("dit"), mode=mode, generator=torch.Generator().manual_seed(0))
    mask = routing.mask(torch.arange(T), 16)
    assert mask.dtype == torch.bool
    assert mask.shape == (T, 16)
    assert bool((mask.sum(1) == 12).all())
    assert torch.equal(mask, routing.mask(torch.arange(T), 16))
    if mode == "window":
        assert torch.equal(mask.int().argmax(1), start_table(16)[0])
    else:
        assert len({tuple(row) for row in mask.tolist()}) > 100
        assert bool((mask.double().mean(0) - 0.75).abs().max() < 5 * (0.25 * 0.75 / T) ** 0.5)


def test_in_random_mode_every_block_has_its_own_choice() -> None:
    """In the released code every block makes a router, which draws; blocks of equal width share only the window."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Identity() for _ in range(3))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    def read(mode: Any) -> tuple[ChannelRouting, list[Tensor]]:
        net, seen = Net(), []
        routing = ChannelRouting(
            net, blocks=[(b, 20) for b in net.blocks], mode=mode, generator=torch.Generator().manual_seed(0)
        )
        net = copy.deepcopy(net)
        for block in net.blocks:
            block.register_forward_pre_hook(lambda _module, args: seen.append(args[0] != 0))
        net(torch.ones(4, 3, 20), torch.tensor([7, 7, 500, 999]))
        return routing, seen

    routing, seen = read("random")
    for i, channels in enumerate(seen):
        assert torch.equal(channels[:, 0], routing.mask(torch.tensor([7, 7, 500, 999]), 20, block=i))
        assert torch.equal(channels[0], channels[1])
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    with pytest.raises(ValueError, match=r"block must be in \[0, 3\), as 3 routed blocks have width 20; got 3"):
        routing.mask(7, 20, block=3)
    routing, seen = read("window")
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


def test_window_ends_share_three_quarters_of_their_channels() -> None:
    """Published for beta = 0.8: the share (2n - C) / n = 0.75 of the channels of t = 0 is also read at t = T-1."""
    table, n = start_table(1000)
    assert (int(table[0]) + n - int(table[-1])) / n == 0.75


def test_continuous_time_agrees_with_the_table_and_covers_edm() -> None:
    model = ByHand()
    routing = ChannelRouting(model, blocks=[(model.block, 64)], channel_dim=1, rank=lambda u: u)
    u = torch.arange(T, dtype=torch.float64) / (T - 1)
    assert torch.equal(routing.mask(u, 64).int().argmax(1), start_table(64)[0])
    rank = edm_rank()
    sigma = torch.exp(torch.tensor([-1.2, -1.2 + 1.2, -1.2 - 2.4], dtype=torch.float64))
    # The normal distribution function at 0, 1 and -2.
    torch.testing.assert_close(
        rank(sigma), torch.tensor([0.5, 0.841344746, 0.022750132], dtype=torch.float64), rtol=1e-7, atol=0.0
    )


class ByHand(nn.Module):
    """A network that is not from diffusers, with one residual block over [B, 64]."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Residual()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.block(x)
        return out


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


# ---- effect on a network ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_beta_one_is_the_network_itself_and_removal_restores_it(name: str) -> None:
    net, x, t = network(name), images(), torch.tensor([0, 500, 999])
    want = run(net, x, t)
    routing = ChannelRouting(net, beta=1.0)
    assert torch.equal(run(net, x, t), want)
    routing.remove()
    other = ChannelRouting(net)
    assert not torch.equal(run(net, x, t), want)
    other.remove()
    assert torch.equal(run(net, x, t), want)


def test_a_routed_block_reads_its_window_and_adds_to_what_it_skipped() -> None:
    model, t = ByHand(), torch.tensor([0, 600, 999])
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    routing = ChannelRouting(model, blocks=[(model.block, 64)], channel_dim=1)
    m = routing.mask(t, 64)
    y = model(x, t)
    # x + F(m x) in float64: two additions of numbers below ten, in another order
    torch.testing.assert_close(y, x + torch.tanh(model.block.linear(x * m)), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(y, route(lambda h: h + torch.tanh(model.block.linear(h)), x, m), rtol=0, atol=0)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert bool((grad[~m] == 1).all())  # only the skip path contributes
    assert bool((grad[m] != 1).any())


def test_an_identity_block_stays_one() -> None:
    x = torch.randn(4, 7, 16)
    mask = torch.rand(4, 1, 16) < 0.5
    assert torch.equal(route(lambda h: h, x, mask), x)


def test_dit_block_by_hand() -> None:
    """Attention and MLP share one mask at the input of the block. The first block's input is the patch embedding."""
    net, x, t = network("dit"), images(), torch.tensor([3, 700, 999])
    tokens = net.pos_embed(x)
    block, seen = net.transformer_blocks[0], []
    handle = net.transformer_blocks[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    labels = torch.zeros(3, dtype=torch.int64)
    mask = rearrange(ChannelRouting(network("dit")).mask(t, 16), "b c -> b 1 c")
    want = route(lambda h: block(h, timestep=t, class_labels=labels), tokens, mask)
    ChannelRouting(net)
    run(net, x, t)
    handle.remove()
    torch.testing.assert_close(seen[0], want, rtol=1e-13, atol=1e-13)  # float64, another order of additions


def test_unet_skip_path_is_not_masked_where_the_width_changes() -> None:
    """Blocks of the decoder halve their channels and must compute skip_conv(x) + F(m x)."""
    net, x, t = network("unet"), images(), torch.tensor([0, 700, 999])
    block = net.up_blocks[1].resnets[0]
    assert block.conv_shortcut is not None
    seen: dict[str, Any] = {}
    block.register_forward_hook(lambda module, args, output: seen.update(x=args[0], temb=args[1], y=output))
    routing = ChannelRouting(net)
    run(net, x, t)
    channels = seen["x"].shape[1]
    mask = rearrange(routing.mask(t, channels), "b c -> b c 1 1")
    routing.remove()
    branch = block(seen["x"] * mask, seen["temb"]) - block.conv_shortcut(seen["x"] * mask)
    # float64; the branch is computed as a difference of numbers of order one
    torch.testing.assert_close(seen["y"], block.conv_shortcut(seen["x"]) + branch, rtol=1e-12, atol=1e-12)


def test_unet_routes_every_residual_block_and_attention() -> None:
    net = network("unet")
    before = {id(module) for module in net.modules() if module._forward_pre_hooks}
    ChannelRouting(net)
    hooked = [name for name, module in net.named_modules() if module._forward_pre_hooks and id(module) not in before]
    blocks = [name for name in hooked if name]
    resnets = [n for n, m in net.named_modules() if type(m).__name__ == "ResnetBlock2D"]
    attentions = [n for n, m in net.named_modules() if type(m).__name__ == "Attention"]
    assert sorted(blocks) == sorted([f"{n}.norm1" for n in resnets] + [f"{n}.group_norm" for n in attentions])
    assert len(resnets) == 8
    assert len(attentions) == 4


@pytest.mark.parametrize("name", NETWORKS)
def test_a_copy_is_routed_by_its_own_timesteps_and_the_state_dict_is_as_before(name: str) -> None:
    net, x = network(name), images()
    keys = list(net.state_dict())
    parameters = sum(p.numel() for p in net.parameters())
    ChannelRouting(net)
    assert list(net.state_dict()) == keys
    assert sum(p.numel() for p in net.parameters()) == parameters
    other = copy.deepcopy(net)
    early, late = run(net, x, 10), run(net, x, 990)
    assert torch.equal(run(other, x, 10), early)
    run(net, x, 990)  # must not change the masks of the copy
    assert torch.equal(run(other, x, 990), late)
    net.channel_routing.remove()
    assert not torch.equal(run(net, x, 990), late)
    assert torch.equal(run(other, x, 990), late)


@pytest.mark.parametrize("name", NETWORKS)
def test_samples_of_one_batch_do_not_mix(name: str) -> None:
    net, x, t = network(name), images(), torch.tensor([0, 555, 999])
    ChannelRouting(net)
    together = run(net, x, t)
    alone = torch.cat([run(net, x[i : i + 1], t[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)  # float64, the sums are blocked differently


def test_respaced_sampling_reads_the_windows_of_the_original_timesteps() -> None:
    from diffusers import DDIMScheduler

    net = network("dit")
    routing = ChannelRouting(net)
    seen = []
    net.transformer_blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    ddim = DDIMScheduler(num_train_timesteps=T)
    ddim.set_timesteps(7)
    x = images(2)
    for t in ddim.timesteps:
        x = ddim.step(run(net, x, int(t)), t, x).prev_sample
        assert torch.equal((seen[-1] != 0).any(dim=1)[0], start_mask(int(t), 16))
    assert len(seen) == 7
    assert torch.equal(routing.mask(int(ddim.timesteps[0]), 16)[0], start_mask(int(ddim.timesteps[0]), 16))


def start_mask(t: int, channels: int) -> Tensor:
    table, n = start_table(channels)
    c = torch.arange(channels)
    return (c >= table[t]) & (c < table[t] + n)


def test_checkpointed_blocks_give_the_same_gradients() -> None:
    plain, saving = network("dit"), network("dit")
    for net in (plain, saving):
        ChannelRouting(net)
    saving.enable_gradient_checkpointing()
    for net in (plain, saving):
        net.train()
        run(net, images(), torch.tensor([0, 400, 999])).square().mean().backward()
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-14)  # float64, recomputed


@pytest.mark.parametrize("name", NETWORKS)
def test_composes_with_pcgrad_through_cluster_gradients(name: str) -> None:
    """The gradient of each cluster is that of the routed network on the samples of this cluster alone."""
    net, x, t = network(name), images(6), torch.tensor([5, 30, 480, 510, 900, 999])
    cluster = torch.tensor([0, 0, 1, 1, 2, 2])
    noise = torch.randn_like(x)
    ChannelRouting(net)

    def losses(x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return reduce((run(net, x, t) - noise).square(), "b ... -> b", "mean")

    cluster_gradients = ClusterGradients(net, 3)
    jacobian = cluster_gradients(losses, (x, t, noise), cluster)
    for i in range(3):
        net.zero_grad()
        losses(*(value[cluster == i] for value in (x, t, noise))).mean().backward()
        for row, p in zip(jacobian.rows, net.parameters(), strict=True):
            assert row is not None
            want = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(row[i], want, rtol=1e-10, atol=1e-14)  # float64 through a whole network
    weights = ops.pcgrad_weights(jacobian.gram(), generator=torch.Generator().manual_seed(0))
    jacobian.combine(weights)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [-1, 1000, 0.5, float("nan")])
@pytest.mark.parametrize("name", NETWORKS)
def test_t_out_of_range(name: str, t: float) -> None:
    net = network(name)
    ChannelRouting(net)
    with pytest.raises(ValueError, match=r"0 <= t < T=1000 .*at row 1"):
        run(net, images(2), torch.tensor([3, t]))


def test_rank_out_of_range() -> None:
    model = ByHand()
    ChannelRouting(model, blocks=[(model.block, 64)], channel_dim=1, rank=lambda u: u)
    with pytest.raises(ValueError, match=r"rank\(timestep\) must be in \[0, 1\]; got 1.5 at row 0"):
        model(torch.zeros(1, 64, dtype=torch.float64), torch.tensor([1.5]))


def test_whole_numbers_may_come_as_floats_and_as_one_for_all() -> None:
    net, x = network("unet"), images()
    ChannelRouting(net)
    want = run(net, x, torch.tensor([700, 700, 700]))
    assert torch.equal(run(net, x, torch.tensor([700.0, 700.0, 700.0])), want)
    assert torch.equal(net(x, 700, return_dict=False)[0], want)
    assert torch.equal(net(x, timestep=torch.tensor(700), return_dict=False)[0], want)


def test_the_remedy_for_a_routed_model_works_as_printed() -> None:
    for model in (network("dit"), nn.ModuleList([network("dit")])):
        ChannelRouting(model)
        with pytest.raises(ValueError, match="must not be routed already") as caught:
            ChannelRouting(model)
        command = str(caught.value).partition("Call ")[2].partition(" first.")[0]
        eval(command, {"model": model})
        ChannelRouting(model)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ChannelRouting(nn.Linear(4, 4)), "must hold one DiTTransformer2DModel or UNet2DModel.*Linear holds 0"),
        (lambda: ChannelRouting(nn.ModuleList([network("dit"), network("dit")])), "holds 2"),
        (lambda: ChannelRouting(network("dit"), beta=0.0), "beta must be in"),
        (lambda: ChannelRouting(network("dit"), beta=0.01), "keep at least one of 16 channels"),
        (lambda: ChannelRouting(network("dit"), alpha=0), "alpha must be positive"),
        (lambda: ChannelRouting(network("dit"), T=1), "T must be at least 2"),
        (lambda: ChannelRouting(network("dit"), mode="both"), "mode must be"),
        (lambda: ChannelRouting(nn.Linear(4, 4), blocks=[(nn.Identity(), 4)]), "must take the timestep as one of"),
        (lambda: ChannelRouting(network("dit")).mask(0, 17), r"width of a routed block, one of \[16\]; got 17"),
        (lambda: [ChannelRouting(net := network("dit")), ChannelRouting(net)], "must not be routed already"),
        (lambda: wrong_width(), "with 63 channels in dimension 1"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def wrong_width() -> None:
    model = ByHand()
    ChannelRouting(model, blocks=[(model.block, 63)], channel_dim=1)
    model(torch.zeros(1, 64, dtype=torch.float64), torch.tensor([0]))


def test_traced_by_dynamo_it_follows_t_and_answers_a_bad_one_with_nan() -> None:
    """Under torch.compile no value is read on the host, as on CUDA: a bad t turns its own sample into NaN."""
    model, x = ByHand(), torch.randn(3, 64, dtype=torch.float64)
    ChannelRouting(model, blocks=[(model.block, 64)], channel_dim=1)
    traced = torch.compile(model, backend="eager")
    for t in (torch.tensor([0, 400, 999]), torch.tensor([999, 0, 600])):
        torch.testing.assert_close(traced(x, t), model(x, t), rtol=1e-14, atol=1e-14)  # float64
    assert traced(x, torch.tensor([5, 1000, 7])).isnan().any(1).tolist() == [False, True, False]
