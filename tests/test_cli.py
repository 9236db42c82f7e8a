"""The command line: what it prints, what it imports, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image

import sdxl_host
from sdxl_host.cli import _COMMANDS, main
from sdxl_host.errors import DataError
from sdxl_host.version import __version__

HOST = str(Path(sdxl_host.__file__).parents[1])
SIZE = 'size: int = option(3, help="how big", minimum=0)'


def python(*words: str, path: str = HOST, folder: Path | None = None):
    """Runs Python with the host on its path, in a process of its own."""
    return subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "PYTHONPATH": path},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to be in."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def refused(capsys, words: list[str]) -> str:
    """The one line that `sdxl-host WORDS` writes when it ends with exit code 2."""
    capsys.readouterr()
    assert main(words) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("sdxl-host: error: ")
    assert "Traceback" not in captured.out + captured.err
    return lines[0].removeprefix("sdxl-host: error: ")


# ---- what is light


IMPORTED = (
    "import sys; from sdxl_host.cli import main; code = main({words!r}); "
    "print(sorted({{'mindspore', 'numpy', 'torch', 'transformers'}} & set(sys.modules))); "
    "sys.exit(code)"
)


HEAVY = {"mindspore", "numpy", "torch", "transformers"}


@pytest.mark.parametrize(
    ("words", "printed"),
    [
        ([], "usage: sdxl-host COMMAND"),
        (["--version"], __version__),
        *(([name, "--help"], f"usage: sdxl-host {name} ") for name in _COMMANDS),
        (["plugins"], "fake-ash"),
        (["plugins", "--json"], "fake-ash"),
        (["new-plugin", "bark"], "bark/__init__.py"),
    ],
)
def test_help_lists_and_templates_import_nothing_heavy(site, here, words, printed):
    module = site.add("ash", SIZE)
    done = python("-c", IMPORTED.format(words=words), path=site.python_path, folder=here)
    assert (done.returncode, done.stderr) == (0, "")
    *lines, imported = done.stdout.splitlines()
    assert printed in "\n".join(lines)
    assert max(map(len, lines)) <= 100
    assert not set(json.loads(imported.replace("'", '"'))) & HEAVY
    assert module not in imported


def test_python_dash_m_is_the_same_program():
    done = python("-m", "sdxl_host", "--version")
    assert (done.returncode, done.stdout) == (0, f"sdxl-host {__version__}\n")


def test_every_command_of_the_help_can_be_called(capsys):
    """Also those that no test of theirs calls by its name on the command line."""
    assert main([]) == 0
    text = capsys.readouterr().out
    for name, (target, help_line) in _COMMANDS.items():
        assert f"  {name:<11} {help_line}\n" in text
        module, _, function = target.partition(":")
        assert callable(getattr(import_module(module), function))


def test_the_help_of_train_names_every_flag(site, capsys):
    from sdxl_host.settings.declarations import FLAGS

    site.add("ash", SIZE)
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for name in ("config", "plugins", *FLAGS):
        assert f"--{name}" in text
    assert "Plugins installed: ash." in text


# ---- errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "trian: there is no such command (did you mean train?)"),
        (
            ["zzz"],
            "zzz: there is no such command (commands: train, plan, data, cache, sample, convert, "
            "plugins, new-plugin, doctor)",
        ),
        (["--verbose"], "--verbose: there is no such command"),
        (["plugins", "--chekc"], "--chekc: there is no such flag (did you mean check?)"),
        (["sample"], "--prompt: is missing"),
        (["sample", "--checkpoint", "x", "--prompt", "y", "--steps", "0"], "--steps: 0 is"),
        (["train", "--sede", "1"], "--sede: there is no such flag (did you mean seed?)"),
        (["train", "--config", "none.yaml"], "--config none.yaml: there is no such file"),
        (["train", "word"], "word: not understood"),
        (["train", "--plugins", "zzz"], "plugin zzz is not installed"),
    ],
)
def test_bad_words_end_with_one_line_and_exit_code_2(site, here, capsys, words, message):
    assert message in refused(capsys, words)
    assert not list(here.iterdir())


def test_a_yaml_typo_is_told_with_file_and_line(here, capsys):
    (here / "mine.yaml").write_text("model:\n  target: [x\noptim: {}\n")
    assert refused(capsys, ["train", "--config", "mine.yaml"]).startswith(
        "mine.yaml, line 3: not valid YAML: "
    )


def test_a_message_of_several_lines_is_still_told_in_one(site, here, capsys):
    """Whatever a plugin's own error says."""
    site.add("ash", source="raise RuntimeError('first\\nsecond')")
    said = refused(capsys, ["train", "--plugins", "ash"])
    assert "first" in said
    assert "second" in said


