"""Compiled graphs kept on the disk, so that another start that needs the same compiles nothing.

MindSpore 2.10 names what it keeps by the order of compilation in a process, in one folder that it
asks for once, and does not look whether a graph is the one wanted: another order, another shape or
another attribute, and it computes with the wrong one. So it gets a folder of this process alone,
and before each compilation the graph that belongs there, if there is one; it is found by a digest
of what it is made of.
"""

from __future__ import annotations

import atexit
import functools
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import importlib_metadata
import mindspore as ms

from sdxl_host.device import ascend_generation
from sdxl_host.files.atomic import write_file
from sdxl_host.training.identity import Undeclared, graph_digest

if TYPE_CHECKING:
    from sdxl_host.training.summary import Fact

__all__ = ["CompileCache"]

Compiled = Callable[..., Any]


class CompileCache:
    """Compiles methods of cells, and keeps their graphs in `folder`, or nowhere for None.

    rank, ranks: of this process, and how many share an update. say: shows the user a note where a
    graph can't be kept.
    """

    def __init__(
        self,
        folder: Path | None = None,
        rank: int = 0,
        ranks: int = 1,
        say: Callable[[Fact], None] = print,
    ) -> None:
        self._folder, self._say = folder, say
        self._rank, self._ranks = rank, ranks

    @functools.cached_property
    def _facts(self) -> dict[str, Any]:
        """What a graph depends on beside its cell and inputs; needed only where graphs are kept."""
        return {
            "device": ms.get_current_device().device_target,
            "ascend": ascend_generation(),
            "machine": platform.machine(),
            "rank": self._rank,
            "ranks": self._ranks,
            "python": sys.version,
            **{name: importlib_metadata.version(name) for name in ("mindspore", "numpy")},
        }

    def compiled(self, method: Compiled, jit_level: str = "O0") -> Compiled:
        """A cell's method, compiled at its first call with inputs of each shape and type."""
        function = ms.jit(method, jit_level=jit_level)
        if self._folder is None:
            return function
        folder, known = self._folder, set()

        def call(*inputs: ms.Tensor) -> Any:
            signature = tuple((tuple(value.shape), value.dtype) for value in inputs)
            if signature in known:
                return function(*inputs)
            try:
                facts = {**self._facts, "jit_level": jit_level}
                name = graph_digest(method.__self__, method.__name__, signature, facts)
            except Undeclared as reason:
                self._say(("note", f"--compile_cache: a graph is not kept: it holds {reason}"))
                outputs = function(*inputs)
            else:
                with self._exchange(folder / f"{name}.mindir"):
                    outputs = function(*inputs)
            known.add(signature)
            return outputs

        return call

    @contextmanager
    def _exchange(self, stored: Path) -> Iterator[None]:
        """Lets MindSpore find the graph `stored` in what is compiled inside; stores it if it is
        new."""
        try:
            process_folder = _process_folder(self._rank)
        except OSError as error:
            self._say(("note", f"--compile_cache: a graph is not kept: {error}"))
            yield
            return
        with ExitStack() as stack:
            try:
                new = stack.enter_context(process_folder.compiling(stored))
            except OSError as error:
                self._say(("note", f"--compile_cache: a graph is compiled anew: {error}"))
                new = stack.enter_context(process_folder.compiling(None))
            yield
        try:
            for graph in new:
                write_file(stored, graph)
        except OSError as error:
            self._say(("note", f"--compile_cache: a graph is not kept: {error}"))


class _ProcessFolder:
    """The folder that MindSpore keeps this process's graphs in, numbered as they are compiled.

    It is emptied after each compilation, so that no graph is ever there for another.
    """

    def __init__(self, rank: int) -> None:
        self._root = tempfile.mkdtemp(prefix="sdxl-host-graphs-")
        atexit.register(shutil.rmtree, self._root, ignore_errors=True)
        self._folder = Path(self._root) / f"rank_{rank}" / "graph_cache"
        self._folder.mkdir(parents=True)
        self._next = 0

    @contextmanager
    def compiling(self, graph: Path | None) -> Iterator[list[bytes]]:
        """Inside, one graph is compiled, or read from the file `graph` if it exists; what is
        yielded then holds it afterwards if it has been compiled."""
        self._empty()
        if graph is not None:
            # Where msrun has started the process, MindSpore puts its role before the name.
            for role in {"", os.environ.get("MS_ROLE", "")}:
                name = f"{role}compile_cache_{self._next}.mindir"
                with suppress(FileNotFoundError, NotADirectoryError):
                    shutil.copyfile(graph, self._folder / name)
        before = _written(self._folder)
        new: list[bytes] = []
        try:
            with (
                _environment(
                    MS_COMPILER_CACHE_ENABLE="1",
                    MS_COMPILER_CACHE_PATH=self._root,
                    # Without it MindSpore compares the scripts' imports, and reads nothing more
                    # in this process once they differ; the digest covers them.
                    MS_DEV_FORCE_USE_COMPILE_CACHE="1",
                ),
                _no_entry_script(),
            ):
                yield new
            changed = [
                file for file, at in _written(self._folder).items() if before.get(file) != at
            ]
            if len(changed) == 1:
                new.append(changed[0].read_bytes())
            if changed:  # another number where something else in this process was compiled too
                self._next = int(changed[-1].stem.rpartition("_")[2])
            self._next += 1
        finally:
            self._empty()

    def _empty(self) -> None:
        for file in _written(self._folder):
            file.unlink()


@functools.cache
def _process_folder(rank: int) -> _ProcessFolder:
    """One a process: MindSpore asks for its path once."""
    return _ProcessFolder(rank)


def _written(folder: Path) -> dict[Path, tuple[int, int]]:
    """When each graph was written, and which file it is."""
    found = {file: file.stat() for file in sorted(folder.glob("*compile_cache_*.mindir"))}
    return {file: (status.st_mtime_ns, status.st_ino) for file, status in found.items()}


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Inside, the environment has these values."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _no_entry_script() -> Iterator[None]:
    """Inside, MindSpore does not read the program's main file to list what it imports: the digest
    covers that, and for `python -c` there is no such file, at which MindSpore would fail."""
    from mindspore.graph import api

    before = getattr(api, "entry_script_path", None)
    api.entry_script_path = None
    try:
        yield
    finally:
        api.entry_script_path = before
