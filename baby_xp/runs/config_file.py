"""The config file of a run: its settings, where it computed, and how it ended."""

from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from baby_xp import __version__, layout
from baby_xp.arrays.backend import Backend
from baby_xp.config import RunConfig
from baby_xp.distributed import launchers
from baby_xp.errors import BabyError
from baby_xp.models import Model
from baby_xp.runs import report, state_file, store
from baby_xp.runs.store import RunFiles
from baby_xp.text.dataset import Dataset
from baby_xp.text.tokenizer import Tokenizer, tokenizer_from_dict

KEYS = {"guid", "preset", "base", "started", "model", "train", "data", "place", "result", "vocab_size"}


@dataclass(frozen=True)
class StoredRun:
    """A run's config and tokenizer, read once."""

    files: RunFiles
    content: dict[str, Any]
    """The JSON of the config file."""
    config: RunConfig
    tokenizer: Tokenizer

    @classmethod
    def of(cls, files: RunFiles, content: dict[str, Any], tokenizer: Tokenizer) -> "StoredRun":
        """The run whose config file has this content. Raises BabyError if it makes no sense."""
        return cls(files, content, RunConfig.from_dict(content, str(files.config)), tokenizer)

    @property
    def belonging(self) -> dict[str, str]:
        """What the metadata of the run's arrays must hold."""
        return state_file.belonging(self.files.guid, self.config.model, self.tokenizer)


def now() -> str:
    """The current time as files store it: UTC, ISO 8601, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def content(
    files: RunFiles,
    config: RunConfig,
    model: Model,
    backend: Backend,
    started: str,
    result: dict[str, Any],
    device: str | None = None,
    workers: int = 1,
    dataset: Dataset | None = None,
    base: str | None = None,
    ranks: int = 1,
) -> dict[str, Any]:
    """The content of the config file.

    result: the state of the run. device: as requested. dataset: None for an imported run, which has none.
    base: GUID of the run that this one is finetuned from. workers: of each of the ranks.
    """
    # the requested options that affect the numbers; `resume` uses them again
    place = {"backend": backend.name, "device": device, "workers": workers}
    if getattr(backend, "tf32", False):
        place["tf32"] = True
    if backend.kernels != "fast":
        place["kernels"] = backend.kernels
    machine = {
        "machine": report.machine(), "backend": backend.version, "device": backend.device, "workers": workers,
    }  # fmt: skip
    if ranks > 1:
        place["ranks"] = machine["ranks"] = ranks
    if (memory := backend.memory()) is not None:
        peaks = f"{layout.size(memory.peak_used)} / {layout.size(memory.peak_held)}"
        machine["GPU memory, peak used/held"] = peaks
    job = launchers.job()
    file, sha256 = (dataset.file, dataset.facts.get("sha256")) if dataset else (None, None)
    parts = config.to_dict()
    return {
        "guid": files.guid,
        "baby_xp": __version__,
        "base": base,
        "started": started,
        "written": now(),
        **parts,
        "vocab_size": model.vocab_size,
        "parameters": model.n_parameters,
        "data": {**parts["data"], "file": file, "sha256": sha256},
        "place": place,
        **({"job": job} if job else {}),
        "machine": machine,
        "result": result,
    }


def read(files: RunFiles) -> StoredRun:
    """Config and tokenizer of a run. Raises BabyError if they cannot be read, or do not belong together."""
    content = store.read_sealed(files.config)
    if not content.keys() >= KEYS or content["guid"] != files.guid:
        raise BabyError(f"{files.config} is not the config of run {files.guid}; {store.RESTORE}")
    tokenizer = tokenizer_from_dict(store.read_json(files.tokenizer), str(files.tokenizer))
    if tokenizer.vocab_size != content["vocab_size"]:
        raise BabyError(
            f"{files.tokenizer} has {tokenizer.vocab_size} ids, the model {content['vocab_size']!r}: "
            f"they do not belong together; {store.RESTORE}"
        )
    return StoredRun.of(files, content, tokenizer)


def of_this_job(folder: Path, config: RunConfig, base: str | None) -> str | None:
    """The run that an earlier attempt at this job has left unfinished under `folder`; None if there is none.

    It has the same settings, but perhaps for its text, and a checkpoint. base: as for `content`.
    """
    job = launchers.job()
    for guid in store.guids(folder) if job else ():
        with suppress(BabyError):
            stored = read(RunFiles(folder, guid))
            content, train = stored.content, stored.config.train
            wanted = job, base, config.model, replace(config.train, num_steps=train.num_steps)
            same = wanted == (content.get("job"), content["base"], stored.config.model, train)
            trained = same and state_file.read_metadata(stored.files.state).get("step") != "0"
            if trained and content["result"]["state"] != "done":
                return guid
    return None
