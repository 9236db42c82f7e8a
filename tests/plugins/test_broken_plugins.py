"""Plugins that are broken on purpose: the contract names what is wrong with each, and none of them
hurts who does not select it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from textwrap import dedent, indent
from typing import Any

import importlib_metadata
import pytest

from sdxl_host.cli import main
from sdxl_host.errors import HostError
from sdxl_host.plugins.discovery import discover, find, fitting
from sdxl_host.testing import PluginContract
from sdxl_host.testing.run_checks import Runs
from sdxl_host.testing.subject import Subject
from sdxl_host.version import __version__

HEAD = """
import dataclasses
from dataclasses import dataclass

import numpy as np

from sdxl_host import DiscreteDistribution, NoiseDistribution, PromptEmbedding, encode_truncated
from sdxl_host import hookimpl, option
"""
WORKING = "@hookimpl\ndef weight_loss(self, noise): return np.minimum(noise.snr, 5.0)\n"


def written(body: str, before: str = "") -> str:
    """A module whose plugin class has this body; `before` stands above it."""
    return f"{HEAD}\n{dedent(before)}\n\nclass Fake:\n{indent(dedent(body).strip(), '    ')}\n"


def weight(expression: str) -> str:
    return written(f"@hookimpl\ndef weight_loss(self, noise): return {expression}")


def options(*lines: str, before: str = "") -> str:
    """A plugin that works, with these options."""
    body = "".join(f"    {line}\n" for line in lines)
    schema = f"{dedent(before)}\n@dataclass\nclass Options:\n{body}"
    made = "Options = Options\ndef __init__(self, options): self.options = options\n"
    return written(made + WORKING, schema)


def distribution(quantile: str, cdf: str) -> str:
    """A plugin whose noise levels have this quantile of u and this cdf of sigma."""
    before = f"""
        class Levels(NoiseDistribution):
            def __init__(self, schedule): self.schedule = schedule
            def quantile(self, u): return {quantile}
            def cdf(self, sigma): return {cdf}
    """
    body = """
        def __init__(self): self.levels = None
        @hookimpl
        def sample_timesteps(self, model):
            self.levels = self.levels or Levels(model.schedule)
            return self.levels
    """
    return written(body, before)


def embedding(change: str) -> str:
    """A plugin that changes the embedding `plain` before it returns it."""
    body = f"""
        @hookimpl
        def encode_prompt(self, prompts, encoders):
            plain = encode_truncated(prompts, encoders)
            {change}
    """
    return written(body)


def stateful(state: str, load: str = "self.count = state['count']") -> str:
    """A plugin whose weights depend on the steps it saw."""
    body = f"""
        def __init__(self): self.count, self.size = 0, 0
        @hookimpl
        def weight_loss(self, noise): return np.full_like(noise.snr, 1.0 + self.count + self.size)
        @hookimpl
        def on_step_end(self, result):
            self.count += 1
            self.size += 2
        def state_dict(self): return {state}
        def load_state_dict(self, state): {load}
    """
    return written(body)


RAISES = """
    @hookimpl
    def {hook}(self): raise ValueError("out of luck")
