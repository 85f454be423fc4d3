"""What a machine with a GPU but no network needs, in one folder: wheels and Shakespeare. See bench/README.md."""

import argparse
import configparser
import re
import shutil
import subprocess
import sys
from pathlib import Path

from baby_xp_data import catalog

from bench import harness
from bench.harness import MIB

TESTS = ("pytest", "pytest-xdist", "hypothesis", "array-api-strict")
"""Of the extra `test`, what the tests that are run there need."""
GLIBC = (17, 24, 26, 27, 28, 31, 34)
"""Minor versions of glibc 2 that wheels are made for: pip takes those that are named and no others."""


def main() -> int:
    """Fill the folder, and print what is in it and what to do with it. Exit code 1 if it became too large."""
    asked = parse()
    asked.out.mkdir(parents=True, exist_ok=True)
    for old in asked.out.glob("*.whl"):  # two versions of one package stop an installation
        old.unlink()
    if code := subprocess.run(download(asked)).returncode:
        harness.say(f"bench.carry: pip could not collect the wheels (exit code {code}), see above")
        return 1
    shutil.copy(catalog.find("shakespeare"), asked.out)
    for wheel in asked.out.glob("*.whl"):  # of what others need
        if plain(wheel.name.partition("-")[0]) in asked.have:
            wheel.unlink()
    sizes = {file.name: file.stat().st_size / MIB for file in sorted(asked.out.iterdir())}
    print("\n".join(f"{size:8.2f} MiB  {name}" for name, size in sizes.items()))
    print(f"{sum(sizes.values()):8.2f} MiB in all\n\nThere, in a checkout:")
    ours, tests = f"'.[cuda{asked.cuda},graphs]'" if asked.cuda else ".", " ".join(TESTS)
    print(f"python -m pip install --no-index --find-links {asked.out} -e {ours} {tests}")
    print(f"export BABY_XP_DATA={asked.out}")
    if sum(sizes.values()) > asked.limit:
        harness.say(f"bench.carry: that is more than {asked.limit} MiB: name with --have what is there already")
        return 1
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = harness.parser("bench.carry", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="the folder")
    parser.add_argument("--python", default="3.12", help="version there (%(default)s), on Linux and x86-64")
    parser.add_argument("--cuda", choices=("12", "13"), help="also CuPy and nvmath-python, for this version")
    parser.add_argument("--have", type=lambda text: {plain(name) for name in text.split(",")}, default=set(),
                        help="packages that are there, such as numpy,torch: they are left out")  # fmt: skip
    parser.add_argument("--limit", type=int, default=64, help="most MiB in all (%(default)s)")
    return parser.parse_args()


def plain(name: str) -> str:
    """The name of a package in the one spelling that counts."""
    return re.sub("[-_.]+", "-", name).lower()


def download(asked: argparse.Namespace) -> list[str]:
    """The command that collects the wheels for that machine, with all that they need."""
    tags = [f"manylinux_2_{minor}_x86_64" for minor in GLIBC] + ["manylinux2014_x86_64"]
    wanted = [one for one in requirements(asked.cuda) if plain(re.match(r"[\w.-]+", one)[0]) not in asked.have]
    return [
        sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--dest", str(asked.out),
        "--implementation", "cp", "--python-version", asked.python,
        *(word for tag in tags for word in ("--platform", tag)), *wanted,
    ]  # fmt: skip


def requirements(cuda: str | None) -> list[str]:
    """What setup.cfg requires of baby_xp and its tests; for a GPU, also CuPy and what bench.graph needs."""
    setup = configparser.ConfigParser()
    setup.read(harness.ROOT / "setup.cfg", encoding="utf-8")
    extras = setup["options.extras_require"]
    lines = lambda text: [line for line in text.splitlines() if line and not line.startswith("#")]  # noqa: E731
    tests = [one for one in lines(extras["test"]) if re.match(r"[\w.-]+", one)[0] in (*TESTS, "setuptools")]
    of_gpu = [*lines(extras[f"cuda{cuda}"]), *lines(extras["graphs"])] if cuda else []
    return [*lines(setup["options"]["install_requires"]), *tests, *of_gpu]


if __name__ == "__main__":
    raise SystemExit(main())
