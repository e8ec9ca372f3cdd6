"""Check the cluster gradients of every denoiser that diffusers exports, on the corpus of denoiser_cases.py.

The rows of ``ClusterGradients(model, K, route="grouped")`` are compared with plain backward passes on the samples of
each cluster. benchmarks/results/coverage_cpu.csv holds the results, docs/coverage_table.py makes a table of them, and
test_denoisers.py checks that they still hold.

python tests/denoisers.py --sweep                        # every case and every variant, ten minutes on one core
python tests/denoisers.py --sweep --csv PATH             # the same, and write the results
python tests/denoisers.py --sweep --only Flux LTX        # the cases whose names contain one of the words; with --csv
                                                         # their rows are replaced, and the others are kept
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import math
import re
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from denoiser_cases import CASES, LEFT_OUT, B, Case, spread
from tolerances import UNIT_ROUNDOFF
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from antdiff import ClusterGradients
from antdiff.gradients import GroupingError

K = 3
CLUSTER = torch.tensor([2, 0, 1, 0, 1, 0])  # sizes 3, 2 and 1, not sorted
assert len(CLUSTER) == B
RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "coverage_cpu.csv"

# The largest error of an exact case, by the least precise dtype in it. Both sides compute the same products and add
# them in another order. A row is compared on the scale FLOOR at least, so a gradient whose terms cancel shows up to
# 1 / FLOOR roundings of its terms, times 8 for the layers that it passes: 8000 u, with u as in tolerances.py. Under
# autocast the gradients of a network are as far from each other as they are from those of float32; see ``check``.
EXACT = {"float64": 8000 * UNIT_ROUNDOFF[torch.float64], "float32": 8000 * UNIT_ROUNDOFF[torch.float32]}
# A row is compared on the scale of its norm, or of this share of the largest row of any parameter if it is smaller:
# the gradient of the bias of an attention key, for example, is zero up to rounding.
FLOOR = 1e-3
FLOOR_AUTOCAST = 5e-2  # smaller gradients are mostly rounding in bfloat16
# Plain gradients of a sub-batch and of the masked batch differ by more than this many bounds where samples depend on
# each other.
MIXES = 10

LossFn = Callable[[dict[str, Tensor]], Tensor]


@dataclasses.dataclass
class Result:
    """What was found for one case or variant.

    Attributes:
        name, model, variant: the case, its class, and the variant ("" for the case itself).
        precision: the least precise dtype of a tensor that takes part in the gradient.
        parameters: the number of trainable numbers.
        outcome: of route ``grouped``: exact, refused, wrong, or fails (another error).
        mixing: the largest difference of the plain gradients of a sub-batch and of the batch.
        error, where: the largest error of a row of a parameter, and that parameter.
        verify: what ``verify()`` does on route ``grouped``: "passes" or "raises".
        auto, auto_error: the route that ``auto`` takes, and its largest error.
        reason: the message of the error or of verify() where the outcome is not exact.
        seconds: the time of the whole check.
    """

    name: str
    model: str
    variant: str
    precision: str
    parameters: int
    outcome: str
    mixing: float
    error: float
    where: str
    verify: str
    auto: str
    auto_error: float
    reason: str
    seconds: float


FIELDS = [field.name for field in dataclasses.fields(Result)]


class Precision(TorchFunctionMode):
    """Note the least precise floating-point dtype of results that require a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.is_floating_point() and out.numel() > 1 and out.requires_grad:
            self.seen.add(out.dtype)
        return out

    def least(self) -> str:
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            if dtype in self.seen:
                return str(dtype).removeprefix("torch.")
        return "float64"


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor | None]:
    """Return the gradients of a plain backward pass, zeros where a parameter has none, None where it is frozen."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    found = [
        None if not p.requires_grad else torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()
    ]
    model.zero_grad(set_to_none=True)
    return found


Rows = list[list[Tensor | None]]  # K lists of a gradient per parameter


def by_hand(model: nn.Module, loss_fn: LossFn, batch: dict[str, Tensor], *, masked: bool) -> Rows:
    """Return the gradient of each cluster's mean loss, from its samples alone or, if ``masked``, from the batch."""
    rows = []
    for i in range(K):
        index = (i == CLUSTER).nonzero()[:, 0]
        if masked:
            loss = loss_fn(batch)[index].mean()
        else:
            loss = loss_fn({name: x[index] for name, x in batch.items()}).mean()
        rows.append(gradients(model, loss))
    return rows


