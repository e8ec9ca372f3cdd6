"""Diffusion model patching: improve a frozen, converged DiT by a mixture of prompts that is added to its tokens.

Source: Ham, Woo, Kim, Go, Park, Kim, "Diffusion Model Patching via Mixture-of-Prompts", AAAI 2025 (arXiv 2405.17825).
The implementation follows the released code; the exact equations of the paper were not available.

    h = W_g [c ; i] + b_g,                      gate logits of block i for the condition c, one gate for all blocks
    h~ = h + eps * (softplus(W_n c) + 0.01),    in training only; eps ~ N(0, I), a new draw in each block
    g = softmax of the k largest of h~, 0 elsewhere
    x <- x + g_n P^(i)_n  for each token n,     before the block itself runs

Only the prompts P, the gate and its noise are trained. P starts at zero, so the patched model is at first identical to
the original model, and training starts through P (the gate has no gradient until P has changed).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from antdiff._checks import as_choice, as_count, as_flag, as_function, as_generator, as_module, as_number, as_tensor

_LARGEST = 2**24
NAME = "mixture_of_prompts"  # name of the patch among the submodules of the patched model


class MixtureOfPrompts(nn.Module):
    """Prompts, gate and balancing losses of a patch.

    Example::

        prompts = MixtureOfPrompts(depth=12, n_tokens=256, dim=768)
        patch_dit(model, prompts)                                    # freezes model
        optimizer = AdamW(prompts.param_groups(lr=1e-4), weight_decay=0)
        loss = mse(model(x, t, y), noise) + prompts.balancing_loss()  # after each forward
        torch.save(prompts.state_dict(), path)                       # only the patch

    Args:
        depth: number of blocks with prompts, the first ``depth`` blocks of the model.
        n_tokens: N, the number of prompts per block and of image tokens (256 for 256^2 images in 32^2 latents with
            patches of 2).
        dim: D, width of the tokens.
        cond_dim: width of the condition. None: ``dim``.
        k: number of prompts kept out of N. None: all, as published.
        noisy: whether to add the trained noise to the logits in training mode.
        generator: generator of that noise, on its device. None: torch's global generator.
        balancing: the losses of :meth:`balancing_loss`. With ``"corrected"``, importance is the sum of a prompt's gates
            over the batch, as in Shazeer et al. (2017), and the load counts gates above zero. ``"published"`` repeats
            three mistakes of the released code: importance is the variation over all B x N gates, which also pushes
            every *sample* to use all prompts equally; the load is not a variation but the sum over the prompts of
            the mean load of the blocks, about B k; and for k = N it counts gates *below* zero, which do not exist.

    Raises:
        TypeError, ValueError: a size is below 1, k lies outside [1, N], or ``balancing`` is unknown.
    """

    def __init__(
        self,
        depth: int,
        n_tokens: int,
        dim: int,
        cond_dim: int | None = None,
        *,
        k: int | None = None,
        noisy: bool = True,
        generator: torch.Generator | None = None,
        balancing: Literal["corrected", "published"] = "corrected",
    ) -> None:
        super().__init__()
        cond_dim = dim if cond_dim is None else cond_dim
        k = n_tokens if k is None else k
        sizes = [("depth", depth), ("n_tokens", n_tokens), ("dim", dim), ("cond_dim", cond_dim), ("k", k)]
        for name, value in sizes:
            as_count(name, value, most=_LARGEST)
        if depth * n_tokens * dim > 2**32 or cond_dim * n_tokens > 2**32:
            raise ValueError(
                "depth, n_tokens, dim and cond_dim must give at most 2^32 numbers; got "
                f"{', '.join(f'{name}={value}' for name, value in sizes[:4])}. Lower one of them."
            )
        noisy = as_flag("noisy", noisy)
        as_generator("generator", generator)
        if not 1 <= k <= n_tokens:
            raise ValueError(f"k must be in [1, n_tokens={n_tokens}]; got {k}. Leave it out to keep all prompts.")
        as_choice("balancing", balancing, ("corrected", "published"))
        self.k = k
        self.balancing = balancing
        self.prompts = nn.Parameter(torch.zeros(depth, n_tokens, dim))  # [L, N, D]
        self.gate = nn.Linear(cond_dim + 1, n_tokens)
        self.noise = nn.Linear(cond_dim, n_tokens, bias=False) if noisy else None
        for p in (*self.gate.parameters(), *(self.noise.parameters() if self.noise is not None else ())):
            nn.init.zeros_(p)
        self._gates: list[Tensor] = []  # [B, N] per block since reset, in training mode only
        self._loads: list[Tensor] = []  # [N]
        self.generator = generator
        self.patch: _Patch | None = None  # set by patch_dit

    @property
    def depth(self) -> int:
        """L, the number of blocks with prompts."""
        return self.prompts.shape[0]

    @property
    def n_tokens(self) -> int:
        """N, the number of prompts per block and of tokens."""
        return self.prompts.shape[1]

    def forward(self, i: int, x: Tensor, cond: Tensor) -> Tensor:
        """Add the gated prompts of block i to the tokens x [B, N, D], for conditions cond [B or 1, cond_dim].

        Raises:
            ValueError: i lies outside [0, depth), x has another number of tokens or width, or cond has another shape.
        """
        i = self._block(i)
        as_tensor("x", x), as_tensor("cond", cond)
        if x.dim() != 3 or x.shape[1:] != self.prompts.shape[1:]:
            raise ValueError(
                f"x must be [B, {self.n_tokens}, {self.prompts.shape[2]}] tokens; got {list(x.shape)}. Prompts belong "
                "to token positions: make a MixtureOfPrompts with the n_tokens and dim of this model and image size."
            )
        if cond.dim() != 2 or cond.shape[1] != self.gate.in_features - 1 or cond.shape[0] not in (1, len(x)):
            raise ValueError(
                f"cond must be [B={len(x)}, {self.gate.in_features - 1}]; got {list(cond.shape)}. Make the "
                "MixtureOfPrompts with the cond_dim of this model."
            )
        g = self.gates(i, cond)  # [B, N]
        return x + (rearrange(g, "b n -> b n 1") * self.prompts[i]).to(x.dtype)

    def gates(self, i: int, cond: Tensor) -> Tensor:
        """Return the gates g [B, N] of block i: at least 0, with row sums of 1.

        In training mode they are noisy, and kept for the balancing losses.
        """
        i = self._block(i)
        self._check_condition("cond", cond)
        cond = cond.to(self.gate.weight.dtype)
        clean = self.gate(torch.cat([cond, cond.new_full((len(cond), 1), float(i))], dim=1))  # [B, N]
        logits, std = clean, None
        if self.noise is not None and self.training:
            std = nn.functional.softplus(self.noise(cond)) + 1e-2  # [B, N]; starts at ln 2 + 0.01 = 0.703
            eps = torch.randn(clean.shape, generator=self.generator, device=clean.device, dtype=clean.dtype)
            logits = clean + eps * std
        if self.k < self.n_tokens:
            # Take k + 1, since the probability of being kept depends on the largest logit that is not kept.
            top, index = logits.topk(self.k + 1, dim=1)
            kept = torch.full_like(logits, -math.inf).scatter(1, index[:, : self.k], top[:, : self.k])
        else:
            top, kept = None, logits
        g = kept.softmax(dim=1)
        if self.training:
            self._gates.append(g)
            self._loads.append(self._load(g, clean, logits, std, top))
        return g

    def reset(self) -> None:
        """Clear the gates of the previous forward pass. The hook of :func:`patch_dit` calls this before each pass."""
        self._gates.clear()
        self._loads.clear()

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """Return ``importance`` and ``load``, both [] float: squared coefficients of variation over the prompts.

        With ``balancing="published"``, the load is the sum over the prompts of the mean over the blocks.

        They belong to the latest forward pass, and are zero if that was not in training mode.
        """
        if not self._gates:
            zero = self.prompts.new_zeros(())
            return {"importance": zero, "load": zero}
        if len({g.shape for g in self._gates}) > 1:
            raise ValueError(
                "cond must have had the same number of rows in all calls of gates() since reset(); got "
                f"{[len(g) for g in self._gates][:8]}. Call reset() before each forward pass."
            )
        importance = torch.stack(self._gates).float().sum(0)  # [B, N], summed over blocks
        load = torch.stack(self._loads).float()  # [blocks, N]
        if self.balancing == "published":
            return {"importance": _squared_variation(importance), "load": load.mean(0).sum()}
        return {"importance": _squared_variation(importance.sum(0)), "load": _squared_variation(load.sum(0))}

    def balancing_loss(self) -> Tensor:
        """Return importance + load, [], each with weight 1 as published. Add it to the training loss."""
        losses = self.auxiliary_losses()
        return losses["importance"] + losses["load"]

    def param_groups(self, lr: float = 1e-4, gate_factor: float = 10.0) -> list[dict[str, Any]]:
        """Return parameter groups for an optimizer without weight decay.

        The prompts have learning rate ``lr``; gate and noise have ``gate_factor`` times ``lr``.
        """
        lr, gate_factor = as_number("lr", lr, least=0), as_number("gate_factor", gate_factor, least=0)
        gate = [p for name, p in self.named_parameters() if name != "prompts"]
        return [{"params": [self.prompts], "lr": lr}, {"params": gate, "lr": lr * gate_factor}]

    @torch.no_grad()
    def inference_table(self, conds: Tensor) -> Tensor:
        """Return the noise-free gates of every block, [S, depth, N], for conditions [S, cond_dim].

        The conditions are, for example, those of a sampler's timesteps. Gates depend only on condition and block, so
        ``table[s, i, :, None] * prompts[i]`` is a constant bias for the tokens of block i.
        """
        self._check_condition("conds", conds)
        was_training = self.training
        self.eval()
        try:
            return torch.stack([self.gates(i, conds) for i in range(self.depth)], dim=1)
        finally:
            self.train(was_training)

    def _block(self, value: Any) -> int:
        i: int = as_count("i", value, -(2**63))
        if not 0 <= i < self.depth:
            raise ValueError(f"i must be a block with prompts, 0 <= i < {self.depth}; got {i}.")
        return i

    def _check_condition(self, name: str, cond: Any) -> None:
        as_tensor(name, cond)
        width = self.gate.in_features - 1
        if cond.dim() != 2 or cond.shape[1] != width:
            raise ValueError(
                f"{name} must be [B, {width}]; got {list(cond.shape)}. Make the MixtureOfPrompts with the cond_dim of "
                "this model."
            )

    def _load(self, g: Tensor, clean: Tensor, logits: Tensor, std: Tensor | None, top: Tensor | None) -> Tensor:
        """Return the load of each prompt, [N]: the number of samples that keep it.

        With noise and k < N, it is the expected number over a new draw of the prompt's own noise. It is differentiable.
        """
        if top is None or std is None:
            chosen = g < 0 if self.balancing == "published" and top is None else g > 0
            return chosen.sum(0).to(g.dtype)
        # A kept prompt is dropped if it falls below the (k+1)-th logit; a dropped one is kept if it exceeds the k-th.
        is_kept = logits > top[:, self.k :]
        threshold = torch.where(is_kept, top[:, self.k :], top[:, self.k - 1 : self.k])  # [B, N]
        load: Tensor = torch.special.ndtr((clean - threshold) / std).sum(0)
        return load


def _squared_variation(x: Tensor) -> Tensor:
    """Return Var / Mean^2 of all entries, with the unbiased variance. 0 for a single entry, or if all are 0."""
    if x.numel() < 2:
        return x.new_zeros(())
    return x.var() / (x.mean().square() + 1e-10)


# ---- patching a model --------------------------------------------------------------------------------------------


class _Patch:
    """Hooks of one patched model. They are bound methods, so that a deep copy of the model gets its own hooks."""

    def __init__(self, prompts: MixtureOfPrompts, condition: Callable[..., Tensor] | None) -> None:
        self.prompts = prompts
        self.condition = condition
        self.handles: list[torch.utils.hooks.RemovableHandle] = []
        self.was_trainable: list[tuple[nn.Parameter, bool]] = []
        self.embedding: nn.Module | None = None
        self.cond: Tensor | None = None

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.prompts.reset()
        if self.condition is not None:
            self.cond = self.condition(*args, **kwargs)
        elif self.embedding is not None:
            bound = dict(zip(("hidden_states", "timestep", "class_labels"), args, strict=False)) | kwargs
            self.cond = _diffusers_condition(
                self.embedding, bound["hidden_states"], bound["timestep"], bound["class_labels"]
            )


class _PatchedBlock:
    """Hook that adds the prompts of block i to its input."""

    def __init__(self, patch: _Patch, i: int) -> None:
        self.patch = patch
        self.i = i

    def add(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        cond = self.patch.cond
        if cond is None:  # blocks of the original DiT are called with (x, c)
            cond = args[1] if len(args) > 1 else kwargs["c"]
        return (self.patch.prompts(self.i, args[0], cond), *args[1:]), kwargs


def patch_dit(
    model: nn.Module, prompts: MixtureOfPrompts, *, freeze: bool = True, condition: Callable[..., Tensor] | None = None
) -> nn.Module:
    """Insert ``prompts`` before the first ``prompts.depth`` blocks of a DiT, in place. Returns ``model``.

    ``prompts`` becomes the submodule ``mixture_of_prompts`` of the DiT, so that ``model.parameters()``, ``.to`` and
    copies include it. Frozen parameters have ``requires_grad=False``: no gradient of them is computed, reduced or kept.

    Args:
        model: diffusers' DiTTransformer2DModel, a network with ``blocks`` that are called as ``block(x, c)`` (as in the
            original DiT), or a module that contains one of these.
        prompts: the patch.
        freeze: whether to freeze the network. False: train the whole network together with the prompts.
        condition: function of the arguments of the DiT's ``forward`` that returns the condition [B, cond_dim]. None:
            the sum of timestep and label embedding. diffusers computes these embeddings in each block; the gate uses
            those of block 0, as diffusers' output layer does, but without label dropout (diffusers drops labels in each
            block independently; drop them in the batch instead).

    Raises:
        ValueError: ``model`` contains no DiT, has fewer blocks than ``prompts.depth``, or is patched already.
    """
    as_module("model", model)
    freeze = as_flag("freeze", freeze)
    if not isinstance(prompts, MixtureOfPrompts):
        raise TypeError(f"prompts must be a MixtureOfPrompts; got {type(prompts).__name__}.")
    if condition is not None:
        as_function("condition", condition)
    dit, blocks = _find_dit(model)
    if hasattr(dit, NAME):
        raise ValueError("model must not be patched already; got one that is. Call unpatch(model) first.")
    if prompts.depth > len(blocks):
        raise ValueError(
            f"prompts must have at most one set per block, depth <= {len(blocks)}; got depth {prompts.depth}. Make the "
            f"MixtureOfPrompts with depth={len(blocks)} or less."
        )
    patch = _Patch(prompts, condition)
    patch.embedding = getattr(getattr(blocks[0], "norm1", None), "emb", None)
    if freeze:
        patch.was_trainable = [(p, p.requires_grad) for p in dit.parameters()]
        dit.requires_grad_(False)
    like = next(dit.parameters())
    prompts.to(like.device).train(dit.training)
    dit.add_module(NAME, prompts)
    prompts.patch = patch
    patch.handles.append(dit.register_forward_pre_hook(patch.begin, with_kwargs=True))
    for i in range(prompts.depth):
        patch.handles.append(blocks[i].register_forward_pre_hook(_PatchedBlock(patch, i).add, with_kwargs=True))
    return model


def unpatch(model: nn.Module) -> MixtureOfPrompts:
    """Undo :func:`patch_dit`: remove the hooks and restore ``requires_grad``. Returns the prompts.

    Raises:
        ValueError: ``model`` is not patched.
    """
    dit, prompts = _find_patch(model)
    patch = prompts.patch
    assert patch is not None  # patch_dit sets it when it adds the submodule
    for handle in patch.handles:
        handle.remove()
    for p, trainable in patch.was_trainable:
        p.requires_grad_(trainable)
    delattr(dit, NAME)
    prompts.patch = None
    return prompts


def save_patch(model: nn.Module) -> Mapping[str, Tensor]:
    """Return the state dict of the patch alone (about 2 % of the model), for ``prompts.load_state_dict``."""
    state: dict[str, Tensor] = _find_patch(model)[1].state_dict()
    return state


def _find_patch(model: nn.Module) -> tuple[nn.Module, MixtureOfPrompts]:
    for module in as_module("model", model).modules():
        prompts = getattr(module, NAME, None)
        if isinstance(prompts, MixtureOfPrompts):
            return module, prompts
    raise ValueError(
        f"model must be patched by patch_dit; got a {type(model).__name__} without a patch. Call patch_dit first."
    )


def _find_dit(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    for module in model.modules():
        for name in ("transformer_blocks", "blocks"):
            blocks = getattr(module, name, None)
            if not isinstance(blocks, nn.ModuleList) or len(blocks) == 0:
                continue
            if name == "blocks" or hasattr(getattr(blocks[0], "norm1", None), "emb"):
                return module, blocks
    raise ValueError(
        "model must hold a DiT, that is diffusers' DiTTransformer2DModel or blocks that are called as block(x, c); "
        f"{type(model).__name__} holds none. Prompts are added to tokens, which a UNet does not have: patch a DiT."
    )


def _diffusers_condition(embedding: Any, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """Return c [B, D] of diffusers' CombinedTimestepLabelEmbeddings, without its label dropout."""
    time = embedding.timestep_embedder(embedding.time_proj(t).to(x.dtype))
    c: Tensor = time + embedding.class_embedder.embedding_table(labels)
    return c
