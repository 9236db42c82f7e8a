"""What a compiled graph is made of: a digest of everything that may be a constant in it.

A graph that is kept on the disk is used again only where this digest is the same. MindSpore itself
does not look: a graph whose Python attributes have changed would compute with the old ones. So what
a digest can't cover is refused, and its graph is compiled anew.

Not in the digest is what enters the graph as data: the values of inputs and of parameters.
"""

from __future__ import annotations

import enum
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
    for part in (method, list(signature), dict(facts)):
        digest.add(part)
    digest.add(cell)
    digest.add_modules()
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

    def hexdigest(self) -> str:
        return self._hash.hexdigest()

    def add(self, value: Any) -> None:
        """Adds a value and all that it holds."""
        if value is None or isinstance(value, _PLAIN):
            self._put(type(value).__name__, repr(value))
        elif isinstance(value, ms.Type | enum.Enum):
            self._put("type", str(value))
        elif isinstance(value, type):
            self._add_class(value)
        elif isinstance(value, types.ModuleType):
            self._put("module", value.__name__)
        elif id(value) in self._seen:
            self._put("seen", str(self._seen[id(value)]))
        else:
            self._seen[id(value)] = len(self._seen)
            self._alive.append(value)
            self._add_new(value)

    def add_modules(self) -> None:
        """Adds the sources of every package that code was met of, and the plain values that stand
        in its modules now: a graph holds those as constants too."""
        for name in sorted(self._modules):
            module = sys.modules.get(name)
            if module is None:
                raise Undeclared(f"code of {name}, which is no module")
            for key, value in sorted(vars(module).items()):
                if not key.startswith("__") and isinstance(value, _PLAIN):
                    self._put(key, repr(value))
        for file in _sources(self._modules):
            self._put(file.name, hashlib.sha256(file.read_bytes()).hexdigest())

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

    def _add_class(self, cls: type) -> None:
        self._put("class", cls.__module__, cls.__qualname__)
        if id(cls) in self._seen:
            return
        self._seen[id(cls)] = len(self._seen)
        for base in cls.__mro__:
            if _is_versioned(base.__module__):
                continue
            self._modules[base.__module__] = None
            for key, value in sorted(vars(base).items()):
                if not key.startswith("__") and isinstance(value, _PLAIN):
                    self._put(key, repr(value))

    def _add_function(self, function: types.FunctionType) -> None:
        self._put("function", function.__module__, function.__qualname__)
        if not _is_versioned(function.__module__):
            self._modules[function.__module__] = None
        self.add([cell.cell_contents for cell in function.__closure__ or ()])
        self.add((function.__defaults__, function.__kwdefaults__))

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
        is_python = type(value).__new__ is object.__new__ or _is_versioned(type(value).__module__)
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


def _is_versioned(module: str) -> bool:
    return module.partition(".")[0] in _VERSIONED


def _sources(modules: Iterable[str]) -> list[Path]:
    """Every Python file of the modules' packages, each once, in an order that is always the same.

    Raises Undeclared for a module that has none.
    """
    files: dict[Path, None] = {}
    for name in sorted(modules):
        package = sys.modules.get(name.partition(".")[0], sys.modules[name])
        found = getattr(package, "__file__", None) or getattr(sys.modules[name], "__file__", None)
        if found is None:
            raise Undeclared(f"code of {name}, which has no file")
        file = Path(found)
        inside = sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]
        files.update(dict.fromkeys(inside))
    return list(files)