def worst(model: nn.Module, got: Rows, want: Rows, floor: float = FLOOR) -> tuple[float, str]:
    """Return the largest relative error of a row of a parameter, and the name of that parameter."""
    error, where = 0.0, ""
    largest = max(float(torch.linalg.vector_norm(w.double())) for row in want for w in row if w is not None)
    for got_row, want_row in zip(got, want, strict=True):
        for (name, _), g, w in zip(model.named_parameters(), got_row, want_row, strict=True):
            if g is None or w is None:
                assert g is None, name
                assert w is None, name
                continue
            gap = float(torch.linalg.vector_norm(g.double() - w.double()))
            relative = gap / max(float(torch.linalg.vector_norm(w.double())), floor * largest)
            if not relative <= error:  # also if it is NaN
                error, where = relative if relative == relative else math.inf, name
    return error, where


def rows_of(jacobian: Any) -> Rows:
    return [[None if j is None else j[i].clone() for j in jacobian.rows] for i in range(K)]


# ---- variants --------------------------------------------------------------------------------------------------------


class Lora(nn.Module):
    """A frozen linear layer with a trainable product of two small matrices beside it, as peft makes it."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        g = torch.Generator().manual_seed(base.in_features)
        self.a = nn.Linear(base.in_features, rank, bias=False, dtype=base.weight.dtype)
        self.b = nn.Linear(rank, base.out_features, bias=False, dtype=base.weight.dtype)
        with torch.no_grad():
            for p in (self.a.weight, self.b.weight):
                p.copy_(0.3 * torch.randn(p.shape, generator=g, dtype=torch.float64))

    def __getattr__(self, name: str) -> Any:
        """Show the weight and the sizes of the layer, which models read."""
        if name in ("weight", "bias", "in_features", "out_features"):
            return getattr(super().__getattr__("base"), name)
        return super().__getattr__(name)

    def forward(self, input: Tensor) -> Tensor:
        return self.base(input) + 0.5 * self.b(self.a(input))


def with_lora(model: nn.Module) -> None:
    model.requires_grad_(False)
    for module in list(model.modules()):
        if isinstance(module, Lora):
            continue
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, Lora(child))


def with_frozen_parts(model: nn.Module) -> None:
    """Train attention only, or every second parameter where no parameter says that it belongs to attention."""
    names = [name for name, _ in model.named_parameters()]
    attention = [name for name in names if "attn" in name or "attention" in name] or names[::2]
    for name, p in model.named_parameters():
        p.requires_grad_(name in attention)


def with_dropout(model: nn.Module) -> None:
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.p = 0.3


def with_channels_last(model: nn.Module) -> None:
    for p in model.parameters():
        if p.dim() == 4:  # weights of 3-D convolutions have another format
            p.data = p.data.contiguous(memory_format=torch.channels_last)


VARIANTS: dict[str, Callable[[Any], Any]] = {
    "checkpointing": lambda model: model.enable_gradient_checkpointing(),
    "bfloat16 autocast": lambda model: None,
    "LoRA": with_lora,
    "fused projections": lambda model: model.fuse_qkv_projections(),
    "channels_last": with_channels_last,
    "dropout": with_dropout,
    "frozen parts": with_frozen_parts,
    "own initialisation": lambda model: None,
}


# Variants that a class seems to offer, and that do not run without antdiff either.
_NO_KEYWORDS = "diffusers passes keyword arguments that its checkpoint does not take"
_NO_FLEX = "torch has no backward of flex_attention on a CPU, and the recomputation does not see its replacement"
_NO_FUSION = "diffusers cannot fuse the projections of this attention"
_NO_AUTOCAST = "diffusers writes bfloat16 into a float32 tensor, or the other way round"
NOT_OFFERED = {
    ("AnyFlowFARTransformer3DModel", "checkpointing"): _NO_FLEX,
    ("Cosmos3OmniTransformer", "bfloat16 autocast"): _NO_AUTOCAST,
    ("DreamLiteUNetModel", "fused projections"): _NO_FUSION,
    ("HunyuanImageTransformer2DModel", "checkpointing"): _NO_KEYWORDS,
    ("Kandinsky5Transformer3DModel", "fused projections"): _NO_FUSION,
    ("Kandinsky6SRTransformer3DModel", "checkpointing"): _NO_FLEX,
    ("Kandinsky6SRTransformer3DModel", "fused projections"): _NO_FUSION,
    ("Kandinsky6Transformer3DModel", "fused projections"): _NO_FUSION,
    ("LTX2VideoTransformer3DModel", "fused projections"): _NO_FUSION,
    ("PRXTransformer2DModel", "fused projections"): _NO_FUSION,
    ("SanaWMLTX2RefinerTransformer3DModel", "fused projections"): _NO_FUSION,
    ("T2IAdapter", "LoRA"): "it has no linear layer",
    ("UVit2DModel", "checkpointing"): _NO_KEYWORDS,
    ("WanAnimate2Transformer3DModel", "checkpointing"): _NO_KEYWORDS,
    ("ZImageControlNetModel", "bfloat16 autocast"): _NO_AUTOCAST,
}


def applies(case: Case, variant: str) -> bool:
    """Return whether a variant is checked for a case: for the first case of each class that offers it.

    The choice that ``auto`` makes on untrained weights is checked for each case.
    """
    first = next(c for c in CASES if c.model == case.model) is case
    model = case.model_class()
    if (case.model, variant) in NOT_OFFERED:
        return False
    if variant == "own initialisation":
        return True
    if variant == "checkpointing":
        return first and getattr(model, "_supports_gradient_checkpointing", False)
    if variant == "fused projections":
        return first and hasattr(model, "fuse_qkv_projections")
    if variant == "channels_last":
        return first and "UNet" in case.model and "1D" not in case.model
    return first and not case.model.startswith("Multi") and "Multi" not in case.model


def variants_of(case: Case) -> list[str]:
    return ["", *(variant for variant in VARIANTS if applies(case, variant))]


def prepared(case: Case, variant: str) -> tuple[nn.Module, dict[str, Tensor], LossFn]:
    dtype = torch.float32 if variant == "bfloat16 autocast" else case.dtype
    model, batch = case.build(dtype), case.batch(dtype)
    if variant:
        VARIANTS[variant](model)
    plain = case.loss_fn(model, dtype)
    if variant == "channels_last":
        batch = {k: x.to(memory_format=torch.channels_last) if x.dim() == 4 else x for k, x in batch.items()}
    if variant != "bfloat16 autocast":
        return model, batch, plain

    def autocast(batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return plain(batch)

    return model, batch, autocast


# ---- the check -------------------------------------------------------------------------------------------------------


def blank(case: Case, variant: str, precision: str, parameters: int) -> Result:
    nan = math.nan
    return Result(case.name, case.model, variant, precision, parameters, "", nan, nan, "", "", "", nan, "", 0.0)


def one_line(text: str) -> str:
    """Return the text on one line and without addresses of memory, so that it is the same in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", " ".join(text.split()))


def trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def check_own_initialisation(case: Case) -> Result:
    """Let ``auto`` choose on the weights that the class initialises, move the weights, and compare its rows then.

    The outcome is that of ``auto``, and the error that of the second call.
    """
    start = time.perf_counter()
    model, batch = case.initial(torch.float32), case.batch(torch.float32)
    loss_fn = case.loss_fn(model, torch.float32)
    result = blank(case, "own initialisation", "float32", trained(model))
    cluster_gradients = ClusterGradients(model, K)
    try:
        cluster_gradients(loss_fn, (batch,), CLUSTER)
        result.auto = cluster_gradients.explain().split("'")[1]
        spread(model)
        masked = by_hand(model, loss_fn, batch, masked=True)
        want = by_hand(model, loss_fn, batch, masked=False)
        result.mixing, _ = worst(model, masked, want)
        if result.auto == "loop" or result.mixing > MIXES * EXACT["float32"]:
            want = masked
        result.error, result.where = worst(model, rows_of(cluster_gradients(loss_fn, (batch,), CLUSTER)), want)
        result.auto_error = result.error
        result.outcome = "exact" if result.error <= EXACT["float32"] else "wrong"
        result.reason = "" if result.outcome == "exact" else f"auto: {cluster_gradients.explain()}"
    except GroupingError as error:
        result.outcome, result.reason = "refused", str(error)
    except Exception as error:
        result.outcome, result.reason = "fails", f"{type(error).__name__}: {error}"
    result.reason = one_line(result.reason)
    result.seconds = time.perf_counter() - start
    return result


