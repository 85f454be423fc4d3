"""Whether all ranks train the same model on the same text: they must, or their sum means nothing."""

import functools
import hashlib
import importlib
from pathlib import Path
from typing import Any

import baby_xp
from baby_xp.errors import BabyError
from baby_xp.training.setup import Setup


def figures(setup: Setup) -> dict[str, Any]:
    """What must be the same on all ranks, by name. The path of the text may differ."""
    settings = setup.config.to_dict()
    return {
        "version of baby_xp": f"{baby_xp.__version__}, {source_hash()[:12]}",
        "text": setup.dataset.facts.get("sha256"),
        "number of different tokens": setup.model.vocab_size,
        **{f"setting {name}": value for part in ("model", "train") for name, value in settings[part].items()},
        **{f"setting {name}": value for name, value in settings["data"].items() if name != "data"},
    }


def check(setup: Setup, expected: dict[str, Any]) -> None:
    """Raises BabyError if a figure differs from that of rank 0."""
    for name, value in figures(setup).items():
        if value != expected.get(name):
            raise BabyError(
                f"the {name} differs from that of rank 0: {value} here, {expected.get(name)} there; all ranks "
                "need the same program, text and settings"
            )


@functools.cache
def source_hash() -> str:
    """SHA-256 of the code of the packages."""
    found = hashlib.sha256()
    for package in ("baby_xp", "baby_xp_backends", "baby_xp_data"):
        (folder,) = importlib.import_module(package).__path__
        for path in sorted(Path(folder).rglob("*.py")):
            found.update(f"{path.relative_to(folder).as_posix()}\n".encode())
            found.update(path.read_bytes())
    return found.hexdigest()
