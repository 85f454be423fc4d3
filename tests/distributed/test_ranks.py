"""Ranks, here threads: together they compute what one process computes, and decide alike."""

import itertools
import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from thread_ranks import ThreadGroup, together

import baby_xp
from baby_xp import compute
from baby_xp.arrays import params, registry
from baby_xp.config import GPTConfig, TrainConfig
from baby_xp.distributed import Group
from baby_xp.errors import BabyError
from baby_xp.models import Model
from baby_xp.runs import state_file
from baby_xp.text.batches import EpochWindows, RandomWindows, consecutive_windows
from baby_xp.training import alike, checkpoint, loop, optimizers
from baby_xp.training.alone import Alone
from baby_xp.training.divergence import largest_gradient
from baby_xp.training.ranks import Ranks
from baby_xp.training.signals import Agreed, Stop
from baby_xp.training.step import initial_state
from baby_xp.training.validation import mean_loss

IDS = np.random.default_rng(0).integers(0, 17, 400)
STEPS = 10
TOLERANCE = {"float32": 1e-6, "float64": 1e-12}
SETTINGS = {
    "n_ctx": 4, "n_emb": 4, "head_size": 4, "n_heads": 2, "n_layers": 1, "dropout": 0.1, "batch_size": 3,
    "num_steps": 6, "eval_every": 2, "lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 2, "sample_tokens": 0,
    "checkpoint_minutes": 0.0, "dtype": "float64", "backend": "numpy", "workers": 1, "data": "text.txt",
    "distributed": "mpi",
}  # fmt: skip


# steps --------------------------------------------------------------------------------------------------


class Training:
    """Ten steps of a small model with dropout."""

    def __init__(self, dtype: str, optimizer: str = "adamw", accumulate: int = 1, epochs: bool = False, **more):
        sizes = {"n_ctx": 8, "n_emb": 8, "head_size": 8, "n_heads": 2, "n_layers": 2, "dropout": 0.2, **more}
        self.backend, self.model = registry.load("numpy", dtype=dtype), Model(GPTConfig(**sizes), 17)
        self.config = TrainConfig(
            num_steps=STEPS, batch_size=7, accumulate=accumulate, warmup_steps=2, lr=1e-2, min_lr=1e-3,
            optimizer=optimizer, dtype=dtype,
        )  # fmt: skip
        size = self.config.step_size
        # 19 windows: a whole batch and a smaller one in turn, if there are 14 in a batch
        self.batches = EpochWindows(IDS[:155], 8, size, 8, 0) if epochs else RandomWindows(IDS, 8, size, 0)

    def run(self, group: Group) -> dict[str, np.ndarray]:
        """Losses and gradient norms, and the state at the end."""
        backend, model, found = self.backend, self.model, []
        decays = params.decay_mask(model.spec)
        state = initial_state(backend, params.draw(model.spec, 0, backend.dtype) * 2, decays, 2**31 + 5)
        own = Alone(backend, model, self.config.batch_size)
        ranks = Ranks(group, own, backend, model, self.config)
        step = ranks.step()
        for i in range(STEPS):
            state, metrics = step(state, self.batches.batch(i))
            found.append([float(metrics[name][0]) for name in ("loss", "grad_norm")])
        ranks.gather(state["m"], state["v"])
        return {"figures": np.array(found), **{name: state[name].copy() for name in ("params", "m", "v")}}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("how", "sizes"),
    [
        ({}, (2, 3, 4, 9)),
        ({"optimizer": "muon"}, (3, 9)),
        ({"epochs": True, "accumulate": 2}, (3,)),
        ({"optimizer": "muon", "accumulate": 3}, (2,)),
    ],
    ids=str,
)
def test_ranks_compute_the_steps_of_one_process(dtype, how, sizes):
    """With dropout; seven samples for two, three and four ranks, and for nine, some of which have none."""
    training = Training(dtype, **how)
    expected = training.run(Group())
    tolerance = TOLERANCE[dtype]
    for size in sizes:
        found = together(size, training.run)
        for one in found:
            np.testing.assert_allclose(one["figures"][:, 0], expected["figures"][:, 0], rtol=tolerance)
            np.testing.assert_allclose(one["figures"][:, 1], expected["figures"][:, 1], rtol=10 * tolerance)
            for name in ("params", "m", "v"):
                # all ranks have the same bits
                np.testing.assert_array_equal(one[name], found[0][name])
            np.testing.assert_allclose(one["params"], expected["params"], rtol=0, atol=1e4 * tolerance)
            for name in ("m", "v"):
                scale = np.abs(expected[name]).max()
                np.testing.assert_allclose(one[name] / scale, expected[name] / scale, rtol=0, atol=1e4 * tolerance)


