"""The table of rules: one rule per torch function.

A rule is called as ``rule(recorder, func, *args, **kwargs)`` instead of an op that applies a parameter to the batch. It
runs the op on detached parameters, so that PyTorch itself computes the output and the gradient of the input. It taps
the output with a function that writes the K weight gradients. It returns NotImplemented for arguments that it does not
support.

To support another op, add a line here. The op needs a formula of its own only if :func:`by_slices`, which reruns its
forward in the backward, is too slow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from antdiff.gradients.grouped import norms, products, tables
from antdiff.gradients.grouped.attention import multi_head_attention
from antdiff.gradients.grouped.broadcast import (
    ELEMENTWISE,
    METADATA,
    assign,
    attention,
    elementwise,
    gather,
    join,
    metadata,
)
from antdiff.gradients.grouped.recorder import Op, Recorder
from antdiff.gradients.grouped.slices import by_slices


class Rule(Protocol):
    def __call__(self, recorder: Recorder, func: Op, /, *args: Any, **kwargs: Any) -> Any: ...


RULES: dict[Op, Rule] = {
    F.linear: products.linear,
    torch.matmul: products.matmul,
    Tensor.matmul: products.matmul,
    Tensor.__matmul__: products.matmul,
    torch.mm: products.matmul,
    Tensor.mm: products.matmul,
    torch.addmm: products.addmm,
    Tensor.addmm: products.addmm,
    torch.einsum: products.einsum,
    F.conv1d: products.convolution,
    F.conv2d: products.convolution,
    F.conv3d: products.convolution,
    F.conv_transpose1d: products.convolution_transpose,
    F.conv_transpose2d: products.convolution_transpose,
    F.conv_transpose3d: products.convolution_transpose,
    F.group_norm: norms.group_norm,
    torch.group_norm: norms.group_norm,
    F.layer_norm: norms.layer_norm,
    torch.layer_norm: norms.layer_norm,
    F.rms_norm: norms.rms_norm,
    torch.rms_norm: norms.rms_norm,
    F.batch_norm: norms.batch_norm,
    F.instance_norm: norms.instance_norm,
    F.embedding: tables.embedding,
    Tensor.__getitem__: tables.getitem,
    torch.index_select: tables.index_select,
    Tensor.index_select: tables.index_select,
    F.multi_head_attention_forward: multi_head_attention,
    F.scaled_dot_product_attention: attention,
    torch.cat: join,
    torch.concat: join,
    torch.concatenate: join,
    torch.stack: join,
    torch.gather: gather,
    Tensor.gather: gather,
    Tensor.__setitem__: assign,
    torch.bmm: products.bmm,
    Tensor.bmm: products.bmm,
    torch.cdist: by_slices,
    F.bilinear: by_slices,
    F.prelu: by_slices,
    torch.prelu: by_slices,
    **dict.fromkeys(METADATA, metadata),
    **dict.fromkeys(ELEMENTWISE, elementwise),
}

# Checks for ops that can mix the samples of a batch, with or without parameters. Each check gets the arguments of every
# call of its op that has a varying argument, and raises if the call mixes samples.
CROSS_SAMPLE: dict[Op, Callable[..., None]] = {
    F.batch_norm: norms.no_batch_statistics,
    torch.batch_norm: lambda x, w, b, mean, var, training, *_: norms.no_batch_statistics(x, training=training),
}
