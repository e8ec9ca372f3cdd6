"""What a forward changes, found and put back, so that the checks may run ``loss_fn`` again.

The probe runs the network on NaN. Whatever a forward writes (running statistics, codebooks, histories of losses) would
keep the NaN, and training would continue from it.
"""

from __future__ import annotations

import pickle
import random
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# How far a loss function is searched, and how many bytes of tensors outside the model are copied. A data set that a
# loss function holds is larger, and loss functions do not write into it.
_DEPTH, _WIDTH, _BYTES = 4, 64, 2**26
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_CONTAINERS = (dict, OrderedDict, defaultdict, Counter, list, set, deque)
_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
_LIBRARIES = ("torch", "numpy", "antdiff", "random", "builtins")
# Types without a state that a forward changes, and optimizers, whose state is larger than the model.
_SKIPPED = (str, bytes, int, float, complex, type, types.ModuleType, types.BuiltinFunctionType, torch.optim.Optimizer)


class Replay:
    """Restores what a forward can change to its state when this object was made.

    - Of the model: parameters, buffers, other tensors and attributes of modules, and the entries of their dicts, lists
      and sets.
    - Of what ``loss_fn`` holds in closures, defaults, arguments of ``functools.partial`` and attributes, and of the
      global names in its code: the same of other modules, except their parameters, and tensors and arrays of up to
      64 MiB together.
    - Random generators: torch's, NumPy's and Python's global ones, and those found in the same places.
    """

    def __init__(self, model: nn.Module, loss_fn: Any = None) -> None:
        found = _Found(model, loss_fn)
        self._tensors = [(x, x._version, x.detach().clone()) for x in found.tensors.values()]
        self._arrays = [(x, x.copy()) for x in found.arrays.values()]
        self._attributes = [(vars(m), dict(vars(m))) for m in found.modules.values()]
        self._containers = [(x, x.copy()) for x in found.containers.values()]
        self._devices = sorted({x.device for x, *_ in self._tensors if x.device.type == "cuda"}, key=str)
        self._generators = [*found.generators.values()]
        self._states = self._random()
        self.foreign = list(found.foreign.values())  # parameters that loss_fn trains besides those of the model

    def _random(self) -> list[Any]:
        devices = [torch.cuda.get_rng_state(d) for d in self._devices]
        own = [_state(g) for g in self._generators]
        return [torch.get_rng_state(), np.random.get_state(), random.getstate(), *devices, *own]

    def drew(self) -> bool:
        """Return whether random numbers were drawn since."""
        return not all(map(_same_state, self._states, self._random()))

    @torch.no_grad()
    def rewind(self) -> None:
        cpu, numpy, python, *others = self._states
        torch.set_rng_state(cpu)
        np.random.set_state(numpy)
        random.setstate(python)
        for device, state in zip(self._devices, others, strict=False):
            torch.cuda.set_rng_state(state, device)
        for generator, state in zip(self._generators, others[len(self._devices) :], strict=True):
            _set_state(generator, state)
        for now, before in self._attributes:
            if now.keys() != before.keys() or any(now[name] is not value for name, value in before.items()):
                now.clear()
                now.update(before)
        for container, entries in self._containers:
            _refill(container, entries)
        for x, version, value in self._tensors:
            if x.shape != value.shape or x.dtype != value.dtype or x.device != value.device:
                x.data = value.clone()
            # The version does not tell of x.data.copy_(y) and of kernels in Triton.
            elif x._version != version or (type(x) in _PLAIN and not torch.equal(x, value)):
                x.copy_(value)
        for array, entries in self._arrays:
            array[...] = entries


