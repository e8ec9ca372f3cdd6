"""Valid random arguments of every public function, class and method, from which the fuzzer makes bad ones.

:func:`missing` lists the public names without a recipe, so that a new name cannot be forgotten.
"""

from __future__ import annotations

import functools
import inspect
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from fuzz_values import FLOATS, CallbackError
from torch import Tensor, nn

import antdiff
from antdiff import analysis, balancing, companions, diffusion, distributed, gradients, ops, plotting

MODULES = (ops, balancing, gradients, diffusion, companions, analysis, distributed, plotting, antdiff)
# Names that take no arguments of their own, or that are described elsewhere.
EXEMPT = {
    "ops.reference": "the twins, which the fuzzer uses as oracles",
    "balancing.About": "a plain tuple",
    "balancing.Balancer": "a protocol",
    "balancing.DirectionBalancer": "a protocol",
    "balancing.GramBalancer": "abstract; its methods are called on the subclasses",
    "balancing.LossBalancer": "abstract; its methods are called on the subclasses",
    "gradients.BackwardResult": "a plain record",
    "gradients.ClusterJacobian": "a protocol; its methods are called on the results of ClusterGradients",
    "gradients.GroupingError": "an error",
    "gradients.Route": "a type",
    "diffusion.SCHEDULES": "a tuple",
    "analysis.Interval": "a plain tuple",
    "distributed.Cost": "a plain tuple",
    "distributed.LostRankError": "an error",
    "distributed.NonFiniteError": "an error",
    "distributed.Scheme": "a type",
}
Kwargs = dict[str, Any]
RECIPES: dict[str, Callable[[Random], Kwargs]] = {}
METHODS: dict[str, dict[str, Callable[[Random, Any], Kwargs]]] = {}
# Relative frequency; 1 where it is not stated. Slow functions are called less often.
WEIGHTS = {
    "antdiff.ClusterGradients": 0.6,
    "antdiff.BalancedBackward": 0.6,
    "analysis.task_affinity": 0.02,
    "analysis.cluster_conflict": 0.05,
    "analysis.TaskAffinity": 0.3,
    "companions.add_inception": 0.1,
    "companions.InceptionBlock2d": 0.3,
    "companions.InceptionMixer2d": 0.3,
    "distributed.save_checkpoint": 0.02,
    "distributed.load_checkpoint": 0.02,
    "plotting.plot_clusters": 0.02,
    "plotting.new_figure": 0.02,
}


# Arguments that set the amount of work. A large number is a valid request for hours of it, so they stay small.
WORK = {"batches", "repeats", "resamples"}


@functools.cache
def public() -> dict[str, Any]:
    """Return every public function and class by its name, as in ``ops.gram``; each object once."""
    found: dict[str, Any] = {}
    for module in MODULES:
        short = module.__name__.removeprefix("antdiff.")
        for name in module.__all__:
            if module is antdiff and name in ("ClusterGradients", "BalancedBackward", "shared"):
                found.pop(f"gradients.{name}", None)  # found under both names
            thing = getattr(module, name)
            if not inspect.ismodule(thing) or f"{short}.{name}" in EXEMPT:
                found[f"{short}.{name}"] = thing
    return found


@functools.cache
def methods_of(cls: type) -> list[str]:
    """Return the public methods and ``__call__`` that antdiff defines on a class, properties left out."""
    names = []
    for name in dir(cls):
        if name.startswith("_") and name != "__call__":
            continue
        owner = next((c for c in cls.__mro__ if name in vars(c)), None)
        if owner is None or not owner.__module__.startswith("antdiff"):
            continue
        if callable(getattr(cls, name)):
            names.append(name)
    return names


def missing() -> list[str]:
    """Return the public names, ``module.name`` or ``module.Class.method``, that have no recipe and no exemption."""
    without = []
    for name, thing in public().items():
        if name in EXEMPT:
            continue
        if name not in RECIPES:
            without.append(name)
        elif inspect.isclass(thing):
            without += [f"{name}.{m}" for m in methods_of(thing) if m not in METHODS.get(name, {})]
    return without


# ---- values ----------------------------------------------------------------------------------------------------------


def size(rng: Random) -> int:
    return rng.choice([1, 2, 3, 5])


