"""The report of a run, as readable text."""

import math
import os
import platform
import sys
from typing import Any

from baby_xp import layout
from baby_xp.files import shown
from baby_xp.text.dataset import Dataset

REASONS = {
    "steps": "done: all {steps:,} steps",
    "patience": "done after {steps:,} steps: the validation loss stopped improving",
    "time": "stopped after step {steps:,} at the time limit; `resume` continues it",
    "interrupted": "stopped after step {steps:,} by the user; `resume` continues it",
}


def machine() -> str:
    """The machine and the Python of this process, in one line."""
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {sys.version.split()[0]}"


def text(config: dict[str, Any], records: list[dict[str, Any]], dataset: Dataset, sample: str) -> str:
    """The report of a run, from its config file, the records of its evaluations, its data and its last sample."""
    entropy = dataset.entropy
    lines = [f"baby_xp {config['baby_xp']}, run {config['guid']}", *_origin(config), ""]
    lines += _table("Result", _result(config["result"], records, entropy))
    known = {} if entropy is None else {"entropy, nats per character": entropy}
    lines += _table("Text", {"name": shown(config["data"]["data"]), **dataset.facts, **known})
    lines += _table("Model", {**config["model"], "parameters": config["parameters"]})
    lines += _table("Training", config["train"]) + _table("Machine", config["machine"])
    lines += _losses(records)
    if samples := [record for record in records if record.get("sample")]:
        lines += ["Samples during training"]
        lines += [f"{record['step']:8d}  {' '.join(record['sample'].split())}" for record in samples]
        lines += [""]
    return "\n".join([*lines, *(["Sample at the end", sample, ""] if sample else [])])


def _origin(config: dict[str, Any]) -> list[str]:
    base = [f"finetuned from run {config['base']}"] if config["base"] else []
    return [f"preset {config['preset']}, started {config['started']}, written {config['written']}", *base]


def _result(result: dict[str, Any], records: list[dict[str, Any]], entropy: float | None) -> dict[str, Any]:
    """The result of the run, which is first in the report."""
    failed = f"failed; the last good checkpoint is that of step {result['steps']:,}: {result['reason']}"
    rows = {"how it ended": REASONS.get(result["reason"], failed).format(**result)}
    if result["val_loss"] is not None:
        whole = bool(records) and records[-1]["whole_validation"]
        part = "the whole validation part" if whole else "a sample of the validation part"
        rows["validation loss"] = f"{result['val_loss']:.4f} nats per token, over {part}"
        rows["perplexity"] = f"{math.exp(min(result['val_loss'], 700)):.3f}"
        if entropy is not None:
            distance = result["val_loss"] - entropy
            rows["distance to the best possible"] = f"{distance:.4f} above the entropy of the text"
    if result["train_loss"] is not None:
        rows["training loss"] = f"{result['train_loss']:.4f} nats per token, mean since the previous evaluation"
    if result["best_step"] is not None:
        rows["weights kept"] = f"those of step {result['best_step']:,}, the best validation loss"
    rows["time"] = f"{result['seconds']:,.1f} s with evaluations and checkpoints"
    rows["speed"] = f"{result['tokens_per_second']:,} tokens/s while training"
    return rows


def _losses(records: list[dict[str, Any]]) -> list[str]:
    rows: list[tuple[str, ...]] = [("step", "train", "validation", "rate", "grad norm", "seconds", "")]
    for record in records:
        train = f"{record['train_loss']:.4f}" if record["train_loss"] is not None else ""
        losses = str(record["step"]), train, f"{record['val_loss']:.4f}"
        part = "whole validation part, weights kept" if record["whole_validation"] else ""
        pace = f"{record['lr']:.3g}", f"{record['grad_norm']:.3g}", f"{record['seconds']:.1f}"
        rows.append((*losses, *pace, part))
    lines = layout.columns("{:>8}  {:>8}  {:>10}  {:>10}  {:>9}  {:>8}  {}", rows)
    return ["Losses, in nats per token", *lines, ""]


def _table(title: str, values: dict[str, Any]) -> list[str]:
    return [title, *layout.pairs([(name, _shown(value)) for name, value in values.items()], 4), ""]


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
