"""The compiled extension, which only antdiff.ops calls.

antdiff.ops documents the functions, allocates their outputs and checks what the extension does not check.
"""

from typing import Literal, TypedDict

from torch import Tensor

class BuildInfo(TypedDict):
    version: str
    compiler: str
    isa: Literal["generic", "avx2", "avx512"]
    supported_isa: Literal["generic", "avx2", "avx512"]
    openmp: bool
    cuda: bool
    cuda_compiler: str
    cuda_archs: str

def build_info() -> BuildInfo: ...
def take_errors(device: int) -> int: ...
def attach(exchange_api: object, tensor_type: type, parameter_type: type) -> None: ...
def cluster_loss_forward(
    pred: Tensor,
    target: Tensor,
    cluster: Tensor,
    weight: Tensor | None,
    k: int,
    kind: str,
    delta: float,
    losses: Tensor,
    counts: Tensor,
    per_sample: Tensor,
    scratch: Tensor | None,
) -> None: ...
def cluster_loss_backward(
    grad_losses: Tensor,
    pred: Tensor,
    target: Tensor,
    cluster: Tensor,
    weight: Tensor | None,
    counts: Tensor,
    kind: str,
    delta: float,
    grad_pred: Tensor,
) -> None: ...
def cluster_loss_and_grad(
    pred: Tensor,
    target: Tensor,
    cluster: Tensor,
    weight: Tensor | None,
    k: int,
    cluster_weight: Tensor | None,
    kind: str,
    delta: float,
    losses: Tensor,
    counts: Tensor,
    per_sample: Tensor,
    scratch: Tensor | None,
    grad_pred: Tensor,
) -> None: ...
def cluster_mean_forward(
    per_sample: Tensor, cluster: Tensor, weight: Tensor | None, k: int, losses: Tensor, counts: Tensor
) -> None: ...
def cluster_loss_tiles(B: int, N: int) -> int: ...
def gram(out: Tensor, J: list[Tensor | None], accumulate: bool, scratch: Tensor | None) -> None: ...
def gram_scratch(k: int, device: int) -> int: ...
def combine(weights: Tensor, J: list[Tensor | None], out: list[Tensor | None]) -> None: ...
def pcgrad_weights(
    gram: Tensor,
    perms: Tensor | None,
    keys: Tensor | None,
    mean: bool,
    poison: bool,
    out: Tensor,
    scratch: Tensor | None,
) -> None: ...
def pcgrad_scratch(n: int, K: int) -> int: ...
def nash_weights(gram: Tensor, poison: bool, out: Tensor, scratch: Tensor | None) -> None: ...
def nash_scratch(n: int, K: int) -> int: ...
def gram_weights(
    gram: Tensor,
    method: str,
    option: float,
    keys: Tensor | None,
    targets: Tensor | None,
    poison: bool,
    out: Tensor,
    scratch: Tensor | None,
) -> None: ...
def gram_weights_scratch(n: int, K: int) -> int: ...
def interval_cost(cost: Tensor, k: int, min_size: int, max_size: int, starts: Tensor, totals: Tensor) -> None: ...
def interval_affinity(
    affinity: Tensor, k: int, min_size: int, max_size: int, starts: Tensor, totals: Tensor
) -> None: ...
def interval_values(
    x: Tensor,
    weight: Tensor | None,
    power: int,
    scan: bool,
    k: int,
    min_size: int,
    max_size: int,
    starts: Tensor,
    totals: Tensor,
) -> None: ...
