"""Diffusion model patching: a frozen, converged DiT is improved by a mixture of prompts added to its tokens.

Source: Ham, Woo, Kim, Go, Park, Kim, "Diffusion Model Patching via Mixture-of-Prompts", AAAI 2025 (arXiv 2405.17825),
as its released code does it; the wording of the paper's equations was not at hand.

    h = W_g [c ; i] + b_g,                      gate logits of block i from the condition c, one gate for all blocks
    h~ = h + eps * (softplus(W_n c) + 0.01),    while training; eps ~ N(0, I), fresh in each block
    g = softmax of the k largest of h~, 0 elsewhere
    x <- x + g_n P^(i)_n  for each token n,     then the block itself

Only the prompts P, the gate and its noise are trained. P starts at zero: at first the patched model *is* the old one,
and training starts through P (the gate has no gradient until P has moved).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from antdiff._checks import as_choice, as_count

NAME = "mixture_of_prompts"  # of the patch among the patched model's submodules


class MixtureOfPrompts(nn.Module):
    """Prompts, gate and balancing losses of a patch.

    Example::

        prompts = MixtureOfPrompts(depth=12, n_tokens=256, dim=768)
        patch_dit(model, prompts)                                    # freezes model
        optimizer = AdamW(prompts.param_groups(lr=1e-4), weight_decay=0)
        loss = mse(model(x, t, y), noise) + prompts.balancing_loss()  # after each forward
        torch.save(prompts.state_dict(), path)                       # the patch alone

    Args:
        depth: number of blocks that get prompts, the first ``depth`` of the model.
        n_tokens: N, prompts a block; the number of image tokens (256 for 256^2 images in 32^2 latents, patches of 2).
        dim: D, width of the tokens.
        cond_dim: width of the condition; None: ``dim``.
        k: number of prompts kept of N; None: all (published).
        noisy: add the trained noise to the logits while training.
        generator: of that noise, on its device; without one, torch's global generator.
        balancing: which losses :meth:`balancing_loss` takes. ``"corrected"``: importance is a prompt's gates summed
            over the batch, as in Shazeer et al. (2017), and the load counts gates above zero. ``"published"`` repeats
            two slips of the released code: importance is the variation over all B x N gates, which also asks every
            *sample* to use all prompts alike; and for k = N the load counts gates *below* zero, of which there are
            none.

    Raises:
        ValueError: a size below 1, k outside [1, N], or an unknown ``balancing``.
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
        for name, value in (("depth", depth), ("n_tokens", n_tokens), ("dim", dim), ("cond_dim", cond_dim)):
            as_count(name, value)
        if not 1 <= k <= n_tokens:
            raise ValueError(f"k must be in [1, n_tokens={n_tokens}]; got {k}.")
        as_choice("balancing", balancing, ("corrected", "published"))
        self.k = k
        self.balancing = balancing
        self.prompts = nn.Parameter(torch.zeros(depth, n_tokens, dim))  # [L, N, D]
        self.gate = nn.Linear(cond_dim + 1, n_tokens)
        self.noise = nn.Linear(cond_dim, n_tokens, bias=False) if noisy else None
        for p in (*self.gate.parameters(), *(self.noise.parameters() if self.noise is not None else ())):
            nn.init.zeros_(p)
        self._gates: list[Tensor] = []  # [B, N] of each block since reset, while training
        self._loads: list[Tensor] = []  # [N]
        self.generator = generator
        self.patch: _Patch | None = None  # where this is built in

    @property
    def depth(self) -> int:
        """L, the number of blocks with prompts."""
        return self.prompts.shape[0]

    @property
    def n_tokens(self) -> int:
        """N, the number of prompts a block and of tokens."""
        return self.prompts.shape[1]

    def forward(self, i: int, x: Tensor, cond: Tensor) -> Tensor:
        """Tokens x [B, N, D] with block i's gated prompts added, for conditions cond [B or 1, cond_dim].

        Raises:
            ValueError: i outside [0, depth), x with another number of tokens or width, or a condition of another shape.
        """
        if not 0 <= i < self.depth:
            raise ValueError(f"i must be a block with prompts, 0 <= i < {self.depth}; got {i}.")
        if x.dim() != 3 or x.shape[1:] != self.prompts.shape[1:]:
            raise ValueError(
                f"x must be [B, {self.n_tokens}, {self.prompts.shape[2]}] tokens; got {list(x.shape)}. Prompts belong "
                "to token positions: make MixtureOfPrompts with n_tokens of this image size."
            )
        if cond.dim() != 2 or cond.shape[1] != self.gate.in_features - 1 or cond.shape[0] not in (1, len(x)):
            raise ValueError(f"cond must be [B={len(x)}, {self.gate.in_features - 1}]; got {list(cond.shape)}.")
        g = self.gates(i, cond)  # [B, N]
        return x + (rearrange(g, "b n -> b n 1") * self.prompts[i]).to(x.dtype)

    def gates(self, i: int, cond: Tensor) -> Tensor:
        """g [B, N] of block i: at least 0, each row sums to 1. In training mode they are noisy, and remembered."""
        cond = cond.to(self.gate.weight.dtype)
        clean = self.gate(torch.cat([cond, cond.new_full((len(cond), 1), float(i))], dim=1))  # [B, N]
        logits, std = clean, None
        if self.noise is not None and self.training:
            std = nn.functional.softplus(self.noise(cond)) + 1e-2  # [B, N], ln 2 + 0.01 = 0.703 at the start
            eps = torch.randn(clean.shape, generator=self.generator, device=clean.device, dtype=clean.dtype)
            logits = clean + eps * std
        if self.k < self.n_tokens:
            # one more than k: the probability to be kept needs the first logit that is not
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
        """Forget the gates of the forward before. :func:`patch_dit`'s hook calls it at the start of each forward."""
        self._gates.clear()
        self._loads.clear()

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """``importance`` and ``load``, both [] float: squared coefficients of variation over the prompts.

        Of the latest forward in training mode; zeros if there was none.
        """
        if not self._gates:
            zero = self.prompts.new_zeros(())
            return {"importance": zero, "load": zero}
        importance = torch.stack(self._gates).float().sum(0)  # [B, N], summed over blocks
        if self.balancing == "corrected":
            importance = importance.sum(0)  # [N]
        return {
            "importance": _squared_variation(importance),
            "load": _squared_variation(torch.stack(self._loads).float().sum(0)),
        }

    def balancing_loss(self) -> Tensor:
        """importance + load, [], weighted 1 and 1 as published: add it to the loss."""
        losses = self.auxiliary_losses()
        return losses["importance"] + losses["load"]

    def param_groups(self, lr: float = 1e-4, gate_factor: float = 10.0) -> list[dict[str, Any]]:
        """Groups for an optimizer without weight decay: prompts at ``lr``, gate and noise ``gate_factor`` times
        that."""
        gate = [p for name, p in self.named_parameters() if name != "prompts"]
        return [{"params": [self.prompts], "lr": lr}, {"params": gate, "lr": lr * gate_factor}]

    @torch.no_grad()
    def inference_table(self, conds: Tensor) -> Tensor:
        """Gates of every block for conditions [S, cond_dim] (a sampler's timesteps, say): [S, depth, N], noise-free.

        They depend on condition and block alone: ``table[s, i, :, None] * prompts[i]`` is a bias to add, nothing more.
        """
        was_training = self.training
        self.eval()
        try:
            return torch.stack([self.gates(i, conds) for i in range(self.depth)], dim=1)
        finally:
            self.train(was_training)

    def _load(self, g: Tensor, clean: Tensor, logits: Tensor, std: Tensor | None, top: Tensor | None) -> Tensor:
        """Load of each prompt, [N]: how many samples of the batch keep it, smoothly where the noise makes it smooth."""
        if top is None or std is None:
            chosen = g < 0 if self.balancing == "published" and top is None else g > 0
            return chosen.sum(0).to(g.dtype)
        # A kept prompt would fall out below the (k+1)-th logit; one that was not kept would be above the k-th.
        is_kept = logits > top[:, self.k :]
        threshold = torch.where(is_kept, top[:, self.k :], top[:, self.k - 1 : self.k])  # [B, N]
        load: Tensor = torch.special.ndtr((clean - threshold) / std).sum(0)
        return load