@pytest.fixture
def apart(monkeypatch):
    """All ranks are on machines of their own, and send gradients in small pieces."""
    monkeypatch.setattr(ThreadGroup, "machines", lambda self: self.size)
    monkeypatch.setattr(optimizers, "PIECE", 64)


@pytest.mark.parametrize("size", [2, 3, 9])
def test_ranks_with_a_share_of_every_piece_compute_the_steps_of_one_process(apart, size):
    training = Training("float64")
    expected, found = training.run(Group()), together(size, training.run)
    for one in found:
        np.testing.assert_allclose(one["figures"], expected["figures"], rtol=1e-11)
        for name in ("params", "m", "v"):
            np.testing.assert_array_equal(one[name], found[0][name])
            np.testing.assert_allclose(one[name], expected[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("more", "overlapped"),
    [({}, True), ({"optimizer": "muon"}, False), ({"accumulate": 2}, False)],
)  # fmt: skip
def test_when_gradients_travel_while_others_are_computed(apart, more, overlapped):
    training = Training("float32", **more)

    def overlaps(group):
        own = Alone(training.backend, training.model, 7)
        ranks = Ranks(group, own, training.backend, training.model, training.config)
        return ranks.overlaps

    assert together(2, overlaps) == [overlapped] * 2


def test_ranks_of_one_machine_send_their_gradients_at_the_end(monkeypatch):
    monkeypatch.setattr(optimizers, "PIECE", 64)
    training = Training("float32")

    def overlaps(group):
        own = Alone(training.backend, training.model, 7)
        return group.machines(), Ranks(group, own, training.backend, training.model, training.config).overlaps

    assert together(2, overlaps) == [(1, False)] * 2


def test_all_ranks_decide_alike(apart):
    """One of them has several processes."""
    training = Training("float32")

    def overlaps(group):
        own = Alone(training.backend, training.model, 7)
        own.number = 1 + group.rank
        return Ranks(group, own, training.backend, training.model, training.config).overlaps

    assert together(2, overlaps) == [False, False]


@pytest.mark.parametrize(("elements", "ranks"), [(1, 2), (1000, 3), (3_199_553, 2), (816_705, 7)])
def test_pieces_cover_everything_once_from_the_end_to_the_beginning(elements, ranks):
    pieces = optimizers.pieces(elements, ranks)
    end = elements
    for bounds in pieces:
        assert bounds == sorted(bounds)
        assert (len(bounds), bounds[-1]) == (ranks + 1, end)
        sizes = [last - first for first, last in itertools.pairwise(bounds)]
        assert max(sizes) - min(sizes) < optimizers.LINE * ranks
        end = bounds[0]
    assert end == 0


def test_an_error_in_a_gradual_sum_breaks_up_the_group(monkeypatch):
    group, failed = Group(), []
    monkeypatch.setattr(group, "fail", lambda: failed.append(True), raising=False)
    with group.begin_sum(np.ones(3), [[0, 3]]) as sum_:
        sum_.finish()
    assert failed == []
    with pytest.raises(MemoryError), group.begin_sum(np.ones(3), [[0, 3]]):
        raise MemoryError
    assert failed == [True]


def test_the_same_number_of_ranks_gives_the_same_bits():
    training = Training("float32", "muon")
    one, other = (together(3, training.run)[1] for _ in range(2))
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name])


def test_a_step_sums_the_gradients_once():
    training = Training("float64", accumulate=3)

    def run(group):
        training.run(group)
        return group.sums

    assert together(2, run) == [STEPS, STEPS]


# shares -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("weights", [[1], [1, 1], [2, 1, 1], [1] * 5, [1] * 100], ids=str)
def test_shares_cover_everything_once_and_no_matrix_is_divided(optimizer, weights):
    model = Model(GPTConfig(n_ctx=8, n_emb=48, head_size=48, n_heads=2, n_layers=3), 17)
    bounds = optimizers.shares(model, optimizer, weights)
    assert bounds == sorted(bounds)
    assert (len(bounds), bounds[0], bounds[-1]) == (len(weights) + 1, 0, model.n_parameters)
    seen = np.zeros(model.n_parameters, int)
    for share in itertools.pairwise(bounds):
        for rank in range(2):
            own = optimizers.parts(model, optimizer, rank, 2, share)
            for at in [*own.slices, *(at for at, _ in own.matrices)]:
                assert share[0] <= at.start < at.stop <= share[1]
                seen[at] += 1
    assert (seen == 1).all()