def test_other_errors_of_the_program_are_not_hidden(monkeypatch):
    """An error that the user can't mend is a bug, and keeps its traceback."""
    import sdxl_host.commands.train as command

    monkeypatch.setattr(command, "load", lambda words: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["train"])


def test_an_interrupt_ends_with_130(monkeypatch, capsys):
    import sdxl_host.commands.train as command

    def interrupt(words):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "load", interrupt)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "sdxl-host: interrupted\n"


@pytest.mark.parametrize("error", [DataError("a: b; c")])
def test_an_error_goes_to_standard_error_as_it_is(monkeypatch, capsys, error):
    import sdxl_host.commands.train as command

    def fail(words):
        raise error

    monkeypatch.setattr(command, "load", fail)
    assert refused(capsys, ["train"]) == str(error)


# ---- bad data, found before anything slow begins (these import MindSpore)


def images(folder: Path) -> Path:
    folder.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (40, 36), "red").save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("a cat")
    return folder


def unwritable(here: Path) -> tuple[list[str], str]:
    (here / "file").write_text("")
    return ["--save_path", "file/runs"], "file/runs"


def weight_missing(here: Path) -> tuple[list[str], str]:
    return ["--weight", "none.safetensors"], "none.safetensors: there is no such file or folder"


def folder_missing(here: Path) -> tuple[list[str], str]:
    return ["--data_path", "nowhere"], "data_path nowhere: there is no such folder"


def folder_empty(here: Path) -> tuple[list[str], str]:
    (here / "empty").mkdir()
    return ["--data_path", "empty"], "data_path empty: holds no captioned image"


def image_corrupt(here: Path) -> tuple[list[str], str]:
    file = images(here / "data") / "b.png"
    file.write_bytes(file.read_bytes()[:50])
    return ["--data_path", "data"], "data/b.png: image file is truncated"


def image_outside(here: Path) -> tuple[list[str], str]:
    table = images(here / "data") / "metadata.jsonl"
    table.write_text(
        '{"file_name": "a.png", "text": "x"}\n{"file_name": "../c.png", "text": "x"}\n'
    )
    return ["--data_path", "data"], "metadata.jsonl, line 2: names ../c.png, which is outside"


def captions_missing(here: Path) -> tuple[list[str], str]:
    for caption in images(here / "data").glob("*.txt"):
        caption.unlink()
    return ["--data_path", "data"], "image, but 2 x an image without a caption (a.png)"


def transform_unknown(here: Path) -> tuple[list[str], str]:
    key = "data.dataset_config.params.transforms[0].target"
    return [f"{key}=gm.data.mappers.Resise"], "transforms[0].target: gm.data.mappers.Resise: there"


def optimizer_param(here: Path) -> tuple[list[str], str]:
    key = "optim.optimizer_config.params.beta"
    return [f"{key}=0.9"], "optim.optimizer_config.params.beta: AdamW has no such parameter"


def resume_missing(here: Path) -> tuple[list[str], str]:
    return ["--resume", "nowhere"], "nowhere"


BAD = [
    unwritable,
    weight_missing,
    folder_missing,
    folder_empty,
    image_corrupt,
    image_outside,
    captions_missing,
    transform_unknown,
    optimizer_param,
    resume_missing,
]


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_ends_with_one_line_and_leaves_nothing(device, here, capsys, bad):
    words, message = bad(here)
    before = sorted(here.rglob("*"))
    words = ["train", "--device_target", "CPU", *words]
    assert message in refused(capsys, words)
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize("bad", [image_corrupt, unwritable])
def test_bad_input_in_a_process_of_its_own(here, bad):
    """MindSpore writes nothing to standard error either."""
    words, message = bad(here)
    done = python("-m", "sdxl_host", "train", *words, folder=here)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("sdxl-host: error: ")
    assert message in done.stderr


# ---- plugins


@pytest.fixture
def checked(site, monkeypatch):
    """The site, seen by the processes that --check starts too."""
    monkeypatch.setenv("PYTHONPATH", site.python_path)
    return site


HELPLESS = """
from dataclasses import dataclass
from sdxl_host import hookimpl
class Fake:
    @dataclass
    class Options:
        size: int = 3
    @hookimpl
    def on_step_end(self): pass
"""


