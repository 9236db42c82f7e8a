"""What a run sets aside of its data: `skipped.jsonl` in its folder, a line each."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from sdxl_host.data.problems import Problem
from sdxl_host.errors import DataError
from sdxl_host.files.atomic import open_no_follow, write_file

__all__ = ["SKIPPED", "SkippedImages", "began_without"]

SKIPPED = "skipped.jsonl"


class SkippedImages:
    """Writes what is set aside at the start, and adds what breaks later.

    folder: the run's. problems: those of the start. step: the one that the run goes on from; with 0
    the file is written anew. say: shows the user a sentence. count: images that broke since.
    """

    def __init__(
        self, folder: Path, problems: Sequence[Problem], step: int, say: Callable[[str], None]
    ) -> None:
        self.path = folder / SKIPPED
        self.count = 0
        self._say = say
        lines = _lines(self.path) if step else []
        self._known = {line["name"] for line in lines}
        lines += [_line(one, step) for one in problems if one.name not in self._known]
        self._known |= {problem.name for problem in problems}
        if lines or self.path.is_file():
            content = "".join(map(_text, lines)).encode("utf-8")
            self._write(lambda: write_file(self.path, content))

    def add(self, step: int, problems: Sequence[Problem]) -> None:
        """Says and writes which images broke, each once; the step takes others instead."""
        for problem in problems:
            if problem.name in self._known:  # it comes again in every epoch
                continue
            self._known.add(problem.name)
            self.count += 1
            self._say(
                f"step {step}: {problem.name} is set aside, because it can't be read any more "
                f"({problem.kind}: {problem.detail}); the next image in order is taken instead"
            )
            self._write(partial(self._append, _line(problem, step)))

    def _append(self, line: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8", opener=open_no_follow) as file:
            file.write(_text(line))
            file.flush()
            os.fsync(file.fileno())

    def _write(self, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError as error:
            raise DataError(
                f"{self.path}: can't be written ({error.strerror}); free some space"
            ) from error


def began_without(folder: Path) -> set[str]:
    """What the run of `folder` set aside when it began, by name."""
    return {line["name"] for line in _lines(folder / SKIPPED) if "step" not in line}


def _line(problem: Problem, step: int) -> dict[str, Any]:
    """A problem as it is written; step: the one that met it, 0 for the start of a new run."""
    return asdict(problem) | ({"step": step} if step else {})


def _text(line: dict[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of the file, without one that a crash cut short; none where there is no file."""
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read ({error}); mend or remove it") from error
    found = []
    for line in text.split("\n"):
        with contextlib.suppress(json.JSONDecodeError):
            read = json.loads(line)
            if isinstance(read, dict) and isinstance(read.get("name"), str):
                found.append(read)
    return found