"""


@dataclass(frozen=True)
class Broken:
    """A plugin with one fault: the promise of the contract that it breaks, and the words of the
    message that name the fault.

    metadata: what `Site.add` is told besides. heavy: a module that its own import finds. files:
    what stands in the folder of its metadata instead, None for nothing; {name} is its name.
    """

    promise: str
    said: str
    source: str = field(default_factory=lambda: written(WORKING))
    metadata: dict[str, str] = field(default_factory=dict)
    heavy: str = ""
    files: dict[str, bytes | None] = field(default_factory=dict)


def raising(promise: str, hook: str) -> Broken:
    name = f"{hook}_raises"
    said = f"{hook}: {name}: plugin {name} (fake-{name.replace('_', '-')} 1.0) raised ValueError: "
    return Broken(promise, f"{said}out of luck", written(RAISES.format(hook=hook)))


KINDS = {
    # ---- the package
    "no_bounds": Broken(
        "metadata", "does not say which versions of sdxl-host", metadata={"requires": ""}
    ),
    "no_upper_bound": Broken("metadata", "no upper bound", metadata={"requires": "sdxl-host>=0.1"}),
    "no_lower_bound": Broken("metadata", "no lower bound", metadata={"requires": "sdxl-host<0.2"}),
    "other_version": Broken(
        "metadata",
        f"needs sdxl-host<8,>=7, and this is sdxl-host {__version__}",
        metadata={"requires": "sdxl-host>=7,<8"},
    ),
    "train": Broken("metadata", "the name train belongs to the host"),
    "Capital": Broken("metadata", "'Capital' is not a plugin name"),
    "no_metadata": Broken(
        "metadata", "can't be read (MetadataNotFound: ", files={"METADATA": None}
    ),
    "no_version": Broken(
        "metadata", "can't be read (", files={"METADATA": b"Metadata-Version: 2.1\nName: fake\n"}
    ),
    "metadata_not_utf_8": Broken(
        "metadata", "can't be read (UnicodeDecodeError: ", files={"METADATA": b"Name: \xff\n"}
    ),
    "entry_points_not_utf_8": Broken(
        "metadata",
        "entry_points.txt can't be read (UnicodeDecodeError: ",
        files={"entry_points.txt": b"# \xff\n[sdxl_host.plugins]\n{name} = fake:Fake\n"},
    ),
    "entry_point_without_value": Broken(
        "metadata",
        "entry_points.txt holds the line 'entry_point_without_value'; delete this folder",
        files={"entry_points.txt": b"[other]\nodd\n[sdxl_host.plugins]\n{name}\n"},
    ),
    # ---- its import
    "imports_mindspore": Broken("import", "importing it imports mindspore", heavy="mindspore"),
    "imports_torch": Broken("import", "importing it imports torch", heavy="torch"),
    "imports_what_is_not_there": Broken(
        "import", "ModuleNotFoundError: No module named 'nothing_such'", "import nothing_such"
    ),
    "syntax_error": Broken("import", "SyntaxError", "def broken(:"),
    "exits": Broken("import", "SystemExit: 3", "raise SystemExit(3)"),
    "ends_python": Broken("import", "exit code 3", "import os; os._exit(3)"),
    "ends_python_quietly": Broken(
        "import", "importing it ended Python without a word", "import os; os._exit(0)"
    ),
    "no_class": Broken("import", "is not a class", "Fake = 3"),
    # ---- its hooks
    "no_hook": Broken("hooks", "implements no hook", "class Fake: pass"),
    "wrong_hook_name": Broken(
        "hooks",
        "no hook named weigth_loss (did you mean weight_loss?)",
        written("@hookimpl\ndef weigth_loss(self, noise): return noise.snr"),
    ),
    "wrong_argument": Broken(
        "hooks",
        "weight_loss has no argument nose (did you mean noise?)",
        written("@hookimpl\ndef weight_loss(self, nose): return nose.snr"),
    ),
    "argument_with_a_default": Broken(
        "hooks",
        "gives the parameter step a default",
        written("@hookimpl\ndef weight_loss(self, noise, step=1): return noise.snr"),
    ),
    "not_marked": Broken(
        "hooks",
        "weight_loss has a hook's name but is not marked; put @hookimpl above it",
        written("def weight_loss(self, noise): return noise.snr"),
    ),
    "tryfirst": Broken(
        "hooks",
        "uses @hookimpl(tryfirst=...), which is refused",
        written("@hookimpl(tryfirst=True)\ndef weight_loss(self, noise): return noise.snr"),
    ),
    "wrapper_without_return": Broken(
        "weight_loss",
        "weight_loss is a wrapper that returns nothing",
        written("@hookimpl(wrapper=True)\ndef weight_loss(self, noise): weights = yield"),
    ),
    "wrapper_without_yield": Broken(
        "hooks",
        "weight_loss is a wrapper without `result = yield`",
        written("@hookimpl(wrapper=True)\ndef weight_loss(self, noise): return noise.snr"),
    ),
    "observer_as_wrapper": Broken(
        "hooks",
        "on_step_end observes; it can't be a wrapper",
        written("@hookimpl(wrapper=True)\ndef on_step_end(self): return (yield)"),
    ),
    "state_without_load": Broken(
        "hooks",
        "has state_dict but no load_state_dict",
        written(f"{WORKING}def state_dict(self): return {{}}"),
    ),
    # ---- its options
    "no_help": Broken("options", "its option size has no help", options("size: int = 3")),
    "no_default": Broken(
        "options",
        "its option size has no default",
        options("size: int = dataclasses.field(metadata={'help': 'how big'})"),
    ),
    "shared_default": Broken(
        "options",
        "its option sizes has one list for all instances",
        options(
            "sizes: list[int] = dataclasses.field("
            "default_factory=lambda: SHARED, metadata={'help': 'x'})",
            before="SHARED = [1]",
        ),
    ),
    "options_not_a_dataclass": Broken(
        "options",
        "its Options is not a dataclass",
        written(f"class Options: size = 3\n{WORKING}"),
    ),
    "option_of_no_config": Broken(
        "options",
        "can't be made from their defaults",
        options("size: complex = option(1j, help='x')"),
    ),
    # ---- build_model
    "build_model_raises": raising("build_model", "build_model"),
    "build_model_gives_nothing": Broken(
        "build_model",
        "returned None, not a DiffusionModel",
        written("@hookimpl\ndef build_model(self, config): return None"),
    ),
    "build_model_changes_what_it_is_given": Broken(
        "build_model",
        "of the model it was given; return a copy with the change",
        written(
            """
            @hookimpl(wrapper=True)
            def build_model(self):
                model = yield
                model.schedule.sigmas.flags.writeable = True
                model.schedule.sigmas[0] *= 0.5
                return model
            """
        ),
    ),
    # ---- sample_timesteps
    "sample_timesteps_raises": raising("sample_timesteps", "sample_timesteps"),
    "sample_timesteps_gives_numbers": Broken(
        "sample_timesteps",
        "not a NoiseDistribution",
        written("@hookimpl\ndef sample_timesteps(self, model): return model.schedule.sigmas"),
    ),
    "new_distribution_each_step": Broken(
        "sample_timesteps",
        "gives a new distribution at each call",
        written(
            "@hookimpl\n"
            "def sample_timesteps(self, model): return DiscreteDistribution(model.schedule)"
        ),
    ),
    "falling_quantile": Broken(
        "sample_timesteps",
        "its distribution's quantile falls",
        distribution("10.0 - 9.0 * u", "(10.0 - sigma) / 9.0"),
    ),
    "nan_quantile": Broken(
        "sample_timesteps",
        "its distribution's quantile is nan",
        distribution("np.where(u > 0.5, np.nan, 1.0 + u)", "sigma - 1.0"),
    ),
    "draws_out_of_range": Broken(
        "sample_timesteps",
        "the model states the range",
        distribution("1.0 + 1000.0 * u", "(sigma - 1.0) / 1000.0"),
    ),
    "cdf_of_another": Broken(
        "sample_timesteps", "its distribution's cdf is", distribution("1.0 + u", "0.5 + 0 * sigma")
    ),
    # ---- weight_loss
    "weight_loss_raises": raising("weight_loss", "weight_loss"),
    "wrong_shape": Broken("weight_loss", "gives the shape (1,) for", weight("noise.snr[:1]")),
    "nan_weight": Broken(
        "weight_loss", "weight_loss is nan", weight("np.where(noise.snr > 100.0, np.nan, 1.0)")
    ),
    "negative_weight": Broken("weight_loss", "gives -0.99 at SNR", weight("noise.snr - 1.0")),
    "zero_weight": Broken(
        "weight_loss", "weight_loss gives 0 at", weight("np.maximum(noise.snr - 1.0, 0.0)")
    ),
    "no_weight": Broken("weight_loss", "weight_loss gives None", weight("None")),
    "one_number": Broken("weight_loss", "gives the shape () for", weight("3.0")),
    "whole_numbers": Broken(
        "weight_loss", "int64, not floating numbers", weight("np.ones(noise.snr.shape, int)")
    ),
    "weight_by_place": Broken(
        "weight_loss",
        "at another place in the batch",
        weight("1.0 + np.arange(float(len(noise.snr)))"),
    ),
    # ---- encode_prompt
    "encode_prompt_raises": raising("encode_prompt", "encode_prompt"),
    "wrong_width": Broken(
        "encode_prompt",
        "a context of shape (5, 77, 7), not (5, 77, 8)",
        embedding("return PromptEmbedding(plain.context[..., 1:], plain.pooled, plain.mask)"),
    ),
    "masks_a_whole_prompt": Broken(
        "encode_prompt",
        "a mask with a row that attends nothing",
        embedding(
            "mask = np.array(prompts)[:, None] != np.full(77, '')\n"
            "            return PromptEmbedding(plain.context, plain.pooled, mask)"
        ),
    ),
    "prompt_by_its_neighbours": Broken(
        "encode_prompt",
        "alone than beside others",
        embedding("return PromptEmbedding(plain.context, plain.pooled * len(prompts), plain.mask)"),
    ),
    # ---- in runs
    "on_step_end_raises": raising("determinism", "on_step_end"),
    "random": Broken(
        "determinism",
        "two runs with the same seed differ: at step 1",
        weight("1.0 + np.random.random(noise.snr.shape)"),
    ),
    "weighs_by_hash": Broken(
        "determinism",
        "weight_loss answers otherwise in another process with the same seed",
        weight("np.full_like(noise.snr, 1.0 + hash('weight') % 97)"),
    ),
    "forgets_a_field": Broken(
        "resume",
        "changed during the run: count, size",
        stateful("{'count': self.count}"),
    ),
    "does_not_take_its_state_back": Broken(
        "state",
        "its state_dict after load_state_dict differs in count",
        stateful("{'count': self.count, 'size': self.size}", "self.size = state['size']"),
    ),
    "state_that_no_file_holds": Broken(
        "state", "state_dict: ", stateful("{'count': lambda: self.count}")
    ),
    "keeps_its_state_on_the_class": Broken(
        "objects_share_nothing",
        "a run changes seen of objects that took no part in it",
        written(
            f"seen = []\n{WORKING}"
            "@hookimpl\ndef on_step_end(self, result): self.seen.append(result.step)"
        ),
    ),
}


def add(site: Any, name: str) -> str:
    """Installs a kind and returns the name of its module."""
    broken = KINDS[name]
    source = broken.source
    if broken.heavy:
        folder = site.folder / "heavy"
        folder.mkdir(exist_ok=True)
        (folder / f"{broken.heavy}.py").write_text("", "utf-8")
        source = f"import sys\nsys.path.insert(0, {str(folder)!r})\nimport {broken.heavy}\n{source}"
    module = site.add(name, source=source, **broken.metadata)
    for file, content in broken.files.items():
        path = site.folder / f"fake_{name}-1.0.dist-info" / file
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content.replace(b"{name}", name.encode()))
    return module


@pytest.fixture(autouse=True)
def no_other_packages(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where packages are looked at one by one, those of the site are all."""
    only_here = partial(importlib_metadata.distributions, path=[str(site.folder)])
    monkeypatch.setattr(importlib_metadata, "distributions", only_here)


