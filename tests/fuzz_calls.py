"""Random bad calls of every public function, class and method: ``python tests/fuzz_calls.py --minutes 60``.

A session makes one call, or builds an object and calls some of its methods. Its arguments are valid ones of
:mod:`fuzz_recipes`, most of them spoiled by :mod:`fuzz_values`. Sessions run in a subprocess with a limit on its
memory, under a watchdog. A call fails if

- the process dies, or the call takes longer than its time or more memory than its limit;
- an error is not TypeError, ValueError, RuntimeError or OSError, was not raised on purpose by antdiff (on a ``raise``
  line, or by its extension), or does not name an argument;
- an argument, or the state of the object, has changed although an error was raised, or an input of a call has changed;
- the result differs from that of the plain PyTorch twin in float64, or breaks a rule of :data:`RULES`.

Each session has a number, from which ``--replay NUMBER`` repeats it. Failures of one kind (same function, error and
line) are reported once, with the smallest set of faults that still shows them.
"""

from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import functools
import inspect
import json
import mmap
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import fuzz_recipes as recipes
import fuzz_values as values
import numpy as np
import tolerances
import torch
from torch import Tensor, nn

import antdiff
from antdiff import ops

SECONDS = 10.0  # processor time of a call
WALL = 90.0  # time without any progress, also while waiting
GROWTH = 512 * 2**20  # bytes by which a call may raise the peak memory of the process
ADDRESSES = 6 * 2**30  # bytes of address space beyond those of the process when it starts
SESSIONS = 50000  # per process, which takes ten seconds to import everything
PACKAGE = str(Path(antdiff.__file__).parent)
ALLOWED = (TypeError, ValueError, RuntimeError, OSError, ImportError)
INTERNALS = ("INTERNAL ASSERT", "incompatible function arguments", "Boolean value of Tensor", "copy out of meta")
SIGNATURE = re.compile(r"missing \d+ required|unexpected keyword|takes (from )?\d+|multiple values|positional-only")


