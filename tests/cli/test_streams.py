"""Streams that are closed, full or not read: one line and an exit code, and no training is lost."""

import errno
import io
import os
import subprocess
import sys

import pytest
from small_runs import flags, metrics_of

import baby_xp
from baby_xp.cli import COMMANDS, main, streams

TINY = flags(num_steps=4)
FULL_LINE = "baby_xp: standard output cannot be written (No space left on device); free some space on that disk\n"
needs_posix = pytest.mark.skipif(os.name == "nt", reason="descriptors as POSIX has them")
needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
pytestmark = pytest.mark.usefixtures("work")


class Broken(io.StringIO):
    """A stream that fails: at each write, or when it is flushed."""

    def __init__(self, code: int, at_write: bool = True):
        super().__init__()
        self.error, self.at_write = OSError(code, os.strerror(code)), at_write

    def write(self, text: str) -> int:
        if self.at_write:
            raise self.error
        return super().write(text)

    def flush(self) -> None:
        raise self.error


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def call(monkeypatch):
    """Run a command with these streams -> exit code, and what was written to the streams."""

    def run(*arguments: str, out=None, err=None) -> tuple[int, str, str]:
        out, err = (io.StringIO() if stream is None else stream for stream in (out, err))
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            code = main(list(arguments))
            assert (sys.stdout, sys.stderr) == (out, err)
        return code, out.getvalue(), err.getvalue()

    return run


EVERY_COMMAND = [
    [], ["--version"], ["presets"], ["runs"], ["generate", "--num-tokens=3"], ["evaluate", "--num-tokens=9"],
    ["inspect", "--prompt=the"], ["check", "--elements=1", "--directions=1"], ["train", "--help"],
    ["equations", "--seeds=1", "--workers=1", "--num-steps=1", "--held-out=4+4"],
]  # fmt: skip


@pytest.mark.parametrize("arguments", EVERY_COMMAND, ids=" ".join)
def test_unwritable_output_is_one_line_and_a_closed_pipe_no_error(copied, call, arguments):
    """At a write or at the flush."""
    for at_write in (True, False):
        assert call(*arguments, out=Broken(errno.EPIPE, at_write))[::2] == (141, "")
        assert call(*arguments, out=Broken(errno.ENOSPC, at_write))[::2] == (2, FULL_LINE)


@pytest.mark.first_case
@pytest.mark.parametrize("at_write", [True, False], ids=["write", "flush"])
@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 2), (errno.EPIPE, 141), (errno.EIO, 2)])
@pytest.mark.parametrize("command", ["train", "finetune"])
def test_training_continues_if_its_progress_cannot_be_printed(call, command, number, code, at_write):
    arguments = ["train", *TINY]
    assert call(*arguments)[0] == 0
    if command == "finetune":
        arguments = ["finetune", baby_xp.load(backend="numpy").guid, *TINY[5:]]
        assert call(*arguments)[0] == 0
    expected = baby_xp.load(backend="numpy").config["result"]["val_loss"]
    found, _, err = call(*arguments, out=Broken(number, at_write))
    newest = baby_xp.load(backend="numpy")
    result = newest.config["result"]
    assert (found, result["state"], result["reason"], result["steps"]) == (code, "done", "steps", 4)
    assert result["val_loss"] == expected
    assert newest.files.completion().exists()
    assert newest.files.report.exists()
    problem = f"standard output cannot be written ({os.strerror(number)})"
    note, *line = err.splitlines()
    assert note == f"{problem}: training continues as run {newest.guid}"
    assert [one.partition(";")[0] for one in line] == ([f"baby_xp: {problem}"] if code == 2 else [])


def test_unwritable_stderr_is_ignored(call):
    broken = Broken(errno.ENOSPC)
    code, out, _ = call("train", *TINY, err=broken)
    assert (code, "to generate text: python -m baby_xp generate" in out) == (0, True)
    assert call("generate", "--num-tokens=3", err=broken)[0] == 0
    assert call("fly", err=broken)[:2] == (2, "")
    assert call("presets", out=Broken(errno.EIO), err=broken)[0] == 2


def test_a_signal_during_a_message_is_harmless():
    """Python refuses a write while another write is in progress."""

    class Busy(io.StringIO):
        def write(self, text):
            raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    assert streams.Errors(Busy()).write("stopping") == 8


def test_the_commands_own_error_wins_over_lost_output(call, monkeypatch):
    def fail(arguments):
        print("something", flush=False)
        raise baby_xp.BabyError("the text is empty")

    monkeypatch.setitem(COMMANDS, "presets", fail)
    assert call("presets", out=Broken(errno.ENOSPC, at_write=False))[::2] == (2, "baby_xp: the text is empty\n")


