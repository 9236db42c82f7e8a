"""`sdxl-host plan`: what a run would be is told rightly, and nothing is trained or allocated."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from omegaconf import OmegaConf
from PIL import Image
from safetensors.numpy import save_file

import sdxl_host
from sdxl_host.cli import main
from sdxl_host.config.load import RunConfig, load
from sdxl_host.config.provenance import commented_yaml
from sdxl_host.data.folder import Captioned
from sdxl_host.diffusion.conditioning import TextEncoders
from sdxl_host.diffusion.model import DiffusionModel
from sdxl_host.planning.captions import Recorder, caption_lengths
from sdxl_host.planning.chart import draw_curves
from sdxl_host.planning.curves import Curve, curves
from sdxl_host.planning.memory import memory, model_parts
from sdxl_host.plugins.hooks import make_hooks

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")
SDXL = "configs/training/sd_xl_base_finetune_910b.yaml"
FILES = ["config.yaml", "curves.csv", "curves.png"]


def plan(*words: str) -> int:
    return main(["plan", "--config", TINY, *words])


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that is said when the command ends with exit code 2."""
    capsys.readouterr()
    assert plan(*words) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    return said.err.removeprefix("sdxl-host: error: ").strip()


def images(folder: Path, captions: dict[str, str]) -> Path:
    folder.mkdir()
    for name, caption in captions.items():
        Image.new("RGB", (40, 36), "red").save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(caption)
    return folder


# ---- where values come from


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


# ---- captions


class Words:
    """A text encoder whose tokens are words: their lengths."""

    begin, end, pad, length, width, pooled_width = 901, 902, 0, 77, 4, 3

    def __init__(self, pad: int = 0, pooled_width: int = 3) -> None:
        self.pad, self.pooled_width = pad, pooled_width

    def tokenize(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]

    def encode(self, ids: np.ndarray) -> Any:
        raise AssertionError("plan encodes nothing")


class OneHook:
    """Hooks of which only encode_prompt is there."""

    def __init__(self, encode: Any) -> None:
        self.encode_prompt = encode


def lengths(encode: Any, *captions: str, encoders: Sequence[Any] = ()) -> list[tuple[int, int]]:
    """(tokens, lost) of each caption when `encode` answers encode_prompt."""
    shown = [Captioned(f"{i}.png", Path(), caption) for i, caption in enumerate(captions)]
    encoders = TextEncoders(list(encoders) or [Words(902, 0), Words()])
    found = caption_lengths(OneHook(encode), encoders, shown)
    assert [each.name for each in found] == [each.name for each in shown]
    return [(each.tokens, each.lost) for each in found]


def row(encoder: Any, ids: list[int]) -> list[int]:
    padded = [encoder.begin, *ids, encoder.end]
    return padded + [encoder.pad] * (encoder.length - len(padded))


def plain(prompts: list[str], encoders: Any) -> None:
    for encoder in encoders:
        encoder.encode(np.array([row(encoder, encoder.tokenize(prompts[0])[:75])]))


def test_what_the_host_cuts_off() -> None:
    assert lengths(plain, "a cat", "x " * 75, "x " * 76, "x y " * 100, "") == [
        (2, 0), (75, 0), (76, 1), (200, 125), (0, 0)
    ]  # fmt: skip


def test_an_encoder_that_loses_more_counts() -> None:
    def second_is_short(prompts: list[str], encoders: Any) -> None:
        for encoder, kept in zip(encoders, (75, 10), strict=True):
            encoder.encode(np.array([row(encoder, encoder.tokenize(prompts[0])[:kept])]))

    assert lengths(second_is_short, "x " * 30) == [(30, 20)]


def test_a_plugin_may_look_at_a_length_first_and_read_by_pieces() -> None:
    def pieces(prompts: list[str], encoders: Any) -> None:
        for encoder in encoders:
            encoder.tokenize(prompts[0])
            ids = [i for word in prompts[0].split() for i in encoder.tokenize(word)]
            encoder.encode(np.array([row(encoder, ids[:75])]))

    assert lengths(pieces, "one two one two", "one two " * 50) == [(4, 0), (100, 25)]