class Failure(Exception):  # noqa: N818  # it is a finding
    """What is wrong with a call, and the place, which identifies its kind."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class Step:
    """One call: the function, its arguments, and the names that an error may mention."""

    def __init__(self, label: str, function: Callable[..., Any], kwargs: dict[str, Any], owner: Any = None) -> None:
        self.label, self.function, self.kwargs, self.owner = label, function, kwargs, owner
        self.spoiled = False

    def __str__(self) -> str:
        arguments = ", ".join(f"{name}={values.describe(x)}" for name, x in self.kwargs.items())
        return f"{self.label}({arguments})"


def seed(rng: Random) -> None:
    torch.default_generator.manual_seed(rng.randrange(2**31))  # torch.manual_seed takes a millisecond


# ---- a session -------------------------------------------------------------------------------------------------------


class Session:
    """The calls of one number. ``keep`` are the faults to make; None makes all of them."""

    def __init__(self, number: int, keep: set[int] | None = None, only: list[str] | None = None) -> None:
        self.number, self.keep = number, keep
        self.rng = Random(f"session {number}")
        names = only or list(recipes.RECIPES)
        weights = [recipes.WEIGHTS.get(name, 1.0) for name in names]
        self.name = self.rng.choices(names, weights)[0]
        self.faults = 0
        self.calls = self.bad = 0
        self.text: list[str] = []

    def run(self) -> None:
        """Make the calls; raise a Failure for the first one that fails."""
        target = recipes.public()[self.name]
        step = self.step(self.name, target, recipes.RECIPES[self.name], fraction=0.3 if self.is_class(target) else 0.85)
        ok, result = self.make(step)
        if not ok or not self.is_class(target):
            return
        methods = recipes.METHODS.get(self.name, {})
        names = [m for m in recipes.methods_of(target) if m in methods]
        for i in range(self.rng.choice([1, 1, 2, 3]) if names else 0):
            name = Random(f"{self.number} method {i}").choice(names)
            self.method(result, self.name, name, methods[name])

    def method(self, owner: Any, class_name: str, name: str, recipe: Callable[..., dict[str, Any]]) -> None:
        function = CALLS.get((class_name, name), functools.partial(lambda owner, name: getattr(owner, name), name=name))
        try:
            step = self.step(f"{class_name}.{name}", function(owner), lambda rng: recipe(rng, owner), owner=owner)
        except Exception:  # an object that was made from odd arguments has no valid call
            return
        ok, result = self.make(step)
        kind = type(result).__name__
        if ok and kind in recipes.RESULTS and not class_name.startswith("result"):
            for each, inner in recipes.RESULTS[kind].items():
                if self.rng.random() < 0.5:
                    self.method(result, f"result.{kind}", each, inner)

    def step(self, label: str, function: Any, recipe: Any, owner: Any = None, fraction: float = 0.85) -> Step:
        rng = Random(f"{self.number} arguments {self.calls}")
        seed(rng)
        step = Step(label, function, recipe(rng), owner)
        names = list(step.kwargs)
        count = rng.choices([1, 2, 3], [70, 23, 7])[0] if rng.random() < fraction else 0
        for name in rng.sample(names, min(count, len(names))):
            self.faults += 1
            if self.keep is not None and self.faults - 1 not in self.keep:
                continue
            own = Random(f"{self.number} fault {self.faults}")
            seed(own)
            if own.random() < 0.02:
                del step.kwargs[name]
            else:
                others = [x for other, x in step.kwargs.items() if other != name]
                value = values.spoil(own, step.kwargs[name], others)
                if name in recipes.WORK and isinstance(value, (int, np.integer)) and value > 8:
                    value = -1
                step.kwargs[name] = value
            step.spoiled = True
        return step

    def make(self, step: Step) -> tuple[bool, Any]:
        self.calls += 1
        self.bad += step.spoiled
        self.text.append(str(step))
        return attempt(step, self.number)

    @staticmethod
    def is_class(target: Any) -> bool:
        return inspect.isclass(target)


def accumulated(owner: Any) -> Callable[..., Any]:
    def accumulate(**arguments: Any) -> Any:
        with owner.accumulate() as total:
            total.add(**arguments)
        return total.jacobian

    return accumulate


def recorded(owner: Any) -> Callable[..., Any]:
    def record(loss_fn: Any = None, batch: Any = (), **arguments: Any) -> Any:
        with owner.record(**arguments) as recording:
            if not callable(loss_fn) or not isinstance(batch, (list, tuple)):
                raise values.CallbackError("the caller's own call")
            return recording.backward(loss_fn(*batch))

    return record


CALLS: dict[tuple[str, str], Callable[[Any], Callable[..., Any]]] = {
    ("antdiff.ClusterGradients", "accumulate"): accumulated,
    ("antdiff.ClusterGradients", "record"): recorded,
}


def attempt(step: Step, number: int) -> tuple[bool, Any]:
    """Make the call. Return whether it succeeded, and its result; raise a Failure if it did something wrong."""
    before, state = snapshot(step.kwargs), state_of(step.owner)
    rng_state = torch.get_rng_state()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    error: BaseException | None = None
    result: Any = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = bind(step)()
            if inspect.isgenerator(result):
                result = list(result)
    except Exception as caught:
        error = caught
    except KeyboardInterrupt:
        raise
    except BaseException as caught:
        if step.label == "distributed.save_checkpoint" and type(caught).__name__ == "CheckpointException":
            return False, None  # documented, and no Exception
        raise Failure(type(caught).__name__, f"not an Exception: {caught!r:.300}") from caught
    spent = time.process_time() - started
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak)
    if grown > GROWTH:
        raise Failure("memory", f"the call took {grown / 2**20:.0f} MiB; result {type(result)}, error {error!r:.200}")
    if spent > SECONDS:
        raise Failure("time", f"the call took {spent:.1f} s; error {error!r:.200}")
    if error is not None:
        judge(error, step)
        changed = difference(before, step.kwargs, written=())
        if changed:
            raise Failure("changed", f"{changed} has changed although an error was raised: {error!r:.300}")
        if state is not None and not same(state, state_of(step.owner)):
            raise Failure("state", f"the state of the object has changed although an error was raised: {error!r:.300}")
        return False, None
    changed = difference(before, step.kwargs, written=("out", "model", "state", "params", "unet", "prompts", "experts"))
    if changed:
        raise Failure("changed", f"the call has changed its argument {changed}")
    check_result(step, result, rng_state)
    return True, result


def bind(step: Step) -> Callable[[], Any]:
    """Return the call with positional-only and variable arguments in their places."""
    kwargs = dict(step.kwargs)
    try:
        parameters = inspect.signature(step.function).parameters
    except (TypeError, ValueError):
        parameters = {}
    args: list[Any] = []
    for name, parameter in parameters.items():
        if parameter.kind is parameter.POSITIONAL_ONLY and len(kwargs) and (name in kwargs or name in ("x", "state")):
            args.append(kwargs.pop(name) if name in kwargs else kwargs.pop(next(iter(kwargs))))
    for name in [name for name in kwargs if name.startswith("*")]:
        value = kwargs.pop(name)
        args += list(value) if isinstance(value, (list, tuple)) else [value]
        if name == "*dtypes":  # the first argument is positional too
            args.insert(0, kwargs.pop("gram", None))
    return functools.partial(step.function, *args, **kwargs)


# ---- judgement -------------------------------------------------------------------------------------------------------


@functools.cache
def raise_lines(path: str) -> frozenset[int]:
    """Return the lines of a file that belong to a ``raise`` statement or a call of the extension."""
    source = Path(path).read_text()
    lines = {i for i, line in enumerate(source.splitlines(), 1) if "_C." in line}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise):
            lines |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith(("_C.", "solver")):
            lines |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return frozenset(lines)


def judge(error: BaseException, step: Step) -> None:
    """Raise a Failure unless the error is one that antdiff raised on purpose and that names an argument."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, values.CallbackError):
            return
        chain = chain.__cause__ or chain.__context__
    text = str(error)
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    last, inside = frames[-1], [frame for frame in frames if frame[0].startswith(PACKAGE)]
    place = f"{Path(inside[-1][0]).name}:{inside[-1][1]}" if inside else "the call"
    kind = f"{type(error).__name__} at {place}"
    if "Inference tensors cannot be saved for backward" in text:
        return  # torch's rule for tensors from torch.inference_mode(), which its message explains
    if "FakeTensor" in text or any(
        isinstance(x, torch._subclasses.FakeTensor) for x in tensors_in(list(step.kwargs.values()))
    ):
        return  # fake tensors outside a compiler; torch explains what they cannot do
    if isinstance(error, TypeError) and not inside and SIGNATURE.search(text):
        return  # Python itself names the argument
    story = f"{type(error).__name__}: {text[:400]!r} at {place}"
    if not isinstance(error, ALLOWED):
        raise Failure(kind, f"untyped {story}") from error
    if isinstance(error, (MemoryError,)) or "allocate memory" in text or "bad_alloc" in text:
        raise Failure(kind, f"out of memory: {story}") from error
    if any(phrase in text for phrase in INTERNALS) and "torch says" not in text:
        raise Failure(kind, f"internals: {story}") from error
    if isinstance(error, OSError) and ("path" in step.kwargs or "folder" in step.kwargs):
        return
    if not last[0].startswith(PACKAGE) or last[1] not in raise_lines(last[0]):
        raise Failure(kind, f"not raised by antdiff: {story}") from error
    if isinstance(step.kwargs.get("path"), str) and step.kwargs["path"] in text:
        return  # it names the file
    if not any(re.search(rf"(?<![A-Za-z0-9_]){re.escape(name)}(?![A-Za-z0-9_])", text) for name in names_of(step)):
        raise Failure(kind, f"names no argument: {story}") from error


