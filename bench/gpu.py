"""A session on a machine with a GPU, in stages: whether it is correct, how fast it is, and how well it trains.

A folder keeps what each job prints, with the results as JSON. If a job fails or takes too long, the next one runs
all the same; the last lines say which did. See bench/README.md for the stages.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import baby_xp
from baby_xp import files
from baby_xp.errors import BabyError
from baby_xp.presets import PRESETS
from bench import harness, results
from bench.workloads import FOR_A_GPU, TOLERANCES, WORKLOADS, on_gpu

STAGES = ("tests", "sanitizer", "steps", "graph", "train", "epoch", "crossover", "w5", "ages")
PRESET = "nanogpt-gpu"
AGES = [name for name in PRESETS if name.endswith("-months")]
KERNELS = "tests/backends/test_cupy_kernels.py"
PASSED = r"\b[1-9]\d* passed"  # tests that were all skipped end with exit code 0 too
CLEAN = {"memcheck": r"ERROR SUMMARY: 0 errors", "racecheck": r"RACECHECK SUMMARY: 0 hazards"}
PEERS = "torch,torch.compile,jax,baby_xp-jax"
SHARE = 0.8  # of the time limit, for which an age trains: starting, the last evaluation and a sample take time too
TAIL = 25  # lines of a job's output that are shown when it is done


@dataclass(frozen=True)
class Job:
    """A command of a stage; "python" stands for this interpreter.

    must_say: patterns that its output must hold. runs: the folder of the run that it trains. judged: whether that
    run is compared with the goals.
    """

    name: str
    command: list[str]
    must_say: tuple[str, ...] = ()
    runs: Path | None = None
    judged: bool = False


@dataclass
class Outcome:
    """How a job ended: "ok", or why not.

    run: the result of the run that it trained, as its config has it, and the text that the model then wrote.
    """

    stage: str
    job: str
    result: str
    command: str
    seconds: float = 0.0
    output: str = ""
    goals: list[str] = field(default_factory=list)
    run: dict | None = None


def main() -> int:
    """Run the stages that the command line names. Exit code 1 if anything failed."""
    asked, outcomes = parse(), []
    for stage, jobs in asked.jobs.items():
        if not jobs:
            print(f"== {stage}: nothing to do with {asked.backend}\n", flush=True)
        for outcome in run_stage(stage, jobs, asked.out, 60 * asked.minutes):
            keep(asked.out, outcome)
            outcomes.append(outcome)
    rows = [
        {"stage": one.stage, "job": one.job, "result": one.result, "s": f"{one.seconds:.0f}", "file": one.output}
        for one in outcomes
    ]
    print("\n".join([*results.markdown(rows), "", *(line for one in outcomes for line in one.goals)]))
    wrong = [f"{one.stage} {one.job} ({one.result})" for one in outcomes if one.result != "ok"]
    print(f"not ok: {'; '.join(wrong)}" if wrong else "nothing failed")
    return 1 if wrong else 0


def parse() -> argparse.Namespace:
    """The command line; `jobs`: those of each stage that it names."""
    parser = harness.parser("bench.gpu", __doc__, backend="cupy", steps=None, rounds=1, data="shakespeare")
    parser.add_argument("--out", type=Path, required=True, help="folder for all that it writes")
    known, usual = harness.names_of(STAGES, "stage"), ",".join(STAGES[:-1])
    parser.add_argument("--stage", type=known, default=usual, help="such as tests,steps (%(default)s)")
    parser.add_argument("--only", type=lambda text: text.split(","), help="jobs by name, such as W1,W2 (all)")
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
    jobs = {stage: jobs_of(stage, asked) for stage in asked.stage}
    names = [job.name for found in jobs.values() for job in found]
    if unknown := [name for name in asked.only or [] if name not in names]:
        parser.error(f"argument --only: no job is called {unknown[0]!r}: choose {', '.join(names)}")
    chosen = asked.only or names
    asked.jobs = {stage: [job for job in found if job.name in chosen] for stage, found in jobs.items()}
    return asked


# the stages ---------------------------------------------------------------------------------------------


def jobs_of(stage: str, asked: argparse.Namespace) -> list[Job]:
    """The jobs of a stage, small ones, so that one that takes too long stops no other."""
    gpu, backend, out = on_gpu(asked.backend), ["--backend", asked.backend], ["--out", str(asked.out)]
    tf32 = ["--tf32"] if "tf32" in asked.precision else []
    steps = ["--steps", str(asked.steps)] if asked.steps else []
    tests = ["python", "-m", "pytest", "-q", "-m"]
    if stage == "tests":
        works = rf"(?m)^{re.escape(asked.backend)} +works"
        parity = Job("parity", [*tests, "parity", "-k", asked.backend], (PASSED,))
        jobs = [Job("backends", ["python", "-m", "baby_xp", "backends"], (works,)), parity]
        return [*jobs, Job("gpu", [*tests, "gpu"], (PASSED,))] if gpu else jobs
    if stage == "sanitizer":
        command = ["compute-sanitizer", "--error-exitcode", "1", "--tool"]
        of_kernels = [*tests, "gpu", "-n", "0", KERNELS]
        return [Job(tool, [*command, tool, *of_kernels], (PASSED, clean)) for tool, clean in CLEAN.items() if gpu]
    if stage == "graph":
        return [Job("W1", ["python", "-m", "bench.graph", "--workloads", "W1", *out])] if gpu else []
    if stage in ("train", "ages"):
        return [train_job(name, asked, [*backend, *tf32]) for name in (AGES if stage == "ages" else [PRESET])]
    if stage == "epoch":
        preset = results.EPOCH_PRESET
        command = ["python", "-m", "bench.memory", "estimate", "--presets", preset, "--steps", "0"]
        return [Job(preset, [*command, "--data", asked.data, *backend, *out, *tf32])]
    if stage == "crossover":
        command = ["python", "-m", "bench.growth", "crossover", *backend, *out, *steps]
        return [Job("family", command)] if asked.backend != "numpy" else []  # which it is compared with
    command = ["python", "-m", "bench.train", *backend, "--rounds", str(asked.rounds), *out, *steps]
    command += ["--peers", PEERS, "--precision", ",".join(asked.precision)]
    names = FOR_A_GPU if stage == "w5" else [name for name in WORKLOADS if name not in FOR_A_GPU]
    return [Job(name, [*command, "--workloads", name]) for name in names]


def train_job(preset: str, asked: argparse.Namespace, where: list[str]) -> Job:
    """Train a preset to its end. An age stops in time, and goes on from there when its stage is run again."""
    runs, program = asked.out / "runs" / preset, ["python", "-m", "baby_xp"]
    command = [*program, "train", preset, *where, "--data", asked.data]
    command += ["--num-steps", str(asked.steps), "--warmup-steps", "0"] if asked.steps else []
    if preset not in AGES:
        return Job(preset, [*command, "--path", str(runs)], runs=runs, judged=on_gpu(asked.backend))
    before, limit = result_of(runs), ["--max-minutes", f"{SHARE * asked.minutes:g}"]
    if before and before["state"] == "done":  # nothing is left to do
        command, limit = [*program, "runs"], []
    elif before:
        command = [*program, "resume", "last"]
    return Job(preset, [*command, *limit, "--path", str(runs)], runs=runs)


def result_of(runs: Path) -> dict | None:
    """How the last run in a folder ended, with the text that it wrote; None if there is no run."""
    try:
        run = baby_xp.load(path=runs, backend="numpy")
    except BabyError:
        return None
    text = run.files.completion()
    return {**run.config["result"], "sample": text.read_text("utf-8") if text.exists() else ""}


def run_stage(stage: str, jobs: list[Job], out: Path, seconds: float) -> Iterator[Outcome]:
    """Run the jobs of a stage one after the other, within that many seconds together."""
    end = time.perf_counter() + seconds
    for job in jobs:
        left, line = end - time.perf_counter(), shlex.join(job.command)
        program = sys.executable if job.command[0] == "python" else job.command[0]
        if left <= 0:
            outcome = Outcome(stage, job.name, "not begun", line)
        elif shutil.which(program) is None:
            outcome = Outcome(stage, job.name, f"not begun: {program} is not installed", line)
        else:
            print(f"== {stage}, {job.name}: {line} (at most {left:.0f} s)", flush=True)
            outcome = run_job(stage, job, out, left)
        print(f"== {stage}, {job.name}: {outcome.result}\n", flush=True)
        yield outcome


def run_job(stage: str, job: Job, out: Path, seconds: float) -> Outcome:
    """Run a command, its output into a file of its own; at the limit it is ended with all that it started."""
    file, begin, result = out / f"{stage}-{job.name}.txt", time.perf_counter(), "out of time"
    # JAX takes three quarters of a GPU where it is first used: of the tests, two processes may share one
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environment |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if stage == "tests" else {}
    out.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as output:
        child = subprocess.Popen(
            [sys.executable if word == "python" else word for word in job.command], cwd=harness.ROOT,
            env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = child.wait(seconds)
            result = f"failed, exit code {code}" if code else "ok"
        except subprocess.TimeoutExpired:
            pass
        finally:  # with all that it started; Ctrl-C reaches this process alone
            if child.returncode is None and os.name == "nt":
                subprocess.run(["taskkill", "/F", "/T", "/PID", str(child.pid)], capture_output=True)
            elif child.returncode is None:
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    took, said = time.perf_counter() - begin, file.read_text(encoding="utf-8", errors="replace")
    print("\n".join(said.splitlines()[-TAIL:]), flush=True)
    if result == "ok" and not all(re.search(pattern, said) for pattern in job.must_say):
        result = "failed: it did nothing, or found something"
    goals = [line for line in said.splitlines() if line.startswith("- goal,")]
    outcome = Outcome(stage, job.name, result, shlex.join(job.command), round(took, 1), file.name, goals)
    if job.runs and result == "ok" and (run := result_of(job.runs)):
        outcome.run = run
        if run["state"] != "done":
            outcome.result = f"unfinished after {run['steps']:,} steps: run the stage again"
        outcome.goals = results.train_goals(run["val_loss"], took, run["steps"]) if job.judged else []
    return outcome


def keep(out: Path, outcome: Outcome) -> None:
    """Write the outcome of a job into summary.json, beside those of all other jobs, also of earlier calls."""
    file = out / "summary.json"
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"stages": {}}
    kept["gpu"] = harness.gpu()
    kept["stages"].setdefault(outcome.stage, {})[outcome.job] = asdict(outcome)
    files.write_json(file, kept)


if __name__ == "__main__":
    raise SystemExit(main())
