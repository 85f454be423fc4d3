"""What the GPU has to reach, on one H200, and whether a measurement reaches it."""

import statistics

from bench import report

STEP = {
    "W1": {"torch.compile": 1.0, "torch": 0.5},
    "W2": {"torch.compile": 1.0, "torch": 0.5},
    "W3": {"torch.compile": 1.0, "torch": 0.5},
    "W4": {"torch.compile": 1.2},
}
"""baby_xp's median step as a share of a peer's at the same precision: at most this."""
EPOCH_MINUTES = 5.0
"""One epoch of `48-months`, W3's model, evaluations included."""
TRAIN_LOSS, TRAIN_SECONDS = 1.47, 90.0
"""`train nanogpt-gpu`, 5000 steps on Shakespeare: validation loss, and seconds of the whole command."""


def step_lines(workload: str, precision: str, runs: dict[str, list]) -> list[str]:
    """A line for each goal of a workload; runs: the rounds of each contender."""
    medians = {name: statistics.median(report.times(rounds)) for name, rounds in runs.items()}
    lines = []
    for peer, most in STEP.get(workload, {}).items():
        what = f"- goal, {workload} {precision}: at most {most:.2f} of {peer}'s time:"
        if report.US in medians and peer in medians:
            ratio = medians[report.US] / medians[peer]
            lines.append(f"{what} {ratio:.2f}, {told(ratio <= most)}")
        else:
            lines.append(f"{what} not measured")
    return lines


def epoch_line(seconds: float) -> str:
    """Whether an epoch takes less than EPOCH_MINUTES."""
    met = seconds < 60 * EPOCH_MINUTES
    return f"- goal, one epoch under {EPOCH_MINUTES:g} minutes: {seconds / 60:.2f} minutes, {told(met)}"


def train_lines(val_loss: float | None, seconds: float, steps: int) -> list[str]:
    """Whether the run of nanogpt-gpu is good enough and fast enough. val_loss: None where it has none."""
    if steps < 5000 or val_loss is None:
        return [f"- goal, nanogpt-gpu: not measured, as only {steps:,} of 5,000 steps were done"]
    return [
        f"- goal, validation loss at most {TRAIN_LOSS}: {val_loss:.4f}, {told(val_loss <= TRAIN_LOSS)}",
        f"- goal, under {TRAIN_SECONDS:g} s: {seconds:.1f} s, {told(seconds < TRAIN_SECONDS)}",
    ]


def told(met: bool) -> str:
    """The verdict in a word."""
    return "met" if met else "MISSED"
