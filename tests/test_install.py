"""The packages as users install them, in one fresh environment: wheels, commands in an empty
folder, and docs/plugins.md as its reader follows it, every command, in order. `make soak` runs it.

Blocks under `<!-- checked: tutorial -->` are commands and what they print; a line `...` there
stands for any lines. Blocks under `<!-- file: PATH -->` are files that the commands have written.
Where the page is out of date the test writes beside it what it should be, and says where.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sdxl_host.hookspecs import HOOKS

pytestmark = pytest.mark.soak

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "plugins.md"
_BLOCK = re.compile(
    r"^<!-- (?P<kind>checked|file): (?P<subject>[^\n]+) -->\n(?:<!-- not run: [^\n]+ -->\n)?"
    r"(?P<fence>`{3,})\w+\n(?P<text>.*?)^(?P=fence)\n",
    re.MULTILINE | re.DOTALL,
)
# What differs from one machine or one moment to the next.
_VARYING = (
    (re.compile(r"\d{4}\.\d\d\.\d\d-\d\d\.\d\d\.\d\d"), "DATE"),
    (re.compile(r"\d+(\.\d+)? ms\b"), "TIME"),
    (re.compile(r"\b\d+(\.\d+)? ?s\b( \(\d+:\d\d:\d\d\))?"), "TIME"),
    (re.compile(r"\d+(\.\d+)? images/s, \d+:\d\d left"), "SPEED"),
    (re.compile(r"[\d,]+ us a step \((\w+) [\d,]+\)"), r"TIME a step (\1)"),
    (re.compile(r"={2,}"), "=="),  # pytest fills the line that its time stands in
)
# What a reader's shell has not: pytest shortens no line of its summary where CI is set.
_NOT_A_READERS = ("PYTHONPATH", "PYTEST_ADDOPTS", "CI", "BUILD_NUMBER")
# A run of the embedded default, as short as can be.
SHORT = ["data.total_step=2", "train.ms_mode=1", "train.sample_count=1", "train.sample_steps=1"]


def run(environment: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`sdxl-host ARGUMENTS` of the fresh environment, in `folder`, with no checkout in sight."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [str(environment / "sdxl-host"), *arguments],
        cwd=folder,
        env=kept,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_the_extras_install_what_they_name_and_nothing_else(
    environment: Path, tmp_path: Path
) -> None:
    listed = run(environment, tmp_path, "plugins")
    assert listed.returncode == 0
    rows = [line.split() for line in listed.stdout.splitlines()[1:]]
    assert rows == [["edm", "sdxl-edm", "0.1.0", "ok"], ["snr", "sdxl-snr", "0.1.0", "ok"]]


def test_it_trains_in_an_empty_folder(environment: Path, tmp_path: Path) -> None:
    done = run(environment, tmp_path, "train", "--plugins", "edm,snr", *SHORT)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert {path.name for path in folder.iterdir()} == {
        ".lock",
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "samples",
    }
    for line in ("edm (sdxl-edm 0.1.0): adapts build_model", "snr (sdxl-snr 0.1.0): claims"):
        assert line in done.stdout
    assert f"{folder.relative_to(tmp_path)}/samples/step_00000002.png" in done.stdout
    drawn = run(
        environment,
        tmp_path,
        "sample",
        "--checkpoint",
        str(folder / "checkpoints" / "latest"),
        "--prompt",
        "an owl",
        "--steps=2",
    )
    assert drawn.returncode == 0, drawn.stderr
    assert "objective   edm, spacing karras" in drawn.stdout
    assert (tmp_path / "grid.png").is_file()


def test_packaged_configs_are_found_by_their_path(environment: Path, tmp_path: Path) -> None:
    done = run(
        environment, tmp_path, "train", "--config", "configs/learn_demo.yaml", "optim.base_lr=1"
    )
    assert done.returncode == 2
    assert "optim.base_lr: there is no such option" in done.stderr


def test_a_plugin_that_is_not_installed_is_named_with_the_remedy(
    environment: Path, tmp_path: Path
) -> None:
    done = run(environment, tmp_path, "train", "--plugins", "edm,lpw")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "sdxl-host: error: plugin lpw is not installed; pip install sdxl-lpw\n"


# ---- docs/plugins.md


@dataclass(frozen=True)
class Block:
    """A block of the page: checked or file, where its text stands, what it says and should say."""

    kind: str
    start: int
    end: int
    printed: str
    real: str


class Reader:
    """Does what the page says: a shell with a working folder, and the fresh environment."""

    def __init__(self, programs: Path, dist: Path, folder: Path) -> None:
        self.programs = programs
        self.folder = folder
        found = [str(dist), *os.environ.get("PIP_FIND_LINKS", "").split()]
        kept = {name: value for name, value in os.environ.items() if name not in _NOT_A_READERS}
        self.environment = {
            **kept,
            "PATH": os.pathsep.join([str(programs), os.environ["PATH"]]),
            "PIP_FIND_LINKS": " ".join(found),
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "COLUMNS": "80",
        }

    def run(self, command: str) -> str:
        """What the command prints; the test fails where it fails without a word of sdxl-host."""
        words = shlex.split(command)
        if words[0] == "cd":
            self.folder = self.folder / words[1]
            return ""
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        refused = done.stderr.startswith("sdxl-host: error: ")
        told = done.stdout + done.stderr
        assert done.returncode == (2 if refused else 0), f"$ {command}\n{told}"
        # What pip warns of is this machine's settings.
        return done.stdout if words[0] == "pip" else told

    def installed(self) -> set[str]:
        """The packages of the environment."""
        words = [str(self.programs / "python"), "-m", "pip", "list", "--format=freeze"]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        return {line.partition("==")[0] for line in done.stdout.splitlines()}

    def uninstall(self, packages: set[str]) -> None:
        words = [str(self.programs / "python"), "-m", "pip", "uninstall", "--quiet", "--yes"]
        subprocess.run([*words, *sorted(packages)], check=True)


@pytest.fixture(scope="module")
def reader(
    environment: Path, dist: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Reader]:
    """A reader in an empty folder; what is installed by the tests of this file goes again."""
    reader = Reader(environment, dist, tmp_path_factory.mktemp("tutorial"))
    before = reader.installed()
    yield reader
    added = reader.installed() - before
    if added:
        reader.uninstall(added)


@pytest.fixture(scope="module")
def blocks(reader: Reader) -> list[Block]:
    """The blocks of the page, after following it from its top to its end."""
    done = []
    for part in _BLOCK.finditer(PAGE.read_text("utf-8")):
        if part["kind"] == "file":
            real = (reader.folder / part["subject"]).read_text("utf-8")
        else:
            assert part["subject"] == "tutorial"
            real = followed(part["text"], reader)
        done.append(Block(part["kind"], *part.span("text"), part["text"], real))
    return done


def followed(text: str, reader: Reader) -> str:
    """The text of a block with what its commands print now; what agrees stays as it is."""
    lines = []
    for command, printed in commands(text):
        real = reader.run(command).splitlines()
        lines += [f"$ {command}", *(printed if agree(printed, real) else real)]
    return "\n".join(lines) + "\n"


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Each command of a block with the lines printed below it."""
    found: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        if line.startswith("$ "):
            found.append((line.removeprefix("$ "), []))
        else:
            found[-1][1].append(line)
    return found