def _squared_variation(x: Tensor) -> Tensor:
    """Var / Mean^2 of all entries (unbiased variance; 0 for a single one, and where all are 0)."""
    if x.numel() < 2:
        return x.new_zeros(())
    return x.var() / (x.mean().square() + 1e-10)


# ---- into a model ------------------------------------------------------------------------------------------------


class _Patch:
    """The hooks of one patched model; bound methods, so that a deep copy of the model gets its own."""

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
    def __init__(self, patch: _Patch, i: int) -> None:
        self.patch = patch
        self.i = i

    def add(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        cond = self.patch.cond
        if cond is None:  # the original DiT's blocks are called with (x, c)
            cond = args[1] if len(args) > 1 else kwargs["c"]
        return (self.patch.prompts(self.i, args[0], cond), *args[1:]), kwargs


def patch_dit(
    model: nn.Module, prompts: MixtureOfPrompts, *, freeze: bool = True, condition: Callable[..., Tensor] | None = None
) -> nn.Module:
    """Put ``prompts`` before the first ``prompts.depth`` blocks of a DiT, in place; returns ``model``.

    ``prompts`` becomes the submodule ``mixture_of_prompts`` of the DiT, so that ``model.parameters()``, ``.to`` and
    copies see it. Frozen parameters have ``requires_grad=False``: no gradient is computed, reduced or kept for them.

    Args:
        model: diffusers' DiTTransformer2DModel, a network with ``blocks`` called as ``block(x, c)`` (the original DiT's
            form), or a module that holds one of these.
        freeze: False trains the whole network beside the prompts.
        condition: gives the condition [B, cond_dim] from the arguments of the DiT's ``forward``. Without it: the sum of
            timestep and label embedding. diffusers embeds them anew in each block; its output layer takes block 0's,
            and so does the gate, without dropping labels (diffusers drops them in each block apart; drop them in the
            batch).

    Raises:
        ValueError: no DiT in ``model``, fewer blocks than ``prompts.depth``, or already patched.
    """
    dit, blocks = _find_dit(model)
    if hasattr(dit, NAME):
        raise ValueError("model must not be patched already; got one that is. Call unpatch(model) first.")
    if prompts.depth > len(blocks):
        raise ValueError(
            f"prompts must have at most one set a block, depth <= {len(blocks)}; got depth {prompts.depth}."
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
    """Undo :func:`patch_dit`: hooks off, ``requires_grad`` as it was. Returns the prompts.

    Raises:
        ValueError: ``model`` is not patched.
    """
    dit, prompts = _find_patch(model)
    patch = prompts.patch
    assert patch is not None  # patch_dit sets it with the submodule
    for handle in patch.handles:
        handle.remove()
    for p, trainable in patch.was_trainable:
        p.requires_grad_(trainable)
    delattr(dit, NAME)
    prompts.patch = None
    return prompts


def save_patch(model: nn.Module) -> Mapping[str, Tensor]:
    """State dict of the patch alone (about 2 % of the model), for ``prompts.load_state_dict``."""
    state: dict[str, Tensor] = _find_patch(model)[1].state_dict()
    return state


def _find_patch(model: nn.Module) -> tuple[nn.Module, MixtureOfPrompts]:
    for module in model.modules():
        prompts = getattr(module, NAME, None)
        if isinstance(prompts, MixtureOfPrompts):
            return module, prompts
    raise ValueError("model must be patched by patch_dit; got one that is not.")


def _find_dit(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    for module in model.modules():
        for name in ("transformer_blocks", "blocks"):
            blocks = getattr(module, name, None)
            if not isinstance(blocks, nn.ModuleList) or len(blocks) == 0:
                continue
            if name == "blocks" or hasattr(getattr(blocks[0], "norm1", None), "emb"):
                return module, blocks
    raise ValueError(
        "model must hold a DiT: diffusers' DiTTransformer2DModel, or blocks called as block(x, c); "
        f"{type(model).__name__} holds none. Prompts are added to tokens, which a UNet does not have."
    )


def _diffusers_condition(embedding: Any, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """c [B, D] of diffusers' CombinedTimestepLabelEmbeddings, without its label dropout."""
    time = embedding.timestep_embedder(embedding.time_proj(t).to(x.dtype))
    c: Tensor = time + embedding.class_embedder.embedding_table(labels)
    return c
