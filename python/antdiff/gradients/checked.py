"""Which route runs, and what is checked about it: the choice of ``auto``, the probe of each structure, the audit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from antdiff.gradients import routes
from antdiff.gradients.audit import (
    HALF,
    Audit,
    UnrepeatableError,
    compare,
    plain_gradient,
    same_losses,
)
from antdiff.gradients.batch import ClusteredBatch, GroupingError, RowsError, check_losses
from antdiff.gradients.grouped.compiled import compiler_of
from antdiff.gradients.grouped.deferred import GramMode
from antdiff.gradients.grouped.layout import Layout
from antdiff.gradients.grouped.mode import GroupedMode
from antdiff.gradients.probe import binary_codes, locate, probe, random_code, uncompiled
from antdiff.gradients.replay import Replay, repeatable, tentative
from antdiff.gradients.routes import Chosen, LossFn, Network
from antdiff.gradients.samples import Samples
from antdiff.gradients.sinks import GradientStore

Layouts = Mapping[int, Layout] | None
# A random code tells two given samples apart with probability 1/2, the binary one always, with log2(B) times as many
# forwards. Networks with more structures than this get random codes, so that probes do not dominate their steps.
_PROBED_IN_FULL = 32


class CompilationError(RuntimeError):
    """The grouped route works in eager mode and fails when it is compiled."""


class CheckedRoutes:
    """Runs a route into a store, and makes sure that the rows are those of the clusters.

    - Route ``grouped`` needs to know which rows belong to which sample. Before the rows of a batch of a new structure
      are used, a probe of this batch has to pass (``probe.py``).
    - If the rows are elsewhere, a route ``grouped`` that the user has asked for looks where they are, in a probe of
      every batch (``locate``). ``auto`` takes ``split`` instead, which costs less.
    - At call 1, 2, 4, 8, ... and then every ``every`` calls, the row of one cluster is compared with a plain backward
      (``audit.py``), and the probe is repeated.
    - ``auto`` takes the first of ``grouped``, ``split`` and ``loop`` that runs and passes both.

    Attributes:
        choice: the route and the reason for it; None before ``auto`` has chosen.
    """

    def __init__(self, network: Network, choice: tuple[Chosen, str] | None, every: int | None) -> None:
        self.network = network
        self.choice = choice
        self.audit = Audit(every)
        self.locates = choice is not None and choice[0] == "grouped" and network.compiled is None and every is not None
        self._structures: set[int] = set()
        self._is_odd = False  # the first dimension is not the batch everywhere
        self._uncompared = False  # the route was chosen without rows

    def run(
        self,
        store: GradientStore,
        loss_fn: LossFn,
        batch: Sequence[Any],
        clustered: ClusteredBatch,
        scale: Tensor | float,
        *,
        mean: bool,
        fresh: bool,
    ) -> Tensor:
        """Write the gradients of a batch sorted by cluster into the store, or add them; return the losses' sums."""
        call = _Call(self.network, store, loss_fn, batch, clustered, scale, mean, fresh)
        self.compile_like(loss_fn)
        if self.choice is None:
            return self._choose(call)
        route = self.choice[0]
        if route != "grouped" or self.audit.every is None:
            return call.run(route)
        return self._run_grouped(call, due=fresh and self.audit.due())

    def run_deferred(
        self,
        make_mode: Callable[[Layouts], GramMode],
        loss_fn: LossFn,
        batch: Sequence[Any],
        clustered: ClusteredBatch,
        scale: Tensor | float,
    ) -> tuple[GramMode, Tensor]:
        """As :meth:`run`, for a mode that leaves the Gram matrix, which is returned; the route must be ``grouped``."""
        call = _Call(self.network, None, loss_fn, batch, clustered, scale, True, True)
        call.make_mode = make_mode
        if self.audit.every is None and not self._uncompared:
            sums = call.run("grouped")
            return call.deferred, sums
        due = self.audit.due() or self._uncompared
        sums = self._run_grouped(call, due=due)
        self._uncompared = self._uncompared and not due
        return call.deferred, sums

    def _run_grouped(self, call: _Call, *, due: bool) -> Tensor:
        """Run ``grouped``, with the probe of a new structure and, if it is due, the audit."""
        before = Replay(self.network.model, call.loss_fn) if due else None
        if self._is_odd:
            sums = self._run_located(call)
        else:
            try:
                sums = call.run("grouped")
                self._require_probed(call, random_code, again=due)
            except RowsError as first:
                if before is None or not self.locates or not call.fresh or self.network.compiled is not None:
                    raise
                before.rewind()
                try:
                    sums = self._run_located(call)
                except GroupingError as second:
                    raise GroupingError(f"{first} {second}") from None
                self._is_odd = True
        if before is not None:
            self._compare(call, sums, before)
        return sums

    def _run_located(self, call: _Call) -> Tensor:
        """Run ``grouped`` on a batch whose rows are looked for first."""
        with repeatable(self.network.model, call.loss_fn) as replay:
            located = locate(self.network, call.loss_fn, call.batch, call.clustered, replay)
        call.layouts = located.layouts
        sums = call.run("grouped")
        if call.mode is None or call.mode.recorded != located.structure:
            raise GroupingError(
                "the network must arrange the rows of a batch as it did in the probe of the same batch, and it did "
                "not. Use route='split', which needs no more than independent samples."
            )
        return sums

    def settle_deferred(self, loss_fn: LossFn, batch: Sequence[Any], clustered: ClusteredBatch) -> Chosen:
        """As :meth:`settle`, without rows, which may not fit: probe ``grouped``. The first call is compared."""
        self.compile_like(loss_fn)
        net = self.network
        if self.choice is None and net.compiled is None:
            try:
                routes.refuse_batch_norm("grouped", net.model)
                with repeatable(net.model, loss_fn) as replay:
                    codes = binary_codes(clustered.B, clustered.cluster.device)
                    self._structures.add(probe("grouped", net, loss_fn, batch, clustered, replay, codes))
            except GroupingError as reason:
                self.choice = "split", f"not 'grouped': {reason}"
            else:
                self.choice = "grouped", f"in {len(codes)} probes no sample reaches the rows of another one"
                self._uncompared = True
        return "grouped" if self.choice is None else self.choice[0]

    def settle(self, loss_fn: LossFn, batch: Sequence[Any], clustered: ClusteredBatch) -> Chosen:
        """Return the route, which ``auto`` chooses from this batch if it has not chosen yet."""
        self.compile_like(loss_fn)
        if self.choice is None:
            store = GradientStore(self.network.model, clustered.k, None)
            with repeatable(self.network.model, loss_fn):
                self._choose(_Call(self.network, store, loss_fn, batch, clustered, 1.0, True, True))
        assert self.choice is not None
        return self.choice[0]

    def compile_like(self, loss_fn: LossFn) -> None:
        net = self.network
        if net.compiled is None and hasattr(loss_fn, "_torchdynamo_orig_callable"):
            net.compiled = compiler_of(net.model, {}, net.separable)

    # ---- auto ----------------------------------------------------------------------------------------------------

    def _choose(self, call: _Call) -> Tensor:
        model = self.network.model
        with (
            repeatable(model, call.loss_fn),
            uncompiled(self.network),
        ):  # what is wrong with loss_fn itself is raised here
            losses = call.loss_fn(*call.batch)
            check_losses(losses, call.clustered.B)
            call.plain_losses = losses.detach().clone()
            del losses
        try:
            routes.refuse_batch_norm("grouped", model)
        except GroupingError as reason:
            self.choice = "loop", str(reason)
            return call.run("loop")
        said = ""
        candidates: tuple[Chosen, ...] = ("grouped", "split")
        for route in candidates:
            try:
                sums, why = self._attempt(call, route)
            except UnrepeatableError as reason:
                self.choice = "split", f"{said}{reason}"
                return call.run("split")
            except CompilationError as reason:
                said += f"{reason} "
            except GroupingError as reason:
                said += f"not {route!r}: {reason} "
            except Exception as error:  # whatever an op, a compiler or a checkpoint raises: another route may serve
                said += f"not {route!r}: {type(error).__name__}: {error} "
            else:
                self.choice = route, said + why
                return sums
        sums = call.run("loop")
        self.choice = "loop", said.strip()
        return sums

    def _attempt(self, call: _Call, route: Chosen) -> tuple[Tensor, str]:
        net, B = self.network, call.clustered.B
        codes = binary_codes(B, call.clustered.cluster.device)
        with repeatable(net.model, call.loss_fn) as replay, uncompiled(net):
            structure = probe(route, net, call.loss_fn, call.batch, call.clustered, replay, codes)
        why = f"in {len(codes)} probes of {B} samples no sample reaches the rows of another one"
        before = Replay(net.model, call.loss_fn)
        with tentative(before):  # if the route fails, the next one is the first that draws and writes
            try:
                sums = call.run(route)
            except Exception as error:
                if net.compiled is None or route != "grouped":
                    raise
                # The eager route has just passed the probe, so this is a failure of the compiler.
                raise CompilationError(f"'grouped' does not compile: {type(error).__name__}: {error}") from error
            if route == "grouped":
                self._structures.add(structure if call.mode is None else call.mode.structure)
                self.audit.due()
            elif before.drew():
                return sums, f"{why}; not compared with 'loop', since slices draw other random numbers"
            self._compare(call, sums, before)
        why += ", and the row of one cluster agrees with a plain backward"
        return sums, why + ("" if net.compiled is None or route != "grouped" else ", and it compiled")

    # ---- checks --------------------------------------------------------------------------------------------------

    def _require_probed(self, call: _Call, code: Any, *, again: bool = False) -> None:
        structure = call.structure()
        if structure in self._structures and not again:
            return
        net, clustered = self.network, call.clustered
        if not finite_parameters(net):  # NaN everywhere says nothing about places; a later call is probed
            return
        if structure in self._structures or len(self._structures) >= _PROBED_IN_FULL:
            codes = code(clustered.B, len(self._structures) + self.audit.calls, clustered.cluster.device)
        else:
            codes = binary_codes(clustered.B, clustered.cluster.device)
        try:
            with repeatable(net.model, call.loss_fn) as replay, uncompiled(net):
                probe("grouped", net, call.loss_fn, call.batch, clustered, replay, codes)
        except (GroupingError, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            raise GroupingError(
                f"loss_fn must run on a batch in which some samples are NaN, with which the independence of samples is "
                f"probed; got {type(error).__name__}: {error}. Remove its own check of finite values, or switch the "
                "probe off with audit=None."
            ) from error
        self._structures.add(structure)

    def _compare(self, call: _Call, sums: Tensor, before: Replay) -> None:
        """Compare the row of one cluster with a plain backward."""
        audit, clustered = self.audit, call.clustered
        i = audit.cluster(clustered)
        size = max(1, clustered.sizes[i]) if call.mean else 1
        drew_compiled = call.is_compiled and before.drew()
        losses, want, low = plain_gradient(
            self.network, call.loss_fn, call.batch, clustered, i, call.scale / size, before
        )
        mine = clustered.one_hot(torch.bool)[i]
        plain_sum = losses[mine].sum(dtype=torch.float64)
        if drew_compiled and not same_losses(sums[i], plain_sum, low):
            raise UnrepeatableError(
                "the compiled program must draw the random numbers of eager PyTorch, so that its rows can be compared "
                "with a plain backward; its losses differ. Draw noise and timesteps before loss_fn, or set "
                "torch._inductor.config.fallback_random = True."
            )
        before_sum = sums[i] if call.plain_losses is None else call.plain_losses[mine].sum(dtype=torch.float64)
        if not same_losses(before_sum, plain_sum, low):
            raise UnrepeatableError(
                "loss_fn gives different losses for the same batch and random state, so the rows cannot be compared "
                "with a plain backward. Draw noise and timesteps before it, or from a torch.Generator that it holds."
            )
        found = call.difference(i, want, low)
        if found.excess > 1:
            last = (
                f"It was last found right {audit.calls - audit.right_at} calls ago. "
                if audit.right_at
                else "It was never found right. "
            )
            raise GroupingError(
                f"the gradient of {found.name} for cluster {i} differs from a plain backward by {found.relative:.1e} "
                "of its length: the samples are not independent, or their rows are not where the first dimension "
                f"says. {last}Use route='split', or route='loop' for a network that mixes samples."
            )
        audit.right_at = audit.calls


class _Call:
    """One call of a route, and what it left."""

    def __init__(
        self,
        network: Network,
        store: GradientStore | None,
        loss_fn: LossFn,
        batch: Sequence[Any],
        clustered: ClusteredBatch,
        scale: Tensor | float,
        mean: bool,
        fresh: bool,
    ) -> None:
        self.network, self.store, self.loss_fn, self.batch, self.clustered = network, store, loss_fn, batch, clustered
        self.scale, self.mean, self.fresh = scale, mean, fresh
        self.mode: GroupedMode | None = None
        self.make_mode: Callable[[Layouts], GramMode] | None = None
        self.layouts: Layouts = None
        self.is_compiled = False  # whether the latest run used a compiled program of the grouped route
        self.plain_losses: Tensor | None = None  # [B], of a plain forward from the same random state

    def run(self, route: Chosen) -> Tensor:
        net, clustered = self.network, self.clustered
        self.is_compiled = route == "grouped" and net.compiled is not None
        options: dict[str, Any] = {"mean": self.mean, "scale": self.scale}
        if self.store is None:
            assert self.make_mode is not None
            mode = self.mode = self.make_mode(self.layouts)
            return routes.run(route, net, self.loss_fn, self.batch, clustered, mode._roots, mode=mode, **options)
        self.store.reuse = route != "grouped" or net.compiled is None
        sinks = self.store.sinks(fresh=self.fresh)
        self.mode = None
        if route == "grouped" and net.compiled is None:
            samples = Samples.of(self.batch, clustered.B)
            self.mode = GroupedMode(
                net.model, clustered, sinks, net.separable, batch=samples.tensors(), layouts=self.layouts
            )
        sums = routes.run(route, net, self.loss_fn, self.batch, clustered, sinks, mode=self.mode, **options)
        self.store.keep(sinks)
        return sums

    @property
    def deferred(self) -> GramMode:
        assert isinstance(self.mode, GramMode)
        return self.mode

    def structure(self) -> int:
        if self.mode is not None:
            return self.mode.structure
        shapes = (tuple(x.shape) for x in Samples.of(self.batch, self.clustered.B).tensors())
        return hash((self.clustered.B, *shapes))

    def difference(self, i: int, want: dict[str, Tensor], low: bool) -> Any:
        if self.store is None:
            mode: Any = self.mode
            got = {"all parameters (norm of the row)": mode.gram[i, i].sqrt()}
            total = sum((g.double().square().sum() for g in want.values()), mode.gram.new_zeros(()))
            return compare(got, {next(iter(got)): total.sqrt()}, low)
        rows = {n: x[i] for (n, _), x in zip(self.store.named, self.store.tensors, strict=True) if x is not None}
        return compare(rows, want, low or any(x.dtype in HALF for x in rows.values()))


def finite_parameters(net: Network) -> bool:
    return all(bool(p.detach().isfinite().all()) for p in net.model.parameters() if p.is_floating_point())
