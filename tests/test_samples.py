"""What a sample is: every container on every route against gradients by hand, and what is refused."""

from __future__ import annotations

import functools
from collections import OrderedDict, UserDict, UserList, deque, namedtuple
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gradient_cases import by_hand, worst
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import antdiff
from antdiff import balancing
from antdiff.gradients.batch import ClusteredBatch, each_row
from antdiff.gradients.samples import Samples, cut, with_dims
from antdiff.gradients.walk import Shared

K, B, D = 4, 8, 3
IDS = torch.tensor([3, 0, 2, 1, 0, 3, 1, 1])  # shuffled and unequal


@dataclass(frozen=True, slots=True)
class Frozen:
    n: Any
    name: str = "frozen"


@dataclass
class Derived:
    """A dataclass whose __post_init__ must not run again, and with an attribute that is no field."""

    n: Any
    size: Any = field(init=False)

    def __post_init__(self) -> None:
        self.size = [(float(i), 1.0) for i in range(len(self.n))]
        self.twice = self.n * 2
        self.n = self.n + 1


Named = namedtuple("Named", ["n", "scale"])


class Frame(Mapping[str, Any]):
    """A read-only mapping of another library."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self._data = dict(data)

    def __getitem__(self, key: str) -> Any:
        return self._data[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._data)

    def __len__(self) -> int:
        return len(self._data)


class TensorFrame(Frame):
    """A mapping whose tensors share their first dimensions, like a TensorDict."""

    @property
    def batch_size(self) -> torch.Size:
        return next(iter(self._data.values())).shape[:1]

    def __getitem__(self, key: Any) -> Any:
        return self._data[key] if isinstance(key, str) else TensorFrame({k: v[key] for k, v in self._data.items()})

    def apply(self, f: Callable[[Tensor], Tensor]) -> TensorFrame:
        return TensorFrame({k: f(v) for k, v in self._data.items()})


class Encoding(UserDict):  # type: ignore[type-arg]
    """A mapping with samples in an attribute beside its entries, like the output of a tokenizer."""

    def __init__(self, data: Any, lines: Any) -> None:
        super().__init__(data)
        self.lines = lines


class Image:
    """One sample of a list of objects of an unknown kind."""

    def __init__(self, row: Tensor) -> None:
        self.row, self.size = row, (B, B)


def objects(n: Tensor) -> Any:
    array = np.empty(len(n), dtype=object)
    array[:] = [tuple(row) for row in n.tolist()]
    return array


def double(rows: Any) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# Each kind puts targets n [B, D] into an argument, and takes the targets [b, D] out of it again.
KINDS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tensor": (lambda n: n, lambda a: a),
    "array": (lambda n: n.numpy(), torch.from_numpy),
    "array of objects": (objects, lambda a: double([*a])),
    "dict": (lambda n: {"n": n, "T": 1000}, lambda a: a["n"]),
    "ordered dict": (lambda n: OrderedDict(n=n), lambda a: a["n"]),
    "user dict": (lambda n: UserDict(n=n), lambda a: a["n"]),
    "mapping": (lambda n: Frame({"n": n, "mode": "train"}), lambda a: a["n"]),
    "tensor dict": (lambda n: TensorFrame({"n": n}), lambda a: a["n"]),
    "encoding": (lambda n: Encoding({"n": n / 2}, n.tolist()), lambda a: a["n"] + double(a.lines) / 2),
    "dict of lists": (lambda n: {"rows": n.tolist()}, lambda a: double(a["rows"])),
    "tuple": (lambda n: (n / 2, (n / 2,)), lambda a: a[0] + a[1][0]),
    "named tuple": (lambda n: Named(n / 2, 2.0), lambda a: a.n * a.scale),
    "dataclass": (lambda n: Frozen({"n": n}), lambda a: a.n["n"]),
    "dataclass with more": (
        lambda n: Derived(n),
        lambda a: a.twice - a.n + 1 + 0 * double(a.size)[:, :1],
    ),
    "namespace": (lambda n: SimpleNamespace(n=n, flag=True), lambda a: a.n),
    "list of tensors": (list, torch.stack),
    "list of arrays": (lambda n: list(n.numpy()), lambda a: double(np.stack(a))),
    "list of unequal tensors": (
        lambda n: [row.repeat(i + 1) for i, row in enumerate(n)],
        lambda a: torch.stack([row[:D] for row in a]),
    ),
    "list of lists": (lambda n: n.tolist(), double),
    "tuple of tuples": (lambda n: tuple(map(tuple, n.tolist())), double),
    "list of strings": (
        lambda n: [",".join(map(str, row)) for row in n.tolist()],
        lambda a: double([[float(x) for x in line.split(",")] for line in a]),
    ),
    "lists of numbers": (lambda n: [*n.T.tolist()], lambda a: double(a).T),
    "list of dicts": (lambda n: [{"n": row} for row in n], lambda a: torch.stack([e["n"] for e in a])),
    "list of objects": (lambda n: [Image(row) for row in n], lambda a: torch.stack([e.row for e in a])),
    "list with gaps": (
        lambda n: [None if i % 2 else row for i, row in enumerate(n)],
        lambda a: torch.stack([torch.zeros(D).double() if e is None else e for e in a]),
    ),
    "user list": (lambda n: UserList(n.tolist()), lambda a: double(list(a))),
    "deque": (lambda n: deque(n.tolist()), lambda a: double(list(a))),
    "range": (lambda n: range(len(n)), lambda a: double(list(a))[:, None].expand(-1, D)),
    "sparse tensor": (lambda n: n.to_sparse(), lambda a: a.to_dense()),
    "nested tensor": (
        lambda n: torch.nested.nested_tensor([row.repeat(i + 1) for i, row in enumerate(n)], layout=torch.jagged),
        lambda a: torch.stack([row[:D] for row in a.unbind()]),
    ),
}
ROUTES = ["auto", "grouped", "split", "loop", "gram", "accumulated", "micro-batches", "between", "losses", "verify"]


def check(route: str, loss_fn: Callable[..., Tensor], batch: Any, net: nn.Module, plain: Tensor, **more: Any) -> None:
    """Compare a way to use the batch with the losses ``plain [B]`` and their gradients by hand."""
    want = by_hand(net, plain, IDS, K)
    per_sample = plain.detach()
    losses = torch.stack([per_sample[i == IDS].mean() for i in range(K)])
    expected = None

    def combined(weights: Tensor) -> list[Tensor]:
        return [(weights.to(w.dtype).view(-1, *[1] * (w.dim() - 1)) * w).sum(0) for w in want if w is not None]

    if route in ("auto", "grouped", "split", "loop"):
        jacobian = antdiff.ClusterGradients(net, K, route)(loss_fn, batch, IDS, **more)
        assert worst(jacobian.rows, want) < 1e-12
        torch.testing.assert_close(jacobian.losses, losses)
    elif route == "verify":
        assert antdiff.ClusterGradients(net, K, "grouped").verify(loss_fn, batch, IDS, **more) < 1e-12
    elif route == "gram":
        jacobian = antdiff.ClusterGradients(net, K, hold="gram")(loss_fn, batch, IDS, **more)
        jacobian.combine(torch.arange(1.0, K + 1))
        expected = combined(torch.arange(1.0, K + 1))
    elif route == "accumulated":
        cg = antdiff.ClusterGradients(net, K, "loop")
        with cg.accumulate() as total:
            total.add(loss_fn, batch, IDS, **more)
            total.add(loss_fn, batch, IDS, **more)
        assert worst(total.jacobian.rows, want) < 1e-12
    else:
        balancer = balancing.UncertaintyWeighting(K) if route == "losses" else balancing.PCGrad(update_every=2)
        step = antdiff.BalancedBackward(net, balancer, K, micro_batch=3 if route != "losses" else None)
        result = step(loss_fn, batch, IDS, **more)
        if route == "between":
            result = step(loss_fn, batch, IDS, **more)
            assert result.gram is None
        torch.testing.assert_close(result.losses, losses)
        assert result.weights is not None
        expected = combined(result.weights)
    if expected is not None:
        for p, g in zip(net.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, g)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(D, D).double()


def batch_of(kind: str) -> tuple[Tensor, Tensor]:
    x, n = torch.randn(2, B, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    if kind == "list with gaps":
        n[1::2] = 0
    if kind == "range":
        n = torch.arange(B).double()[:, None].expand(-1, D)
    return x, n


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", KINDS)
def test_samples_of_every_kind_keep_their_pairs_on_every_route(kind: str, route: str, net: nn.Module) -> None:
    put, take = KINDS[kind]
    x, n = batch_of(kind)

    def loss_fn(x: Tensor, a: Any) -> Tensor:
        return ((net(x) - take(a)) ** 2).mean(1)

    plain = ((net(x) - n) ** 2).mean(1)
    torch.testing.assert_close(loss_fn(x, put(n)), plain)
    check(route, loss_fn, (x, put(n)), net, plain)


# ---- arguments that all samples share --------------------------------------------------------------------------------

# Each puts a table [B, D], whose rows belong to timesteps, beside the samples x and t.
MARKS: dict[str, tuple[Callable[[Tensor], Any], Any]] = {
    "mark": (antdiff.shared, None),
    "mark in a dict": (lambda table: {"table": antdiff.shared(table)}, None),
    "mark in a list": (lambda table: [antdiff.shared([table]), 3], None),
    "mark in an object": (lambda table: Frozen(antdiff.shared(table)), None),
    "mark in a list of B": (lambda table: [antdiff.shared(table), *range(B - 1)], None),
    "two marks": (lambda table: antdiff.shared(antdiff.shared(table)), None),
    "mark below a 0": (antdiff.shared, 0),
    "mark below a None": (lambda table: {"table": antdiff.shared(table)}, (0, 0, None)),
    "in_dims": (lambda table: table, (0, 0, None)),
    "in_dims of a list": (lambda table: [table, 3], [0, 0, [None, None]]),
    "in_dims of a dict": (lambda table: {"table": table}, (0, 0, {"table": None})),
    "in_dims of an object": (lambda table: Frozen(table), (0, 0, {"n": None, "name": None})),
    "array": (lambda table: antdiff.shared(table.numpy()), None),
}


def table_of(value: Any) -> Tensor:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, (list, dict)):
        return table_of(value["table" if isinstance(value, dict) else 0])
    return value.n if isinstance(value, Frozen) else value


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", MARKS)
def test_a_table_with_as_many_rows_as_samples_is_shared_if_the_call_says_so(
    kind: str, route: str, net: nn.Module
) -> None:
    x, table = batch_of("tensor")
    t = torch.tensor([5, 0, 0, 7, 1, 2, 7, 3])
    put, in_dims = MARKS[kind]

    def loss_fn(x: Tensor, t: Tensor, argument: Any) -> Tensor:
        assert table_of(argument).data_ptr() == table.data_ptr()
        return ((net(x) - table_of(argument)[t]) ** 2).mean(1)

    plain = ((net(x) - table[t]) ** 2).mean(1)
    check(route, loss_fn, (x, t, put(table)), net, plain, in_dims=in_dims)


def test_a_tensor_of_b_rows_is_a_tensor_of_samples_unless_it_is_marked(net: nn.Module) -> None:
    x, n = batch_of("tensor")
    seen: list[Any] = []

    def loss_fn(x: Tensor, *rest: Any) -> Tensor:
        seen.append(rest)
        return net(x).square().mean(1)

    order = IDS.argsort(stable=True)
    shapes = {"n": n, "other": torch.zeros(B + 1, 2), "scalar": torch.tensor(1.0), "size": torch.Size([1] * B)}
    antdiff.ClusterGradients(net, K, "loop")(loss_fn, (x, shapes, torch.nn.ModuleList([net] * B), n.sum), IDS)
    got, modules, f = seen.pop()
    assert torch.equal(got["n"], n[order])
    assert got["other"] is shapes["other"]
    assert got["scalar"] is shapes["scalar"]
    assert got["size"] is shapes["size"]
    assert len(modules) == B
    assert callable(f)
    functions = (torch.sin,) * B
    antdiff.ClusterGradients(net, K, "loop")(loss_fn, (x, functions), IDS)
    assert seen.pop() == (functions,)


# ---- refusals --------------------------------------------------------------------------------------------------------


class Conditions:
    """A container of an unknown kind."""

    def __init__(self, **entries: Any) -> None:
        self.__dict__.update(entries)


class Slotted:
    __slots__ = ("n",)

    def __init__(self, n: Any) -> None:
        self.n = n


class Stubborn(UserDict):  # type: ignore[type-arg]
    def __setitem__(self, key: Any, value: Any) -> None:
        if key in self:
            raise TypeError("read-only")
        super().__setitem__(key, value)


def cycle() -> list[Any]:
    x: list[Any] = [torch.zeros(B)]
    x.append(x)
    return x


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "tensors of B rows": (lambda: [torch.zeros(B, 2)] * B, r"one entry per sample or B arguments; got list of 8 "
                          r"entries such as torch.float32 \[8, 2\] with B=8. Pass torch.stack\(x\), .*in_dims=0"),
    "one of B rows": (lambda: [torch.zeros(i + 1, 2) for i in range(B)], r"np.fromiter\(x, dtype=object\)"),
    "arrays of B rows": (lambda: (np.zeros((B, 2)),) * B, r"Pass torch.stack\(x\)"),
    "B lists of B": (lambda: [[0.5] * B] * B, r"Give in_dims for it: 0 if its entries are the samples"),
    "B dicts of B": (lambda: [{"n": torch.zeros(B)}] * B, r"Give in_dims for it"),
    "functions and numbers": (lambda: [torch.sin, *range(B - 1)], r"Give in_dims for it"),
    "second dimension": (lambda: torch.zeros(3, B, 2), r"first dimension; got torch.float32 \[3, 8, 2\]"),
    "second dimension of an array": (lambda: np.zeros((3, B)), r"first dimension; got a numpy array float64 \[3, 8\]"),
    "a parameter": (lambda: nn.Parameter(torch.zeros(B)), r"no gradient flows back .*x.detach\(\)"),
    "packed": (
        lambda: nn.utils.rnn.pack_sequence([torch.zeros(2)] * B), "keep the rows of a sample together; got Packed"
    ),
    "numbered": (lambda: dict(enumerate("abcdefgh")), r"Pass list\(x.values\(\)\)"),
    "iterator": (lambda: iter([1] * B), r"must not be an iterator, .*got list_iterator"),
    "generator": (lambda: (i for i in range(B)), r"must not be an iterator"),
    "object": (lambda: Conditions(n=torch.zeros(B)), r"got Conditions with B=8"),
    "object of objects": (lambda: Conditions(inner=Conditions(names=["a"] * B)), r"got Conditions"),
    "slots": (lambda: Slotted([Slotted(torch.zeros(B))]), r"got Slotted"),
    "set": (lambda: {torch.zeros(B)}, r"got set of 1 entries"),
    "view": (lambda: {"n": torch.zeros(B)}.values(), r"got dict_values of 1 entries"),
    "partial": (lambda: functools.partial(print, n=torch.zeros(B)), r"got partial"),
    "bytes": (lambda: bytearray(B), r"got bytearray of 8 entries"),
    "read-only mapping": (lambda: Stubborn(n=torch.zeros(B)), r"can be rebuilt .*got Stubborn of 1 entries"),
    "cycle": (cycle, r"must not contain itself"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_ambiguous_is_refused_with_the_remedy_and_passed_if_it_is_marked(kind: str, net: nn.Module) -> None:
    make, message = REFUSED[kind]
    x, _ = batch_of("tensor")
    seen = []

    def loss_fn(x: Tensor, argument: Any) -> Tensor:
        seen.append(argument["it"])
        return net(x).square().mean(1)

    argument = make()
    for route in ("auto", "split", "grouped", "loop"):
        with pytest.raises(TypeError, match=rf"^batch\[1\]\['it'\].*{message}") as error:
            antdiff.ClusterGradients(net, K, route)(loss_fn, (x, {"it": argument}), IDS)  # type: ignore[arg-type]
        assert str(error.value).endswith(", or mark it antdiff.shared(...) if all samples share it.")
    assert not seen
    antdiff.ClusterGradients(net, K, "split")(loss_fn, (x, {"it": antdiff.shared(argument)}), IDS)
    assert all(it is argument for it in seen)
    seen.clear()
    # Nothing is sorted or cut here, so nothing has to be known.
    for route in ("grouped", "loop"):
        cg = antdiff.ClusterGradients(net, K, route)  # type: ignore[arg-type]
        cg(loss_fn, (x, {"it": argument}), IDS.sort().values, counts=[2, 3, 1, 2])
    antdiff.BalancedBackward(net, balancing.UncertaintyWeighting(K), K)(loss_fn, (x, {"it": argument}), IDS)
    assert kind == "cycle" or all(it is argument for it in seen)


IN_DIMS: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "other dimension": (torch.zeros(3, B), (0, 1), ValueError, r"0 or None for batch\[1\].*got 1. .*x.movedim\(1, 0\)"),
    "text": (torch.zeros(B), "00", TypeError, r"in_dims must be 0, or a tuple .*got str"),
    "other integer": (torch.zeros(B), 1, TypeError, r"in_dims must be 0, or a tuple .*got 1"),
    "length": (torch.zeros(B), (0,), ValueError, r"each of the 2 arguments in batch; got 1"),
    "length of an argument": ([torch.zeros(B)], (0, [0, 0]), ValueError, r"each of the 1 entries of batch\[1\]; got 2"),
    "keys": ({"a": 1}, (0, {"b": None}), ValueError, r"keys of batch\[1\], which are \['a'\]; got \['b'\]"),
    "structure": (
        torch.zeros(B),
        (0, [0]),
        TypeError,
        r"batch\[1\], or have its structure; got list for torch.float32",
    ),
    "no samples": ([3], (0, [0]), ValueError, r"batch\[1\]\[0\] must have one row .*B=8 samples, .*got int"),
    "other rows": (torch.zeros(B + 1), 0, ValueError, r"batch\[1\] must have one row .*got torch.float32 \[9\]"),
    "other entries": (["a"] * 3, 0, ValueError, r"batch\[1\] must have one row .*got list of 3 entries such as str"),
    "mark": (antdiff.shared(1), (0, 0), ValueError, r"must be None for batch\[1\], which is marked antdiff.shared"),
}


@pytest.mark.parametrize("kind", IN_DIMS)
def test_in_dims_that_do_not_fit_the_batch(kind: str, net: nn.Module) -> None:
    argument, in_dims, error, message = IN_DIMS[kind]
    x, _ = batch_of("tensor")

    def use(in_dims: Any) -> None:
        for cluster in (IDS, IDS.sort().values):
            antdiff.ClusterGradients(net, K, "loop")(
                lambda x, _: net(x).square().mean(1), (x, argument), cluster, in_dims=in_dims
            )

    with pytest.raises(error, match=message):
        use(in_dims)
    use((0, None))


def test_in_dims_say_what_a_list_of_b_entries_is(net: nn.Module) -> None:
    order = IDS.argsort(stable=True)
    rows = torch.randn(B, B)

    def sorted_as(value: Any, in_dims: Any) -> Any:
        batch = with_dims((value,), in_dims)
        return ClusteredBatch.of(IDS, K).sort(batch)[1][0]

    table = rows.tolist()
    assert sorted_as(table, 0) == [table[i] for i in order]
    assert sorted_as(table, [[0] * B]) == rows[:, order].tolist()
    assert torch.equal(torch.stack(sorted_as(list(rows), 0)), rows[:, order])
    assert torch.equal(sorted_as(torch.stack(list(rows)), None), rows[order])
    entries = sorted_as(np.fromiter(list(rows), dtype=object), None)
    assert torch.equal(torch.stack(list(entries)), rows[order])


def test_a_batch_that_is_no_sequence_of_arguments_is_refused(net: nn.Module) -> None:
    x, _ = batch_of("tensor")
    cg = antdiff.ClusterGradients(net, K, "loop")
    for batch in (x, {"x": x}, "x", iter((x,))):
        with pytest.raises(TypeError, match=r"batch must be a tuple or list of the arguments of loss_fn; got"):
            cg(lambda x: net(x).square().mean(1), batch, IDS)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"batch must hold the B=8 samples, .*instead of reading them inside it"):
        cg(lambda: net(x).square().mean(1), (), IDS)


# ---- tensors of every layout -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("route", ["loop", "split"])
def test_layouts_without_rows_are_refused_or_sorted(route: Any, net: nn.Module) -> None:
    x, n = batch_of("tensor")

    def loss_fn(x: Tensor, n: Tensor) -> Tensor:
        dense = n if n.layout is torch.strided else n.to_dense()
        return ((net(x) - (dense.dequantize() if dense.is_quantized else dense)) ** 2).mean(1)

    cg = antdiff.ClusterGradients(net, K, route)
    for other in (n.to_sparse_csr(), n.float().to_mkldnn(), torch.quantize_per_channel(
        n.float(), torch.ones(B), torch.zeros(B), 0, torch.qint8)):  # fmt: skip
        with pytest.raises(TypeError, match=r"batch\[1\] must hold samples that can be sorted.*Convert it to a dense"):
            cg(loss_fn, (x, other), IDS)
        cg = antdiff.ClusterGradients(net, K, "loop")
        cg(loss_fn, (x, other), IDS.sort().values)
    quantized = torch.quantize_per_tensor(n.float(), 0.1, 0, torch.qint8)
    check(route, loss_fn, (x, quantized), net, ((net(x) - quantized.dequantize()) ** 2).mean(1))
    elsewhere = ClusteredBatch.of(IDS, K).sort((x, n.to("meta")))[1][1]
    assert elsewhere.device.type == "meta"
    ragged = torch.nested.nested_tensor(list(n))
    assert torch.equal(
        torch.stack(ClusteredBatch.of(IDS, K).sort((ragged,))[1][0].unbind()), n[IDS.argsort(stable=True)]
    )


# ---- what is not done ------------------------------------------------------------------------------------------------


def test_sorted_samples_are_neither_sorted_nor_copied(net: nn.Module) -> None:
    x, n = batch_of("tensor")
    argument = {"n": n, "names": ["a"] * B}
    for route in ("grouped", "loop"):

        def loss_fn(got: Tensor, other: Any) -> Tensor:
            assert got is x
            assert other["n"] is n
            assert other["names"] is argument["names"]
            return ((net(got) - other["n"]) ** 2).mean(1)

        cg = antdiff.ClusterGradients(net, K, route, audit=None)  # type: ignore[arg-type]
        cg(loss_fn, (x, argument), IDS.sort().values, counts=[2, 3, 1, 2])
        cg(loss_fn, (x, argument), torch.zeros(B, dtype=torch.int64))
    # Known weights need no order, and a slice is a view.
    step = antdiff.BalancedBackward(net, balancing.PCGrad(update_every=2), K)
    step(lambda x, a: ((net(x) - a["n"]) ** 2).mean(1), (x, argument), IDS)
    step(loss_fn, (x, argument), IDS)
    assert cut((x,), B, 2, 5)[0].data_ptr() == x[2:].data_ptr()


def test_one_sample_is_never_refused(net: nn.Module) -> None:
    x = torch.randn(1, D).double()
    token = nn.Parameter(torch.zeros(1, D).double())
    for make, _ in REFUSED.values():
        for route in ("auto", "split", "loop"):
            antdiff.ClusterGradients(net, K, route)(  # type: ignore[arg-type]
                lambda x, a, *_: net(x + a["mark"] + token).square().mean(1),
                (x, {"mark": antdiff.shared(1.0)}, make(), [torch.zeros(1)], ["a"], token),
                torch.tensor([2]),
            )
    assert Samples.of((token,), 1)[0] is token


def test_a_slice_is_not_read_again_with_the_number_of_its_samples() -> None:
    x, table = torch.randn(B, 3), torch.randn(3, 5)
    part = cut((x, table, ["a", "b", "c"]), B, 2, 5)
    again = cut(part, 3, 1, 2)
    assert len(again[0]) == 1
    assert again[1] is table
    assert again[2] == ["a", "b", "c"]
    with pytest.raises(ValueError, match=r"one id per sample, B=3; got 2"):
        Samples.of(part, 2)


def test_no_gradient_flows_back_into_samples(net: nn.Module) -> None:
    w = torch.ones((), dtype=torch.float64, requires_grad=True)
    x, n = batch_of("tensor")
    batch = (x * w, [{"n": row} for row in n * w], TensorFrame({"n": n * w}), list(n * w))

    def loss_fn(x: Tensor, a: Any, b: Any, c: Any) -> Tensor:
        return (net(x) - torch.stack([e["n"] for e in a]) - b["n"] - torch.stack(list(c))).square().mean(1)

    for cluster in (IDS, IDS.sort().values):
        for route in ("split", "grouped", "loop"):
            antdiff.ClusterGradients(net, K, route)(loss_fn, batch, cluster)  # type: ignore[arg-type]
    assert w.grad is None


def test_a_probe_reaches_samples_in_every_container() -> None:
    x, n = batch_of("tensor")
    chosen = torch.zeros(B, dtype=torch.bool)
    chosen[2] = True
    for kind in set(KINDS) - {"list of strings", "list of objects", "range", "list with gaps"}:
        put, take = KINDS[kind]
        found = torch.isnan(take(Samples.of((put(n),), B).with_nan(chosen)[0])).any(1)
        assert torch.equal(found, chosen), kind
    doubled = each_row((x, {"n": n}, n[:3]), B, lambda x: x * 2)
    assert torch.equal(doubled[0], x * 2)
    assert torch.equal(doubled[1]["n"], n * 2)
    assert torch.equal(doubled[2], n[:3])


# ---- random structures -----------------------------------------------------------------------------------------------


class Part:
    """A value of a random structure, and what must become of it.

    Attributes:
        holds: whether what became of the value belongs to the samples ``order``.
        kind: "samples", "mark", "code", or "" for anything else.
        refused: whether there is a list in it that must be refused.
    """

    def __init__(self, value: Any, holds: Callable[[Any, list[int]], bool], kind: str, refused: bool = False) -> None:
        self.value, self.holds, self.kind, self.refused = value, holds, kind, refused


def leaves(B: int) -> st.SearchStrategy[Part]:
    def tensor(width: int) -> Part:
        value = torch.arange(B)[:, None].expand(B, width) if width else torch.arange(B)
        return Part(value, lambda got, order: got.tolist() == [value[i].tolist() for i in order], "samples")

    def array() -> Part:
        return Part(np.arange(B), lambda got, order: isinstance(got, np.ndarray) and got.tolist() == order, "samples")

    def entries(make: Callable[[int], Any], kind: type) -> Part:
        value = kind(make(i) for i in range(B))
        return Part(value, lambda got, order: type(got) is kind and got == kind(make(i) for i in order), "samples")

    def shared(value: Any) -> Part:
        marked = isinstance(value, Shared)
        bare = value.value if marked else value
        return Part(value, lambda got, order: got is bare, "mark" if marked else "code" if callable(value) else "")

    return st.one_of(
        st.sampled_from([1, 2, 7]).map(tensor),
        st.builds(lambda: tensor(0)),
        st.builds(array),
        st.builds(
            entries,
            st.sampled_from([str, float, lambda i: (i, *"abcde"), lambda i: [i], lambda i: {"i": i}, lambda i: None]),
            st.sampled_from([list, tuple]),
        ),
        st.sampled_from([None, 1.5, "text", torch.zeros(9), torch.tensor(2), antdiff.shared(torch.zeros(B, 2)),
                         antdiff.shared(["a"] * B), torch.Size([B] * B), print]).map(shared),
    )  # fmt: skip


def containers(parts: st.SearchStrategy[Part], B: int) -> st.SearchStrategy[Part]:
    def pack(container: str, inner: list[Part]) -> Part:
        values = [p.value for p in inner]
        names = [f"k{i}" for i in range(len(inner))]
        make, take = {
            "list": (list, list),
            "tuple": (tuple, list),
            "dict": (lambda v: dict(zip(names, v, strict=True)), lambda x: list(x.values())),
            "user dict": (lambda v: UserDict(zip(names, v, strict=True)), lambda x: list(x.values())),
            "mapping": (lambda v: Frame(dict(zip(names, v, strict=True))), lambda x: list(x.values())),
            "namespace": (
                lambda v: SimpleNamespace(**dict(zip(names, v, strict=True))),
                lambda x: list(vars(x).values()),
            ),
            "object": (lambda v: Frozen(dict(zip(names, v, strict=True))), lambda x: list(x.n.values())),
            "named": (lambda v: Named(tuple(v) + (1,) * (len(v) == B), 1), lambda x: list(x.n)[: len(values)]),
        }[container]
        value = make(values)

        def holds(got: Any, order: list[int]) -> bool:
            entries = take(got)
            return type(got) is type(value) and len(entries) == len(inner) and all(
                p.holds(g, order) for p, g in zip(inner, entries, strict=True)
            )  # fmt: skip

        def permuted(got: Any, order: list[int]) -> bool:
            return len(got) == len(order) and all(g is values[i] for g, i in zip(got, order, strict=True))

        kinds = [p.kind for p in inner]
        kind = next((k for k in ("mark", "samples") if k in kinds), "")
        refused = any(p.refused for p in inner)
        if container in ("list", "tuple") and len(inner) == B and kind != "mark" and set(kinds) != {"code"}:
            bad = kind == "samples" or "code" in kinds
            return Part(value, holds if bad else permuted, "samples", bad or refused)
        return Part(value, holds, kind, refused)

    names = ["list", "tuple", "dict", "user dict", "mapping", "namespace", "object", "named"]
    return st.builds(pack, st.sampled_from(names), st.lists(parts, max_size=4))


@settings(deadline=None, max_examples=150)
@given(data=st.data(), size=st.integers(2, 4))
def test_random_structures_keep_every_pair_or_are_refused(data: st.DataObject, size: int) -> None:
    part = st.recursive(leaves(size), lambda parts: containers(parts, size), max_leaves=8)
    parts = [*data.draw(st.lists(part, max_size=3)), Part(torch.arange(size), lambda x, i: x.tolist() == i, "samples")]
    order = data.draw(st.permutations(range(size)))
    start, stop = sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size))))
    samples = Samples.of(tuple(p.value for p in parts), size)
    if any(p.refused for p in parts):
        with pytest.raises(TypeError, match=r"^batch\[\d\].* must not be a list of B entries"):
            samples.select(torch.tensor(order))
        return
    moved = samples.select(torch.tensor(order))
    cuts = moved.cut(start, stop)
    for whole, slice_, p in zip(moved, cuts, parts, strict=True):
        assert p.holds(whole, list(order))
        assert p.holds(slice_, list(order)[start:stop])
    assert all(p.holds(x, list(range(size))) for x, p in zip(samples, parts, strict=True))
