"""Targets of a config that plugins serve: they select the plugin and become its options."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import importlib_metadata
import pytest
from omegaconf import OmegaConf

from sdxl_host.config.load import RunConfig, load
from sdxl_host.errors import ConfigError, PluginError

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"

SOURCE = """
from dataclasses import dataclass

from sdxl_host import PluginError, hookimpl, option


def targets(parts):
    seen.append(dict(parts))
    if parts["sigma_sampler"][0] == "TwistedSampling" and parts["scaling"][0] != "TwistedScaling":
        raise PluginError("TwistedSampling goes with TwistedScaling only")
    options = {}
    for slot in ("scaling", "sigma_sampler"):
        options.update(parts[slot][1] if parts[slot][0].startswith("Twisted") else {})
    return options


seen = []


@dataclass
class Options:
    size: float = option(1.0, help="a size")
    mean: float = option(0.0, help="a mean")


class Fake:
    Options = Options

    def __init__(self, options):
        self.options = options

    @hookimpl
    def on_step_end(self):
        pass
"""

NAMES = ("gm.twisted.TwistedScaling", "gm.twisted.TwistedSampling")
_SCALING = "model.params.denoiser_config.params.scaling_config"
_SAMPLER = "model.params.sigma_sampler_config"


@pytest.fixture
def twisted(site) -> Any:
    """The module of a plugin `twist` that serves both names."""
    return site.add("twist", source=SOURCE, targets=NAMES)


def config(tmp_path: Path, scaling: Any = None, sampler: Any = None, **plugins: Any) -> str:
    """The tiny config with these nodes in the two slots."""
    tree = OmegaConf.load(TINY)
    tree.plugins = plugins
    for place, node in ((_SCALING, scaling), (_SAMPLER, sampler)):
        if node is not None:
            OmegaConf.update(tree, place, node, merge=False)
    file = tmp_path / "twisted.yaml"
    OmegaConf.save(tree, file)
    return str(file)


def node(name: str, **params: Any) -> dict[str, Any]:
    return {"target": f"gm.twisted.Twisted{name}", "params": params}


def read(file: str, *words: str) -> RunConfig:
    return load(["--config", file, *words])


def test_targets_select_the_plugin_and_become_its_options(twisted, tmp_path: Path) -> None:
    """One call with every part; the nodes are gone, so the host's own stand there."""
    import sys

    run = read(config(tmp_path, node("Scaling", size=3.0), node("Sampling", mean=0.5)))
    assert [p.installed.name for p in run.plugins] == ["twist"]
    assert (run.plugins[0].options.size, run.plugins[0].options.mean) == (3.0, 0.5)
    assert OmegaConf.select(run.tree, _SCALING) is None
    assert OmegaConf.select(run.tree, _SAMPLER) is None
    (parts,) = sys.modules[twisted].seen
    assert parts == {
        "first_stage": ("IdentityFirstStage", {}),
        "network": parts["network"],
        "conditioner": parts["conditioner"],
        "denoiser": ("DiscreteDenoiser", {}),
        "scaling": ("TwistedScaling", {"size": 3.0}),
        "weighting": ("EpsWeighting", {}),
        "discretization": ("LegacyDDPMDiscretization", {}),
        "sigma_sampler": ("TwistedSampling", {"mean": 0.5}),
        "loss_fn": ("StandardDiffusionLoss", {"type": "l2", "offset_noise_level": 0.0}),
    }


def test_what_a_checkpoint_keeps_is_the_same_run(twisted, tmp_path: Path) -> None:
    run = read(config(tmp_path, node("Scaling", size=3.0)))
    again = tmp_path / "again.yaml"
    OmegaConf.save(run.tree, again)
    restored = read(str(again))
    assert restored.tree == run.tree
    assert restored.plugins[0].options.size == 3.0


def test_the_command_line_goes_before_a_targets_params(twisted, tmp_path: Path) -> None:
    file = config(tmp_path, node("Scaling", size=3.0))
    assert read(file, f"{_SCALING}.params.size=4.0").plugins[0].options.size == 4.0
    assert read(file, "plugins.twist.size=5.0").plugins[0].options.size == 5.0
    assert read(file, "--twist_size", "6.0").plugins[0].options.size == 6.0


def test_a_section_that_says_the_same_is_no_contradiction(twisted, tmp_path: Path) -> None:
    file = config(tmp_path, node("Scaling", size=3.0), twist={"size": 3.0, "mean": 0.25})
    options = read(file).plugins[0].options
    assert (options.size, options.mean) == (3.0, 0.25)