@pytest.mark.parametrize(("error", "words"), [
    (OSError(errno.EMFILE, "No more"), ["a file or a process cannot be used (No more)", "ulimit -n"]),
    (OSError(errno.EIO, "Input/output error", "x.txt"), ["x.txt cannot be used (Input/output error)", "disk"]),
    (FileNotFoundError(errno.ENOENT, "No such file", "x\n.txt"), ["'x\\n.txt' cannot be read (No such file)"]),
    (BrokenPipeError(errno.EPIPE, "Broken pipe"), ["a file or a process cannot be used (Broken pipe)"]),
], ids=lambda one: type(one).__name__)  # fmt: skip
def test_any_other_system_error_is_one_line(refused, monkeypatch, error, words):
    def fail(arguments):
        raise error

    monkeypatch.setitem(COMMANDS, "presets", fail)
    refused("presets", words=words)


@pytest.mark.parametrize("missing", ["stdout", "stderr", "both"])
@pytest.mark.parametrize("command", ["train", "presets", "fly"])
def test_closed_standard_streams(monkeypatch, capsys, command, missing):
    """Python sets a stream with a closed descriptor to None, and then prints to stderr what is for stdout."""
    with monkeypatch.context() as patch:
        for name in ("stdout", "stderr"):
            if missing in (name, "both"):
                patch.setattr(sys, name, None)
        code = main([command, *(TINY if command == "train" else [])])
    assert code == (2 if command == "fly" else 0)
    out, err = capsys.readouterr()
    assert bool(out) == (command != "fly" and missing == "stderr")
    assert bool(err) == (command == "fly" and missing == "stdout")


CLOSING = "import os, sys; [os.close(int(one)) for one in sys.argv[1]]; os.execv(sys.executable, sys.argv[2:])"


def with_closed(numbers: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run Python where these descriptors are closed."""
    program = [sys.executable, "-c", CLOSING, numbers, sys.executable, *arguments]
    return subprocess.run(program, stdin=subprocess.DEVNULL, capture_output=True, text=True)


@needs_posix
@pytest.mark.first_case
@pytest.mark.parametrize("numbers", ["012", "0", "1", "2", "12", "02"])
def test_no_file_gets_the_descriptor_of_a_closed_stream(work, numbers):
    """Processes that are started later inherit these streams."""
    program = """if True:
        import os
        from baby_xp.cli.streams import guarded
        with guarded(), open("found.txt", "w") as file:
            print(file.fileno() > 2, [os.get_inheritable(number) for number in range(3)], file=file)
    """
    assert with_closed(numbers, "-c", program).returncode == 0
    assert (work / "found.txt").read_text() == "True [True, True, True]\n"


@needs_posix
def test_a_training_with_all_streams_closed(work):
    done = with_closed("012", "-m", "baby_xp", "train", *TINY)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    run = baby_xp.load(backend="numpy")
    assert run.config["result"]["state"] == "done"
    assert [record["step"] for record in metrics_of(run.files)][:2] == [2, 4]


@needs_full
def test_nothing_is_left_to_write_when_the_interpreter_ends(monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", "")  # otherwise no output would be left in the buffer
    program = [sys.executable, "-m", "baby_xp"]
    with open("/dev/full", "w") as full:
        done = subprocess.run([*program, "train", "--help"], stdout=full, stderr=subprocess.PIPE, text=True)
        assert (done.returncode, done.stderr) == (2, FULL_LINE)
        assert subprocess.run([*program, "fly"], stdout=full, stderr=full).returncode == 2


def test_a_closed_pipe_is_no_error():
    """As in `python -m baby_xp presets | head -0`."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "baby_xp", "presets"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() in (0, 141)  # 0: all was written before the pipe was closed
    process.stderr.close()


# output on a terminal -----------------------------------------------------------------------------------

ODD = "a\x1b[31mb\0c\x07d\re\x9bf\x7fg\n\th\u00e4"
ESCAPED = "a\\x1b[31mb\\x00c\\x07d\\re\\x9bf\\x7fg\n\th\u00e4"


@pytest.mark.parametrize(("stream", "shown"), [(Terminal, ESCAPED), (io.StringIO, ODD)])
def test_control_characters_are_escaped_only_on_a_terminal(monkeypatch, stream, shown):
    monkeypatch.setattr(sys, "stdout", stream())
    assert streams.printable(ODD) == shown


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "pipe"])
def test_generated_text_cannot_control_the_terminal(work, call, terminal):
    (work / "text.txt").write_text("\x1b\0\x1b\x07" * 200, encoding="utf-8", newline="\n")
    raw, escaped = {"\x1b", "\0", "\x07"}, {"\\x1b", "\\x00", "\\x07"}
    for arguments in (["train", *TINY], ["generate", "--prompt=\x1b\0\x07", "--num-tokens=30"]):
        code, out, _ = call(*arguments, out=Terminal() if terminal else io.StringIO())
        assert code == 0
        assert {one for one in raw | escaped if one in out} == (escaped if terminal else raw)
    (completion,) = (work / "runs" / "outputs").glob("completion_*_*.txt")
    assert completion.read_text(encoding="utf-8").startswith("\x1b\0\x07")  # the file has the original text
