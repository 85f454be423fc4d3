"""Runs command lines of baby_xp, each in a fork, and reports how each one ended. test_hostile.py starts it.

It takes a folder and trains a few runs there. Then it reads JSON objects, one per line: a command line and how to
run it; it answers each with one JSON object. It forks from a process that has loaded only baby_xp, since
JAX and PyTorch, which the tests may have loaded, cannot be forked. No command can take more than its share of
memory, disk, processes and time, and before each command the folder is as it was at the start.
"""

import contextlib
import faulthandler
import hashlib
import importlib
import io
import json
import os
import pkgutil
import resource
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
from pathlib import Path

from quick import quick

import baby_xp
from baby_xp import cli

MEMORY = 4 * 2**30
"""Bytes of address space of a process."""
FILE = 64 * 2**20
"""Bytes of a file."""
MODULES = [f"matplotlib.backends.backend_{kind}" for kind in ("agg", "svg", "pdf", "ps", "pgf")]
"""Modules that are imported on demand, when their files may no longer be readable."""
LONG = 2.0
"""Seconds after which a command that may take long is stopped."""
NOBODY = 65534
"""The user for commands that test permissions, which do not apply to root."""
MARK = "BABY_XP_TESTS_COMMAND"
"""Environment variable of the processes that a command starts: some have a session of their own."""
PATIENCE = 10.0
"""Seconds of computing (or three times as many of waiting) after which a command counts as hanging."""
TEXT = "the cat sat on the mat.\nit sat and sat, and so did the hat. " * 30
TINY = ["--n-layers=1", "--n-emb=16", "--head-size=16", "--n-heads=2", "--n-ctx=16", "--batch-size=4"]
TINY += ["--eval-every=10", "--sample-tokens=5", "--backend=numpy", "--workers=1"]


class Base:
    """The folder that every command starts with: runs, and things that can be given in place of a file.

    Commands run in a folder below it, so that ../.. is a part of it too.
    """

    def __init__(self, folder: Path):
        self.folder, self.here = folder / "base", folder / "base" / "a" / "b"
        self.source = folder / "source"  # where files are copied from
        self.names: dict[str, str] = {}

    def make(self) -> None:
        """Train the runs that exist from the start, and import all modules that the program imports."""
        self.source.mkdir()
        for name, text in {"text.txt": TEXT, "other.txt": TEXT.replace("cat", "dög")}.items():
            (self.source / name).write_text(text, encoding="utf-8", newline="\n")
        self.furnish()
        os.chdir(self.here)
        training = ["--data=text.txt", "--num-steps=20", *TINY]
        for name in ("littlebaby", "model"):
            self._train(name, "train", "classic", *training, "--path=elsewhere")
            _call("export", "littlebaby", "last", "--to=littlebaby", "--path=elsewhere")
        models = {name: f"littlebaby/models/model_{self.names[name]}.json" for name in ("littlebaby", "model")}
        _call("import", "littlebaby", models["littlebaby"])
        small = ["--n-hidden=8", "--num-steps=5", "--eval-every=5", "--batch-size=8", "--backend=numpy"]
        self._train("equations", "train", "equations", *small, "--workers=1")
        self._train("byte", "train", "classic", *training, "--tokenizer=byte")
        self._train("char", "train", "classic", *training, "--max-minutes=1e-9")
        for name in ("runs", "littlebaby"):
            shutil.copytree(name, self.source / name)
        self.names["model"] = models["model"]
        for command in ("generate", "evaluate", "check", "resume"):
            _call(command, self.names["char"], *(["--backend=numpy"] if command != "check" else []))
        _call("inspect", "--picture=picture.png", "--backward", "--prompt=the cat")
        _call("estimate", *training, "--no-measure")
        os.chdir(self.folder.parent)
        own = pkgutil.walk_packages(baby_xp.__path__, "baby_xp.")
        for module in [*MODULES, *(found.name for found in own if found.name != "baby_xp.__main__")]:
            with contextlib.suppress(ImportError):
                importlib.import_module(module)

    def _train(self, name: str, *arguments: str) -> None:
        printed = _call(*arguments)
        self.names[name] = next(line.split()[1] for line in printed.splitlines() if line.startswith("run "))

    def furnish(self) -> None:
        """Restore the folder."""
        _remove(self.folder)
        self.here.mkdir(parents=True)
        shutil.copytree(self.source, self.here, dirs_exist_ok=True)
        (self.here / "folder" / "inner").mkdir(parents=True)
        (self.here / "binary.bin").write_bytes(bytes(range(256)) * 20)
        (self.here / "empty.txt").write_bytes(b"")
        with contextlib.suppress(OSError):  # some file systems do not allow such names
            (self.here / os.fsdecode(b"caf\xe9.txt")).write_text(TEXT, encoding="utf-8")
        (self.here / "loop").symlink_to("loop")
        (self.here / "dangling").symlink_to("nowhere")
        os.mkfifo(self.here / "fifo")
        (self.here / "locked").mkdir()
        (self.here / "locked" / "text.txt").write_text(TEXT, encoding="utf-8")
        (self.here / "locked").chmod(0)
        if os.geteuid() == 0:
            for parent, folders, files in os.walk(self.folder.parent):
                for name in [".", *folders, *files]:
                    os.chown(os.path.join(parent, name), NOBODY, NOBODY, follow_symlinks=False)

    def resolve(self, argument: str) -> str:
        """@char stands for a GUID, @model for a file that can be imported."""
        return self.names[argument[1:]] if argument[:1] == "@" and argument[1:] in self.names else argument

    def all(self) -> dict[str, str]:
        """Everything in the folder, with a digest of its contents."""
        found = {}
        for parent, folders, files in os.walk(self.folder):
            for name in [*folders, *files]:
                path = os.path.join(parent, name)
                mode = os.lstat(path).st_mode
                held = b""
                if stat.S_ISREG(mode):
                    with open(path, "rb") as file:
                        held = file.read()
                found[os.path.relpath(path, self.folder)] = f"{mode:o} {hashlib.sha256(held).hexdigest()}"
        return found


