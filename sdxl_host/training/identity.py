"""What a compiled graph is made of: a digest of everything that may be a constant in it.

A graph that is kept on the disk is used again only where this digest is the same. MindSpore itself
does not look: a graph whose Python attributes have changed would compute with the old ones. So what
a digest can't cover is refused, and its graph is compiled anew.

Not in the digest is what enters the graph as data: the values of inputs and of parameters.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn

__all__ = ["Undeclared", "graph_digest"]

# What MindSpore keeps in a cell for itself, which differs from process to process and does not
# enter a graph; and what is covered elsewhere: parameters by value, cells in a walk of their own.
_BOOKKEEPING = {
    "_cells", "_compile_cache", "_compile_phase", "_compiled", "_create_time", "_exist_names",
    "_exist_objs", "_id", "_init_flag", "_is_check_and_refresh", "_jit_graph_name",
    "_lazy_user_parameters", "_mutable_flags", "_params", "_params_list", "_phase", "_phase_cache",
    "_primitives", "_scope", "__parse_method__", "arguments_key",
}  # fmt: skip
# What Python itself keeps in classes.
_OF_CLASSES = {"_abc_impl"}
_PLAIN = (bool, int, float, complex, str, bytes, np.generic, np.dtype, type(...), range, Path)
# Packages whose version stands for their sources.
_VERSIONED = {"mindspore", "numpy", "pybind11_builtins", *sys.stdlib_module_names}


class Undeclared(Exception):
    """Something that a graph may hold and a digest can't cover."""


def graph_digest(
    cell: nn.Cell, method: str, signature: Sequence[Any], facts: Mapping[str, Any]
) -> str:
    """(64,) hexadecimal digits, for the graph of one method of a cell.

    signature: shape and type of each input. facts: what else a graph depends on, such as the
    device and versions. Raises Undeclared where something of the cell can't be covered.
    """
    digest = _Digest({id(parameter) for parameter in cell.get_parameters()})
    try:
        for part in (method, list(signature), dict(facts)):
            digest.add(part)
        digest.add(cell)
        digest.add_code()
    except RecursionError:
        raise Undeclared("values inside each other, too deep to follow") from None
    return digest.hexdigest()