def names_of(step: Step) -> set[str]:
    names = {name.lstrip("*") for name in step.kwargs}
    functions = [step.function, type(step.owner)] if step.owner is not None else [step.function]
    for function in functions:
        with contextlib.suppress(TypeError, ValueError):
            names |= set(inspect.signature(function).parameters)
    if "edm" in step.label or "Curriculum" in step.label:
        names |= {"patience", "steps_per_stage", "order", "smoothing", "device"}
    short = step.label.rpartition(".")[2]
    return (names | {short, "jacobian", "experts", "stage", "precision", "state"}) - {"args", "kwargs"}


def tensors_in(value: Any, depth: int = 0) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, nn.Module):
        with contextlib.suppress(Exception):
            yield from value.state_dict().values()
    elif isinstance(value, (list, tuple)) and depth < 3:
        for each in value:
            yield from tensors_in(each, depth + 1)
    elif isinstance(value, dict) and depth < 3:
        for each in value.values():
            yield from tensors_in(each, depth + 1)


def copies(value: Any) -> list[Any]:
    found = []
    for x in tensors_in(value):
        is_plain = type(x) in (Tensor, nn.Parameter) and x.layout is torch.strided and x.device.type == "cpu"
        if is_plain and not x.is_quantized and not x.is_nested and x.numel() <= values.SMALL:
            found.append(torch.empty(x.shape, dtype=x.dtype).copy_(x.detach()))
        else:
            found.append(None)
    return found


