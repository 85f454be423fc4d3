"""A session on a machine with a GPU, in stages: whether it is correct, how fast it is, and how well it trains.

A folder keeps what each stage prints, with the results as JSON. If a stage fails or takes too long, the next one
runs all the same; the last lines say which did. See bench/README.md for the stages.
"""

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import baby_xp
from bench import harness, results
from bench.workloads import FOR_A_GPU, TOLERANCES, WORKLOADS, on_gpu

STAGES = ("check", "steps", "w5", "train", "epoch", "crossover")
PRESET = "nanogpt-gpu"
TAIL = 25
"""Lines of a job's output that are shown when it is done."""


@dataclass(frozen=True)
class Job:
    """A command of a stage, in the arguments of Python."""

    name: str
    command: list[str]
    must_say: str = ""
    """A pattern that its output must hold: tests that were all skipped end with exit code 0 too."""
    runs: Path | None = None
    """The folder of the run that it trains."""
    judged: bool = False
    """Whether that run is compared with the goals."""

    def __str__(self) -> str:
        return shlex.join(["python", *self.command])


@dataclass
class Outcome:
    """How a job ended: "ok", "failed" and why, "out of time" or "not begun"."""

    stage: str
    job: str
    result: str
    command: str
    seconds: float = 0.0
    output: str = ""
    goals: list[str] = field(default_factory=list)
    run: dict | None = None
    """The result of the run that it trained, as its config has it."""


def main() -> int:
    """Run the stages that the command line names. Exit code 1 if anything failed."""
    asked = parse()
    asked.out.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for stage in asked.stage:
        outcomes += run_stage(stage, jobs_of(stage, asked), asked.out, 60 * asked.minutes)
        keep(asked.out, stage, [one for one in outcomes if one.stage == stage])
    print("\n".join(summary(outcomes)))
    return 0 if all(one.result == "ok" for one in outcomes) else 1


def parse() -> argparse.Namespace:
    """The command line."""
    parser = harness.parser("bench.gpu", __doc__, backend="cupy", steps=None, data="shakespeare")
    parser.add_argument("--out", type=Path, required=True, help="folder for all that it writes")
    known = harness.names_of(STAGES, "stage")
    parser.add_argument("--stage", type=known, default=",".join(STAGES), help="such as check,steps (%(default)s)")
    parser.add_argument("--minutes", type=float, default=9.0, help="limit of each stage (%(default)g)")
    known = harness.names_of(TOLERANCES, "precision")
    parser.add_argument("--precision", type=known, help="(float32,tf32; on a CPU float32)")
    asked = parser.parse_args()
    if not asked.minutes > 0:
        parser.error("argument --minutes: it must be more than 0")
    asked.precision = asked.precision or (["float32", "tf32"] if on_gpu(asked.backend) else ["float32"])
    asked.out = asked.out.resolve()  # the jobs run elsewhere
    if asked.data != "shakespeare":
        if not Path(asked.data).is_file():
            parser.error(f"argument --data: there is no file {asked.data}")
        asked.data = str(Path(asked.data).resolve())
    return asked


# the stages ---------------------------------------------------------------------------------------------


def jobs_of(stage: str, asked: argparse.Namespace) -> list[Job]:
    """The jobs of a stage; one for each workload and precision, so that one that takes too long stops no other."""
    gpu, backend = on_gpu(asked.backend), ["--backend", asked.backend]
    out, steps = ["--out", str(asked.out)], ["--steps", str(asked.steps)] if asked.steps else []
    own = {name: ["--tf32"] if name == "tf32" else [] for name in asked.precision if name != "half"}
    if stage == "check":
        tests, passed = ["-m", "pytest", "-q", "-m"], r"\b[1-9]\d* passed"
        works = rf"(?m)^{re.escape(asked.backend)} +works"
        parity = Job("parity", [*tests, "parity", "-k", asked.backend], passed)
        jobs = [Job("backends", ["-m", "baby_xp", "backends"], works), parity]
        return [*jobs, Job("gpu", [*tests, "gpu"], passed)] if gpu else jobs
    if stage == "train":
        command = ["-m", "baby_xp", "train", PRESET, *backend, "--data", asked.data]
        command += ["--num-steps", str(asked.steps), "--warmup-steps", "0"] if asked.steps else []
        return [
            Job(f"{PRESET}-{name}", [*command, *tf32, "--path", str(runs)], runs=runs, judged=gpu)
            for name, tf32 in own.items()
            for runs in [asked.out / f"runs-{name}"]
        ]
    if stage == "epoch":
        preset = results.EPOCH_PRESET
        command = ["-m", "bench.memory", "estimate", "--presets", preset, "--steps", "0", "--data", asked.data]
        return [Job(f"{preset}-{name}", [*command, *backend, *out, *tf32]) for name, tf32 in own.items()]
    if stage == "crossover":
        return [Job("family", ["-m", "bench.growth", "crossover", *backend, *out, *steps])]
    command = ["-m", "bench.train", *backend, "--rounds", "2", *out, *steps]
    command += ["--precision", ",".join(asked.precision)]
    names = FOR_A_GPU if stage == "w5" else [name for name in WORKLOADS if name not in FOR_A_GPU]
    return [Job(name, [*command, "--workloads", name]) for name in names]