def complaint(runs: Runs, promise: str) -> str:
    """What the contract says where the plugin breaks `promise`."""
    with pytest.raises((HostError, pytest.fail.Exception)) as failed:
        getattr(PluginContract(), f"test_{promise}")(runs)
    return str(failed.value)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:mindspore.*")
def test_the_contract_names_the_fault(site: Any, tmp_path: Path, name: str) -> None:
    add(site, name)
    runs = Runs(Subject(name, tmp_path / "runs", steps=2))
    said = complaint(runs, KINDS[name].promise)
    assert KINDS[name].said in said
    assert name in said
    assert len(said.splitlines()) == 1
    assert "; " in said or "did you mean" in said  # how to mend it


# ---- who does not select them


def add_all(site: Any) -> None:
    """All of them at once, and two packages whose plugins have one name."""
    for name in KINDS:
        add(site, name)
    for distribution in ("fake-one", "fake-other"):
        site.add("twin", distribution=distribution)


def test_two_packages_with_one_name(site: Any, tmp_path: Path) -> None:
    for distribution in ("fake-one", "fake-other"):
        site.add("twin", distribution=distribution)
    said = complaint(Runs(Subject("twin", tmp_path)), "metadata")
    assert "fake-one 1.0 and fake-other 1.0 both provide a plugin named twin" in said
    assert said.endswith("(pip uninstall fake-other)")


