"""The table of all runs in a folder."""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from baby_xp.errors import BabyError
from baby_xp.files import as_path
from baby_xp.runs import state_file, store
from baby_xp.runs.store import RunFiles


@dataclass(frozen=True)
class Summary:
    """One row. `state`: running, done, stopped, failed, imported; or damaged, with nothing else known.

    steps: done so far, as of the last checkpoint; num_steps: of all. val_loss: nats per token.
    """

    guid: str
    state: str
    preset: str = ""
    data: str = ""
    started: str = ""
    steps: int = 0
    num_steps: int = 0
    val_loss: float | None = None


def summaries(folder: str | Path) -> list[Summary]:
    """The runs under `folder`, the one last trained first. A damaged one is in the list like any other.

    Raises BabyError if `folder` is not a path.
    """
    folder = as_path(folder, "path")
    return [_summary(RunFiles(folder, guid)) for guid in store.guids(folder)]


def _summary(files: RunFiles) -> Summary:
    try:
        config = store.read_sealed(files.config)
        result = config["result"]
        kept = state_file.read_metadata(files.state)  # newer than the config while the run trains
        steps, num_steps = (int(kept.get(name, 0)) for name in ("step", "num_steps"))
        val_loss = result["val_loss"]
        state = result["state"]
        if state == "running":
            val_loss = _last_loss(files)
            if not store.is_held(files):
                state = "stopped"  # its process was killed
        asked = config["preset"], config["data"]["data"], config["started"]
        return Summary(files.guid, state, *asked, steps, num_steps, val_loss)
    except (BabyError, KeyError, TypeError, ValueError):
        return Summary(files.guid, "damaged")


def _last_loss(files: RunFiles) -> float | None:
    """The validation loss in the last line of the metrics."""
    with suppress(OSError, ValueError, IndexError, KeyError, TypeError):
        return json.loads(files.metrics.read_bytes().splitlines()[-1])["val_loss"]
    return None
