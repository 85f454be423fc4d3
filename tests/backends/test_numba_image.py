"""Images of machine code: they run wherever they lie, and where none can be made LLVM loads an object file."""

import ctypes
import errno
import json
import mmap
import platform
import sys
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("numba", reason="numba is not installed")

import llvmlite.binding
from baby_xp_backends import numba_compile, numba_image, numba_library

has_images = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="images are for Linux on x86-64"
)
KINDS = [numba_library.FLOATS, numba_library.FLOATS, "i8"]


def example(x, y, at):
    """With a loop that LLVM turns into a call of memset, and with constants."""
    for i in range(len(y)):
        y[i] = 0.0
    for i in range(len(x)):
        y[(i + at) % len(y)] += x[i] * 0.3 + 0.7
    return len(x)


def results(function) -> tuple[int, list[float]]:
    y = np.full(100, np.nan, np.float32)
    return function(np.arange(1000, dtype=np.float32), y, 3), y.tolist()


@pytest.fixture(scope="module")
def compiled():
    """The module of the example, its symbol, and its results."""
    function = numba_library.numba_function(example)
    symbol, assembly = numba_compile.c_function("example", function, "i8", KINDS)
    assert "llvm.memset" in assembly
    return llvmlite.binding.parse_assembly(assembly), symbol, results(example)


def written(folder, code, place):
    (folder / numba_library.CODE).write_bytes(code)
    content = {"width": 4, "kernels": {"example": [place, "i8", *KINDS]}}
    (folder / numba_library.NAMES).write_text(json.dumps(content))
    return folder


@pytest.fixture
def folder(compiled, tmp_path):
    """A folder with an image."""
    module, symbol, _ = compiled
    code, places = numba_compile.machine_code(module, [symbol])
    assert list(places) == [symbol]
    return written(tmp_path, code, places[symbol])


@has_images
def test_an_image_runs_wherever_it_lies(compiled, folder):
    functions = [numba_library.loaded(folder).kernels["example"] for _ in range(2)]
    first, second = (ctypes.cast(function, ctypes.c_void_p).value for function in functions)
    assert first != second
    for function in functions:
        count, y = results(function)
        assert count == compiled[2][0]
        np.testing.assert_allclose(y, compiled[2][1], rtol=1e-6)


@has_images
def test_an_image_is_copied_where_files_may_not_be_executed(compiled, folder, monkeypatch):
    real = mmap.mmap

    def without_files(number, size, flags, protection):
        if number >= 0:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        return real(number, size, flags, protection)

    monkeypatch.setattr(mmap, "mmap", without_files)
    expected = numba_library.loaded(folder).kernels["example"]
    assert results(expected)[0] == compiled[2][0]
    np.testing.assert_allclose(results(expected)[1], compiled[2][1], rtol=1e-6)

    def refused(*arguments):
        ctypes.set_errno(errno.EACCES)
        return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda *names, **options: SimpleNamespace(mprotect=refused))
    with pytest.raises(PermissionError):
        numba_library.loaded(folder)


@pytest.mark.parametrize("why", ["another machine", "a function that is not in it"])
def test_llvm_loads_what_cannot_be_an_image(compiled, tmp_path, monkeypatch, why):
    module, symbol, expected = compiled
    if why == "another machine":
        monkeypatch.setattr(platform, "machine", lambda: "other")
    else:
        monkeypatch.setattr(numba_image, "ZEROS", "")
    code, places = numba_compile.machine_code(module, [symbol])
    assert places == {}
    monkeypatch.undo()
    count, y = results(numba_library.loaded(written(tmp_path, code, symbol)).kernels["example"])
    assert count == expected[0]
    np.testing.assert_allclose(y, expected[1], rtol=1e-6)


@has_images
def test_an_address_cannot_be_in_an_image():
    pointer = llvmlite.binding.parse_assembly("@at = global i32 1\n@where = global ptr @at")
    pointer.triple = llvmlite.binding.get_process_triple()
    target = llvmlite.binding.Target.from_triple(pointer.triple)
    machine = target.create_target_machine(reloc="pic", codemodel="small")
    with pytest.raises(ValueError, match="relocations of type 1"):
        numba_image.linked(machine.emit_object(pointer))


@has_images
def test_the_kernels_are_an_image():
    """One kernel that cannot be in it, such as one with a range whose step numba does not know, would cost all of
    them their image, and each process the memory of LLVM."""
    numba_library.library()
    content = json.loads((numba_library.ready() / numba_library.NAMES).read_text())
    assert {type(place) for place, *_ in content["kernels"].values()} == {int}