def run(site: Any, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "PYTHONPATH": site.python_path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# The doctor without its long trials of other packages and of MindSpore.
DOCTOR = """
import sys
from sdxl_host.doctor import backend, packages
from sdxl_host.cli import main
from sdxl_host.processes import Child
packages.import_all = lambda names: {}
backend.start = lambda: ({}, Child([], "", ""))
sys.exit(main(["doctor"]))
"""


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["-m", "sdxl_host", "--help"], 0),
        (["-m", "sdxl_host", "train", "--help"], 0),
        (["-m", "sdxl_host", "plugins"], 0),
        (["-m", "sdxl_host", "plugins", "--json"], 0),
        (["-c", DOCTOR], 2),
    ],
    ids=["help", "train_help", "plugins", "plugins_json", "doctor"],
)
def test_none_hurts_who_only_looks(site: Any, words: list[str], code: int) -> None:
    add_all(site)
    done = run(site, *words)
    assert (done.returncode, done.stderr) == (code, "")
    if "--help" in words:
        assert done.stdout.startswith("usage: sdxl-host ")
    else:
        assert not [name for name in KINDS if name not in done.stdout]


def test_none_hurts_who_checks_all(site: Any) -> None:
    """Of the other kinds one that starts a process is enough."""
    chosen = [name for name in KINDS if KINDS[name].promise == "metadata"]
    for name in (*chosen, "ends_python_quietly", "snr_like"):
        add(site, name) if name in KINDS else site.add(name)
    done = run(site, "-m", "sdxl_host", "plugins", "--check", "--json")
    assert (done.returncode, done.stderr) == (2, "")
    states = {row["name"]: row["state"] for row in json.loads(done.stdout)}
    assert states["snr_like"] == "ok"
    for name in (*chosen, "ends_python_quietly"):
        assert KINDS[name].said in states[name]