class _Found:
    """The state that a forward can reach, each part once, by id."""

    def __init__(self, model: nn.Module, loss_fn: Any) -> None:
        self.modules: dict[int, nn.Module] = {}
        self.tensors: dict[int, Tensor] = {}
        self.arrays: dict[int, Any] = {}
        self.containers: dict[int, Any] = {}
        self.generators: dict[int, Any] = {}
        self.foreign: dict[int, Tensor] = {}
        self._seen: set[int] = set()
        self._left = float("inf")  # bytes
        for p in model.parameters():  # a forward may write them (forced weight normalisation)
            self.tensors[id(p)] = p
        self._module(model)
        self._left = _BYTES
        self._search(loss_fn, _DEPTH, owned=True)

    def _module(self, model: nn.Module) -> None:
        for m in model.modules():
            if id(m) in self.modules:
                continue
            self.modules[id(m)] = m
            self._seen.add(id(m))
            for x in vars(m).values():
                self._search(x, 2, owned=True)

    def _search(self, x: Any, depth: int, *, owned: bool) -> None:
        """Collect the state in ``x``; containers only if ``owned``, since other threads write into those of loaders."""
        if x is None or isinstance(x, _SKIPPED) or id(x) in self._seen:
            return
        if isinstance(x, nn.Module):
            self._module(x)
            return
        self._seen.add(id(x))
        if isinstance(x, _GENERATORS):
            self.generators[id(x)] = x
        elif isinstance(x, Tensor):
            if x.requires_grad and x.is_leaf and id(x) not in self.tensors:
                self.foreign[id(x)] = x
            if not isinstance(x, nn.Parameter) and x.layout is torch.strided and not x.is_inference():
                self._left -= x.nbytes
                if self._left >= 0:
                    self.tensors[id(x)] = x
        elif isinstance(x, np.ndarray):
            self._left -= x.nbytes
            if self._left >= 0 and x.flags.writeable:
                self.arrays[id(x)] = x
        elif depth:
            if owned and type(x) in _CONTAINERS:
                self.containers[id(x)] = x
            owned = owned and isinstance(x, (types.FunctionType, types.MethodType, partial, *_CONTAINERS, tuple))
            for inner in _inside(x):
                self._search(inner, depth - 1, owned=owned)


def _inside(x: Any) -> Iterable[Any]:
    """Return the objects that ``x`` holds."""
    if isinstance(x, partial):
        return [x.func, *x.args, *x.keywords.values()]
    if isinstance(x, types.MethodType):
        return [x.__self__, x.__func__]
    if isinstance(x, types.FunctionType):
        if (x.__module__ or "").partition(".")[0] in _LIBRARIES:
            return [cell.cell_contents for cell in x.__closure__ or () if _is_filled(cell)]
        return [*_globals(x), *(x.__defaults__ or ()), *(x.__kwdefaults__ or {}).values(), *vars(x).values(),
                *(cell.cell_contents for cell in x.__closure__ or () if _is_filled(cell))]  # fmt: skip
    if isinstance(x, dict):
        return list(x.values())[:_WIDTH]
    if isinstance(x, (list, tuple, set, frozenset, deque)):
        return list(x)[:_WIDTH]
    return list(getattr(x, "__dict__", {}).values())


def _globals(f: types.FunctionType) -> Iterator[Any]:
    """Yield the global values whose names are in the code of ``f``."""
    codes = [f.__code__]
    while codes:
        code = codes.pop()
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
        yield from (f.__globals__[name] for name in code.co_names if name in f.__globals__)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a name that its function has not set yet
        return False


def _refill(container: Any, entries: Any) -> None:
    if isinstance(container, dict):
        same = len(container) == len(entries) and all(
            a is b and x is y for (a, x), (b, y) in zip(container.items(), entries.items(), strict=True)
        )
    else:
        same = len(container) == len(entries) and all(a is b for a, b in zip(container, entries, strict=True))
    if not same:
        container.clear()
        (container.extend if isinstance(container, (list, deque)) else container.update)(entries)


def _state(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def _same_state(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else pickle.dumps(a) == pickle.dumps(b)


@contextmanager
def repeatable(model: nn.Module, loss_fn: Any = None) -> Iterator[Replay]:
    """Leave what a forward can change, and gradients, as they were. Inside, there are no gradients."""
    replay = Replay(model, loss_fn)
    grads = _taken([*model.parameters(), *replay.foreign])
    try:
        yield replay
    finally:
        replay.rewind()
        for p, grad in grads:
            p.grad = grad


@contextmanager
def tentative(replay: Replay) -> Iterator[None]:
    """Undo what the block has changed, gradients of foreign parameters included, if it raises."""
    grads = _taken(replay.foreign)
    try:
        yield
    except BaseException:
        replay.rewind()
        for p, grad in grads:
            p.grad = grad
        raise
    for p, grad in grads:
        if grad is not None:
            p.grad = grad if p.grad is None else grad.add_(p.grad)


def _taken(params: Iterable[Tensor]) -> list[tuple[Tensor, Tensor | None]]:
    """Take the gradients away, so that a backward does not add to them in place."""
    grads = [(p, p.grad) for p in params]
    for p, _ in grads:
        p.grad = None
    return grads
