"""Tracing: copies of the layers and models that record every array.

The files in layers/ and models/ contain no hooks and no list of their arrays. Tracing reads their source, and uses
`ast` to insert a call after each assignment in a function:

    scores = q @ xp.matrix_transpose(k) / ...
    scores = __see__("scores", scores)

and around each value that a `forward` or `backward` returns without a name. The copies are compiled from that,
and refer to each other. Training and generation run the original modules, at no cost.

A name is that of the source, after the place in the model: "blocks.0.attention.heads.scores".

- The place is the path of the layer's parameters. A layer without parameters (heads, softmax, gelu, dropout) has
  the place of its caller and its module's name. A helper function belongs to the layer that calls it.
- An array that is returned without a name is "y" from forward and "dx" from backward.
- A name that is assigned again is numbered in the order of computation: "scores", "scores:2".
- An array with several names (one layer's y is the next one's x) has all of them. Mere renaming, as in
  `q, k, v = saved`, gives no new name; and a loop records only its final values.
"""

import ast
import difflib
import functools
import importlib
import inspect
import pkgutil
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from baby_xp import layers, models
from baby_xp.arrays.tree import Tree
from baby_xp.errors import BabyError

SEE, SCOPE, IMPORT = "__see__", "__scope__", "__import_copy__"
DIRECTIONS = {"forward": ("y", 0), "backward": ("dx", -1)}
"""The name of an unnamed result, and its index among several results."""


class Recorder:
    """Names every array that it sees, keeps a copy of it, and may replace it.

    to_host: makes a host array of one of the backend's. p: the tree of parameters, which gives a layer's place.
    patches: name -> function of (array) -> array of the same shape and type. `arrays` and `gradients` are in the
    order of computation; arrays seen after `begin_backward` are gradients.
    """

    def __init__(self, xp: Any, to_host: Callable, p: Tree, patches: Mapping[str, Callable] | None = None):
        self.xp, self.to_host, self.patches = xp, to_host, dict(patches or {})
        self.paths = dict(_subtrees(p))
        self.arrays: dict[str, Any] = {}
        self.gradients: dict[str, Any] = {}
        self.current = self.arrays
        self.names: list[list[str]] = []
        """For each array in the order of computation, all its names, the first one first."""
        self._counts: Counter[str] = Counter()
        self._latest: dict[str, Any] = {}
        self._known: dict[int, tuple[Any, int]] = {}  # by id; keeping the array ensures that its id is not reused
        self._scopes = [("", "")]

    def begin_backward(self) -> None:
        """The forward pass is over: arrays seen from now on are gradients."""
        self.current = self.gradients

    def see(self, name: str, value: Any) -> Any:
        """Record an array -> itself or its replacement. Any other value is returned as it is."""
        if not hasattr(value, "shape") or not hasattr(value, "dtype"):
            return value
        full = _joined(self._scopes[-1][1], name)
        if self._latest.get(full) is value or self._is_of_forward(value):
            return value
        self._counts[full] += 1
        unique = full if self._counts[full] == 1 else f"{full}:{self._counts[full]}"
        value = self._latest[full] = self.patched(unique, value)
        if id(value) not in self._known:
            self._known[id(value)] = (value, len(self.names))
            self.names.append([])
            self.current[unique] = self.host(value)
        names = self.names[self._known[id(value)][1]]
        names.append(unique)
        self.current[unique] = self.current[names[0]]
        return value

    def _is_of_forward(self, value: Any) -> bool:
        """Whether the backward pass only reuses an array of the forward pass."""
        known = self._known.get(id(value))
        return self.current is self.gradients and known is not None and self.names[known[1]][0] in self.arrays

    def host(self, value: Any) -> Any:
        """A copy on the host, which later writes do not change."""
        return self.to_host(value).copy()

    def patched(self, name: str, value: Any) -> Any:
        """The array after its patch, if it has one. Raises BabyError if the patch changes its shape or type."""
        if name not in self.patches:
            return value
        new = self.patches[name](self.xp.asarray(value, copy=True))  # a copy, as the patch may write into it
        for what in ("shape", "dtype"):
            if getattr(new, what, None) != getattr(value, what):
                raise BabyError(
                    f"the patch of {name} must return an array of shape {tuple(value.shape)} and type "
                    f"{value.dtype}, not {_in_words(new)}"
                )
        # an unchanged array stays the same object, with its layout in memory
        return value if bool(self.xp.all(new == value)) else new

    def check_patches(self, others: Iterable[str] = ()) -> None:
        """Raises BabyError if a patch names no array. others: names that exist besides."""
        known = [*self.arrays, *self.gradients, *others]
        for name in self.patches:
            if name not in known:
                back = "" if self.gradients else " (gradients need backward=True)"
                raise BabyError(f"there is no array {name!r}; {nearest(name, known)}{back}")

    @contextmanager
    def scope(self, module: str, function: str, p: Any) -> Iterator[None]:
        """The place of the names that a function of a module gives while it runs."""
        caller, path = self._scopes[-1]
        if function in DIRECTIONS and isinstance(p, dict) and id(p) in self.paths:
            path = self.paths[id(p)]
        elif function in DIRECTIONS or module != caller:
            path = _joined(path, module.rpartition(".")[2])
        self._scopes.append((module, path))
        try:
            yield
        finally:
            self._scopes.pop()