def rows(capsys, *words: str, code: int = 0) -> dict[str, dict]:
    capsys.readouterr()
    assert main(["plugins", *words, "--json"]) == code
    return {row["name"]: row for row in json.loads(capsys.readouterr().out)}


def test_no_plugins_says_how_to_get_them(site, capsys):
    assert main(["plugins"]) == 0
    assert capsys.readouterr().out.startswith("no plugins are installed; pip install")


def test_plugins_lists_name_package_version_and_state(site, capsys):
    site.add("ash", SIZE, version="1.5")
    site.add("oak", SIZE, requires="sdxl-host>=99")
    found = rows(capsys)
    assert found["ash"] == {
        "name": "ash",
        "distribution": "fake-ash",
        "version": "1.5",
        "state": "ok",
    }
    assert "needs sdxl-host>=99" in found["oak"]["state"]
    assert main(["plugins"]) == 0
    title, ash, oak = capsys.readouterr().out.splitlines()
    assert title.split() == ["name", "distribution", "version", "state"]
    assert ash.split() == ["ash", "fake-ash", "1.5", "ok"]
    assert "sdxl-host>=99" in oak


def test_listing_imports_no_plugin(site, capsys):
    module = site.add("ash", source="raise RuntimeError('imported')")
    assert rows(capsys)["ash"]["state"] == "ok"
    assert module not in sys.modules


def test_check_shows_hooks_and_options(checked, capsys):
    checked.add("ash", SIZE)
    row = rows(capsys, "--check")["ash"]
    assert row["state"] == "ok"
    assert row["hooks"] == {"on_step_end": "observes"}
    (option,) = row["options"]
    assert (option["name"], option["type"], option["default"]) == ("size", "int", 3)
    assert row["import_milliseconds"] >= 0
    assert main(["plugins", "--check"]) == 0
    text = capsys.readouterr().out
    assert "observes on_step_end; imported in " in text
    assert "--ash_size int: how big [3]" in text


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("raise RuntimeError('torn apart')", "RuntimeError: torn apart"),
        ("def", "SyntaxError"),
        ("import nothing_of_that_name", "nothing_of_that_name"),
        ("Other = 1", "is not a class"),
        ("class Fake: pass", "implements no hook"),
        ("import os\nos._exit(3)", "broken"),
        ("import torch\nclass Fake: pass", "importing it imports torch"),
        ("import torch, scipy\nclass Fake: pass", "importing it imports torch, scipy"),
        (HELPLESS, "its option size has no help"),
        ("print('{}')\nraise RuntimeError('after words')", "RuntimeError: after words"),
    ],
)
def test_check_names_what_is_at_fault_and_ends_with_2(checked, capsys, source, cause):
    """One at fault hides none of the others."""
    for name in ("torch", "scipy"):  # they stand for the real ones, which are slow
        (checked.folder / f"{name}.py").write_text("")
    checked.add("ash", SIZE)
    checked.add("oak", source=source)
    found = rows(capsys, "--check", code=2)
    assert found["ash"]["state"] == "ok"
    assert cause in found["oak"]["state"]
    assert "\n" not in found["oak"]["state"]
    assert "hooks" not in found["oak"]


def test_check_refuses_a_plugin_that_imports_mindspore(checked, capsys, make_source):
    checked.add("oak", source=make_source(before="import mindspore"))
    state = rows(capsys, "--check", code=2)["oak"]["state"]
    assert state.startswith("plugin oak (fake-oak 1.0): importing it imports mindspore")
    assert state.endswith("import them inside the methods that use them")


def test_check_says_again_what_metadata_alone_shows(checked, capsys):
    checked.add("oak", SIZE, requires="")
    assert "does not say which versions" in rows(capsys, "--check", code=2)["oak"]["state"]


def test_check_asks_for_both_version_bounds(checked, capsys):
    """A run takes a plugin that states one of them, so the list without --check does too."""
    checked.add("oak", SIZE, requires="sdxl-host>=0.1")
    assert rows(capsys)["oak"]["state"] == "ok"
    assert "no upper bound" in rows(capsys, "--check", code=2)["oak"]["state"]


def test_check_of_two_packages_with_one_name(checked, capsys):
    checked.add("oak", SIZE, distribution="fake-one")
    checked.add("oak", SIZE, distribution="fake-two")
    capsys.readouterr()
    assert main(["plugins", "--check", "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert [row["distribution"] for row in found] == ["fake-one", "fake-two"]
    for row in found:
        assert "fake-one 1.0 and fake-two 1.0 both provide" in row["state"]