def check(case: Case, variant: str = "", *, auto: bool = True) -> Result:
    """Compare ``grouped`` with plain backward passes, and say what ``verify()`` and ``auto`` make of the case."""
    if variant == "own initialisation":
        return check_own_initialisation(case)
    start = time.perf_counter()
    model, batch, loss_fn = prepared(case, variant)
    random = variant == "dropout"
    if random:  # the batch in the order of its clusters, so that each sample meets the same random numbers
        order = torch.argsort(CLUSTER, stable=True)
        batch = {name: x[order] for name, x in batch.items()}
    cluster = CLUSTER.sort().values if random else CLUSTER

    def seeded(x: dict[str, Tensor]) -> Tensor:
        if random:
            torch.manual_seed(5)
        return loss_fn(x)

    with Precision() as seen:
        losses = seeded(batch)
    assert losses.shape == (B,)
    assert losses.isfinite().all()
    result = blank(case, variant, seen.least(), trained(model))
    if random:
        masked = [gradients(model, seeded(batch)[cluster == i].mean()) for i in range(K)]
        want = masked
    else:
        masked = by_hand(model, loss_fn, batch, masked=True)
        want = by_hand(model, loss_fn, batch, masked=False)
    if variant == "bfloat16 autocast":  # as near to plain autocast as that is to float32, within a factor of two
        floor = FLOOR_AUTOCAST
        precise = by_hand(model, case.loss_fn(model, torch.float32), batch, masked=False)
        bound = max(10 * UNIT_ROUNDOFF[torch.bfloat16], 2 * worst(model, want, precise, floor)[0])
    elif result.precision == "bfloat16":  # the class itself computes a part under autocast
        floor, bound = FLOOR_AUTOCAST, 10 * UNIT_ROUNDOFF[torch.bfloat16]
    else:
        floor, bound = FLOOR, EXACT[result.precision]
    result.mixing, where = worst(model, masked, want, floor)
    if result.mixing > MIXES * bound:  # then the gradients of the batch are the definition
        result.reason = f"samples depend on each other in {where}. "
        want = masked
    try:
        torch.manual_seed(5)
        got = rows_of(ClusterGradients(model, K, "grouped")(loss_fn, (batch,), cluster))
        result.error, result.where = worst(model, got, want, floor)
        result.outcome = "exact" if result.error <= bound else "wrong"
    except GroupingError as error:
        result.outcome = "refused"
        result.reason += str(error)
    except Exception as error:
        result.outcome = "fails"
        result.reason += f"{type(error).__name__}: {error}"
    if result.outcome == "exact" and not auto:
        result.seconds = time.perf_counter() - start
        return result
    try:
        ClusterGradients(model, K, "grouped").verify(loss_fn, (batch,), cluster)
        result.verify = "passes"
    except Exception as error:
        result.verify = "raises"
        if result.outcome != "refused":
            result.reason += f" verify(): {type(error).__name__}: {error}"
    try:
        cluster_gradients = ClusterGradients(model, K)
        torch.manual_seed(5)
        jacobian = cluster_gradients(loss_fn, (batch,), cluster)
        explained = cluster_gradients.explain()
        result.auto = explained.split("'")[1]
        own = masked if result.auto == "loop" else want
        if random and result.auto != "grouped":
            result.auto_error = math.nan  # slices draw other random numbers
        else:
            result.auto_error = worst(model, rows_of(jacobian), own, floor)[0]
        if result.auto != "grouped":
            result.reason += f" auto: {explained}"
    except Exception as error:
        result.auto = f"raises {type(error).__name__}"
        result.reason += f" auto: {type(error).__name__}: {error}"
    result.reason = one_line(result.reason)
    result.seconds = time.perf_counter() - start
    return result