def snapshot(kwargs: dict[str, Any]) -> dict[str, Any]:
    found = {name: copies(x) for name, x in kwargs.items() if not isinstance(x, torch.Generator)}
    for name, x in kwargs.items():
        if isinstance(x, np.ndarray) and x.size <= values.SMALL:
            found[name] = [x.copy()]
    return found


def difference(before: dict[str, Any], kwargs: dict[str, Any], written: tuple[str, ...]) -> str | None:
    after = snapshot({name: x for name, x in kwargs.items() if name in before})
    for name, now in after.items():
        if name not in written and not same(before[name], now):
            if any(
                before[name] is not before[w] and shares(kwargs[name], kwargs.get(w)) for w in written if w in before
            ):
                continue
            return name
    return None


def shares(a: Any, b: Any) -> bool:
    """Whether two arguments share a tensor, as after a fault that passes one of them twice."""
    return any(x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr() for x in plain(a) for y in plain(b))


def plain(value: Any) -> list[Tensor]:
    return [x for x in tensors_in(value) if x.layout is torch.strided and x.device.type == "cpu" and not x.is_nested]


def same(a: Any, b: Any) -> bool:
    """Return whether two nested values are equal bit for bit, NaN included."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if a.device.type != "cpu" or a.layout is not torch.strided or a.is_quantized:
            return True
        return a.numel() == 0 or torch.equal(as_bytes(a), as_bytes(b))
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == object or a.tobytes() == b.tobytes()
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    try:
        return type(a) is type(b) and bool(a == b or a != a)
    except Exception:  # objects that cannot be compared
        return a is b


def as_bytes(x: Tensor) -> Tensor:
    return torch.empty(x.numel(), dtype=x.dtype).copy_(x.detach().reshape(-1)).view(torch.uint8)


def state_of(owner: Any) -> Any:
    """Return a copy of the object's state without that of its generators, or None if it has none."""
    if owner is None or not hasattr(owner, "state_dict"):
        return None
    try:
        state = owner.state_dict()
    except Exception:
        return None
    if any(isinstance(x, torch._subclasses.FakeTensor) for x in tensors_in(state)):
        return None
    return copied({key: x for key, x in state.items() if "generator" not in str(key)})


def copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone() if value.layout is torch.strided and value.numel() <= values.SMALL else None
    if isinstance(value, dict):
        return {key: copied(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [copied(x) for x in value]
    return value


# ---- what a result must be -------------------------------------------------------------------------------------------

TWINS = ("cluster_loss", "cluster_loss_and_grad", "cluster_mean", "gram", "combine", "pcgrad_weights", "pcgrad",
         "interval_partition", "interval_partition_affinity", "nash_residual")  # fmt: skip


def check_result(step: Step, result: Any, rng_state: Tensor) -> None:
    module, _, name = step.label.partition(".")
    if any(isinstance(x, torch._subclasses.FakeTensor) for x in tensors_in([result, *step.kwargs.values()])):
        return  # it has a shape, but no values
    if module == "ops" and name in TWINS:
        compare(step, name, result, rng_state)
    rule = RULES.get(step.label) or RULES.get("." + step.label.rpartition(".")[2])
    if rule is not None:
        try:
            broken = rule(step, result)
        except Exception as error:
            raise Failure("rule", f"the result cannot be checked: {error!r}") from error
        if broken:
            raise Failure(f"rule {broken[:40]}", f"accepted, but {broken}; result {values.describe(result)[:300]}")


def widened(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        value = torch.tensor(value.astype(np.float64))
    if isinstance(value, Tensor):
        value = value.detach()
        return value.double().contiguous() if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return [widened(x) for x in value]
    return value


def compare(step: Step, name: str, result: Any, rng_state: Tensor) -> None:
    """Compare with the twin in float64.

    Calls with values beyond 1e4, or below 1e-30 and not zero, are left out: they may overflow or underflow in one of
    the two.
    """
    if any(x.is_inference() for x in tensors_in(list(step.kwargs.values()))):
        return  # the twin cannot save them for its backward
    if any(x.numel() > values.SMALL or not moderate(x) for x in numbers_in(step.kwargs)):
        return
    kwargs = {key: widened(x) for key, x in step.kwargs.items() if key not in ("out", "generator")}
    if step.kwargs.get("generator") is not None:
        return  # the call has advanced it
    torch.set_rng_state(rng_state)
    twin = getattr(ops.reference, name)
    if isinstance(kwargs.get("delta"), (int, float)) and not 1e-30 < abs(kwargs["delta"]) < 1e30:
        return  # it is zero or infinite in float32
    if isinstance(kwargs.get("delta"), int):
        kwargs["delta"] = float(kwargs["delta"])  # torch cannot convert every int
    try:
        want = twin(**kwargs)
    except Exception as error:
        raise Failure("accepted", f"accepted, but the twin raises {error!r:.200}") from error
    # The scale of the terms, since the results themselves may cancel.
    scale_of = {key: absolute(x) for key, x in kwargs.items()}
    scale = want if name.startswith(("interval", "pcgrad")) else twin(**scale_of)
    flat = [list(each) for each in (numbers_in(result), numbers_in(want), numbers_in(scale))]
    if [x.shape for x in flat[0]] != [x.shape for x in flat[1]]:
        raise Failure("shape", f"shapes {[list(x.shape) for x in flat[0]]}, twin {[list(x.shape) for x in flat[1]]}")
    for got, expected, terms in zip(*flat, strict=True):
        if not got.numel():
            continue
        size = max(float(terms.nan_to_num().abs().max()), float(expected.nan_to_num().abs().max()))
        bound = tolerances.another_answer() * size
        if name.startswith("pcgrad"):
            bound = tolerances.another_answer() * (1 + size)
        if step.kwargs.get("nonfinite") == "poison" and bool(got.isnan().any()):
            continue  # the op knows more about what is no Gram matrix than its twin
        if not torch.equal(got.isnan(), expected.isnan()):
            raise Failure("twin", "NaN where the twin has none, or the other way round")
        off = float((got.double() - expected.double()).nan_to_num().abs().max())
        if off > bound:
            raise Failure("twin", f"another answer than the twin: off by {off}, allowed {bound}")


def moderate(x: Tensor) -> bool:
    size = x.abs()
    return bool(((size < 1e4) & ((size > 1e-30) | (size == 0))).all())


def absolute(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.abs() if value.is_floating_point() else value
    return [absolute(x) for x in value] if isinstance(value, list) else value


def numbers_in(value: Any) -> Iterator[Tensor]:
    for x in tensors_in(value if not isinstance(value, dict) else list(value.values())):
        if x.is_floating_point() and x.layout is torch.strided and x.device.type == "cpu":
            yield x.detach()


def _drawn(step: Step, batch: Any) -> str | None:
    B = step.kwargs.get("B")
    count = B if not isinstance(B, (list, tuple)) else sum(B)
    owner = step.owner
    if isinstance(owner, antdiff.companions.SigmaCurriculum):
        return None if batch.shape == (count,) and bool((batch > 0).all()) else "sigma are not B positive numbers"
    t = batch if isinstance(batch, Tensor) else batch.t
    T = owner.T if hasattr(owner, "T") else owner.clusters.T
    if t.device.type == "meta":
        return None
    if t.shape != (count,) or t.dtype != torch.int64 or not bool(((t >= 0) & (t < T)).all()):
        return "t are not B timesteps"
    if hasattr(batch, "cluster") and not torch.equal(batch.cluster, owner.clusters.cluster_of(t)):
        return "the clusters are not those of t"
    return None


def _weights(step: Step, weights: Any) -> str | None:
    x = next((x for x in step.kwargs.values() if isinstance(x, Tensor)), None)
    if not isinstance(weights, Tensor) or x is None:
        return None
    if getattr(step.owner, "update_every", 1) > 1:
        return None  # it may return the last weights, for which it needs no Gram matrix
    if weights.shape != x.shape[: x.dim() - (1 if getattr(step.owner, "needs", "losses") == "gram" else 0)]:
        return f"weights have shape {list(weights.shape)} for {list(x.shape)}"
    if not weights.is_floating_point():
        return f"weights are {weights.dtype}"
    return None


def _table(step: Step, table: Any) -> str | None:
    source = next((x for x in step.kwargs.values() if isinstance(x, Tensor)), None)
    if table.dtype != torch.float64 or (source is not None and table.shape != source.shape):
        return f"the table is {table.dtype} {list(table.shape)}"
    if table.device.type == "cpu" and bool(table.isnan().any()):
        return "the table has NaN"
    return None


RULES: dict[str, Callable[[Step, Any], str | None]] = {
    ".sample": lambda step, batch: None if "SoftInterval" in step.label else _drawn(step, batch),
    ".weights": _weights,
    **{f"diffusion.{name}": _table for name in ("min_snr", "truncated_snr", "p2", "edm")},
    **{f"diffusion.log_snr_from_{name}": _table for name in ("betas", "alphas_cumprod", "sigmas", "flow")},
    "diffusion.log_snr": _table,
    "diffusion.betas": _table,
}

# ---- processes -------------------------------------------------------------------------------------------------------


def limit_memory() -> None:
    os.chdir(tempfile.mkdtemp(prefix="antdiff-fuzz-"))  # some paths are relative
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESSES, used + ADDRESSES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def work(start: int, count: int, only: list[str] | None, progress: str) -> None:
    """Run sessions in this process. Failures are printed as lines of JSON, and the counts at the end."""
    torch.set_num_threads(1)
    limit_memory()
    with open(progress, "r+b") as file:
        shared = mmap.mmap(file.fileno(), 24)
    counts: collections.Counter[str] = collections.Counter()
    calls = bad = 0
    for number in range(start, start + count):
        shared[:24] = struct.pack("qqq", number, calls, bad)
        session = Session(number, only=only)
        try:
            session.run()
        except Failure as failure:
            print(json.dumps({"number": number, "name": session.text[-1].partition("(")[0], "kind": failure.kind,
                              "text": str(failure), "call": session.text[-1][:1500]}), flush=True)  # fmt: skip
        except Exception:  # a fault of this program, which must not hide those of others
            text = traceback.format_exc()[-900:]
            found = {"number": number, "name": session.name, "kind": "the fuzzer itself", "text": text}
            print(json.dumps({**found, "call": session.text[-1][:1500]}), flush=True)
        calls, bad = calls + session.calls, bad + session.bad
        counts[session.name] += session.calls
    shared[:24] = struct.pack("qqq", start + count, calls, bad)
    print(json.dumps({"calls": calls, "bad": bad, "counts": counts}), flush=True)


class Campaign:
    """Runs workers one after another, watches them, and collects failures by kind."""

    def __init__(self, only: list[str] | None, quiet: bool = False) -> None:
        self.only, self.quiet = only, quiet
        self.calls = self.bad = 0
        self.counts: collections.Counter[str] = collections.Counter()
        self.kinds: dict[tuple[str, str], dict[str, Any]] = {}

    def run(self, start: int, count: int, deadline: float) -> int:
        """Run the sessions ``[start, start + count)``, until the deadline; return the next number."""
        with tempfile.NamedTemporaryFile() as progress:
            progress.write(struct.pack("qqq", start, 0, 0))
            progress.flush()
            command = [sys.executable, __file__, "--work", str(start), str(count), "--progress", progress.name]
            command += ["--only", *self.only] if self.only else []
            worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            errors: list[str] = []
            drain = threading.Thread(target=lambda: errors.extend(worker.stderr or ()), daemon=True)
            drain.start()
            watch = threading.Thread(target=self._watch, args=(worker, progress.name, deadline), daemon=True)
            watch.start()
            done = False
            for line in worker.stdout or ():
                if not line.startswith("{"):
                    continue
                found = json.loads(line)
                if "counts" in found:
                    done = True
                    self.counts.update(found["counts"])
                else:
                    self._add(found)
            code = worker.wait()
            drain.join(5)
            number, calls, bad = struct.unpack("qqq", Path(progress.name).read_bytes()[:24])
            self.calls, self.bad = self.calls + calls, self.bad + bad
            if done:
                return start + count
            if code == -signal.SIGTERM and time.monotonic() >= deadline:
                return int(number) + 1
            session = Session(number, only=self.only)
            what = "no progress" if code == -signal.SIGALRM else f"the process ended with {code}"
            self._add({"number": number, "name": session.name, "kind": what, "call": "",
                       "text": f"{what}\n{''.join(errors)[-1500:]}"})  # fmt: skip
            return int(number) + 1

    def _watch(self, worker: subprocess.Popen[str], progress: str, deadline: float) -> None:
        last, since, spent = None, time.monotonic(), 0.0
        while worker.poll() is None:
            time.sleep(0.25)
            with contextlib.suppress(OSError, struct.error, IndexError, ValueError):
                number = struct.unpack("q", Path(progress).read_bytes()[:8])[0]
                fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
                cpu = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
                if number != last:
                    last, since, spent = number, time.monotonic(), cpu
                # A session makes up to four calls, and the import of the package comes first.
                if cpu - spent > 4 * SECONDS + 10 or time.monotonic() - since > WALL:
                    worker.send_signal(signal.SIGALRM)
            if time.monotonic() >= deadline:
                worker.terminate()

    def _add(self, found: dict[str, Any]) -> None:
        key = (found["name"], found["kind"])
        if key in self.kinds:
            self.kinds[key]["times"] += 1
            return
        self.kinds[key] = {**found, "times": 1}
        if not self.quiet:
            print(
                f"\n{found['name']}: {found['text'][:600]}\n  {found['call'][:400]}\n  {command_of(found)}", flush=True
            )

    def shrink(self) -> None:
        """Find the smallest set of faults that still shows each failure, in a process of its own."""
        for found in self.kinds.values():
            command = [
                sys.executable,
                __file__,
                "--shrink",
                str(found["number"]),
                *(["--only", *self.only] if self.only else []),
            ]
            with contextlib.suppress(subprocess.TimeoutExpired, json.JSONDecodeError, IndexError):
                done = subprocess.run(command, capture_output=True, text=True, timeout=WALL, check=False)
                found.update(json.loads(done.stdout.splitlines()[-1]))


def command_of(found: dict[str, Any]) -> str:
    keep = f" --keep {' '.join(map(str, found['keep']))}" if found.get("keep") else ""
    return f"python tests/fuzz_calls.py --replay {found['number']}{keep}"


def outcome(number: int, keep: set[int] | None, only: list[str] | None) -> tuple[str | None, str, int]:
    """Repeat a session in a child process: the kind of its failure, its last call, and its number of faults."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        session, kind = Session(number, keep, only), None
        signal.alarm(int(4 * SECONDS))
        with contextlib.suppress(BaseException):
            try:
                session.run()
            except Failure as failure:
                kind = failure.kind
            os.write(write, json.dumps([kind, session.text[-1][:1500], session.faults]).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) or not text:
        return f"the process ended with {-os.WTERMSIG(status)}", "", 12
    kind, call, faults = json.loads(text)
    return kind, call, faults


def shrink(number: int, only: list[str] | None) -> None:
    limit_memory()
    kind, call, faults = outcome(number, None, only)
    keep = set(range(faults))
    for fault in range(faults):
        again, text, _ = outcome(number, keep - {fault}, only)
        if again == kind:
            keep, call = keep - {fault}, text or call
    print(json.dumps({"call": call, "keep": sorted(keep)}))


def show(number: int, keep: set[int] | None, only: list[str] | None) -> int:
    limit_memory()
    session = Session(number, keep, only)
    original = session.make

    def make(step: Step) -> tuple[bool, Any]:
        print(step, flush=True)
        return original(step)

    session.make = make  # type: ignore[method-assign]
    try:
        session.run()
    except Failure as failure:
        print(f"kind: {failure.kind}\n{failure}")
        if failure.__cause__ is not None:
            traceback.print_exception(failure.__cause__)
        return 1
    print("no failure")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Random bad calls of everything public.")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--calls", type=float, default=float("inf"), help="stop after this many calls")
    parser.add_argument("--seed", type=int, default=0, help="number of the first session, in millions")
    parser.add_argument("--sessions", type=int, default=SESSIONS, help="sessions per process")
    parser.add_argument("--only", nargs="*", help="names such as ops.gram; default all")
    parser.add_argument("--replay", type=int, help="repeat one session")
    parser.add_argument("--keep", type=int, nargs="*", help="with --replay: make only these faults")
    parser.add_argument("--shrink", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--progress", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(*options.work, options.only, options.progress)
        return 0
    if options.shrink is not None:
        shrink(options.shrink, options.only)
        return 0
    if options.replay is not None:
        return show(options.replay, None if options.keep is None else set(options.keep), options.only)
    if forgotten := recipes.missing():
        print(f"these public names have no recipe in tests/fuzz_recipes.py: {', '.join(forgotten)}")
        return 2
    campaign, number = Campaign(options.only), options.seed * 10**6
    print(f"sessions from number {number}", flush=True)
    started = time.monotonic()
    deadline = started + 60 * options.minutes
    while time.monotonic() < deadline and campaign.calls < options.calls:
        number = campaign.run(number, options.sessions, deadline)
        rate = campaign.calls / (time.monotonic() - started)
        kinds = f"{len(campaign.kinds)} kinds of failure"
        print(f"{campaign.calls} calls, {campaign.bad} of them bad, {rate:.0f} per s, {kinds}", flush=True)
    campaign.shrink()
    for found in sorted(campaign.kinds.values(), key=lambda found: -found["times"]):
        print(f"\n{found['name']}, {found['times']} times: {found['text'][:600]}\n{found['call']}\n{command_of(found)}")
    print(
        f"\n{campaign.calls} calls ({campaign.bad} bad) of {len(campaign.counts)} public names, sessions to {number};"
    )
    print(f"{len(campaign.kinds)} kinds of failure")
    return 1 if campaign.kinds else 0


if __name__ == "__main__":
    sys.exit(main())