# running ------------------------------------------------------------------------------------------------


def run_stage(stage: str, jobs: list[Job], out: Path, seconds: float) -> list[Outcome]:
    """Run the jobs of a stage one after the other, within that many seconds together."""
    end, outcomes = time.perf_counter() + seconds, []
    for job in jobs:
        left = end - time.perf_counter()
        if left <= 0:
            outcomes.append(Outcome(stage, job.name, "not begun", str(job)))
            continue
        print(f"== {stage}, {job.name}: {job} (at most {left:.0f} s)", flush=True)
        outcomes.append(run_job(stage, job, out, left))
        print(f"== {stage}, {job.name}: {outcomes[-1].result}\n", flush=True)
    return outcomes


def run_job(stage: str, job: Job, out: Path, seconds: float) -> Outcome:
    """Run a command, its output into a file of its own; at the limit it is ended with all that it started."""
    file, begin, result = out / f"{stage}-{job.name}.txt", time.perf_counter(), "out of time"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with file.open("wb") as output:
        child = subprocess.Popen(
            [sys.executable, *job.command], cwd=harness.ROOT, env=environment, stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = child.wait(seconds)
            result = f"failed, exit code {code}" if code else "ok"
        except subprocess.TimeoutExpired:
            end_all(child)
        except BaseException:  # Ctrl-C reaches this process alone
            end_all(child)
            raise
    took, said = time.perf_counter() - begin, file.read_text(encoding="utf-8", errors="replace")
    print("\n".join(said.splitlines()[-TAIL:]), flush=True)
    if result == "ok" and not re.search(job.must_say, said):
        result = "failed: it did nothing"
    outcome = Outcome(stage, job.name, result, str(job), round(took, 1), file.name)
    outcome.goals = [line for line in said.splitlines() if line.startswith("- goal,")]
    if job.runs and result == "ok":
        outcome.run = run = baby_xp.load(path=job.runs, backend="numpy").config["result"]
        lines = results.train_goals(run["val_loss"], took, run["steps"]) if job.judged else []
        outcome.goals = [f"{line} ({job.name})" for line in lines]
    return outcome


def end_all(child: subprocess.Popen) -> None:
    """End a child with all processes that it started."""
    if os.name == "nt":
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(child.pid)], capture_output=True)
    else:
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


# the summary --------------------------------------------------------------------------------------------


def keep(out: Path, stage: str, outcomes: list[Outcome]) -> None:
    """Write the outcomes of a stage into summary.json, beside those of stages that ran in earlier calls."""
    file = out / "summary.json"
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"stages": {}}
    kept["gpu"] = harness.gpu()
    kept["stages"][stage] = [asdict(outcome) for outcome in outcomes]
    file.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def summary(outcomes: list[Outcome]) -> list[str]:
    """A table of all jobs, the goals, and what failed."""
    rows = [
        {"stage": one.stage, "job": one.job, "result": one.result, "s": f"{one.seconds:.0f}", "file": one.output}
        for one in outcomes
    ]
    wrong = [f"{one.stage} {one.job} ({one.result})" for one in outcomes if one.result != "ok"]
    return [
        *results.markdown(rows),
        "",
        *(line for one in outcomes for line in one.goals),
        f"failed: {'; '.join(wrong)}" if wrong else "nothing failed",
    ]


if __name__ == "__main__":
    raise SystemExit(main())