def test_a_plugin_may_read_changed_text_or_once_for_all_encoders_or_not_at_all() -> None:
    def once(prompts: list[str], encoders: Any) -> None:
        ids = encoders[0].tokenize(f"{prompts[0].upper()} AND MORE")
        for encoder, kept in zip(encoders, (75, 70), strict=True):
            encoder.encode(np.array([row(encoder, ids[:kept])]))

    def never(prompts: list[str], encoders: Any) -> None:
        for encoder in encoders:
            encoder.encode(np.array([row(encoder, [3] * 75)]))

    assert lengths(once, "x " * 80) == [(82, 12)]
    assert lengths(never, "owl " * 80) == [(80, 5)]


def test_added_tokens_and_chunks_that_overlap_lose_nothing() -> None:
    def overlapping(prompts: list[str], encoders: Any) -> None:
        for encoder in encoders:
            ids = encoder.tokenize(prompts[0])
            encoder.encode(np.array([row(encoder, [9, *ids[:70]]), row(encoder, ids[50:])]))

    assert lengths(overlapping, "x yy " * 50) == [(100, 0)]


def test_padding_that_is_also_a_word_is_not_taken_for_one() -> None:
    """bigG pads with 0, which is "!" as well."""

    class Bangs(Words):
        def tokenize(self, text: str) -> list[int]:
            return [0] * text.count("!")

    def ten(prompts: list[str], encoders: Any) -> None:
        for encoder in encoders:
            encoder.encode(np.array([row(encoder, encoder.tokenize(prompts[0])[:10])]))

    assert lengths(plain, "!" * 80, "!" * 70, encoders=[Bangs()]) == [(80, 5), (70, 0)]
    assert lengths(ten, "!" * 30, encoders=[Bangs()]) == [(30, 20)]


def test_a_caption_that_stands_twice_is_encoded_once() -> None:
    seen: list[str] = []

    def watch(prompts: list[str], encoders: Any) -> None:
        seen.extend(prompts)
        plain(prompts, encoders)

    assert lengths(watch, "a b", "c", "a b") == [(2, 0), (1, 0), (2, 0)]
    assert seen == ["a b", "c"]


def test_a_recorder_answers_zeros_of_the_encoders_shapes() -> None:
    for encoder in (Words(902, 0), Words()):
        recorder = Recorder(encoder)
        hidden, pooled = recorder.encode(np.zeros((3, 77), np.int32))
        assert hidden.shape == (3, 77, 4)
        assert hidden.dtype == np.float32
        assert not hidden.any()
        assert pooled is None if not encoder.pooled_width else pooled.shape == (3, 3)
        assert (recorder.begin, recorder.end, recorder.pad) == (901, 902, encoder.pad)


LONG = " ".join(["cat"] * 200)
WEIGHTED = "((cat)) " * 76


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], ["captions    2 of 3 cut off; encoded by host", "long.png: 125 of 200 tokens lost"]),
        (["--lpw", "--lpw_max_embeddings_multiples", "2"],
         ["captions    2 of 3 cut off; encoded by lpw", "long.png: 50 of 200 tokens lost"]),
        (["--lpw"], ["captions    1 of 3 cut off; encoded by lpw"]),
        (["--lpw", "--lpw_max_embeddings_multiples", "4"], ["captions    none of 3 cut off"]),
        (["--lpw", "--lpw_max_embeddings_multiples", "2", "--lpw_prompt_weights"],
         ["captions    1 of 3 cut off", "long.png: 50 of 200 tokens lost"]),
    ],
)  # fmt: skip
def test_captions_with_and_without_long_prompts(
    device: str, here: Path, capsys, words: list[str], said: list[str]
) -> None:
    """Read as prompt weights, brackets are no tokens."""
    images(here / "data", {"short": "a cat", "long": LONG, "weighted": WEIGHTED})
    assert plan("--data_path", "data", *words) == 0
    text = capsys.readouterr().out
    for part in said:
        assert part in text
    longest = "200 tokens (long.png)" if "weights" in " ".join(words) else "(weighted.png)"
    assert longest in text