@pytest.mark.parametrize(
    ("nodes", "words", "error", "message"),
    [
        ({"scaling": node("Scaling", size=3.0), "twist": {"size": 2.0}}, [], ConfigError,
         r"plugins\.twist\.size: is 2\.0, and model\..*scaling_config .* says 3\.0; remove one"),
        ({"scaling": node("Scaling")}, ["--plugins", "none"], ConfigError,
         r"scaling_config\.target: gm\.twisted\.TwistedScaling is a part of the plugin twist, which"
         " --plugins leaves out"),
        ({"scaling": node("Scaling")}, ["--twist", "False"], ConfigError,
         r"--twist False contradicts model\..*scaling_config\.target"),
        ({"sampler": node("Sampling")}, [], PluginError, "goes with TwistedScaling only"),
        ({"scaling": node("Scaling", size="big")}, [], ConfigError, r"plugins\.twist\.size"),
        ({"scaling": node("Scaling", width=1)}, [], ConfigError, r"plugins\.twist\.width"),
        ({"scaling": {"target": "gm.twisted.Twister"}}, [], ConfigError, "there is no such target"),
    ],
)  # fmt: skip
def test_refused(twisted, tmp_path: Path, nodes, words, error, message) -> None:
    file = config(tmp_path, **nodes)
    with pytest.raises(error, match=message):
        read(file, *words)


def test_a_slot_that_stands_twice_and_differs_is_refused(twisted, tmp_path: Path) -> None:
    discretization = {
        "target": "sdxl_host.LegacyDDPMDiscretization",
        "params": {"num_timesteps": 500},
    }
    sampler = {
        "target": "sdxl_host.DiscreteSampling",
        "params": {"discretization_config": discretization},
    }
    with pytest.raises(ConfigError, match=r"discretization_config: differs from model\."):
        read(config(tmp_path, node("Scaling"), sampler))


def test_a_name_that_two_packages_declare_is_refused(site, tmp_path: Path) -> None:
    site.add("twist", source=SOURCE, targets=NAMES)
    site.add("other", source=SOURCE, targets=NAMES[:1])
    with pytest.raises(PluginError, match=r"both declare the target gm\.twisted\.TwistedScaling"):
        read(config(tmp_path, node("Scaling")))


def test_a_function_that_fails_is_attributed(site, tmp_path: Path) -> None:
    broken = SOURCE.replace("seen.append(dict(parts))", "raise KeyError('size')")
    site.add("twist", source=broken, targets=NAMES)
    with pytest.raises(PluginError, match=r"plugin twist \(fake-twist 1\.0\): .* KeyError: 'size'"):
        read(config(tmp_path, node("Scaling")))


def test_a_function_that_gives_no_options_is_attributed(site, tmp_path: Path) -> None:
    broken = SOURCE.replace("return options", "return None")
    site.add("twist", source=broken, targets=NAMES)
    with pytest.raises(PluginError, match="gave NoneType, not a dict of options"):
        read(config(tmp_path, node("Scaling")))


@pytest.mark.parametrize("name", ["EDMScaling", "EDMWeighting", "EDMSampling", "EDMDiscretization"])
def test_a_known_plugin_that_is_not_installed_is_named(site, tmp_path: Path, name: str) -> None:
    with pytest.raises(PluginError, match=r"needs a plugin that is not installed; .*sdxl-edm"):
        read(config(tmp_path, {"target": f"gm.modules.anything.{name}"}))


def test_a_name_that_the_host_serves_is_no_plugins(site, tmp_path: Path) -> None:
    """MindONE's names for the host's parts, too."""
    ours = ["gm.modules.diffusionmodules.denoiser_scaling.EpsScaling", "sdxl_host.EpsScaling"]
    site.add("twist", source=SOURCE, targets=ours)
    for name in ours:
        assert read(config(tmp_path, {"target": name})).plugins == ()


def test_a_config_without_foreign_targets_imports_nothing(twisted, tmp_path: Path) -> None:
    import sys

    read(config(tmp_path))
    assert twisted not in sys.modules


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("METADATA", b"Name: \xff\n"),
        ("METADATA", b""),
        ("entry_points.txt", b"[other]\nodd\n"),
    ],
)
def test_a_damaged_package_hides_no_other(
    site: Any, twisted: Any, tmp_path: Path, file: str, content: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    site.add("torn", source=SOURCE, targets=["gm.torn.TornScaling", *NAMES])
    path = site.folder / "fake_torn-1.0.dist-info" / file
    path.write_bytes(content)
    only_here = partial(importlib_metadata.distributions, path=[str(site.folder)])
    monkeypatch.setattr(importlib_metadata, "distributions", only_here)
    found = read(config(tmp_path, node("Scaling", size=2.0)))
    assert [one.installed.name for one in found.plugins] == ["twist"]
    if file == "METADATA":
        torn = {"target": "gm.torn.TornScaling"}
        with pytest.raises(PluginError, match=r"plugin torn: the metadata in .* can't be read"):
            read(config(tmp_path, torn))
