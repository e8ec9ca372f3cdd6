"""Rule of nn.MultiheadAttention. Its torch function includes the projections, so it is split into ops with rules."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from antdiff.gradients.grouped.recorder import Op, Recorder


def multi_head_attention(
    recorder: Recorder,
    func: Op,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,  # a hint that attn_mask is causal
) -> Any:
    """Rule of multi-head attention.

    Query, key and value are ``[L, B, E]``, the layout of the function, regardless of ``batch_first`` of the module.
    """
    if query.dim() != 3 or static_k is not None or static_v is not None:
        return NotImplemented
    _, B, E = query.shape
    p = dropout_p if training else 0.0
    with recorder:
        weights = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else in_proj_weight
        q, k, v = _project(query, key, value, weights, in_proj_bias)  # [B, L or S, E]
        if bias_k is not None and bias_v is not None:
            k = torch.cat([k, bias_k.expand(B, 1, E)], 1)
            v = torch.cat([v, bias_v.expand(B, 1, E)], 1)
        if add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        mask = _additive(attn_mask, key_padding_mask, B, num_heads, k.shape[1], q)
        q, k, v = (x.unflatten(-1, (num_heads, E // num_heads)).transpose(1, 2) for x in (q, k, v))  # [B, H, ., E / H]
        if need_weights:
            scores = (q * (E // num_heads) ** -0.5) @ k.transpose(-2, -1)
            attention = (scores if mask is None else scores + mask).softmax(-1)  # [B, H, L, S]
            attention = F.dropout(attention, p) if p else attention
            out = attention @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, p)
        out = F.linear(out.transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias).transpose(0, 1)  # [L, B, E]
        if not need_weights:
            return out, None
        return out, attention.mean(1) if average_attn_weights else attention


def _project(query: Tensor, key: Tensor, value: Tensor, weight: Any, bias: Tensor | None) -> Any:
    q, k, v = (x.transpose(0, 1) for x in (query, key, value))
    if isinstance(weight, Tensor) and query is key and key is value:
        return F.linear(q, weight, bias).chunk(3, -1)
    weights = weight.chunk(3) if isinstance(weight, Tensor) else weight
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return tuple(F.linear(x, w, b) for x, w, b in zip((q, k, v), weights, biases, strict=True))


def _additive(
    attn_mask: Tensor | None, padding: Tensor | None, B: int, heads: int, S: int, like: Tensor
) -> Tensor | None:
    """Return the sum of both masks, ``[B or 1, H or 1, L or 1, S]``, to be added to the scores.

    Args:
        S: the number of keys, including bias_k and the zero key.
    """
    total: Tensor | None = None
    if attn_mask is not None:  # [L, S] or [B H, L, S]
        total = _scores(attn_mask, S, like)
        if total.dim() == 3:
            total = total.unflatten(0, (B, heads))
    if padding is not None:  # [B, S]
        ignored = _scores(padding, S, like)[:, None, None]
        total = ignored if total is None else total + ignored
    return total


def _scores(mask: Tensor, S: int, like: Tensor) -> Tensor:
    """Return a mask as terms of the scores, padded with zeros to S keys."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -torch.inf)
    return F.pad(mask, (0, S - mask.shape[-1]))