def test_only_the_worst_captions_are_named_and_the_rest_counted(
    device: str, here: Path, capsys
) -> None:
    captions = {f"p{n}": " ".join(["cat"] * (80 + n)) for n in range(8)}
    images(here / "data", captions)
    assert plan("--data_path", "data", "--plugins", "none") == 0
    lines = capsys.readouterr().out.splitlines()
    named = [line for line in lines if line.startswith("  cut off")]
    assert named[0] == "  cut off   p7.png: 12 of 87 tokens lost"
    assert len(named) == 5
    assert "            and 3 more that lose less or as much" in lines


# ---- parameters and memory


def test_parts_of_a_small_model_are_counted_and_not_made(device: str) -> None:
    from sdxl_host.weights.names import single_file_parameters
    from sdxl_host.weights.networks import build_networks

    config = load(["--config", TINY])
    model = make_hooks(config.plugins).build_model(config.tree)
    parts = model_parts(model)
    assert [part.name for part in parts] == ["network", "text encoder 1", "text encoder 2"]
    cells = [model.network, *(encoder.cell for encoder in model.encoders)]
    for cell in cells:
        for name, parameter in single_file_parameters(cell).items():
            assert parameter.has_init or parameter.size == 1, name

    real = build_networks(make_hooks(config.plugins).build_model(config.tree), 0)
    assert parts[0].count == parts[0].trained == sum(p.size for p in real.trained)
    assert sum(part.count for part in parts[1:]) == sum(p.size for p in real.frozen.values())
    assert all(part.bytes == 4 * part.count for part in parts)
    shapes = {name: shape for part in parts for name, shape in part.shapes.items()}
    assert shapes == {n: tuple(p.shape) for n, p in {**real.network, **real.frozen}.items()}


def changed(change: Any, trainable: Any = None) -> DiffusionModel:
    config = load(["--config", TINY])
    model = make_hooks(config.plugins).build_model(config.tree)
    return model.with_network(change, trainable)


def test_what_plugins_add_and_train_is_counted(device: str) -> None:
    from mindspore import nn

    def add(network: Any) -> None:
        network.extra = nn.Dense(10, 5)

    before = model_parts(changed(lambda network: None))[0]
    after = model_parts(changed(add, lambda name: ".extra." in name))[0]
    assert after.count == before.count + 55
    assert after.trained == 55
    assert after.trained_bytes == 220
    assert after.shapes == before.shapes


def test_a_plugin_that_leaves_nothing_to_train_is_refused(device: str) -> None:
    from sdxl_host.errors import PluginError

    with pytest.raises(PluginError, match="no parameter is left to train"):
        model_parts(changed(lambda network: None, lambda name: False))


def test_memory_is_weights_gradients_two_moments_and_what_is_frozen(device: str) -> None:
    from mindspore import nn

    def add(network: Any) -> None:
        network.extra = nn.Dense(10, 5)

    parts = model_parts(changed(add, lambda name: ".extra." in name))
    sizes = {what: size for what, _, size in memory(parts)}
    assert sizes == {
        "network": 4 * parts[0].count,
        "gradients": 4 * 55,
        "optimizer": 8 * 55,
        "frozen": 4 * (parts[1].count + parts[2].count),
    }
    formulas = [formula for _, formula, _ in memory(parts)]
    assert formulas[1] == "4 bytes x 55 weights"
    assert formulas[2] == "2 moments x 4 bytes x 55 trained"