def quiet() -> None:
    """Silence the remarks of diffusers about its own deprecations."""
    import diffusers

    diffusers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")


def sweep(words: Sequence[str], variants: Sequence[str]) -> list[Result]:
    results = []
    for case in CASES:
        if words and not any(word.lower() in case.name.lower() for word in words):
            continue
        for variant in variants:
            if variant not in variants_of(case):
                continue
            try:
                result = check(case, variant)
            except Exception as error:
                reason = one_line(f"{type(error).__name__}: {error}")
                result = blank(case, variant, "", 0)
                result.outcome, result.reason = "not run", reason
            results.append(result)
            label = f"{result.name}{f' [{variant}]' if variant else ''}: {result.outcome} {result.error:.1e}"
            print(f"{label} auto {result.auto} {result.auto_error:.1e} {result.seconds:.1f} s", flush=True)
            if result.outcome != "exact" or result.auto != "grouped":
                print(f"    {result.where} {result.reason}", flush=True)
    return results


def write(path: Path, results: Sequence[Result]) -> None:
    """Write the results in the order of the corpus. Rows of cases that were not run now are kept."""
    rows: dict[tuple[str, str], list[str]] = {}
    if path.exists():
        with path.open(newline="") as file:
            rows = {(row["name"], row["variant"]): list(row.values()) for row in csv.DictReader(file)}
    for r in results:
        values = dataclasses.asdict(r)
        for name in ("mixing", "error", "auto_error"):
            values[name] = f"{values[name]:.1e}"
        values["seconds"] = f"{r.seconds:.2f}"
        rows[r.name, r.variant] = list(values.values())
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(FIELDS)
        for case in CASES:
            for variant in variants_of(case):
                if (case.name, variant) in rows:
                    writer.writerow(rows[case.name, variant])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="run the corpus")
    parser.add_argument("--only", nargs="*", default=(), metavar="WORD", help="only cases whose names contain a word")
    parser.add_argument("--variants", nargs="*", default=["", *VARIANTS], help="only these variants")
    parser.add_argument("--no-variants", action="store_true", help="leave the variants out")
    parser.add_argument("--csv", type=Path, metavar="PATH", help="write the results to this file")
    args = parser.parse_args()
    if not args.sweep:
        parser.error("pass --sweep to run the corpus")
    quiet()
    torch.set_num_threads(1)
    results = sweep(args.only, [""] if args.no_variants else args.variants)
    if args.csv:
        write(args.csv, results)
    counts = {o: sum(r.outcome == o for r in results) for o in sorted({r.outcome for r in results})}
    print(f"{len(results)} checks: {counts}; {len(LEFT_OUT)} exported models are left out")


if __name__ == "__main__":
    main()
