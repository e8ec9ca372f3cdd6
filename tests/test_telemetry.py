"""Tests of telemetry: its numbers are those of J, it never waits for the device, and it resumes."""

from __future__ import annotations

import csv
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tolerances
import torch
from devices import HAS_CUDA
from torch.utils._python_dispatch import TorchDispatchMode

import antdiff
from antdiff import ops
from antdiff.analysis import Telemetry
from antdiff.train.log import CsvLogger, MetricLog, WandbLogger, cosine_matrix, import_wandb, read_csv

K, P = 4, 50
DOCS = Path(__file__).resolve().parent.parent / "docs" / "report.md"


def steps(n: int, *, empty: bool = False, seed: int = 0) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield losses, counts, weights, each [K], and J [K, P] of n steps. If `empty`, step s lacks cluster s % K."""
    generator = torch.Generator().manual_seed(seed)
    for s in range(n):
        losses = torch.rand(K, generator=generator) + 0.1
        counts = torch.randint(1, 9, (K,), generator=generator)
        weights = torch.rand(K, generator=generator, dtype=torch.float64)
        J = torch.randn(K, P, generator=generator, dtype=torch.float64) + 0.2
        if empty:
            losses[s % K], counts[s % K], J[s % K] = 0, 0, 0
        yield losses, counts, weights, J


def record(telemetry: Telemetry, taken: list[tuple[torch.Tensor, ...]]) -> None:
    for losses, counts, weights, J in taken:
        telemetry.add(losses, counts, weights, ops.gram(J))


# ---- the numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("empty", [False, True])
def test_a_row_is_what_the_gradients_themselves_say(empty: bool) -> None:
    share = np.array([0.4, 0.3, 0.2, 0.1])
    telemetry = Telemetry(K, window=6, share=torch.tensor(share))
    first = list(steps(6, empty=empty, seed=1))
    record(telemetry, first)
    initial = telemetry.read()
    taken = list(steps(6, empty=empty))
    record(telemetry, taken)
    row = telemetry.read()

    # Everything below is computed from J by hand, pair by pair.
    samples, sums, lengths, weights, updates, rates = np.zeros(K), np.zeros(K), [], [], [], []  # type: ignore[var-annotated]
    cosines: dict[tuple[int, int], list[float]] = {(i, j): [] for i in range(K) for j in range(i + 1, K)}
    for losses, counts, w, J in taken:
        samples += counts.numpy()
        sums += losses.double().numpy() * counts.numpy()
        g = [row for row in J.numpy()]
        length = np.array([np.sqrt(sum(x * x for x in row)) for row in g])
        lengths.append(np.where(length > 0, length, np.nan))
        weights.append(w.numpy())
        updates.append(np.linalg.norm(sum(w[i].item() * g[i] for i in range(K))))
        of_step = []
        for i, j in cosines:
            if length[i] and length[j]:
                cosine = float(g[i] @ g[j]) / (length[i] * length[j])
                cosines[i, j].append(cosine)
                of_step.append(cosine < 0)
        rates.append(np.mean(of_step))
    losses_ = sums / samples
    expected = {"loss": float(share @ losses_ / share.sum()), "update_norm": float(np.mean(updates))}
    expected["conflict_rate"] = float(np.mean(rates))
    for i in range(K):
        expected[f"loss_{i}"] = losses_[i]
        expected[f"loss_ratio_{i}"] = losses_[i] / initial[f"loss_{i}"]
        expected[f"weight_{i}"] = float(np.mean(weights, axis=0)[i])
        expected[f"grad_norm_{i}"] = float(np.nanmean(lengths, axis=0)[i])
    expected |= {f"cosine_{i}_{j}": float(np.mean(values)) for (i, j), values in cosines.items()}
    assert row.keys() == expected.keys()
    # Six sums of float64 numbers, none of which cancels to less than a thousandth of its terms.
    assert row == pytest.approx(expected, rel=1e3 * tolerances.summed(torch.float64))
    assert [initial[f"loss_ratio_{i}"] for i in range(K)] == [1.0] * K


def test_losses_are_weighed_by_samples_and_their_mean_by_share() -> None:
    telemetry = Telemetry(3, window=2, share=[0.5, 0.25, 0.25])
    gram = torch.tensor([[1.0, -1.0, 2.0], [-1.0, 1.0, 3.0], [2.0, 3.0, 1.0]])
    telemetry.add(torch.tensor([1.0, 4.0, 0.0]), torch.tensor([1, 2, 0]), torch.tensor([0.2, 0.3, 0.5]), gram)
    telemetry.add(torch.tensor([3.0, 8.0, 0.0]), torch.tensor([3, 2, 0]), torch.tensor([0.4, 0.3, 0.5]), gram.abs())
    row = telemetry.read()
    assert (row["loss_0"], row["loss_1"]) == (2.5, 6.0)
    assert np.isnan(row["loss_2"])  # without samples
    assert row["loss"] == pytest.approx((0.5 * 2.5 + 0.25 * 6) / 0.75)
    assert row["weight_0"] == pytest.approx(0.3)
    assert row["conflict_rate"] == pytest.approx(1 / 6)  # one of three pairs, in one of two steps


def test_what_was_not_measured_is_nan_and_a_late_cluster_has_its_own_beginning() -> None:
    telemetry = Telemetry(2, window=3)
    ones = torch.ones(2)
    telemetry.add(torch.tensor([2.0, 0.0]), torch.tensor([5, 0]), ones)
    row = telemetry.read()
    assert row["loss"] == row["loss_0"] == 2
    for column in ("loss_1", "loss_ratio_1", "grad_norm_0", "update_norm", "conflict_rate", "cosine_0_1"):
        assert np.isnan(row[column]), column
    telemetry.add(torch.tensor([1.0, 8.0]), torch.tensor([5, 5]), ones)
    telemetry.read()
    telemetry.add(torch.tensor([1.0, 6.0]), torch.tensor([5, 5]), ones)
    row = telemetry.read()
    assert (row["loss_ratio_0"], row["loss_ratio_1"]) == (0.5, 0.75)


def test_steps_with_and_without_a_gram_matrix_share_a_row() -> None:
    """As with update_every, the gradient columns are means over the steps that have a Gram matrix."""
    telemetry = Telemetry(2, window=4)
    gram = torch.tensor([[4.0, -3.0], [-3.0, 9.0]], dtype=torch.float64)
    for i in range(4):
        telemetry.add(torch.ones(2), torch.ones(2), torch.ones(2), gram if i == 0 else None)
    row = telemetry.read()
    assert (row["grad_norm_0"], row["grad_norm_1"], row["cosine_0_1"]) == (2, 3, -0.5)
    assert (row["conflict_rate"], row["update_norm"]) == (1, pytest.approx(7**0.5))


def test_scale_does_not_matter_and_poison_stays_visible() -> None:
    rows = []
    for scale in (1.0, 1e-120, 1e120):
        telemetry = Telemetry(K, window=3)
        for losses, counts, weights, J in steps(3):
            telemetry.add(losses, counts, weights, ops.gram(J) * scale)
        rows.append(telemetry.read())
    for key in rows[0]:
        if key.startswith(("cosine", "conflict")):
            assert rows[1][key] == pytest.approx(rows[0][key], rel=1e-12)
            assert rows[2][key] == pytest.approx(rows[0][key], rel=1e-12)
    telemetry.add(torch.ones(K), torch.ones(K), torch.ones(K), torch.full((K, K), torch.nan))
    row = telemetry.read()
    assert np.isnan(row["grad_norm_0"])
    assert np.isnan(row["update_norm"])
    assert np.isnan(row["conflict_rate"])
    assert row["loss"] == 1


def test_a_method_without_weights_has_everything_else() -> None:
    """For a method that chooses per parameter, only the weights and the length of the update are NaN."""
    telemetry = Telemetry(2, window=1)
    gram = torch.tensor([[4.0, -3.0], [-3.0, 9.0]], dtype=torch.float64)
    for weights in (None, torch.full((2,), torch.nan)):
        telemetry.add(torch.ones(2), torch.ones(2), weights, gram)
        row = telemetry.read()
        assert {key for key, value in row.items() if np.isnan(value)} == {"weight_0", "weight_1", "update_norm"}


def test_a_late_reading_covers_the_last_steps_of_the_window() -> None:
    late, punctual = Telemetry(K, window=3), Telemetry(K, window=3)
    taken = list(steps(8))
    record(late, taken)
    record(punctual, taken[5:])
    first = punctual.read()
    assert late.read() == pytest.approx(first, rel=tolerances.summed(torch.float64))  # in another order
    with pytest.raises(RuntimeError, match="read\\(\\) needs a step"):
        late.read()


def test_one_cluster_has_no_pairs() -> None:
    telemetry = Telemetry(1, window=1)
    telemetry.add(torch.ones(1), torch.ones(1), torch.ones(1), torch.full((1, 1), 4.0))
    row = telemetry.read()
    assert row["grad_norm_0"] == row["update_norm"] == 2
    assert np.isnan(row["conflict_rate"])
    assert not [key for key in row if key.startswith("cosine")]


def test_misuse() -> None:
    for options, message in (
        ({"k": 0, "window": 1}, "k must be at least 1; got 0"),
        ({"k": 2, "window": 0}, "window must be at least 1; got 0"),
        ({"k": 2, "window": 1, "share": [1.0]}, r"share must be \[K=2\] numbers"),
        ({"k": 2, "window": 1, "share": [1.0, -1.0]}, r"share must be \[K=2\] numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            Telemetry(**options)  # type: ignore[arg-type]
    telemetry = Telemetry(2, window=1)
    with pytest.raises(ValueError, match=r"gram must have shape \[2, 2\] for k=2; got \[3, 3\]"):
        telemetry.add(torch.ones(2), torch.ones(2), torch.ones(2), torch.eye(3))
    with pytest.raises(ValueError, match="state must have k=2 and window=1"):
        telemetry.load_state_dict(Telemetry(2, window=2).state_dict())


# ---- the cost of a step ------------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Records the names of the operations that run, except views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_step_is_four_kernels_and_none_of_them_waits() -> None:
    telemetry = Telemetry(K, window=3)
    for losses, counts, weights, J in steps(5):
        G = ops.gram(J)
        with Operations() as seen:
            telemetry.add(losses, counts, weights, G)
        assert seen.names == ["cat", "remainder", "index_copy_", "add_"]  # no copy to the host and no value read
    with Operations() as seen:
        telemetry.read()
    assert "_local_scalar_dense" in seen.names  # so the check above would have detected a sync


def test_a_step_traces_whole_and_replays() -> None:
    """The graph has no break and contains no value of a single step, as a CUDA graph requires."""
    plain, traced = Telemetry(K, window=3), Telemetry(K, window=3)
    compiled = torch.compile(traced.add, fullgraph=True, backend="eager")
    for losses, counts, weights, J in steps(3):
        G = ops.gram(J)
        plain.add(losses, counts, weights, G)
        compiled(losses, counts, weights, G)
    assert traced.read() == plain.read()


@pytest.mark.cuda
@pytest.mark.skipif(not HAS_CUDA, reason="no GPU here; the GPU gate runs this")
def test_a_captured_step_records_each_replay_and_waits_for_none() -> None:
    plain, replayed = Telemetry(K, window=4), Telemetry(K, window=4, device="cuda")
    taken = [(losses, counts, weights, J @ J.T) for losses, counts, weights, J in steps(4)]
    slots = [x.cuda() for x in taken[0]]
    torch.cuda.set_sync_debug_mode("error")
    try:
        replayed.add(*slots)  # warm-up
    finally:
        torch.cuda.set_sync_debug_mode("default")
    replayed.read()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed.add(*slots)
    replayed.load_state_dict(Telemetry(K, window=4).state_dict())
    for step in taken:
        for slot, x in zip(slots, step, strict=True):
            slot.copy_(x)
        graph.replay()
        plain.add(*step)
    assert replayed.read() == plain.read()


# ---- resuming ----------------------------------------------------------------------------------------------------


def test_state_goes_on_bit_for_bit() -> None:
    taken = list(steps(9, empty=True))
    whole, broken = Telemetry(K, window=4), Telemetry(K, window=4)
    record(whole, taken[:4])
    record(broken, taken[:4])
    whole.read()
    broken.read()
    record(whole, taken[4:])
    record(broken, taken[4:6])
    state = broken.state_dict()
    record(broken, taken[:3])  # a saved state is a copy
    restored = Telemetry(K, window=4)
    restored.load_state_dict(state)
    record(restored, taken[6:])
    assert restored.read() == whole.read()


# ---- loggers -----------------------------------------------------------------------------------------------------


class Rows:
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.closed = False

    def log(self, step: int, row: Any) -> None:
        self.rows.append((step, dict(row)))

    def close(self) -> None:
        self.closed = True


def row_of(telemetry: Telemetry) -> dict[str, float]:
    record(telemetry, list(steps(2)))
    return telemetry.read()


def test_every_logger_gets_every_row_and_cosines_a_picture(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    telemetry, mine = Telemetry(K, window=2), Rows()
    both = MetricLog(tmp_path, start=0, also=[mine])
    rows = [row_of(telemetry) for _ in range(12)]
    rows[3]["grad_norm_1"] = float("nan")
    for i, row in enumerate(rows):
        both.log(i + 1, row)
    both.close()
    assert mine.rows == [(i + 1, row) for i, row in enumerate(rows)]
    assert mine.closed
    assert [row["step"] for row in read_csv(tmp_path / "metrics.csv")] == list(range(1, 13))
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert [event.value for event in events.Scalars("grad_norm/cluster_0")] == pytest.approx(
        [row["grad_norm_0"] for row in rows]
    )
    assert len(events.Scalars("grad_norm/cluster_1")) == 11  # NaN is left out
    assert not [tag for tag in events.Tags()["scalars"] if "cosine" in tag]
    MetricLog(tmp_path, start=10).close()  # the run resumes from step 10, whose row is kept
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("grad_norm/cluster_0")] == list(range(1, 11))
    pictures = events.Images("cosines")
    assert [event.step for event in pictures] == [1]
    assert pictures[0].width == 240


def test_a_run_resumed_within_a_second_hides_the_rows_after_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.summary.writer import event_file_writer

    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(9))  # "10" sorts before "9"
    time.sleep(1 - time.time() % 1)  # to the begin of a second
    first = MetricLog(tmp_path, start=0)
    for step in range(1, 4):
        first.log(step, {"loss": 1.0})
    first.close()
    MetricLog(tmp_path, start=2).close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]


def test_a_row_cut_short_is_left_out_wherever_it_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    log = CsvLogger(path, start=0)
    log.log(1, {"loss": 0.5, "loss_0": 1.25e-05})
    log.log(2, {"loss": 0.25, "loss_0": 1.25e-05})
    text = path.read_text()
    for end in range(text.rindex("\n", 0, -1) + 1, len(text)):
        path.write_text(text[:end])
        assert [row["step"] for row in read_csv(path)] == [1]


def test_cosines_come_back_as_a_matrix() -> None:
    matrix = cosine_matrix({"loss": 1.0, "cosine_0_1": 0.5, "cosine_0_2": -0.25, "cosine_1_2": float("nan")})
    np.testing.assert_array_equal(matrix, [[1, 0.5, -0.25], [0.5, 1, np.nan], [-0.25, np.nan, 1]])
    assert cosine_matrix({"loss": 1.0}).shape == (1, 1)


def test_wandb_gets_tagged_numbers_and_a_page_to_go_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages: list[Any] = []

    def init(**options: Any) -> Any:
        page = SimpleNamespace(options=options, rows=[], finished=False)
        page.log = lambda row, step: page.rows.append((step, row))
        page.finish = lambda: setattr(page, "finished", True)
        pages.append(page)
        return page

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for _ in range(2):  # the second time, as a resumed run
        logger = WandbLogger("project", tmp_path, {"lr": 0.1})
        logger.log(20, {"loss": 1.0, "loss_0": 2.0, "grad_norm_0": float("nan"), "cosine_0_1": 0.5})
        logger.close()
    assert [page.rows for page in pages] == [[(20, {"train/loss": 1.0, "loss/cluster_0": 2.0, "cosine_0_1": 0.5})]] * 2
    assert all(page.finished for page in pages)
    first, second = (page.options for page in pages)
    assert (first["project"], first["name"], first["config"]) == ("project", tmp_path.name, {"lr": 0.1})
    assert first["resume"] == "allow"
    assert first["id"] == second["id"]


def test_a_missing_wandb_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RuntimeError, match="pip install wandb, or leave out --wandb"):
        import_wandb()


# ---- documentation -----------------------------------------------------------------------------------------------


def test_the_loop_of_the_docs_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    model = torch.nn.Linear(3, 1)
    clusters = antdiff.TimestepClusters.uniform(1000, 5)
    generator = torch.Generator().manual_seed(0)
    t = torch.randint(0, 1000, (100, 20), generator=generator)
    names: dict[str, Any] = {
        "clusters": clusters,
        "device": "cpu",
        "backward": antdiff.BalancedBackward(model, antdiff.balancing.PCGrad(), 5),
        "loss_fn": lambda x0, t: (model(x0)[:, 0] - t / 1000).square(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "batches": [(torch.rand(20, 3, generator=generator), row, clusters.cluster_of(row)) for row in t],
    }
    exec(code, names)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["50", "100"]
    assert "'update_norm'" in lines[0]


def test_the_docs_explain_every_column(tmp_path: Path) -> None:
    MetricLog(tmp_path, start=0).log(1, row_of(Telemetry(K, window=2)))
    with (tmp_path / "metrics.csv").open() as file:
        columns = next(csv.reader(file))
    kinds = {re.sub(r"_\d+_\d+$", "_i_j", re.sub(r"(?<!_\d)_\d+$", "_i", column)) for column in columns}
    documented = set(re.findall(r"^\| `(\w+)` \|", DOCS.read_text(), re.MULTILINE))
    assert documented == kinds | {"stage"}
