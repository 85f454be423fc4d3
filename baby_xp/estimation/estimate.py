"""The size, time and memory of a run, before it starts: exact counts, and measurements of a short trial.

Sizes, floating-point operations and the bytes of arrays follow from shapes alone, see counts.py. Time and the
memory of whole processes do not: libraries, copies of arrays, what the allocator keeps. They are measured, see
trial.py.
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Unpack

from baby_xp import layout, presets
from baby_xp.compute import Compute
from baby_xp.config import EquationConfig, GPTConfig, RunConfig
from baby_xp.estimation import trial
from baby_xp.estimation.trial import Facts, Trial
from baby_xp.files import refusal
from baby_xp.presets import Settings
from baby_xp.resources import counts
from baby_xp.session import SAMPLE_TOKENS
from baby_xp.training.loop import EVALUATION_TOKENS
from baby_xp.training.setup import prepare

TOKENS_A_PARAMETER = (20, 40)
"""The Little Baby's rule for the tokens to train on."""
MIB = 2**20


@dataclass(frozen=True)
class Estimate:
    """An estimate of a run. Counts are exact; values from `trial` are approximate; None: not measured."""

    config: RunConfig
    facts: Facts
    trial: Trial | None

    @property
    def parameters(self) -> dict[str, int]:
        """Number of parameters by kind."""
        return counts.parameters(self.config.model, self.facts.vocab_size)

    @property
    def n_parameters(self) -> int:
        return sum(self.parameters.values())

    @property
    def tokens(self) -> int:
        """Tokens that the whole run trains on, repetitions included."""
        return self.facts.sequences * self.config.model.n_ctx

    @property
    def flops(self) -> int:
        """Floating-point operations of the matrix products of all training steps; with Muon, an upper bound."""
        model, train, V = self.config.model, self.config.train, self.facts.vocab_size
        by_muon = counts.muon_flops(model, V, train.muon_iterations) if train.optimizer == "muon" else 0
        return counts.step_flops(model, V, self.facts.sequences) + self.facts.num_steps * by_muon

    @property
    def arrays(self) -> dict[str, int]:
        """Bytes of the arrays of training by kind."""
        together = min(self.config.train.batch_size, self.facts.step_size)
        sizes = self.facts.vocab_size, together, self.facts.workers, self._itemsize
        return counts.arrays(self.config.model, *sizes, self.facts.tokens_at_once)

    @property
    def cache(self) -> int:
        """Bytes of the key-value cache of generation at full context."""
        return counts.cache_bytes(self.config.model, self._itemsize, self.facts.cache_multiple)

    @property
    def memory(self) -> int | None:
        """Bytes that the run's processes take at their peak, minus a bare interpreter's; None if not measured."""
        return self.trial.memory if self.trial else None

    @property
    def disk(self) -> int:
        """Bytes of the files: the text's ids, the best weights, and a checkpoint with weights, moments and the
        best weights once more."""
        return self.facts.corpus_bytes + 5 * self._itemsize * self.n_parameters

    @property
    def seconds(self) -> dict[str, float] | None:
        """Seconds of the whole run, by activity; None if nothing was measured."""
        return _seconds(self.config, self.facts, self.trial) if self.trial else None

    @property
    def _itemsize(self) -> int:
        return {"float32": 4, "float64": 8}[self.config.train.dtype]


def estimate(
    preset: str | RunConfig = "baby",
    *,
    backend: str = "auto",
    device: str | None = None,
    workers: int | None = None,
    tf32: bool = False,
    memory_gib: float | None = None,
    kernels: Literal["fast", "numpy", "plain"] = "fast",
    measure: bool = True,
    **overrides: Unpack[Settings],
) -> Estimate:
    """An estimate of `train` with the same arguments. measure: also try it, which takes some seconds.

    No files are left behind. Raises BabyError for arguments that `train` refuses too, or if the trial fails.
    Without `measure`, a run that is too large for this machine is counted nevertheless.
    """
    config = presets.preset(preset).override(overrides)
    compute = Compute(backend, device, tf32, memory_gib, kernels, workers)
    with _scratch_folder() as folder:
        if measure:
            facts, found = trial.run_apart(config, compute, folder)
        else:
            ids = Path(folder) / "corpora"
            facts, found = trial.facts_of(prepare(config, compute, ids, check_memory=False), ids), None
    return Estimate(replace(config, train=replace(config.train, num_steps=facts.num_steps)), facts, found)


