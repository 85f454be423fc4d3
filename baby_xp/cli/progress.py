"""What the command line shows while a run trains."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from baby_xp.cli.streams import OutputLost, printable

if TYPE_CHECKING:
    from baby_xp.session import TrainingSession


class Screen:
    """A progress bar on a terminal, and a line per evaluation. Training survives output that cannot be written."""

    def __init__(self, asked_backend: str):
        self.asked = asked_backend
        self.bar: Any = None
        """The progress bar of tqdm, once training has started."""

    def started(self, session: "TrainingSession", step: int) -> None:
        """Print what will be trained, and where."""
        from tqdm import tqdm

        setup = session.setup
        why, backend, dataset = "", setup.backend, setup.dataset
        if self.asked == "auto" and backend.chosen_because:  # ranks have the backend of their group
            why = f"; auto: {backend.chosen_because}"
        processes = f", {setup.workers} processes" if setup.workers > 1 else ""
        if setup.group.size > 1:
            processes = f", {setup.group.size} ranks" + (f" of{processes[1:]}" if processes else "")
        size = f"{setup.model.n_parameters:,} parameters"
        lines = [f"{size} on {backend.version}, {backend.device}{processes}{why}"]
        facts = {
            "training tokens": "training",
            "validation tokens": "validation",
            "training contexts": "contexts",
        }
        counts = [f"{dataset.facts[name]:,} {short}" for name, short in facts.items() if name in dataset.facts]
        vocabulary = dataset.tokenizer.vocab_size
        lines.append(f"{dataset.name}: {vocabulary} different tokens, {' and '.join(counts)}")
        if session.base:
            lines.append(f"finetuned from run {session.base}")
        if step:
            lines.append(f"continuing run {session.files.guid} after step {step}")
        if note := backend.first_use():
            lines.append(note)
        self.guid = session.files.guid
        with self._surviving():
            print("\n".join(lines), flush=True)
        self.entropy = dataset.entropy
        self.bar = tqdm(
            total=dataset.num_steps, initial=step, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True
        )

    def progress(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Move the bar."""
        self.bar.set_postfix_str(f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s", refresh=False)
        self.bar.update(step - self.bar.n)

    def evaluated(self, record: dict[str, Any]) -> None:
        """Print a line for an evaluation, with its sample."""
        line = f"step {record['step']:>6}: "
        if record["train_loss"] is not None:
            line += f"train {record['train_loss']:.4f}, "
        line += f"validation {record['val_loss']:.4f}, {record['seconds']:.0f} s"
        if record["whole_validation"]:
            self.bar.close()
            line += " (whole validation part)"
            if self.entropy is not None:
                line = f"{line[:-1]}; no model can go below {self.entropy:.4f})"
        if sample := " ".join(record.get("sample", "").split()):
            line += f"  {printable(sample)}"
        with self._surviving():
            self.bar.write(line, file=sys.stdout)
            sys.stdout.flush()

    def note(self, text: str) -> None:
        """A line on stderr."""
        if self.bar is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self.bar.write(text, file=sys.stderr)

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        """Training continues if its progress cannot be printed; a line on stderr says so, once."""
        try:
            yield
        except OutputLost as lost:
            self.note(f"{lost.problem}: training continues as run {self.guid}")


@contextlib.contextmanager
def counting(unit: str, shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, for a number of like tasks: progress(done, of) moves it."""
    from tqdm import tqdm

    hidden = not (shown and sys.stderr.isatty())
    with tqdm(unit=unit, disable=hidden, dynamic_ncols=True, leave=False) as bar:

        def progress(done: int, of: int) -> None:
            bar.total = of
            bar.update(done - bar.n)

        yield progress
