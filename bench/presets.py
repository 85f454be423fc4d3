"""How long a whole run of each GPT preset takes on this machine, as `estimate` projects it from a short trial.

    python -m bench.presets [--presets baby,nanogpt-cpu] [--backend numpy] [--tf32] [--data shakespeare.txt]
                            [--out FOLDER]

See bench/README.md for how to read it.
"""

import argparse

from baby_xp.errors import BabyError
from baby_xp.estimation.estimate import Estimate, estimate
from baby_xp.presets import PRESETS
from bench import harness, results
from bench.harness import say
from bench.workloads import on_gpu

GPTS = [name for name, preset in PRESETS.items() if preset.model.kind == "gpt"]


def main() -> int:
    """Estimate the presets that the command line names, print the table and keep it under --out."""
    asked = parse()
    precision = "tf32" if asked.tf32 else "float32"
    try:
        with results.measurement(backend=asked.backend, precision=precision, presets=[]) as result:
            for name in asked.presets:
                data = {"data": asked.data} if PRESETS[name].data.data == "shakespeare" else {}
                found = facts_of(estimate(name, backend=asked.backend, tf32=asked.tf32, **data))
                result["presets"].append(found)
                say(f"{name}: {found['ms_a_step']:.1f} ms a step")
    except BabyError as error:
        say(f"bench.presets: {error}")
        return 2
    results.show(result, document(result), asked.out, "-presets")
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = harness.parser("bench.presets", __doc__, backend="numpy", data="shakespeare", out=None)
    known = harness.names_of(GPTS, "preset")
    parser.add_argument("--presets", type=known, default=",".join(GPTS), help="names, joined by commas (all)")
    parser.add_argument("--tf32", action="store_true", help="products in TF32, on a GPU")
    return parser.parse_args()


def facts_of(found: Estimate) -> dict:
    """What the JSON file keeps of an estimate; "seconds" by what the run does, of all of it "total_seconds"."""
    return {
        "preset": found.preset.name, "parameters": found.n_parameters, "steps": found.facts.num_steps,
        "workers": found.facts.workers, "ms_a_step": found.trial.ms_a_step, "seconds": found.seconds,
        "total_seconds": sum(found.seconds.values()),
    }  # fmt: skip


def document(result: dict) -> list[str]:
    """The results as Markdown."""
    rows = [
        {
            "preset": one["preset"],
            "parameters": f"{one['parameters']:,}",
            "steps": f"{one['steps']:,}",
            "ms a step": f"{one['ms_a_step']:.3f}",
            **{f"{part}, s": f"{seconds:,.1f}" for part, seconds in one["seconds"].items()},
            "whole run": length_of(one["total_seconds"]),
        }
        for one in result["presets"]
    ]
    epochs = [one for one in result["presets"] if one["preset"] == results.EPOCH_PRESET]
    judged = epochs if on_gpu(result["backend"]) else []
    return [
        *results.heading(result, {"backend": {result["backend"]: result["precision"]}}),
        *results.markdown(rows),
        *(["", *(results.epoch_goal(one["total_seconds"]) for one in judged)] if judged else []),
    ]


def length_of(seconds: float) -> str:
    """A time in hours, or in minutes where it is short."""
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


if __name__ == "__main__":
    raise SystemExit(main())