class _Digest:
    """Adds values to a hash by kind and content.

    parameters: the `id` of those that a kept graph gets its values of.
    """

    def __init__(self, parameters: set[int]) -> None:
        self._hash = hashlib.sha256()
        self._parameters = parameters
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []  # so that no `id` is given twice
        self._modules: dict[str, None] = {}
        # Classes and functions met, whose contents are added last: code leads to code, further than
        # Python's calls can be nested.
        self._pending: list[type | types.FunctionType] = []

    def hexdigest(self) -> str:
        return self._hash.hexdigest()

    def add(self, value: Any) -> None:
        """Adds a value and all that it holds."""
        if value is None or isinstance(value, _PLAIN):
            self._put(type(value).__name__, repr(value))
        elif isinstance(value, ms.Type):
            self._put("type", str(value))
        elif hasattr(type(value), "__members__"):  # an enumeration, of Python or of MindSpore
            self.add((type(value), value.name, value.value))
        elif isinstance(value, type):
            self._add_class(value)
        elif isinstance(value, types.ModuleType):
            self._put("module", value.__name__)
            self._add_module(value.__name__)
        elif id(value) in self._seen:
            self._put("seen", str(self._seen[id(value)]))
        else:
            self._seen[id(value)] = len(self._seen)
            self._alive.append(value)
            self._add_new(value)

    def add_code(self) -> None:
        """Adds the contents of every class and function met, what these lead to, the sources of
        their packages, and the plain values that stand in their modules now."""
        while self._pending:
            met = self._pending.pop()
            if isinstance(met, type):
                self._add_attributes(met)
            else:
                names = dict.fromkeys(self._add_bytecode(met.__code__))
                self._add_globals(names, met.__globals__)
        for name in sorted(self._modules):
            module = sys.modules.get(name)
            if module is None:
                raise Undeclared(f"code of {name}, which is no module")
            for key, value in sorted(vars(module).items()):
                if not key.startswith("__") and isinstance(value, _PLAIN):
                    self._put(key, repr(value))
        for file in _sources(self._modules):
            try:
                self._put(file.name, hashlib.sha256(file.read_bytes()).hexdigest())
            except OSError as error:
                raise Undeclared(f"code that can't be read: {error}") from None

    def _add_bytecode(self, code: types.CodeType) -> list[str]:
        """Two functions of one file may have one name. Returns the names that the code looks up."""
        self.add((code.co_code, code.co_varnames, code.co_names))
        names = list(code.co_names)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                names += self._add_bytecode(constant)
            else:
                self.add(constant)
        return names

    def _add_globals(self, names: Iterable[str], namespace: Mapping[str, Any]) -> None:
        """Adds what code finds under these names, in modules too: `module.NAME` names both."""
        spaces, seen = [namespace], set()
        while spaces:
            space = spaces.pop()
            is_versioned = _is_versioned(space.get("__name__"))
            for name in names:
                # A name with dots is of an import inside the function.
                value = space.get(name, sys.modules.get(name) if space is namespace else None)
                if isinstance(value, types.ModuleType) and id(value) not in seen:
                    seen.add(id(value))
                    spaces.append(vars(value))
                if name in space and (not is_versioned or _is_patched(value)):
                    self._put(name)
                    self.add(value)
                elif isinstance(value, types.ModuleType):
                    self._add_module(value.__name__)

    def _put(self, *texts: str) -> None:
        for text in texts:
            data = text.encode("utf-8", "surrogatepass")
            self._hash.update(len(data).to_bytes(8, "little"))
            self._hash.update(data)

    def _add_new(self, value: Any) -> None:
        if isinstance(value, Parameter):
            if id(value) not in self._parameters:
                raise Undeclared(f"the parameter {value.name}, which is not the cell's")
            shape = tuple(value.shape)
            self._put("parameter", value.name, str((shape, value.dtype, value.requires_grad)))
        elif isinstance(value, Tensor):
            self._put("tensor", str((tuple(value.shape), value.dtype)))
            self._hash.update(value.asnumpy().tobytes())
        elif isinstance(value, np.ndarray):
            self._put("array", str((value.shape, value.dtype)))
            self._hash.update(value.tobytes())
        elif isinstance(value, Mapping):
            self._put(type(value).__name__, str(len(value)))
            for pair in value.items():
                self.add(pair[0])
                self.add(pair[1])
        elif isinstance(value, list | tuple):
            self._put(type(value).__name__, str(len(value)))
            for item in value:
                self.add(item)
        elif isinstance(value, set | frozenset):
            if not all(isinstance(item, _PLAIN) for item in value):
                raise Undeclared(f"a {type(value).__name__} of other things than plain values")
            self.add(sorted(value, key=repr))
        elif isinstance(value, functools.partial):
            self.add(("partial", value.func, value.args, value.keywords))
        elif isinstance(value, types.MethodType):
            self.add(("method", value.__self__, value.__func__))
        elif isinstance(value, types.FunctionType):
            self._add_function(value)
        elif isinstance(value, types.BuiltinFunctionType):
            self._put("builtin", str(value.__module__), value.__qualname__)
        else:
            self._add_object(value)

    def _add_module(self, name: str | None) -> None:
        if not _is_versioned(name):
            self._modules[str(name)] = None

    def _add_class(self, cls: type) -> None:
        self._put("class", cls.__module__, cls.__qualname__)
        if id(cls) not in self._seen:
            self._seen[id(cls)] = len(self._seen)
            self._alive.append(cls)
            self._pending.append(cls)

    def _add_attributes(self, cls: type) -> None:
        for base in cls.__mro__:
            is_versioned = _is_versioned(base.__module__)
            self._add_module(base.__module__)
            for key, value in sorted(vars(base).items()):
                functions = _functions(value)
                if is_versioned:
                    functions = [function for function in functions if _is_patched(function)]
                for function in functions:
                    self._put(key)
                    self.add(function)
                if not (functions or is_versioned or key.startswith("__") or key in _OF_CLASSES):
                    self._put(key)
                    self.add(value)

    def _add_function(self, function: types.FunctionType) -> None:
        self._put("function", str(function.__module__), function.__qualname__)
        self.add([cell.cell_contents for cell in function.__closure__ or ()])
        self.add((function.__defaults__, function.__kwdefaults__))
        if _is_patched(function):
            self._add_module(function.__module__)
            self._add_module(function.__globals__.get("__name__"))
            self._pending.append(function)

    def _add_object(self, value: Any) -> None:
        self._add_class(type(value))
        if isinstance(value, nn.Cell):
            for name, child in value.name_cells().items():
                self._put(name)
                self.add(child)
            for name, parameter in value.parameters_and_names(expand=False):
                self._put(name)
                self.add(parameter)
        held = dict(getattr(value, "__dict__", {}))
        for slot in _slots(type(value)):
            if hasattr(value, slot):
                held[slot] = getattr(value, slot)
        is_python = type(value).__new__ is object.__new__
        if not held and not is_python:
            raise Undeclared(f"a {type(value).__qualname__}, which does not show what it holds")
        for key, item in sorted(held.items()):
            if item is None or (isinstance(value, nn.Cell) and _is_bookkeeping(key, item)):
                continue
            self._put(key)
            self.add(item)


def _is_bookkeeping(key: str, item: Any) -> bool:
    # MindSpore makes empty tables of hooks when a cell first runs.
    return key in _BOOKKEEPING or (key.startswith("_lazy_") and not item)


def _slots(cls: type) -> Iterator[str]:
    for base in cls.__mro__:
        slots = vars(base).get("__slots__", ())
        yield from (slots,) if isinstance(slots, str) else slots


def _functions(value: Any) -> list[Any]:
    """The functions of a class's attribute, where it is a method or a property."""
    if isinstance(value, property):
        return [part for part in (value.fget, value.fset, value.fdel) if part is not None]
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    return [value] if isinstance(value, types.FunctionType) else []


def _is_versioned(module: str | None) -> bool:
    return module is not None and module.partition(".")[0] in _VERSIONED


def _is_patched(value: Any) -> bool:
    """Whether it is a function or a class that no package's version stands for."""
    if isinstance(value, types.FunctionType):
        return not _is_versioned(value.__globals__.get("__name__"))
    return isinstance(value, type) and not _is_versioned(value.__module__)


def _sources(modules: Iterable[str]) -> list[Path]:
    """Every Python file of the modules' packages, each once, in an order that is always the same.

    Raises Undeclared for a module that has none.
    """
    files: dict[Path, None] = {}
    folders: set[Path] = set()
    for name in sorted(modules):
        parts = name.split(".")
        packages = [sys.modules.get(".".join(parts[: end + 1])) for end in range(len(parts))]
        found = [Path(at) for at in (getattr(p, "__file__", None) for p in packages) if at]
        # A namespace package holds no code; what is used of it is met by itself.
        if not getattr(packages[-1], "__file__", None) and not hasattr(packages[-1], "__path__"):
            raise Undeclared(f"code of {name}, which has no file")
        for file in found:
            files[file] = None
            if file.name == "__init__.py" and not folders.intersection(file.parents):
                folders.add(file.parent)
                files.update(dict.fromkeys(sorted(file.parent.rglob("*.py"))))
    return list(files)