FULL = """
import resource, sys
from sdxl_host.cli import main
code = main(sys.argv[1:])
print(code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_the_real_sdxl_is_planned_in_less_memory_than_a_fifth_of_its_weights(here: Path) -> None:
    """float32 weights alone would take 13.9 GB."""
    environment = {**os.environ, "PYTHONPATH": str(Path(sdxl_host.__file__).parents[1])}
    words = ["plan", "--config", SDXL, "--plugins", "edm,snr", "--out", "full"]
    done = subprocess.run(
        [sys.executable, "-c", FULL, *words],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    code, kilobytes = map(int, last.split())
    assert code == 0
    assert kilobytes < 2_000_000
    numbers = [line.split() for line in lines]
    assert ["network", "2,567,463,684", "2,567,463,684", "trained"] in numbers
    assert ["text", "encoder", "1", "123,060,480", "frozen"] in numbers
    assert ["text", "encoder", "2", "694,659,841", "frozen"] in numbers
    assert ["first", "stage", "83,653,863", "frozen"] in numbers
    total = 16 * 2_567_463_684 + 4 * (123_060_480 + 694_659_841 + 83_653_863)
    assert ["together", f"{total / 2**30:.2f}", "GiB"] in numbers
    assert "attention   plain, in blocks where sequences are long (flash-attention needs an " in (
        done.stdout
    )
    assert "precision   O2, float16 but for norms and SiLU" in done.stdout
    assert sorted(path.name for path in (here / "full").iterdir()) == FILES


# ---- the command


def test_help_is_light_and_tells_of_out() -> None:
    code = (
        "import sys; from sdxl_host.cli import main; main(['plan', '--help']); "
        "print(sorted({'mindspore', 'numpy', 'omegaconf', 'PIL'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(sdxl_host.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    *text, imported = done.stdout.splitlines()
    assert text[0].startswith("usage: sdxl-host plan")
    assert any("--out DIR" in line for line in text)
    assert imported == "[]"


def test_the_whole_of_a_plan(device: str, here: Path, capsys) -> None:
    words = ["--plugins", "edm,snr", "--timestep_bias_strategy", "later",
             "--timestep_bias_multiplier", "2", "--ms_amp_level", "O2"]  # fmt: skip
    assert plan(*words) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    for line in (
        "  seed: 42",
        "plugins     edm, snr, timestep_bias",
        "objective   edm",
        "device      CPU",
        "attention   plain, in blocks where sequences are long "
        "(flash-attention needs an Ascend device)",
        "precision   O2, float16 but for norms and SiLU, weights in float32",
        "curves      quarters of the timesteps, clean to noisy; without plugins -> with them",
        "captions    none of 64 of the images that the package carries cut off; encoded by host",
        "parameters",
        "memory      of one device, estimated; activations come on top and are not",
        "written     plan/config.yaml, plan/curves.csv, plan/curves.png",
    ):
        assert line in [each.split("  #")[0].rstrip() for each in lines], line
    assert any("adapts build_model, claims sample_timesteps" in line for line in lines)
    assert any(line.startswith("note        edm: ") for line in lines)
    assert any(line.startswith("0-99 ") for line in lines)
    # Nothing but the plan's folder: no run, no checkpoint.
    assert [path.name for path in here.iterdir()] == ["plan"]
    assert sorted(path.name for path in (here / "plan").iterdir()) == FILES
    written = (here / "plan" / "config.yaml").read_text("utf-8")
    assert text.startswith(written)
    assert load(["--config", "plan/config.yaml"]).tree == load(["--config", TINY, *words]).tree


def test_the_attention_is_that_of_network_device_and_precision(
    device: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdxl_host.training import summary

    asked: list[tuple[Any, ...]] = []

    def watch(*arguments: Any) -> str:
        asked.append(arguments)
        return "watched"

    monkeypatch.setattr(summary, "attention_in_use", watch)
    assert plan() == 0
    assert plan("--ms_amp_level", "O3") == 0
    assert asked == [("flash-attention", "CPU", False, 32), ("flash-attention", "CPU", True, 32)]


def test_the_table_of_numbers_is_the_curves(device: str, here: Path) -> None:
    words = ["--plugins", "snr"]
    assert plan(*words, "--out", "new/folder") == 0
    with open(here / "new" / "folder" / "curves.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    config = load(["--config", TINY, *words])
    hooks = make_hooks(config.plugins)
    before, after = curves(hooks, hooks.build_model(config.tree), config.tree)
    assert [int(row["timestep"]) for row in rows] == list(range(1000))
    for name, values in (
        ("sigma", after.sigma), ("p_before", before.p), ("w_before", before.w),
        ("share_before", before.share), ("p_after", after.p), ("w_after", after.w),
        ("share_after", after.share),
    ):  # fmt: skip
        assert np.allclose([float(row[name]) for row in rows], values, rtol=1e-8), name


def test_the_image_shows_the_plugins(device: str, here: Path) -> None:
    for out, plugins in (("one", "snr"), ("two", "edm"), ("three", "snr")):
        assert plan("--plugins", plugins, "--out", out) == 0
    files = [(here / out / "curves.png").read_bytes() for out in ("one", "two", "three")]
    assert files[0] != files[1]
    assert files[0] == files[2]
    with Image.open(here / "one" / "curves.png") as image:
        assert image.format == "PNG"
        assert image.width > 900


def test_the_curves_are_drawn_where_their_values_are() -> None:
    """Before is grey and after red, each at its height; and axes and legend are there."""
    count = 1000
    sigma = np.linspace(0.1, 10, count)
    half = np.where(np.arange(count) < 500, 1.0, 0.0)
    before = Curve(sigma, np.full(count, 1e-3), np.ones(count))
    after = Curve(sigma, half / half.sum(), np.full(count, 0.5))
    pixels = np.asarray(draw_curves(before, after, "plugins: none")).astype(int)

    def rows_of(column: int, color: tuple[int, int, int]) -> np.ndarray:
        return np.flatnonzero((pixels[:, column] == color).all(axis=1))

    red, grey, dark = (200, 60, 30), (130, 130, 130), (30, 30, 30)
    left, right = rows_of(300, red), rows_of(800, red)
    # p: twice the uniform density in the left half, 0 in the right one.
    top_panel = (rows_of(300, grey)[rows_of(300, grey) < 320]).mean()
    floor = right[right < 320].mean()
    assert floor - top_panel > 20
    assert floor - left[left < 320].mean() == pytest.approx(2 * (floor - top_panel), abs=4)
    # w: half of before's everywhere.
    middle = [rows[(rows > 320) & (rows < 600)].mean() for rows in (rows_of(300, grey), left)]
    assert middle[0] < middle[1]
    axis = (pixels[:, 80] == dark).all(axis=1)
    assert axis.sum() > 3 * 190
    assert (pixels[:60, :] == grey).all(axis=2).any()
    assert (pixels[:60, :] == red).all(axis=2).any()


def test_by_default_nothing_is_overwritten(device: str, here: Path, capsys) -> None:
    for _ in range(3):
        assert plan("--plugins", "none") == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("written")]
    assert [line.split()[1] for line in said] == [
        "plan/config.yaml,", "plan-2/config.yaml,", "plan-3/config.yaml,"
    ]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_folder_that_holds_a_plan_is_refused(here: Path, capsys, name: str) -> None:
    (here / "mine").mkdir()
    (here / "mine" / name).write_text("kept")
    assert refused(capsys, "--out", "mine").startswith(f"--out mine: already holds {name}; ")
    assert (here / "mine" / name).read_text() == "kept"
    assert [path.name for path in (here / "mine").iterdir()] == [name]


def test_a_folder_with_other_files_is_written_to(device: str, here: Path) -> None:
    (here / "mine").mkdir()
    (here / "mine" / "notes.txt").write_text("kept")
    assert plan("--out=mine") == 0
    assert sorted(path.name for path in (here / "mine").iterdir()) == [*FILES, "notes.txt"]


def unwritable(here: Path) -> list[str]:
    (here / "file").write_text("")
    return ["--out", "file/plan"]


def not_a_folder(here: Path) -> list[str]:
    (here / "file").write_text("")
    return ["--out", "file"]


def weight_is_pickle(here: Path) -> list[str]:
    (here / "w.ckpt").write_bytes(b"PK\x03\x04 and so on")
    return ["--weight", "w.ckpt"]


def weight_of_another_model(here: Path) -> list[str]:
    name = "model.diffusion_model.out.2.bias"
    save_file({name: np.zeros(5, np.float32)}, here / "w.safetensors")
    return ["--weight", "w.safetensors"]


def caption_missing(here: Path) -> list[str]:
    (images(here / "data", {"a": "a cat", "b": "x"}) / "b.txt").unlink()
    return ["--data_path", "data"]


SHORT = (
    "optim.scheduler_config={target: sdxl_host.LambdaLinearScheduler, params: {warm_up_steps: [0], "
    "f_min: [1.0], f_max: [1.0], f_start: [1.0], cycle_lengths: [1.0]}}"
)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (lambda here: ["--out"], "--out: needs a value (a folder)"),
        (lambda here: ["--out", "--seed"], "--out: needs a value (a folder)"),
        (lambda here: ["--out=a", "--out", "b"], "--out: given twice; give it once"),
        (not_a_folder, "--out file: is not a folder"),
        (unwritable, "--out file/plan: can't be written"),
        (lambda here: ["--sede", "1"], "--sede: there is no such flag (did you mean seed?)"),
        (lambda here: ["--plugins", "zzz"], "plugin zzz is not installed"),
        (lambda here: ["--data_path", "nowhere"], "data_path nowhere: there is no such folder"),
        (caption_missing, "data/b.png: has no caption"),
        (lambda here: ["--weight", "no.safetensors"], "no.safetensors: there is no such file"),
        (weight_is_pickle, "w.ckpt: is a file of torch"),
        (weight_of_another_model, "holds weights of another shape: model.diffusion_model.out.2"),
        (lambda here: ["--resume", "nowhere"], "nowhere"),
        (lambda here: ["optim.optimizer_config.params.beta=1"], "AdamW has no such parameter"),
        (lambda here: ["optim.scheduler_config.params.warm_up_steps=-1"], "warm_up_steps must be"),
        (lambda here: ["model.params.network_config.params.context_dim=48"],
         "context_dim: 48 does not fit the text encoders, which give 32"),
        (lambda here: ["data.dataset_config.params.target_size=15"], "target_size 15x15: "),
        (lambda here: [SHORT], "optim.scheduler_config.params: LambdaLinearScheduler: the cycles"),
        (lambda here: ["--cache_latent", "True"], "--cache_latent True: caching is not part"),
    ],
)  # fmt: skip
def test_errors_are_one_line_and_leave_nothing(
    device: str, here: Path, capsys, words: Any, message: str
) -> None:
    given = words(here)
    before = sorted(here.rglob("*"))
    assert message in refused(capsys, *given)
    assert sorted(here.rglob("*")) == before


# ---- weights and checkpoints


def test_weights_are_named_and_not_read(
    device: str, here: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(["--config", TINY])
    parts = model_parts(make_hooks(config.plugins).build_model(config.tree))
    shapes = {name: shape for part in parts for name, shape in part.shapes.items()}
    arrays = {name: np.zeros(shape, np.float16) for name, shape in shapes.items()}
    save_file(arrays, here / "w.safetensors")
    from sdxl_host.files import tensors

    def refuse(*arguments: Any) -> Any:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(tensors, "read_pieces", refuse)
    assert plan("--weight", "w.safetensors") == 0
    assert "weights     w.safetensors (single file)" in capsys.readouterr().out


STATEFUL = """
from sdxl_host import hookimpl

class Fake:
    factor = 1.0

    @hookimpl(wrapper=True)
    def weight_loss(self):
        weights = yield
        return weights * self.factor

    @hookimpl
    def on_step_end(self):
        self.factor = 5.0

    def state_dict(self):
        return {"factor": self.factor}

    def load_state_dict(self, state):
        self.factor = state["factor"]
"""


def test_a_run_that_goes_on_is_planned_with_its_plugins_state(
    site, device: str, here: Path, capsys
) -> None:
    from sdxl_host.training.build import make_trainer

    site.add("grow", source=STATEFUL)
    words = ["--plugins", "grow", "--save_path", "runs", "--save_path_with_time", "False"]
    make_trainer(load(["--config", TINY, *words, "--total_step", "1"]), lambda line: None).run()
    before = {path: path.stat().st_mtime_ns for path in (here / "runs").rglob("*")}
    assert plan(*words, "--resume", "latest") == 0
    text = capsys.readouterr().out
    assert "step_00000001 at step 1" in text
    assert "  mean w    1.000  ->  5.000" in text
    assert {path: path.stat().st_mtime_ns for path in (here / "runs").rglob("*")} == before