class Copies:
    """Copies of the modules of layers/ and models/, rewritten so that a recorder sees their arrays."""

    def __init__(self, recorder: Recorder):
        self.recorder = recorder
        self.modules: dict[str, types.ModuleType] = {}

    def of(self, module: types.ModuleType) -> types.ModuleType:
        """The copy of a module."""
        return self.named(module.__name__)

    def named(self, name: str) -> types.ModuleType:
        """The copy of the module of that name, made on first use."""
        if name not in self.modules:
            copy = self.modules[name] = types.ModuleType(name)
            vars(copy).update({SEE: self.recorder.see, SCOPE: self._scoped, IMPORT: self._imported})
            file = getattr(importlib.import_module(name), "__file__", None) or name
            exec(compiled(source_of(name), file), vars(copy))  # tracebacks through a copy show the file's lines
        return self.modules[name]

    def _imported(self, module: str, name: str) -> Any:
        """What `from module import name` gives in a copy."""
        if f"{module}.{name}" in found():
            return self.named(f"{module}.{name}")
        if module in found():
            return getattr(self.named(module), name)
        if name == "replaceable":  # copies the plain function: a backend's kernel would not show its arrays
            return lambda function: function
        return getattr(importlib.import_module(module), name)

    def _scoped(self, function: Callable) -> Callable:
        """The function, in a scope of the recorder."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            p = args[1] if len(args) > 1 else None
            with self.recorder.scope(function.__module__, function.__name__, p):
                return function(*args, **kwargs)

        return call


@functools.cache
def found() -> frozenset[str]:
    """The names of all modules in layers/ and models/."""
    parts = (layers, models)
    return frozenset(
        module.name for part in parts for module in pkgutil.iter_modules(part.__path__, f"{part.__name__}.")
    )


def source_of(name: str) -> str:
    """The source of a module. Raises BabyError if it is missing."""
    try:
        return inspect.getsource(importlib.import_module(name))
    except OSError:
        raise BabyError(f"inspecting needs the source of {name}, which is missing: reinstall baby_xp") from None


@functools.lru_cache(maxsize=64)
def compiled(source: str, file: str) -> types.CodeType:
    """The compiled module, in which the recorder sees the arrays of every function."""
    return compile(rewritten(source), file, "exec")


def rewritten(source: str) -> ast.Module:
    """A module's syntax tree, in which the recorder sees the arrays of every function, and imports are copies."""
    tree = ast.parse(source)
    tree.body = [line for statement in tree.body for line in _rewritten(statement)]
    return ast.fix_missing_locations(tree)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint with the most similar names."""
    like = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=3, cutoff=0.5)
    return f"nearest: {', '.join(like)}" if like else "`arrays` and `gradients` of an inspection hold all names"


def _rewritten(statement: ast.stmt) -> list[ast.stmt]:
    if isinstance(statement, ast.ImportFrom) and (statement.module or "").startswith("baby_xp"):
        return [_import_of(statement, alias) for alias in statement.names]
    if isinstance(statement, ast.FunctionDef):
        direction = statement.name.rpartition("_")[2]
        body = [_Shown(DIRECTIONS.get(direction)).visit(line) for line in statement.body]
        statement.body = [line for lines in body for line in (lines if isinstance(lines, list) else [lines])]
        statement.decorator_list.insert(0, ast.Name(SCOPE, ast.Load()))
    return [statement]


def _import_of(statement: ast.ImportFrom, alias: ast.alias) -> ast.stmt:
    """`from a import b as c` becomes `c = __import_copy__("a", "b")`."""
    target = ast.Name(alias.asname or alias.name, ast.Store())
    call = ast.Call(ast.Name(IMPORT, ast.Load()), [ast.Constant(statement.module), ast.Constant(alias.name)], [])
    return ast.copy_location(ast.Assign([target], call), statement)


ASSIGNMENTS = (ast.Assign, ast.AugAssign, ast.AnnAssign)


class _Shown(ast.NodeTransformer):
    """Puts a call of see after each assignment, and around a result without a name.

    result: the name of such a result and its place among several; None for a helper, whose caller names it.
    """

    def __init__(self, result: tuple[str, int] | None):
        self.result, self.loops = result, 0

    def visit_Return(self, node: ast.Return) -> ast.Return:
        if self.result is None or node.value is None:
            return node
        name, place = self.result
        if isinstance(node.value, ast.Tuple) and node.value.elts:
            node.value.elts[place] = _seen(name, node.value.elts[place])
        else:
            node.value = _seen(name, node.value)
        return node

    def _assignment(self, node: Any) -> Any:
        if self.loops or node.value is None or isinstance(node.value, ast.Name):
            return node
        return [node, *(_sight(name, node) for name in _bound(_targets(node)))]

    def _loop(self, node: Any) -> Any:
        """Names assigned in a loop are recorded once, after it."""
        self.loops += 1
        self.generic_visit(node)
        self.loops -= 1
        if self.loops:
            return node
        parts = [part for line in node.body for part in ast.walk(line)]
        targets = [target for part in parts if isinstance(part, ASSIGNMENTS) for target in _targets(part)]
        # a loop without iterations assigns no variable
        bound = ast.Call(ast.Name("locals", ast.Load()), [], [])
        tests = {name: ast.Compare(ast.Constant(name), [ast.In()], [bound]) for name in _bound(targets)}
        ifs = [ast.If(test, [_sight(name, node)], []) for name, test in tests.items()]
        return [node, *(ast.copy_location(one, node) for one in ifs)]

    def _inner(self, node: ast.AST) -> ast.AST:
        """An inner function is not rewritten: its result is named in the outer one."""
        return node

    visit_Assign = visit_AnnAssign = visit_AugAssign = _assignment
    visit_For = visit_While = _loop
    visit_FunctionDef = visit_Lambda = _inner


def _targets(assignment: Any) -> list[ast.expr]:
    return getattr(assignment, "targets", None) or [assignment.target]


def _bound(targets: list[ast.expr]) -> list[str]:
    """The names that an assignment binds, in the order of the source, except those that begin with `_`."""
    names = [part for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
    names = [part for part in names if isinstance(part.ctx, ast.Store) and not part.id.startswith("_")]
    return list(dict.fromkeys(part.id for part in sorted(names, key=lambda part: (part.lineno, part.col_offset))))


def _sight(name: str, node: ast.stmt) -> ast.stmt:
    """name = __see__("name", name)"""
    value = _call(name, ast.Name(name, ast.Load()))
    return ast.copy_location(ast.Assign([ast.Name(name, ast.Store())], value), node)


def _seen(name: str, value: ast.expr) -> ast.expr:
    """__see__("name", value), or the value itself if it has a name already."""
    return value if isinstance(value, ast.Name | ast.Dict) else ast.copy_location(_call(name, value), value)


def _call(name: str, value: ast.expr) -> ast.Call:
    return ast.Call(ast.Name(SEE, ast.Load()), [ast.Constant(name), value], [])


def _subtrees(p: Tree, path: str = "") -> Iterator[tuple[int, str]]:
    """(id, path) of a tree and of all trees in it."""
    yield id(p), path
    for key, value in p.items():
        if isinstance(value, dict):
            yield from _subtrees(value, _joined(path, key))


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _in_words(value: Any) -> str:
    """A value in a few words."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"one of shape {tuple(value.shape)} and type {value.dtype}"
    return "nothing (does it `return` the array?)" if value is None else f"a {type(value).__name__}"
