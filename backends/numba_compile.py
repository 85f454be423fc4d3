"""python -m baby_xp_backends.numba_compile FOLDER: compile all kernels to one file of machine code.

Each becomes a C function that takes arrays as Python objects and reads where NumPy keeps their data and length,
so that a call from Python converts nothing. See numba_library.py, which runs this and loads the result.
"""

import importlib
import json
import multiprocessing
import platform
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
from baby_xp_backends import numba_image, numba_library, simd_width
from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from baby_xp import processes

ARRAYS = {
    numba_library.FLOATS: types.float32, numba_library.INTEGERS: types.int32, numba_library.PLACES: types.int64
}  # fmt: skip
NUMBERS = {"i8": types.int64, "f8": types.float64, "b1": types.boolean, "void": types.void}


def main(folder: str) -> None:
    """Write machine code and names into a folder. A process on each core compiles one kernel after the other."""
    path, names, modules = Path(folder), {}, []
    pool = ProcessPoolExecutor(processes.cores(), mp_context=multiprocessing.get_context("spawn"))
    with pool:
        for name, (symbol, kinds, assembly) in zip(_kernels(), pool.map(_compiled, _kernels()), strict=True):
            names[name] = [symbol, *kinds]
            modules.append(llvmlite.binding.parse_assembly(assembly))
    code, places = machine_code(joined(modules), [symbol for symbol, *_ in names.values()])
    (path / numba_library.CODE).write_bytes(code)
    content = {
        "sha256": numba_library.hash_of(path / numba_library.CODE), "width": simd_width.W,
        "kernels": {name: [places.get(symbol, symbol), *kinds] for name, (symbol, *kinds) in names.items()},
    }  # fmt: skip
    (path / numba_library.NAMES).write_text(json.dumps(content))


def joined(modules: list[Any]) -> Any:
    """One module of all these."""
    whole, *others = modules
    for other in others:
        whole.link_in(other)
    return whole


def machine_code(module: Any, symbols: list[str]) -> tuple[bytes, dict[str, int]]:
    """An image, and the place of each symbol in it; where there are no images, an object file, and no places."""
    codegen = cpu_target.target_context.codegen()
    if sys.platform == "linux" and platform.machine() == "x86_64":
        with suppress(ValueError):
            return numba_image.linked(movable(module, symbols, codegen))
    return codegen._tm.emit_object(module), {}  # numba's choices for this processor and system


def movable(module: Any, symbols: list[str], codegen: Any) -> bytes:
    """An object file that reaches everything relative to its own address. `symbols`: what others may call."""
    more = llvmlite.binding.parse_assembly(numba_image.ZEROS)
    more.triple, more.data_layout = module.triple, module.data_layout
    whole = joined([module.clone(), more])
    for one in (*whole.functions, *whole.global_variables):
        if not one.is_declaration and one.name not in symbols:
            one.linkage = "internal"
    options = {"opt": numba.config.OPT}
    codegen._customize_tm_options(options)
    options |= {"reloc": "pic", "codemodel": "small", "jit": False}
    llvmlite.binding.initialize_native_asmparser()
    return llvmlite.binding.Target.from_triple(whole.triple).create_target_machine(**options).emit_object(whole)


def _kernels() -> list[str]:
    """The names of all kernels; the first one takes longest to compile."""
    numba_library.COMPILING = True
    importlib.import_module("baby_xp_backends.numba_kernels")
    return sorted(numba_library.kernels, key=lambda name: (not name.startswith("numba_gpt."), name))


def _compiled(name: str) -> tuple[str, list[str], str]:
    """A kernel's symbol, the types of its result and arguments, and the assembly of its module."""
    _kernels()
    signature, function = numba_library.kernels[name]
    result, _, rest = signature.removesuffix(")").partition("(")
    kinds = [kind.strip() for kind in rest.split(",")]
    symbol, assembly = c_function(name.replace(".", "_"), function, result, kinds)
    return symbol, [result, *kinds], assembly


def c_function(name: str, function: Any, result: str, kinds: list[str]) -> tuple[str, str]:
    """The C function of a kernel: its symbol, made of `name`, and the LLVM assembly of its module."""
    places = [f"a{i}" for i in range(len(kinds))]
    arrays = {place: ARRAYS[kind] for place, kind in zip(places, kinds, strict=True) if kind in ARRAYS}
    given = (f"flat({place}, dtype_{place})" if place in arrays else place for place in places)
    scope = {"function": function, "flat": flat} | {f"dtype_{place}": kind for place, kind in arrays.items()}
    exec(f"def {name}({', '.join(places)}):\n    return function({', '.join(given)})", scope)
    signature = NUMBERS[result](*(types.voidptr if kind in ARRAYS else NUMBERS[kind] for kind in kinds))
    found = numba.cfunc(signature, error_model="numpy")(scope[name])
    return found._wrapper_name, without_exceptions(found._library.get_llvm_str())


def without_exceptions(assembly: str) -> str:
    """The same with an end of the process in the place of what numba calls to raise an exception: no kernel does,
    and whoever loads the code does not have these functions.
    """
    allowed = "|".join([r"llvm\.", *(rf"{name}\(" for name in numba_library.CALLED)])
    ends = r"define internal \1 {\n  call void @llvm.trap()\n  unreachable\n}"
    assembly = re.sub(rf"^declare (?!.*@(?:{allowed}))(.*)$", ends, assembly, flags=re.MULTILINE)
    assembly = re.sub(r"= external (.*?)global (\S+?)(,|$)", r"= internal \1global \2 zeroinitializer\3", assembly,
                      flags=re.MULTILINE)  # fmt: skip
    return assembly if "declare void @llvm.trap()" in assembly else f"{assembly}\ndeclare void @llvm.trap()\n"


@intrinsic
def flat(typing, place, dtype):
    """The flat array that lies in NumPy's object at this place: PyArrayObject begins with the fields of every
    Python object, the pointer to the data, the number of axes, and the pointer to their lengths.
    """
    array = types.Array(dtype.dtype, 1, "C")
    WORD = ir.IntType(64)

    def code(context, builder, signature, arguments):
        first = builder.bitcast(arguments[0], WORD.as_pointer())
        head = object.__basicsize__ // 8

        def word(at):
            return builder.load(builder.gep(first, [WORD(head + at)]))

        length = builder.load(builder.inttoptr(word(2), WORD.as_pointer()))
        data = builder.inttoptr(word(0), context.get_data_type(array.dtype).as_pointer())
        found, size = context.make_array(array)(context, builder), WORD(array.dtype.bitwidth // 8)
        context.populate_array(found, data=data, shape=[length], strides=[size], itemsize=size, meminfo=None)
        return found._getvalue()

    return array(place, dtype), code


if __name__ == "__main__":
    main(*sys.argv[1:])