def test_shares_follow_the_weights():
    model = Model(GPTConfig(n_ctx=8, n_emb=48, head_size=48, n_heads=2, n_layers=6), 17)
    for optimizer, tolerance in (("adamw", 0.01), ("muon", 0.1)):
        bounds = optimizers.shares(model, optimizer, [1, 2, 1])
        parts = np.diff(bounds) / model.n_parameters
        np.testing.assert_allclose(parts, [0.25, 0.5, 0.25], atol=tolerance)


# evaluations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 2, 5])
def test_ranks_share_the_batches_of_an_evaluation(every):
    ids = IDS[:203]

    def mean(group):
        seen = []

        def total(batch):
            seen.append(batch)
            return float(batch.targets.sum())

        return mean_loss(total, consecutive_windows(ids, 8, 3), every, group), len(seen)

    expected, number = mean(Group())
    for size in (2, 3, 4, 20):
        found = together(size, mean)
        assert [loss for loss, _ in found] == pytest.approx([expected] * size, rel=1e-14)
        assert sum(count for _, count in found) == number
        assert max(count for _, count in found) <= -(-number // size)


def test_a_stop_request_on_one_rank_ends_the_evaluation_of_all():
    def measure(group):
        stop, seen = Stop(), []

        def total(batch):
            seen.append(batch)
            stop.asked = group.rank == 1 and len(seen) == 2
            return 0.0

        with pytest.raises(Agreed):
            mean_loss(total, consecutive_windows(IDS, 8, 3), 1, group, stop)
        return len(seen)

    assert together(3, measure) == [2, 2, 2]


# whole runs ---------------------------------------------------------------------------------------------


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    """Call a function on each of some ranks, where `distributed="mpi"` joins them."""
    monkeypatch.chdir(tmp_path)
    text = "the cat sat on the mat. " * 30 + "tam eht no tas tac eht " * 4
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")

    joined = threading.local()
    monkeypatch.setattr(compute, "join", lambda kind: getattr(joined, "group", Group()))

    def on_each(size: int, function):
        def run(group):
            joined.group = group
            return function(group)

        return together(size, run)

    return on_each


class Noting(baby_xp.Listener):
    """A listener that keeps what training reports."""

    def __init__(self):
        self.records, self.notes, self.workers = [], [], []

    def started(self, session, step):
        self.workers.append(session.setup.compute.workers)

    def evaluated(self, record):
        self.records.append(record)

    def note(self, text):
        self.notes.append(text)


def measured(run) -> list[dict]:
    """The records of a run without the times."""
    lines = map(json.loads, run.files.metrics.read_text("ascii").splitlines())
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def same(records, others, rel=1e-12):
    for one, other in zip(records, others, strict=True):
        assert {name: value or 0 for name, value in one.items()} == pytest.approx(
            {name: value or 0 for name, value in other.items()}, rel=rel
        )


def train_alone(**more):
    return baby_xp.train("classic", **{**SETTINGS, "distributed": "none", "path": "alone", **more})


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_run_of_ranks_learns_what_one_process_learns_and_rank_0_alone_writes(ranks, tmp_path, size):
    notings = [Noting() for _ in range(size)]

    def train(group):
        return baby_xp.train("classic", listener=notings[group.rank], **SETTINGS, path=f"runs{group.rank}")

    runs = ranks(size, train)
    expected = train_alone()
    same(measured(runs[0]), measured(expected))
    np.testing.assert_allclose(runs[0].params, expected.params, rtol=1e-9, atol=1e-12)
    for rank, run in enumerate(runs):
        assert run.guid == runs[0].guid
        np.testing.assert_array_equal(run.params, runs[0].params)
        assert run.config == runs[0].config
        assert (tmp_path / f"runs{rank}").exists() == (rank == 0)
        assert len(notings[rank].records) == (4 if rank == 0 else 0)
    state, _ = state_file.load_state(runs[0].files.state, runs[0].model.n_parameters, "float64")
    one, _ = state_file.load_state(expected.files.state, expected.model.n_parameters, "float64")
    for name in ("m", "v"):
        np.testing.assert_allclose(state.state[name], one.state[name], rtol=1e-9, atol=1e-15)


def test_a_run_goes_on_on_another_number_of_ranks(ranks):
    expected = train_alone()

    def train(group):
        return baby_xp.train("classic", **{**SETTINGS, "max_minutes": 1e-9, "eval_every": 1})

    first = ranks(3, train)[0]
    assert (first.config["result"]["reason"], first.config["result"]["steps"]) == ("time", 1)
    notings = [Noting(), Noting()]

    def resume(group):
        path = "nowhere" if group.rank else "runs"  # another machine need not have the run
        more = {"distributed": "mpi", "max_minutes": 0, "listener": notings[group.rank]}
        return baby_xp.resume(first.guid, path=path, **more)

    ended = ranks(2, resume)
    changed = "3 ranks before, 2 ranks now: sums are rounded otherwise, and the last digits may differ"
    assert [noting.notes for noting in notings] == [[changed], []]
    assert notings[0].workers == [None]  # not the number that suited three ranks
    assert ended[0].config["result"]["reason"] == "steps"
    np.testing.assert_allclose(ended[0].params, expected.params, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(ended[0].params, ended[1].params)


def test_the_same_number_of_ranks_goes_on_bit_for_bit_and_without_a_word(ranks):
    def train(group, **more):
        return baby_xp.train("classic", **{**SETTINGS, "eval_every": 1, **more})

    whole = ranks(2, lambda group: train(group, path="whole"))[0]
    first = ranks(2, lambda group: train(group, max_minutes=1e-9))[0]
    assert first.config["result"]["steps"] < whole.config["result"]["steps"]
    noting = Noting()
    resume = {"distributed": "mpi", "max_minutes": 0, "listener": noting}
    ended = ranks(2, lambda group: baby_xp.resume(first.guid, **resume))[0]
    np.testing.assert_array_equal(ended.params, whole.params)
    (one, _), (other, _) = (
        state_file.load_state(run.files.state, run.model.n_parameters, "float64") for run in (ended, whole)
    )
    for name in ("params", "m", "v"):
        np.testing.assert_array_equal(one.state[name], other.state[name])
    assert (noting.notes, noting.workers) == ([], [1])
    assert ended.config["place"]["ranks"] == 2


def test_a_run_is_finetuned_by_ranks(ranks, tmp_path):
    (tmp_path / "other.txt").write_text("the mat sat on the cat. " * 40, encoding="utf-8")
    base = train_alone()
    more = {"data": "other.txt", "num_steps": 4, "eval_every": 2}
    expected = baby_xp.finetune(base.guid, **more, path="alone")

    def finetune(group):
        return baby_xp.finetune(base.guid, **more, path="nowhere" if group.rank else "alone", distributed="mpi")

    found = ranks(2, finetune)
    same(measured(found[0]), measured(expected))
    assert found[0].guid != expected.guid


@pytest.mark.parametrize(("place", "kept"), [("_evaluate", 1), ("_evaluate_best", 6)])
@pytest.mark.parametrize("interrupted", [0, 1])
def test_an_interrupt_of_one_rank_alone_leaves_the_last_checkpoint(ranks, monkeypatch, interrupted, place, kept):
    """In an evaluation, or in the last one: the others wait there, and nothing can be written with them."""
    original = getattr(loop.Loop, place)

    def interrupt(self):
        if self.group.rank == interrupted:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(loop.Loop, place, interrupt)
    with pytest.raises(KeyboardInterrupt):
        ranks(2, lambda group: baby_xp.train("classic", **{**SETTINGS, "checkpoint_every": 1}))
    (summary,) = baby_xp.list_runs()
    assert summary.steps == kept


@pytest.mark.parametrize("asking", [0, 1, 2])
def test_a_stop_request_on_any_rank_ends_all_after_the_same_step(ranks, monkeypatch, asking):
    """It travels with the gradients."""
    original = loop.Loop._advance

    def advance(self):
        if self.group.rank == asking and self.step == 2:
            self.stop.asked = True
        original(self)

    monkeypatch.setattr(loop.Loop, "_advance", advance)
    # no evaluation, in which ranks also ask each other
    runs = ranks(3, lambda group: baby_xp.train("classic", **{**SETTINGS, "eval_every": 40, "num_steps": 40}))
    results = [run.config["result"] for run in runs]
    assert results[0] == results[1] == results[2]
    assert (results[0]["state"], results[0]["reason"]) == ("stopped", "interrupted")
    assert results[0]["steps"] <= 20  # the next time that losses are read


def test_all_ranks_go_by_the_clock_of_rank_0(ranks, monkeypatch):
    """For the time limit, and for how often the losses are read."""
    clocks: dict[int, float] = {}
    original = loop.Loop._clocks

    def of_rank(self):
        asked, _, kept = original(self)
        clocks[self.group.rank] = clocks.get(self.group.rank, 0.0) + (30.0 if self.group.rank == 0 else 1e6)
        return asked, clocks[self.group.rank], kept

    monkeypatch.setattr(loop.Loop, "_clocks", of_rank)
    runs = ranks(3, lambda group: baby_xp.train("classic", **{**SETTINGS, "max_minutes": 2.0, "num_steps": 40}))
    assert [run.config["result"]["reason"] for run in runs] == ["time"] * 3
    assert [run.config["result"]["steps"] for run in runs] == [4] * 3


def test_divergence_ends_all_ranks_with_the_same_line(ranks):
    def train(group):
        with pytest.raises(BabyError, match="the largest gradient was that of") as caught:
            baby_xp.train("classic", **{**SETTINGS, "lr": 1e30, "clip": 0.0, "num_steps": 30, "eval_every": 30})
        return str(caught.value)

    found = ranks(3, train)
    assert len(set(found)) == 1


def test_ranks_find_the_same_largest_gradient():
    training = Training("float64")

    def find(group):
        own = Alone(training.backend, training.model, 7)
        parts = training.backend, training.model, training.config, SimpleNamespace(batches=training.batches)
        return largest_gradient(*parts, checkpoint.first(training.model, training.config), 4, own, group)

    expected = find(Group())
    for one in together(3, find):
        assert (one.parameter, one.step) == (expected.parameter, expected.step)
        assert one.norm == pytest.approx(expected.norm, rel=1e-10)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"n_emb": 8, "head_size": 8}, "the setting n_emb differs from that of rank 0: 8 here, 4 there"),
        ({"data": "other.txt"}, "the text differs from that of rank 0"),
        ({"lr": 0.5}, "the setting lr differs from that of rank 0: 0.5 here, 0.01 there"),
        ({"data": "none.txt"}, "none.txt"),
    ],
    ids=str,
)
def test_different_ranks_are_noticed_before_the_first_step(ranks, tmp_path, more, words):
    (tmp_path / "other.txt").write_text((tmp_path / "text.txt").read_text()[::-1], encoding="utf-8")

    def train(group):
        with pytest.raises(BabyError, match=words) as caught:
            baby_xp.train("classic", **{**SETTINGS, **(more if group.rank == 1 else {})})
        return str(caught.value)

    first, second = ranks(2, train)
    assert first == f"rank 1: {second}"
    assert not (tmp_path / "runs").exists()


