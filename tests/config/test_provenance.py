"""Where each value of a config comes from, and the YAML that says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from sdxl_host.config.load import RunConfig, load
from sdxl_host.config.provenance import commented_yaml

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")


def known(*words: str) -> tuple[RunConfig, dict[str, str]]:
    """The config and its origins by dotted key."""
    config = load(("--config", TINY, *words))
    return config, {".".join(place): origin for place, origin in config.origins.items()}


def test_each_layer_is_told_by_its_name() -> None:
    config, found = known(
        "--plugins", "snr", "--lpw", "--seed", "7", "--snr_gamma=3", "--data_path", "there",
        "optim.base_learning_rate=1e-5", "train.sample_steps=2",
    )  # fmt: skip
    assert found["model.params.network_config.params.model_channels"] == "tiny.yaml"
    assert found["train.log_interval"] == "default"
    assert found["train.seed"] == "--seed"
    assert found["optim.base_learning_rate"] == "override"
    assert found["train.sample_steps"] == "override"
    assert found["data.dataset_config.params.data_path"] == "--data_path"
    assert found["plugins.snr"] == "--plugins"
    assert found["plugins.snr.gamma"] == "--snr_gamma"
    assert found["plugins.lpw"] == "--lpw"
    assert found["plugins.lpw.convention"] == "default of lpw"
    assert config.train.seed == 7


def test_every_value_has_an_origin_and_nothing_else_has() -> None:
    config, found = known("--plugins", "edm,snr", "--timestep_bias_strategy", "later")

    def leaves(node: Any, place: str) -> list[str]:
        if isinstance(node, dict) and node:
            return [leaf for k, v in node.items() for leaf in leaves(v, f"{place}.{k}")]
        if isinstance(node, list) and node:
            return [leaf for i, v in enumerate(node) for leaf in leaves(v, f"{place}.{i}")]
        return [place[1:]]

    tree = OmegaConf.to_container(config.tree)
    plugins = {f"plugins.{p.installed.name}" for p in config.plugins}
    assert set(found) == set(leaves(tree, "")) | plugins
    assert all(found.values())


def test_a_flag_that_says_what_the_file_says_is_still_where_it_comes_from() -> None:
    _, found = known("--per_batch_size", "2", "data.total_step=3")
    assert found["data.per_batch_size"] == "--per_batch_size"
    assert found["data.total_step"] == "override"
    assert found["data.shuffle"] == "tiny.yaml"


def test_a_flag_goes_before_an_override() -> None:
    config, found = known("--seed", "1", "train.seed=2")
    assert (config.train.seed, found["train.seed"]) == (1, "--seed")


def test_overrides_into_lists_and_of_mappings() -> None:
    _, found = known(
        "data.dataset_config.params.transforms[0].params.size=20",
        "model.params.network_config.params.channel_mult[1]=3",
        "optim.scheduler_config.params={warm_up_steps: 9}",
        "model.params.network_config.params.transformer_depth=[0, 1]",
    )
    assert found["data.dataset_config.params.transforms.0.params.size"] == "override"
    assert found["data.dataset_config.params.transforms.0.target"] == "tiny.yaml"
    assert found["model.params.network_config.params.channel_mult.0"] == "tiny.yaml"
    assert found["model.params.network_config.params.channel_mult.1"] == "override"
    assert found["optim.scheduler_config.params.warm_up_steps"] == "override"
    assert found["optim.scheduler_config.target"] == "tiny.yaml"
    assert found["model.params.network_config.params.transformer_depth.0"] == "override"


def test_plugins_of_the_file_and_of_overrides(tmp_path: Path) -> None:
    tree = OmegaConf.load(TINY)
    tree.plugins = {"timestep-bias": {"strategy": "later"}, "snr": None}
    OmegaConf.save(tree, tmp_path / "mine.yaml")
    words = ["--config", str(tmp_path / "mine.yaml"), "plugins.snr.gamma=2",
             "plugins.lpw.convention=kohya", "--lpw"]  # fmt: skip
    found = load(words).origins
    assert found["plugins", "timestep_bias"] == "mine.yaml"
    assert found["plugins", "timestep_bias", "strategy"] == "mine.yaml"
    assert found["plugins", "timestep_bias", "portion"] == "default of timestep_bias"
    assert found["plugins", "snr"] == "mine.yaml"
    assert found["plugins", "snr", "gamma"] == "override"
    assert found["plugins", "lpw"] == "override"


TWISTED = """
from dataclasses import dataclass
from sdxl_host import hookimpl, option