DAMAGED = [name for name in KINDS if KINDS[name].files]


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_told_with_its_folder_and_the_remedy(site: Any, name: str) -> None:
    add(site, name)
    site.add("whole")
    installed = {plugin.name: plugin for plugin in discover()}
    assert set(installed) == {name, "whole"}
    assert fitting(installed["whole"], list(installed.values())) is None
    told = fitting(installed[name], list(installed.values()))
    assert told is not None
    assert str(site.folder / f"fake_{name}-1.0.dist-info") in told
    assert told.endswith("; delete this folder, or install the package again")


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_package_is_no_twin_of_a_whole_one(site: Any, name: str) -> None:
    add(site, name)
    site.add(name, distribution="whole")
    assert find(name, discover()).distribution == "whole"


@pytest.mark.parametrize("first", [True, False])
def test_a_damaged_copy_of_a_package_does_not_count(
    site: Any, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    """As an upgrade that was cut short leaves it, and beside a file that fails the listing."""
    add(site, "entry_point_without_value")
    site.add("ash", version="1.0" if first else "2.0")
    (information,) = site.folder.glob("fake_ash-*")
    (information / "METADATA").unlink()
    site.add("ash", version="1.5")
    (found,) = [plugin for plugin in discover() if plugin.name == "ash"]
    assert (found.version, found.damage) == ("1.5", "")


@pytest.mark.filterwarnings("ignore::DeprecationWarning:mindspore.*")
def test_none_hurts_a_run_that_selects_none(
    site: Any, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, and all else that is measured, are what they are without them, to the bit."""
    monkeypatch.chdir(tmp_path)

    def measured(folder: str) -> bytes:
        words = ["--config", "tiny.yaml", "--device_target", "CPU", "--guidance_scale", "1"]
        assert main(["train", *words, "--total_step", "2", "--save_path", folder]) == 0
        (file,) = Path(folder).rglob("metrics.jsonl")
        return file.read_bytes()

    without = measured("without")
    add_all(site)
    assert len(discover()) == len(KINDS) + 2
    beside = measured("beside")
    assert json.loads(beside.splitlines()[-1])["step"] == 2
    assert beside == without
    assert not set(site.modules) & set(sys.modules)