def agree(printed: list[str], real: list[str]) -> bool:
    """Whether the lines are the same but for what varies and what `...` leaves out."""
    lines = ["(?:.*\n)*" if line == "..." else re.escape(fixed(line)) + "\n" for line in printed]
    return re.fullmatch("".join(lines), "".join(fixed(line) + "\n" for line in real)) is not None


def fixed(line: str) -> str:
    for varying, name in _VARYING:
        line = varying.sub(name, line)
    return line.rstrip()


def with_real(blocks: list[Block]) -> str:
    """The page as it should be."""
    text = PAGE.read_text("utf-8")
    for block in reversed(blocks):
        text = text[: block.start] + block.real + text[block.end :]
    return text


# ---- the page


def test_everything_it_shows_is_what_its_reader_sees(blocks: list[Block], tmp_path: Path) -> None:
    assert len(blocks) > 5
    mended = tmp_path / PAGE.name
    mended.write_text(with_real(blocks), "utf-8")
    old, new = (path.read_text("utf-8").splitlines(keepends=True) for path in (PAGE, mended))
    difference = "".join(difflib.unified_diff(old, new, str(PAGE), str(mended)))
    assert not difference, difference


def test_it_goes_all_the_way(blocks: list[Block]) -> None:
    checked = "".join(block.printed for block in blocks if block.kind == "checked")
    done = [command for command, _ in commands(checked)]
    for command in (
        "sdxl-host new-plugin my_weight --hooks weight_loss",
        "cd my_weight",
        "pip install --quiet -e '.[test]'",
        "pytest",
        "sdxl-host plugins --check",
        "sdxl-host train --config tiny.yaml --plugins my_weight",
    ):
        assert command in done


def test_a_package_with_an_example_of_every_hook_passes_its_own_tests(
    reader: Reader, blocks: list[Block], dist: Path, tmp_path: Path
) -> None:
    """After the tutorial, which lists what is installed; `reader` removes this package too."""
    other = Reader(reader.programs, dist, tmp_path)
    other.run(f"sdxl-host new-plugin all_five --hooks {','.join(HOOKS)}")
    other.run("cd all_five")
    other.run("pip install --quiet -e '.[test]'")
    passed = re.search(r"^(\d+) passed", other.run("pytest --quiet -k 'not pairing'"), re.MULTILINE)
    # One test of its own for each hook; the rest is the contract.
    assert passed and int(passed[1]) > 2 * len(HOOKS)
