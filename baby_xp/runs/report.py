"""What a person would want to read of a run."""

import platform
import sys
from typing import Any

from baby_xp import __version__


def machine() -> str:
    """The machine and the Python of this process, in one line."""
    import os

    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {sys.version.split()[0]}"


def text(config: dict[str, Any], records: list[dict[str, Any]], facts: dict[str, Any], sample: str) -> str:
    """The report of a run as text."""
    lines = [f"baby_xp {__version__}, run {config['guid']}", ""]
    lines += _table("Result", config["result"]) + _table("Data", {"name": config["data"]["data"], **facts})
    lines += _table("Model", {**config["model"], "parameters": config["parameters"]})
    lines += _table("Training", config["train"]) + _table("Machine", config["machine"])
    lines += ["Losses, in nats a token", "    step    train  validation"]
    for record in records:
        train = f"{record['train_loss']:8.4f}" if record["train_loss"] is not None else " " * 8
        part = "" if record["whole_validation"] else "  (a sample of the validation part)"
        lines.append(f"{record['step']:8d} {train}  {record['val_loss']:8.4f}{part}")
    return "\n".join([*lines, "", "Sample", sample, ""])


def _table(title: str, values: dict[str, Any]) -> list[str]:
    width = max(len(name) for name in values)
    return [title, *(f"    {name:<{width}}  {value}" for name, value in values.items()), ""]