def _call(*arguments: str) -> str:
    """A command that must work -> what it prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = cli.main(list(arguments))
    if code:
        raise SystemExit(f"{' '.join(arguments)} ended with {code}")
    return out.getvalue()


def _remove(folder: Path) -> None:
    for parent, folders, _ in os.walk(folder):
        for name in folders:  # before they are listed
            path = os.path.join(parent, name)
            if not os.path.islink(path):
                os.chmod(path, 0o755)
    if folder.exists():
        shutil.rmtree(folder)


# one command --------------------------------------------------------------------------------------------


def run(base: Base, asked: dict) -> dict:
    """Run one command line in a fork -> how it ended, what it printed, and what it changed.

    asked: "line"; "long": "never", "begun" (once it has printed something) or "always", when it may take long
    and is stopped after LONG seconds; "stop": the name of the signal for that; "nobody": not as root;
    "instead": Python text that defines another `main`, to try this function itself; "patience", "memory": other
    limits.
    """
    patience, memory = asked.get("patience", PATIENCE), asked.get("memory", MEMORY)
    before, (reading, writing) = base.all(), os.pipe()
    with contextlib.ExitStack() as stack:
        out, err, where = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(3))
        begin = time.monotonic()
        child = os.fork()
        if child == 0:
            os.close(reading)
            _be_the_command(base, asked, memory, writing, out, err, where)
        os.close(writing)
        answer = stack.enter_context(open(reading, "rb"))
        ended = _watch(child, asked, begin, patience, out)
        answered = json.loads(answer.read() or b"{}") if not ended["hang"] else {}
        ended["left"] = _end_group(child)
        after = base.all()
        record = {
            **ended,
            **answered,
            **{name: _text(file) for name, file in (("out", out), ("err", err), ("where", where))},
            "added": sorted(after.keys() - before.keys()),
            "removed": sorted(before.keys() - after.keys()),
            "changed": sorted(name for name in before.keys() & after.keys() if before[name] != after[name]),
        }
    if after != before:
        base.furnish()
    return record


def _be_the_command(base: Base, asked: dict, memory: int, answer: int, out, err, where) -> None:
    """Runs the command in the fork. It never returns."""
    result = {"code": None, "error": "", "exit": False}
    try:
        os.setsid()
        os.environ[MARK] = str(os.getpid())
        faulthandler.register(signal.SIGUSR1, where, all_threads=True)
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE, FILE))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), "utf-8")
        sys.stderr = io.TextIOWrapper(
            io.FileIO(2, "w", closefd=False), "utf-8", "backslashreplace", write_through=True
        )
        os.chdir(base.here)
        if asked.get("nobody") and os.geteuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        program = cli.main
        if asked.get("instead"):
            names: dict = {}
            exec(asked["instead"], names)
            program = names["main"]
        try:
            result["code"] = program([base.resolve(argument) for argument in asked["line"]])
        except SystemExit as stop:
            result.update(code=stop.code or 0, exit=True)
        except BaseException:
            result["error"] = traceback.format_exc()[-10000:]
        with contextlib.suppress(OSError):
            sys.stdout.flush()
    finally:
        os.write(answer, json.dumps(result).encode("ascii"))
        os._exit(0)


def _watch(child: int, asked: dict, begin: float, patience: float, out) -> dict:
    """Wait for the end of the command, stop it if it may take long, and kill it if it takes too much."""
    ended = {"signal": 0, "hang": "", "stopped": ""}
    computed_at_stop = stopped_at = looked = 0.0
    pause = 0.002
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            ended["signal"] = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
            return ended
        lasted = time.monotonic() - begin
        if lasted - looked > 0.25:
            looked = lasted
            computed = _seconds_computed(child)
            may_stop = asked["long"] == "always" or (
                asked["long"] == "begun" and os.fstat(out.fileno()).st_size > 0
            )
            if not ended["stopped"] and lasted > asked.get("after", LONG) and may_stop:
                _stop(child, asked["stop"])
                ended["stopped"], stopped_at, computed_at_stop = asked["stop"], lasted, computed
            if computed - computed_at_stop > patience or lasted - stopped_at > 3 * patience:
                what = f"continues after {ended['stopped']}" if ended["stopped"] else "hangs"
                ended["hang"] = f"{what}, {patience:g} s"
            if ended["hang"]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGUSR1)  # prints where it is
                    time.sleep(0.2)
                    os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return ended
        time.sleep(pause)
        pause = min(1.3 * pause, 0.05)


def _stop(child: int, name: str) -> None:
    """Send the signal: SIGINT to all its processes, as a terminal does, SIGTERM to it alone."""
    if name == "SIGTERM":
        os.kill(child, signal.SIGTERM)
    else:
        os.killpg(child, signal.SIGINT)


def _processes(leader: int) -> list[tuple[int, list[bytes]]]:
    """The processes of a command, each with its data from /proc; none without /proc."""
    found, mark = [], f"{MARK}={leader}".encode()
    for entry in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
        if not entry.isdigit():
            continue
        with contextlib.suppress(OSError, IndexError):
            fields = Path(f"/proc/{entry}/stat").read_bytes().rpartition(b")")[2].split()
            own = int(fields[2]) == leader or mark in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0")
            if own and fields[0] not in (b"Z", b"X"):
                found.append((int(entry), fields))
    return found


def _seconds_computed(leader: int) -> float:
    """Seconds that all processes of a command have computed."""
    ticks = sum(int(fields[11]) + int(fields[12]) for _, fields in _processes(leader))
    return ticks / os.sysconf("SC_CLK_TCK")


def _end_group(leader: int) -> int:
    """Kill what the command left running -> how many processes that were."""
    for _ in range(20):
        if not (left := _processes(leader)):
            return 0
        time.sleep(0.05)
    for process, _ in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    return len(left)


def _text(file) -> str:
    """The start and the end of the output."""
    file.seek(0)
    text = file.read()
    if len(text) > 60000:
        text = text[:30000] + b"\n[...]\n" + text[-30000:]
    return text.decode("utf-8", "backslashreplace")


def main() -> None:
    """Answer until the input ends."""
    base = Base(Path(sys.argv[1]))
    if os.geteuid() == 0:  # the user nobody may enter the folder
        for folder in base.folder.parents:
            if Path(tempfile.gettempdir()) in folder.parents:
                folder.chmod(0o755)
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    base.make()
    base.furnish()
    print(json.dumps({"names": base.names, "here": str(base.here)}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(base, json.loads(line))), file=answers, flush=True)
    _remove(base.folder)


if __name__ == "__main__":
    with quick():
        main()