def test_the_text_may_have_another_path_on_another_rank(ranks, tmp_path):
    (tmp_path / "copy.txt").write_bytes((tmp_path / "text.txt").read_bytes())
    names = "text.txt", "copy.txt"
    runs = ranks(2, lambda group: baby_xp.train("classic", **{**SETTINGS, "data": names[group.rank]}))
    assert runs[0].config["data"]["data"] == "text.txt"


def test_a_different_version_is_noticed(ranks, monkeypatch):
    monkeypatch.setattr(alike, "source_hash", lambda: str(threading.get_ident()))
    with pytest.raises(BabyError, match="the version of baby_xp differs from that of rank 0"):
        ranks(2, lambda group: baby_xp.train("classic", **SETTINGS))


def test_only_numpy_computes_with_mpi(ranks):
    with pytest.raises(BabyError, match="--distributed mpi computes with the numpy backend, not array-api-strict"):
        ranks(2, lambda group: baby_xp.train("classic", **{**SETTINGS, "backend": "array-api-strict"}))


def test_an_error_while_rank_0_writes_ends_all(ranks, monkeypatch):
    def full(*_):
        raise BabyError("the disk is full")

    monkeypatch.setattr("baby_xp.session.append_line", full)
    with pytest.raises(BabyError, match="the disk is full"):
        ranks(3, lambda group: baby_xp.train("classic", **SETTINGS))