def floats(rng: Random, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def gram_of(rng: Random, k: int, *batch: int) -> Tensor:
    rows = torch.randn(*batch, k, rng.choice([1, 4, 9]), dtype=torch.float64)
    return rows @ rows.mT


def jacobian(rng: Random, k: int, dtype: torch.dtype) -> Any:
    if rng.random() < 0.4:
        return floats(rng, k, rng.choice([1, 7, 40]), dtype=dtype)
    return [floats(rng, k, 2, 3, dtype=dtype), None, floats(rng, k, dtype=dtype), floats(rng, k, 5, dtype=dtype)]


def out_of(rng: Random, J: Any) -> Any:
    if rng.random() < 0.5:
        return None
    if isinstance(J, Tensor):
        return torch.zeros(J.shape[1:], dtype=torch.float32 if J.dtype != torch.float64 else J.dtype)
    return [None if x is None else torch.zeros(x.shape[1:], dtype=x.dtype) for x in J]


def ids(k: int, B: int) -> Tensor:
    return torch.randint(0, k, (B,))


def maybe(rng: Random, value: Any, chance: float = 0.5) -> Any:
    return value if rng.random() < chance else None


def clusters(rng: Random, T: int = 20, k: int | None = None) -> antdiff.TimestepClusters:
    return antdiff.TimestepClusters.uniform(T, k or size(rng))


def generator(rng: Random) -> torch.Generator | None:
    return maybe(rng, torch.Generator().manual_seed(rng.randrange(99)), 0.3)


class Net(nn.Module):
    """A network of one timestep argument that a person may pass to every function here."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        try:
            for block in self.blocks:
                x = block(x, x if c is None else c)
            result: Tensor = self.out(x)
        except Exception as error:  # a person's own network
            raise CallbackError(str(error)) from error
        return result


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        return x + torch.tanh(self.layer(x))


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the caller's own function: what it raises becomes a CallbackError, which is not antdiff's fault."""

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            raise CallbackError(f"{type(error).__name__}: {error}") from error

    return call


# ---- ops -------------------------------------------------------------------------------------------------------------


def recipe(*names: str) -> Callable[[Any], Any]:
    def add(function: Callable[[Random], Kwargs]) -> Callable[[Random], Kwargs]:
        for name in names:
            RECIPES[name] = function
        return function

    return add


RECIPES["ops.check_errors"] = lambda rng: {"device": rng.choice([None, "cpu", torch.device("cpu")])}


def _pair(rng: Random) -> tuple[Kwargs, int, int, torch.dtype]:
    B, k, dtype = rng.choice([0, 1, 4, 9]), size(rng), rng.choice(FLOATS)
    shape = rng.choice([(B, 3), (B, 2, 4, 4), (B,), (B, 20)])
    pred, target = floats(rng, *shape, dtype=dtype), floats(rng, *shape, dtype=dtype)
    if len(shape) == 4 and rng.random() < 0.5:
        pred, target = (x.contiguous(memory_format=torch.channels_last) for x in (pred, target))
    if rng.random() < 0.3:
        pred.requires_grad_()
    return {"pred": pred, "target": target}, B, k, torch.float64 if dtype == torch.float64 else torch.float32


@recipe("ops.cluster_loss")
def _cluster_loss(rng: Random) -> Kwargs:
    pair, B, k, wide = _pair(rng)
    weight = maybe(rng, torch.rand(B, dtype=wide))
    kind, delta = rng.choice(["mse", "huber", "l1"]), rng.choice([1.0, 0.1])
    return {**pair, "cluster": ids(k, B), "k": k, "weight": weight, "kind": kind, "delta": delta}


@recipe("ops.cluster_loss_and_grad")
def _cluster_loss_and_grad(rng: Random) -> Kwargs:
    pair, B, k, wide = _pair(rng)
    pair["pred"] = pair["pred"].detach()
    return {**pair, "cluster": ids(k, B), "k": k, "cluster_weight": maybe(rng, torch.rand(k, dtype=wide)),
            "weight": maybe(rng, torch.rand(B, dtype=wide)), "kind": rng.choice(["mse", "huber", "l1"])}  # fmt: skip


@recipe("ops.cluster_mean")
def _cluster_mean(rng: Random) -> Kwargs:
    B, k, dtype = rng.choice([0, 1, 4, 9]), size(rng), rng.choice(FLOATS)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {"per_sample": floats(rng, B, dtype=dtype), "cluster": ids(k, B), "k": k,
            "weight": maybe(rng, torch.rand(B, dtype=wide))}  # fmt: skip


@recipe("ops.gram")
def _gram(rng: Random) -> Kwargs:
    return {"J": jacobian(rng, size(rng), rng.choice(FLOATS))}


@recipe("ops.gram_")
def _gram_(rng: Random) -> Kwargs:
    k = size(rng)
    return {"out": torch.zeros(k, k, dtype=torch.float64), "J": jacobian(rng, k, rng.choice(FLOATS))}


@recipe("ops.combine")
def _combine(rng: Random) -> Kwargs:
    k = size(rng)
    J = jacobian(rng, k, rng.choice(FLOATS))
    return {"weights": torch.rand(k, dtype=torch.float64), "J": J, "out": out_of(rng, J)}


def _policy(rng: Random) -> Kwargs:
    return {"nonfinite": rng.choice(["raise", "raise", "poison"])}


@recipe("ops.pcgrad_weights")
def _pcgrad_weights(rng: Random) -> Kwargs:
    k = size(rng)
    perms = torch.tensor([rng.sample([j for j in range(k) if j != i], k - 1) for i in range(k)]).reshape(k, k - 1)
    return {"gram": gram_of(rng, k), "perms": maybe(rng, perms.long()), "generator": generator(rng),
            "reduction": rng.choice(["mean", "sum"]), **_policy(rng)}  # fmt: skip


@recipe("ops.pcgrad")
def _pcgrad(rng: Random) -> Kwargs:
    J = jacobian(rng, size(rng), rng.choice(FLOATS))
    return {"J": J, "perms": None, "out": out_of(rng, J), "generator": generator(rng),
            "reduction": rng.choice(["mean", "sum"]), **_policy(rng)}  # fmt: skip


@recipe("ops.nash")
def _nash(rng: Random) -> Kwargs:
    J = jacobian(rng, size(rng), rng.choice(FLOATS))
    return {"J": J, "out": out_of(rng, J), "solver": "newton", **_policy(rng)}


@recipe("ops.nash_weights")
def _nash_weights(rng: Random) -> Kwargs:
    return {"gram": gram_of(rng, size(rng), *rng.choice([(), (3,)])), "solver": "newton", **_policy(rng)}


@recipe("ops.nash_residual")
def _nash_residual(rng: Random) -> Kwargs:
    k = size(rng)
    return {"gram": gram_of(rng, k), "weights": torch.rand(k, dtype=torch.float64)}


@recipe("ops.gram_weights")
def _gram_weights(rng: Random) -> Kwargs:
    method = rng.choice(["upgrad", "dualproj", "aligned_mtl", "mgda", "cagrad", "imtl_g", "config", "fairgrad"])
    return {"gram": gram_of(rng, size(rng), *rng.choice([(), (2,)])), "method": method,
            "parameter": maybe(rng, 0.7) if method in ("cagrad", "fairgrad") else None, "reduction": "mean",
            "precision": maybe(rng, torch.float32), **_policy(rng)}  # fmt: skip


@recipe("ops.gradvac_weights")
def _gradvac_weights(rng: Random) -> Kwargs:
    gram = gram_of(rng, size(rng))
    return {"gram": gram, "targets": torch.zeros_like(gram), "beta": 0.1, "generator": generator(rng),
            "reduction": rng.choice(["mean", "sum"]), **_policy(rng)}  # fmt: skip


RECIPES["ops.precision_of"] = lambda rng: {"gram": gram_of(rng, size(rng))}
RECIPES["ops.with_precision"] = lambda rng: {"gram": gram_of(rng, 2), "*dtypes": [torch.float32, torch.float16]}


def _sizes(rng: Random, T: int) -> Kwargs:
    return {"k": rng.randint(1, min(T, 4)), "min_size": 1, "max_size": maybe(rng, T, 0.3)}


@recipe("ops.interval_partition", "ops.interval_partition_all")
def _interval(rng: Random) -> Kwargs:
    T = rng.choice([1, 5, 12])
    cost = torch.rand(T, T, dtype=torch.float64)
    return {"cost": cost if rng.random() < 0.7 else cost.numpy(), **_sizes(rng, T)}


@recipe("ops.interval_partition_affinity")
def _interval_affinity(rng: Random) -> Kwargs:
    T = rng.choice([1, 5, 12])
    return {"affinity": torch.rand(T, T, dtype=torch.float64), **_sizes(rng, T)}


@recipe("ops.interval_partition_values")
def _interval_values(rng: Random) -> Kwargs:
    T = rng.choice([1, 5, 12])
    x = torch.rand(T, dtype=torch.float64)
    x = x if rng.random() < 0.3 else x.sort().values
    return {"x": x, "p": 2, "weight": maybe(rng, torch.rand(T, dtype=torch.float64)), **_sizes(rng, T)}


# ---- balancing -------------------------------------------------------------------------------------------------------

RECIPES["balancing.get"] = lambda rng: {"name": rng.choice(balancing.names())}
RECIPES["balancing.published"] = lambda rng: {"name": rng.choice(balancing.names())}
RECIPES["balancing.names"] = lambda rng: {}


def _options(name: str) -> Callable[[Random], Kwargs]:
    extra: dict[str, Callable[[Random], Kwargs]] = {
        "PCGrad": lambda rng: {"generator": generator(rng), "seed": 3},
        "GradVac": lambda rng: {"generator": generator(rng), "seed": 3, "beta": 0.1},
        "GradDrop": lambda rng: {"generator": generator(rng), "seed": 3},
        "RandomLossWeighting": lambda rng: {"generator": generator(rng), "seed": 3},
        "NashMTL": lambda rng: {"max_norm": maybe(rng, 1.0), "reduction": "sum", "solver": "newton"},
        "CAGrad": lambda rng: {"c": 0.4},
        "FairGrad": lambda rng: {"alpha": rng.choice([1.0, 2.0])},
        "ConFIG": lambda rng: {"reduction": "mean"},
        "AlignedMTL": lambda rng: {"reduction": "mean"},
        "FAMO": lambda rng: {"lr": 0.02, "weight_decay": 0.01},
        "DynamicWeightAverage": lambda rng: {"temperature": 2.0, "epoch": 2},
        "SmoothTchebycheff": lambda rng: {"mu": 1.0, "warmup": 1, "epoch": 2},
        "UncertaintyWeighting": lambda rng: {"lr": 0.02},
        "IMTLL": lambda rng: {"lr": 0.02},
    }

    def options(rng: Random) -> Kwargs:
        needs = getattr(balancing, name).needs
        common: Kwargs = {"k": size(rng)} if needs == "losses" else {}
        if needs == "gram":
            common = {"update_every": rng.choice([1, 2]), **_policy(rng)}
        return {**common, **extra.get(name, lambda _: {})(rng)}

    return options


def _k_of(rng: Random, balancer: Any) -> int:
    k = getattr(balancer, "k", None)
    return k if isinstance(k, int) and 0 < k < 100 else 3


def _losses(rng: Random, balancer: Any) -> Kwargs:
    losses = torch.rand(_k_of(rng, balancer), dtype=rng.choice([torch.float32, torch.float64]))
    return {"losses": losses.requires_grad_() if rng.random() < 0.3 else losses}


def _counted(rng: Random, balancer: Any) -> Kwargs:
    losses = _losses(rng, balancer)
    return {**losses, "counts": maybe(rng, torch.randint(0, 5, losses["losses"].shape))}


_BALANCER: dict[str, Callable[[Random, Any], Kwargs]] = {
    "reset": lambda rng, b: {},
    "state_dict": lambda rng, b: {},
    "load_state_dict": lambda rng, b: {"state": b.state_dict()},
    "solve": lambda rng, b: {"gram": gram_of(rng, 3)},
    "direction": lambda rng, b: {"rows": jacobian(rng, 3, rng.choice(FLOATS))},
    "weights": lambda rng, b: {"gram": gram_of(rng, 3)} if b.needs == "gram" else _losses(rng, b),
    "observe": _losses,
    "update": _losses,
    "loss": _counted,
    "forward": _counted,
    "param_groups": lambda rng, b: {},
}
for _name in balancing.__all__:
    if f"balancing.{_name}" not in EXEMPT and inspect.isclass(getattr(balancing, _name)):
        RECIPES[f"balancing.{_name}"] = _options(_name)
        METHODS[f"balancing.{_name}"] = _BALANCER

# ---- timesteps -------------------------------------------------------------------------------------------------------


def _k_and_steps(rng: Random) -> tuple[int, int]:
    T = rng.choice([5, 12, 30])
    return rng.randint(1, 5), T


@recipe("antdiff.TimestepClusters")
def _timestep_clusters(rng: Random) -> Kwargs:
    k, T = _k_and_steps(rng)
    starts = [0, *sorted(rng.sample(range(1, T), k - 1))]
    edges = [0.1 * (i + 1) for i in range(k - 1)]
    return {"T": T, "starts": starts if rng.random() < 0.6 else torch.tensor(starts), "edges": maybe(rng, edges)}


def _from_values(name: str, values: Callable[[Random, int], Tensor]) -> Callable[[Random, Any], Kwargs]:
    def arguments(rng: Random, _: Any) -> Kwargs:
        k, T = _k_and_steps(rng)
        dtype = rng.choice([torch.float32, torch.float64])
        weight = maybe(rng, torch.rand(T) + 0.1, 0.3)
        return {name: values(rng, T).to(dtype), "k": k, "p": rng.choice([1, 2]), "weight": weight, "min_size": 1,
                "max_size": maybe(rng, T)}  # fmt: skip

    return arguments


def _from_square(name: str) -> Callable[[Random, Any], Kwargs]:
    def arguments(rng: Random, _: Any) -> Kwargs:
        k, T = _k_and_steps(rng)
        return {name: torch.rand(T, T, dtype=torch.float64), "k": k, "min_size": 1, "max_size": None}

    return arguments


def _folder(name: str) -> str:
    folder = Path(tempfile.gettempdir()) / "antdiff-fuzz"
    folder.mkdir(exist_ok=True)
    return str(folder / name)


def _saved(thing: Any, name: str) -> str:
    path = _folder(name)
    thing.save(path)
    return path


METHODS["antdiff.TimestepClusters"] = {
    "uniform": lambda rng, c: dict(zip(("k", "T"), _k_and_steps(rng), strict=True)),
    "from_log_snr": _from_values("log_snr", lambda rng, T: torch.randn(T).sort(descending=True).values),
    "from_sigmas": _from_values("sigmas", lambda rng, T: torch.linspace(0.01, 80, T)),
    "from_affinity": _from_square("tas"),
    "from_cost": _from_square("cost"),
    "from_quantiles": lambda rng, c: {
        "k": size(rng), "distribution": rng.choice(["lognormal", "logit-normal", "uniform"]), "mean": -1.2, "std": 1.2,
        "T": 12,
    },
    "cluster_of": lambda rng, c: {
        "t": rng.choice([0, torch.randint(0, c.T, (4,)), torch.randint(0, c.T, (2, 2)).numpy(), 0.2])
    },
    "save": lambda rng, c: {"path": _folder("clusters.json")},
    "load": lambda rng, c: {"path": _saved(clusters(rng), "clusters.json")},
}  # fmt: skip

RECIPES["antdiff.StratifiedTimesteps"] = lambda rng: {
    "clusters": clusters(rng), "importance": rng.random() < 0.5, "seed": maybe(rng, 3), "group": maybe(rng, "local")
}  # fmt: skip
RECIPES["antdiff.UniformTimesteps"] = lambda rng: {"clusters": clusters(rng)}


def _draw(rng: Random, _: Any) -> Kwargs:
    return {"B": rng.choice([1, 4, 9]), "device": maybe(rng, "cpu"), "generator": generator(rng)}


METHODS["antdiff.StratifiedTimesteps"] = {
    "sample": _draw,
    "shares": lambda rng, s: {"B": 7},
    "counts": lambda rng, s: {"B": rng.choice([7, [7]])},
    "state_dict": lambda rng, s: {},
    "load_state_dict": lambda rng, s: {"state": s.state_dict()},
}
METHODS["antdiff.UniformTimesteps"] = {
    name: METHODS["antdiff.StratifiedTimesteps"][name] for name in ("sample", "state_dict", "load_state_dict")
}

# ---- diffusion -------------------------------------------------------------------------------------------------------

RECIPES["diffusion.betas"] = lambda rng: {"name": rng.choice(["linear", "cosine", "ldm", "sd"]), "T": 100}
RECIPES["diffusion.log_snr"] = lambda rng: {"schedule": rng.choice(diffusion.SCHEDULES), "T": maybe(rng, 100)}
RECIPES["diffusion.log_snr_from_betas"] = lambda rng: {"betas": torch.linspace(1e-4, 0.1, 9)}
RECIPES["diffusion.log_snr_from_alphas_cumprod"] = lambda rng: {"alphas_cumprod": torch.linspace(0.99, 0.0, 9)}
RECIPES["diffusion.log_snr_from_sigmas"] = lambda rng: {"sigmas": torch.linspace(0.01, 80, 9)}
RECIPES["diffusion.log_snr_from_flow"] = lambda rng: {"tau": torch.linspace(0.01, 1, 9)}


def _snr_weight(**options: Any) -> Callable[[Random], Kwargs]:
    return lambda rng: {
        "log_snr": torch.linspace(9, -9, 7, dtype=rng.choice(FLOATS)),
        "prediction": rng.choice(["epsilon", "x0", "v"]),
        **options,
    }


RECIPES["diffusion.min_snr"] = _snr_weight(gamma=5.0)
RECIPES["diffusion.truncated_snr"] = _snr_weight()
RECIPES["diffusion.p2"] = _snr_weight(k=1.0, gamma=1.0)
RECIPES["diffusion.edm"] = lambda rng: {"sigma": torch.rand(2, 3) + 0.01, "sigma_data": 0.5}
RECIPES["diffusion.NoiseLevelUncertainty"] = lambda rng: {"channels": 8, "generator": generator(rng)}
METHODS["diffusion.NoiseLevelUncertainty"] = {
    "u": lambda rng, m: {"log_sigma": torch.randn(4)},
    "forward": lambda rng, m: {"per_sample": torch.rand(4), "log_sigma": torch.randn(4)},
}

# ---- companions ------------------------------------------------------------------------------------------------------


def _pacing(rng: Random) -> Kwargs:
    return {"patience": 2, "steps_per_stage": maybe(rng, 2), "order": rng.choice(["easy-first", "hard-first"]),
            "smoothing": rng.choice([0.0, 0.5]), "group": None, "device": maybe(rng, "cpu")}  # fmt: skip


def _curriculum(rng: Random) -> companions.Curriculum:
    return companions.Curriculum(clusters(rng), **_pacing(rng))


RECIPES["companions.Curriculum"] = lambda rng: {"clusters": clusters(rng), **_pacing(rng)}
RECIPES["companions.SigmaCurriculum"] = lambda rng: {"p_mean": -1.2, "p_std": 1.2, "n": 4, **_pacing(rng)}
_PACING: dict[str, Callable[[Random, Any], Kwargs]] = {
    "sample": _draw,
    "update": lambda rng, c: {"loss": rng.choice([0.5, torch.tensor(0.4), torch.rand(1)])},
    "state_dict": lambda rng, c: {},
    "load_state_dict": lambda rng, c: {"state": c.state_dict()},
    "check_device": lambda rng, c: {"device": maybe(rng, "cpu")},
}
METHODS["companions.SigmaCurriculum"] = _PACING
METHODS["companions.Curriculum"] = {
    **_PACING,
    "from_log_snr": lambda rng, c: {"log_snr": torch.linspace(9, -9, 20), "n": 4, **_pacing(rng)},
    "uniform": lambda rng, c: {"T": 20, "n": 4, **_pacing(rng)},
    "edm": lambda rng, c: {"p_mean": -1.2, "p_std": 1.2, "n": 4, **_pacing(rng)},
    "restrict": lambda rng, c: {
        "sampler": rng.choice([antdiff.StratifiedTimesteps, antdiff.UniformTimesteps])(clusters(rng, c.T))
    },
}
RECIPES["companions.RestrictedTimesteps"] = lambda rng: {
    "curriculum": _curriculum(rng),
    "sampler": rng.choice([antdiff.StratifiedTimesteps, antdiff.UniformTimesteps])(clusters(rng)),
}
METHODS["companions.RestrictedTimesteps"] = METHODS["antdiff.UniformTimesteps"]

RECIPES["companions.SoftIntervalSampler"] = lambda rng: {
    "n_experts": 4, "p": rng.choice([(0.8, 0.4, 0.2, 0.1), [1, 0, 1, 0.5]]), "T": 20,
    "clusters": maybe(rng, clusters(rng, 20, 4)),
}  # fmt: skip
METHODS["companions.SoftIntervalSampler"] = {
    "sample": lambda rng, s: {"expert": rng.randrange(len(s.p)), **_draw(rng, s)},
    "density": lambda rng, s: {"expert": rng.randrange(len(s.p))},
}
RECIPES["companions.ExpertBank"] = lambda rng: {
    "experts": [Net() for _ in range(3)], "T": 12, "clusters": maybe(rng, clusters(rng, 12, 3))
}  # fmt: skip
METHODS["companions.ExpertBank"] = {
    "expert_for": lambda rng, b: {"t": 3},
    "offload": lambda rng, b: {"device": "cpu", "home": "cpu"},
    "expert": lambda rng, b: {"i": 1},
    "forward": lambda rng, b: {"x": torch.randn(5, 4), "t": rng.choice([3, torch.randint(0, 12, (5,))])},
}
RECIPES["companions.InceptionMixer2d"] = lambda rng: {"dim": 8, "high_ratio": 0.4, "head_dim": 2, "pool": 2}
RECIPES["companions.InceptionBlock2d"] = lambda rng: {
    "dim": 8, "high_ratio": 0.4, "head_dim": 2, "mlp_ratio": 2, "groups": 4
}  # fmt: skip
METHODS["companions.InceptionMixer2d"] = {"forward": lambda rng, m: {"x": torch.randn(2, 8, 5, 4)}}
METHODS["companions.InceptionBlock2d"] = METHODS["companions.InceptionMixer2d"]
RECIPES["companions.high_ratio_schedule"] = lambda rng: {"expert": 1, "stage": 2, "n_experts": 4, "n_stages": 4}
RECIPES["companions.edm_rank"] = lambda rng: {"p_mean": -1.2, "p_std": 1.2}
RECIPES["companions.start_table"] = lambda rng: {"channels": 16, "T": 50, "alpha": 4.0, "beta": 0.8}


class Stage(nn.Module):
    """What add_inception needs of a stage of a UNet."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Conv2d(16, 16, 1)
        layer.out_channels, layer.norm2 = 16, nn.GroupNorm(4, 16)
        self.resnets = nn.ModuleList([layer])


class Stages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleList([Stage(), Stage()])


RECIPES["companions.add_inception"] = lambda rng: {
    "unet": Stages(), "expert": 1, "n_experts": 4, "head_dim": maybe(rng, 2)
}  # fmt: skip
RECIPES["companions.route"] = lambda rng: {
    "block": guarded(lambda x, *args, **kwargs: 2 * x), "x": torch.randn(3, 4), "mask": torch.rand(3, 4) > 0.5
}  # fmt: skip


@recipe("companions.ChannelRouting")
def _routing(rng: Random) -> Kwargs:
    net = Net()
    return {"model": net, "T": 20, "alpha": 4.0, "beta": 0.8, "mode": rng.choice(["window", "random"]), "rank": None,
            "blocks": [(block, 4) for block in net.blocks], "channel_dim": -1, "generator": generator(rng)}  # fmt: skip


METHODS["companions.ChannelRouting"] = {
    "mask": lambda rng, r: {"t": rng.choice([3, torch.tensor([1, 5])]), "channels": 4, "block": 0},
    "remove": lambda rng, r: {},
}
RECIPES["companions.MixtureOfPrompts"] = lambda rng: {
    "depth": 2, "n_tokens": 3, "dim": 4, "cond_dim": maybe(rng, 4), "k": maybe(rng, 2), "noisy": rng.random() < 0.5,
    "generator": generator(rng), "balancing": rng.choice(["corrected", "published"]),
}  # fmt: skip
METHODS["companions.MixtureOfPrompts"] = {
    "forward": lambda rng, m: {"i": 1, "x": torch.randn(2, 3, 4), "cond": torch.randn(2, 4)},
    "gates": lambda rng, m: {"i": 1, "cond": torch.randn(2, 4)},
    "reset": lambda rng, m: {},
    "auxiliary_losses": lambda rng, m: {},
    "balancing_loss": lambda rng, m: {},
    "param_groups": lambda rng, m: {"lr": 1e-4, "gate_factor": 10.0},
    "inference_table": lambda rng, m: {"conds": torch.randn(2, 4)},
}


def _patched() -> nn.Module:
    return companions.patch_dit(Net(), companions.MixtureOfPrompts(2, 3, 4))


RECIPES["companions.patch_dit"] = lambda rng: {
    "model": Net(), "prompts": companions.MixtureOfPrompts(2, 3, 4), "freeze": rng.random() < 0.5, "condition": None
}  # fmt: skip
RECIPES["companions.save_patch"] = lambda rng: {"model": _patched()}
RECIPES["companions.unpatch"] = lambda rng: {"model": _patched()}

# ---- analysis --------------------------------------------------------------------------------------------------------

RECIPES["analysis.student_interval"] = lambda rng: {"values": torch.rand(4, 3).double(), "confidence": 0.95}
RECIPES["analysis.module_groups"] = lambda rng: {"model": Net()}
RECIPES["analysis.epsilon_loss"] = lambda rng: {"log_snr": torch.linspace(9, -9, 20)}
RECIPES["analysis.TransferGap"] = lambda rng: {
    "joint": torch.rand(3, 4), "specialist": torch.rand(3, 4), "budget": rng.choice(["iterations", "samples"])
}  # fmt: skip
METHODS["analysis.TransferGap"] = {"verdicts": lambda rng, g: {}}
RECIPES["analysis.Conflict"] = lambda rng: {
    name: torch.rand(2, 3, 3).double() for name in ("cosine", "batch_cosine", "rate")
}
METHODS["analysis.Conflict"] = {name: lambda rng, c: {} for name in ("share", "expected", "conflicting_pairs")}


@recipe("analysis.TaskAffinity")
def _task_affinity(rng: Random) -> Kwargs:
    n = 4
    square, flat = torch.rand(1, n, n).double(), torch.rand(1, n).double()
    return {"affinity": square[0], "timesteps": torch.tensor([0, 3, 6, 9]), "log_snr": torch.linspace(9, -9, 10),
            "raw": square[0], "checkpoints": square, "products": flat, "signal": flat, "layers": square,
            "layer_names": ("all",), "stats": {"n": n}}  # fmt: skip


METHODS["analysis.TaskAffinity"] = {
    "full": lambda rng, a: {},
    "clusters": lambda rng, a: {"k": 2, "min_size": 1, "max_size": None},
    "gap_correlations": lambda rng, a: {"resamples": 5, "generator": generator(rng)},
    "save": lambda rng, a: {"path": _folder("affinity.npz")},
    "load": lambda rng, a: {"path": _saved(analysis.TaskAffinity(**_task_affinity(rng)), "affinity.npz")},
}
RECIPES["analysis.Telemetry"] = lambda rng: {
    "k": 3, "window": 4, "share": maybe(rng, [1.0, 2.0, 1.0]), "device": "cpu"
}  # fmt: skip
METHODS["analysis.Telemetry"] = {
    "add": lambda rng, t: {
        "losses": torch.rand(3), "counts": torch.tensor([1, 0, 2]), "weights": maybe(rng, torch.rand(3)),
        "gram": maybe(rng, gram_of(rng, 3)),
    },
    "read": lambda rng, t: {},
    "state_dict": lambda rng, t: {},
    "load_state_dict": lambda rng, t: {"state": t.state_dict()},
}  # fmt: skip


def _denoising_loss(model: nn.Module, x0: Tensor, noise: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
    return (model(x0 + noise, t) - noise).square().mean(1)


RECIPES["analysis.task_affinity"] = lambda rng: {
    "model": Net(), "data": torch.randn(4, 4), "timesteps": 3, "log_snr": torch.linspace(9, -9, 20),
    "loss": maybe(rng, guarded(_denoising_loss)), "sketch": rng.choice([None, "auto", 8]), "batch_size": 2,
    "memory": 2**22, "checkpoints": None, "groups": None, "folder": None, "generator": generator(rng),
    "progress": False,
}  # fmt: skip
RECIPES["analysis.cluster_conflict"] = lambda rng: {
    "model": Net(), "data": torch.randn(4, 4), "clusters": clusters(rng, 20, 2), "batch_size": 4, "batches": 2,
    "log_snr": torch.linspace(9, -9, 20), "loss": maybe(rng, guarded(_denoising_loss)), "repeats": 2,
    "generator": generator(rng),
}  # fmt: skip

# ---- gradients -------------------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(x)))
        return out


def _network(rng: Random) -> Kwargs:
    return {"model": Mlp(), "k": 3, "route": rng.choice([None, "grouped", "split", "loop", "auto"]),
            "hold": rng.choice(["jacobian", "jacobian", "gram"]), "scheme": "auto", "group": maybe(rng, "local"),
            "dtype": maybe(rng, torch.float64, 0.1), "separable": (), "compile": None, "nonfinite": "raise",
            "audit": rng.choice([1000, None, 1])}  # fmt: skip


def _batch(rng: Random, engine: Any) -> Kwargs:
    model = engine.model if isinstance(engine, antdiff.ClusterGradients) else engine.gradients.model
    loss = guarded(lambda x, y, *rest: (model(x) - y).square().mean(1))
    cluster = torch.tensor([0, 0, 1, 2, 2])
    return {"loss_fn": loss, "batch": (torch.randn(5, 3), torch.randn(5, 2)), "cluster": cluster,
            "counts": maybe(rng, [2, 1, 2]), "in_dims": maybe(rng, 0, 0.2)}  # fmt: skip


RECIPES["antdiff.ClusterGradients"] = _network
METHODS["antdiff.ClusterGradients"] = {
    "__call__": lambda rng, g: {**_batch(rng, g), "scaler": None},
    "accumulate": lambda rng, g: {**_batch(rng, g), "scaler": None},
    "record": lambda rng, g: {**{k: v for k, v in _batch(rng, g).items() if k != "in_dims"}, "scaler": None},
    "verify": _batch,
    "unsynchronised": lambda rng, g: {},
    "nbytes": lambda rng, g: {},
    "explain": lambda rng, g: {},
    "check": lambda rng, g: {},
}  # fmt: skip


@recipe("antdiff.BalancedBackward")
def _balanced(rng: Random) -> Kwargs:
    name = rng.choice(["pcgrad", "upgrad", "nash", "graddrop", "uw", "linear", "famo"])
    cls = balancing.get(name)
    balancer = cls(3) if cls.needs == "losses" and name != "linear" else cls()
    return {**_network(rng), "balancer": balancer, "scaler": None, "micro_batch": maybe(rng, 2, 0.3),
            "skip_unused": False, "hold": "jacobian"}  # fmt: skip


METHODS["antdiff.BalancedBackward"] = {"__call__": _batch}
RECIPES["antdiff.shared"] = lambda rng: {"value": torch.rand(3)}
# Methods of what other calls return; the driver finds them by the type of the result.
RESULTS: dict[str, dict[str, Callable[[Random, Any], Kwargs]]] = {
    "HeldJacobian": {
        "gram": lambda rng, j: {},
        "combine": lambda rng, j: {"weights": torch.rand(3, dtype=torch.float64)},
        "write": lambda rng, j: {"direction": [None if x is None else x[0].clone() for x in j.rows]},
    },
    "DeferredJacobian": {
        "gram": lambda rng, j: {},
        "combine": lambda rng, j: {"weights": torch.rand(3, dtype=torch.float64)},
    },
}

# ---- several ranks and figures, with one rank ------------------------------------------------------------------------

RECIPES["distributed.contiguous_counts"] = lambda rng: {"shares": [2, 3, 1], "sizes": [4, 2]}
RECIPES["distributed.cost_model"] = lambda rng: {
    "numel": 1000, "k": 4, "world_size": 8, "itemsize": 4, "counts": None, "step": 0.1, "node": 8, "nvlink": 3e11,
    "network": 4e10, "latency": 1e-5,
}  # fmt: skip
RECIPES["distributed.global_losses"] = lambda rng: {
    "losses": torch.rand(3), "counts": torch.tensor([1, 0, 2]), "group": maybe(rng, "local"), "averaged": False,
    "nonfinite": "raise",
}  # fmt: skip
RECIPES["distributed.reduce_gradients"] = lambda rng: {
    "params": rng.choice([Mlp(), list(Mlp().parameters())]), "group": maybe(rng, "local"), "skip_unused": False
}  # fmt: skip
RECIPES["distributed.save_checkpoint"] = lambda rng: {
    "folder": Path(_folder("checkpoints")), "step": 3, "state": {"w": torch.rand(3)}, "group": None
}  # fmt: skip
RECIPES["distributed.load_checkpoint"] = lambda rng: {
    "folder": Path(_folder("checkpoints")), "state": {"w": torch.rand(3)}, "group": None
}  # fmt: skip
RECIPES["plotting.new_figure"] = lambda rng: {"width": 4.0, "height": 3.0, "columns": 1, "rows": 2, "grid": False}
RECIPES["plotting.plot_clusters"] = lambda rng: {
    "clusters": clusters(rng), "log_snr": maybe(rng, torch.linspace(9, -9, 20)), "ax": None
}  # fmt: skip