def _scratch_folder() -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix="baby_xp_", ignore_cleanup_errors=True)
    except OSError as error:
        raise refusal(error.filename or "the folder for temporary files", error, "written", "TMPDIR") from None


def _seconds(config: RunConfig, facts: Facts, took: Trial) -> dict[str, float]:
    train, context = config.train, 1 if isinstance(config.model, EquationConfig) else config.model.n_ctx
    training = facts.num_steps * took.ms_a_step / 1e3
    whole = took.evaluation_seconds * max(1.0, facts.n_validation / (train.batch_size * context))
    evaluations = -(-facts.num_steps // train.eval_every)
    sample = SAMPLE_TOKENS + evaluations * train.sample_tokens
    checkpoints: float = facts.num_steps // train.checkpoint_every if train.checkpoint_every else 0
    if train.checkpoint_minutes:
        checkpoints += training / 60 / train.checkpoint_minutes
    every = max(1, facts.n_validation // EVALUATION_TOKENS)
    return {
        "training": training,
        "evaluations": whole + evaluations * max(took.evaluation_seconds, whole / every),
        "samples": took.token_seconds * (1 if isinstance(config.model, EquationConfig) else sample),
        "start and checkpoints": took.start_seconds + (1 + checkpoints) * took.checkpoint_seconds,
    }


# printing -----------------------------------------------------------------------------------------------


def lines(found: Estimate) -> list[str]:
    """The estimate as a table to read."""
    facts, context = found.facts, found.config.model.n_ctx
    exactly = "at most" if found.config.train.optimizer == "muon" else "exactly"
    rows = [
        ("parameters", f"{found.n_parameters:,} exactly: {_listed(found.parameters, '{:,}')}"),
        *_by_formula(found),
        ("tokens", f"{found.tokens:,} in {facts.num_steps:,} steps of {facts.step_size} x {context}"),
        *_by_rule(found),
        ("operations", f"{found.flops:.3g} {exactly}, in the matrix products of all training steps"),
        ("", f"{6 * found.tokens * found.n_parameters:.3g} by The Little Baby's 6 T P"),
        ("arrays, MiB", _listed({kind: size / MIB for kind, size in found.arrays.items()}, "{:.1f}")),
        ("", f"keys and values while generating {found.cache / MIB:.2f}"),
        *_measured(found),
        ("disk", f"about {found.disk / MIB:.1f} MiB"),
    ]
    processes = f", {facts.workers} processes" if facts.workers > 1 else ""
    head = f"{found.config.name} on {facts.backend}{processes}; {facts.vocab_size} different tokens"
    return [head, *(line for name, text in rows for line in layout.wrapped(f"  {name:<13}", text, 110))]


def _by_formula(found: Estimate) -> list[tuple[str, str]]:
    model = found.config.model
    count = counts.formula_parameters(model, found.facts.vocab_size)
    if count is None or not isinstance(model, GPTConfig):
        return []
    network = {"mlp": "counts the network twice", "moe": "counts half of the experts"}
    return [
        ("", f"{count:,} by The Little Baby's V H + L (4 H^2 + 4 H F), a rule of thumb"),
        ("", f"that leaves out positions, norms, biases and head, and {network[model.c_network]}"),
    ]


def _by_rule(found: Estimate) -> list[tuple[str, str]]:
    low, high = (share * found.n_parameters for share in TOKENS_A_PARAMETER)
    share = found.tokens / found.n_parameters
    return [("", f"{share:.1f} per parameter; The Little Baby's rule is 20 to 40, {low:,} to {high:,}")]


def _measured(found: Estimate) -> list[tuple[str, str]]:
    trial, seconds = found.trial, found.seconds
    if trial is None or seconds is None:
        return [("memory, time", "not measured")]
    of_device = "" if found.facts.backend == "numpy" else "; without the GPU's own memory"
    taken = "unknown: this system does not report it"
    if trial.memory is not None:
        taken = f"about {trial.memory / MIB:.0f} MiB at the peak, in addition to the interpreter's own{of_device}"
    parts = {name: layout.duration(value) for name, value in seconds.items()}
    return [
        ("memory", taken),
        ("a step", f"{trial.ms_a_step:.3g} ms, {trial.tokens_per_second:,.0f} tokens/s"),
        ("time", f"about {layout.duration(sum(seconds.values()))} for the whole run: {_listed(parts, '{}')}"),
    ]


def _listed(parts: dict[str, Any], form: str) -> str:
    return ", ".join(f"{name} {form.format(value)}" for name, value in parts.items())
