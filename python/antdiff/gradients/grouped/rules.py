"""Which rule serves which torch function.

A rule is called as ``rule(recorder, func, *args, **kwargs)`` in place of an op that applies a parameter to the batch.
It runs the op on detached parameters, so that the output and the input's gradient are the framework's own, and taps the
output with a function that writes the K weight gradients. It returns NotImplemented where the arguments are not of a
kind it knows. A new op needs a line here, and a formula only if one more forward of it in the backward costs too much.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from antdiff.gradients.grouped import norms, products, tables
from antdiff.gradients.grouped.attention import multi_head_attention
from antdiff.gradients.grouped.broadcast import ELEMENTWISE, METADATA, attention, elementwise, join, metadata
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
    F.bilinear: by_slices,
    F.prelu: by_slices,
    torch.prelu: by_slices,
    **dict.fromkeys(METADATA, metadata),
    **dict.fromkeys(ELEMENTWISE, elementwise),
}

# Ops that mix the samples of a batch whether or not they have parameters: refused wherever they meet the batch.
CROSS_SAMPLE: dict[Op, Callable[..., None]] = {
    F.batch_norm: norms.no_batch_statistics,
    torch.batch_norm: lambda x, w, b, mean, var, training, *_: norms.no_batch_statistics(x, training=training),
}