def targets(parts):
    return {**parts["scaling"][1], **parts["sigma_sampler"][1]}

@dataclass
class Options:
    size: float = option(1.0, help="a size")
    mean: float = option(0.0, help="a mean")
    rest: int = option(3, help="a rest")

class Fake:
    Options = Options

    def __init__(self, options):
        self.options = options

    @hookimpl
    def on_step_end(self):
        pass
"""


def test_options_that_a_plugin_makes_of_targets(site, tmp_path: Path) -> None:
    """Also where they are what the plugin's defaults would be."""
    site.add("twist", source=TWISTED, targets=["gm.TwistedScaling", "gm.TwistedSampling"])
    tree = OmegaConf.load(TINY)
    params = tree.model.params
    params.denoiser_config.params.scaling_config = {
        "target": "gm.TwistedScaling",
        "params": {"size": 1.0},
    }
    params.sigma_sampler_config = {"target": "gm.TwistedSampling", "params": {"mean": 2.0}}
    OmegaConf.save(tree, tmp_path / "old.yaml")
    words = ["--config", str(tmp_path / "old.yaml"), "plugins.twist.mean=4"]
    config = load(words)
    found = config.origins
    names = "target TwistedSampling, TwistedScaling"
    assert found["plugins", "twist", "size"] == names
    assert found["plugins", "twist", "mean"] == "override"
    assert found["plugins", "twist", "rest"] == "default of twist"
    assert config.tree.plugins.twist.mean == 4


def test_without_a_config_the_packaged_one_is_named() -> None:
    found = load([]).origins
    assert found["model", "target"] == "default.yaml"
    assert found["train", "seed"] == "default"


def test_the_yaml_is_the_config_and_repeats_the_run(tmp_path: Path) -> None:
    """Also with values that YAML would read otherwise if they were not quoted."""
    words = [
        "--config", TINY, "--plugins", "snr,lpw", "optim.base_learning_rate=1e-5",
        "--sample_prompts", '["a: b # c", "yes", "two\\nlines", "\\u00fc", ""]',
        "--negative_prompt", "one\ntwo: [3] \x7f",
    ]  # fmt: skip
    config = load(words)
    text = commented_yaml(config)
    assert '  negative_prompt: "one\\ntwo: [3] \\x7F"' in text
    assert "sample_prompts: ['a: b # c', 'yes', \"two\\nlines\", \u00fc, '']" in text
    assert yaml.safe_load(text) == OmegaConf.to_container(config.tree)
    (tmp_path / "again.yaml").write_text(text, "utf-8")
    assert load(["--config", str(tmp_path / "again.yaml")]).tree == config.tree


def test_comments_are_aligned_and_stand_behind_every_value() -> None:
    words = ["--config", TINY, "--plugins", "snr", "--seed", "3"]
    config = load(words)
    lines = commented_yaml(config).splitlines()
    parts = [line.partition("  # ") for line in lines]
    columns = {len(before) for before, hash_mark, _ in parts if hash_mark}
    # One target is longer than all comments should be pushed aside for.
    assert sorted(columns)[0] == 64
    assert all(
        len(before.rstrip()) == column > 64
        for column in columns - {64}
        for before, _, _ in parts
        if len(before) == column
    )
    assert all(before.endswith(":") for before, hash_mark, _ in parts if not hash_mark)
    by_text = {before.strip(): origin for before, _, origin in parts}
    assert by_text["seed: 3"] == "--seed"
    assert by_text["snr:"] == "--plugins"
    assert by_text["log_interval: 1"] == "default"
