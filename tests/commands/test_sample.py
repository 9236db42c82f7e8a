"""`sdxl-host sample`: a checkpoint is drawn from as it was trained, without being told how."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdxl_host.cli import main
from sdxl_host.config.load import load, restore
from sdxl_host.diffusion.preconditioning import EpsPreconditioning
from sdxl_host.errors import ConfigError
from sdxl_host.models import precision
from sdxl_host.plugins import discovery
from sdxl_host.sampling import load as restore_module
from sdxl_host.sampling.load import restore_sampler
from sdxl_host.training.build import make_trainer

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")


def trained(folder: Path, *arguments: str) -> Path:
    """The checkpoint of a run of three steps."""
    words = ["--config", TINY, "--save_path", str(folder), "optim.base_learning_rate=0.01"]
    trainer = make_trainer(load([*words, *arguments]), say=lambda line: None)
    trainer.run()
    return trainer.save_path / "checkpoints" / "latest"


@pytest.fixture(scope="module")
def plain(device: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("plain"), "--plugins", "none")


@pytest.fixture(scope="module")
def edm(device: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(
        tmp_path_factory.mktemp("edm"), "--plugins", "edm,lpw", "--edm_sigma_data", "0.7"
    )


def sample(checkpoint: Path, *arguments: str) -> int:
    return main(["sample", "--checkpoint", str(checkpoint), *arguments])


def image(file: Path) -> np.ndarray:
    with Image.open(file) as opened:
        return np.asarray(opened)


def test_a_grid_is_written_where_out_says(plain: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "new" / "owl.png"
    arguments = ["--prompt", "an owl", "--prompt", "a key", "--steps", "2", "--out", str(out)]
    assert sample(plain, *arguments) == 0
    said = capsys.readouterr().out
    assert f"images      {out}" in said
    assert "plugins     none" in said
    assert "objective   eps, spacing trailing" in said
    height, width, channels = image(out).shape
    assert channels == 3
    assert width > 2 * 128
    assert height > 128


def test_what_is_cut_of_a_prompt_is_said_before_it_is_drawn(
    plain: Path, edm: Path, tmp_path: Path, capsys
) -> None:
    """With the plugins that the checkpoint was trained with, which take 227 tokens."""
    out = ["--steps", "1", "--out", str(tmp_path / "g.png")]
    prompts = ["--prompt", "cat " * 100, "--prompt", "a key", "--negative_prompt", "cat " * 80]
    assert sample(plain, *prompts, *out) == 0
    said = capsys.readouterr().out.splitlines()
    note = (
        "note        2 of the 3 prompts are longer than host encodes; 30 of their 182 tokens are "
        f"lost, most in {('cat ' * 10)[:37]}... (25 of 100); shorten the prompt"
    )
    assert said.index(note) < said.index(f"images      {tmp_path}/g.png")
    assert sample(edm, *prompts, *out) == 0
    assert "longer than" not in capsys.readouterr().out


def test_sampling_and_listing_open_no_network_connection(
    plain: Path, tmp_path: Path, no_network: None
) -> None:
    assert sample(plain, "--prompt", "x", "--steps", "1", "--out", str(tmp_path / "g.png")) == 0
    assert main(["plugins"]) == 0


def test_a_model_trained_with_edm_samples_as_edm(edm: Path, tmp_path: Path, capsys) -> None:
    assert sample(edm, "--prompt", "x", "--steps", "2", "--out", str(tmp_path / "g.png")) == 0
    said = capsys.readouterr().out
    assert "plugins     edm 0.1.0, lpw 0.1.0" in said
    assert "objective   edm, spacing karras" in said
    sampler, _ = restore_sampler(edm)
    assert sampler.model.preconditioning.sigma_data == 0.7
    assert sampler.model.sampling.sigma_max == 80.0
    assert sampler._hooks.chain("encode_prompt") == "lpw"


def test_the_preconditioning_is_what_decides(edm: Path, monkeypatch, device: str) -> None:
    """The same weights drawn as eps give other images, so the record is not idle."""
    sampler, _ = restore_sampler(edm)
    right = sampler.draw(["an owl"], 2, 1.0, 0)
    model = sampler.model.with_preconditioning(EpsPreconditioning(sampler.model.schedule))
    sampler.model = model
    assert not np.allclose(right, sampler.draw(["an owl"], 2, 1.0, 0))


def test_a_checkpoint_in_bfloat16_is_drawn_in_float32_where_the_device_lacks_it(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """As it was trained on an Ascend device; this one is a CPU."""
    words = ["--prompt", "an owl", "--steps", "1", "--out"]
    assert sample(plain, *words, str(tmp_path / "a.png")) == 0
    assert "note " not in capsys.readouterr().out
    config = restore(plain / "config.yaml")
    levels = {"ms_amp_level": "O3", "ms_amp_dtype": "bfloat16", "param_fp16": True}
    trained_so = replace(config, train=replace(config.train, **levels))
    monkeypatch.setattr(restore_module, "restore", lambda file: trained_so)
    assert sample(plain, *words, str(tmp_path / "b.png")) == 0
    said = capsys.readouterr().out
    assert "note        trained at O3 in bfloat16, which this device does not compute in; " in said
    assert np.array_equal(image(tmp_path / "a.png"), image(tmp_path / "b.png"))

    # Where the device has it, it is drawn in it.
    asked: list[str] = []
    monkeypatch.setattr(precision, "has_bfloat16", lambda: True)
    monkeypatch.setattr(precision, "apply_precision", lambda cell, *how: asked.extend(how))
    rows = restore_sampler(plain)[1]
    assert (asked, [text for _, text in rows if "bfloat16" in text]) == (["O3", "bfloat16"], [])


def test_bfloat16_is_refused_before_a_weight_is_opened(tmp_path: Path, capsys) -> None:
    """Told so by whom draws from a file of weights, who can leave it out."""
    words = ["--weight", "nowhere", "--config", TINY, "--prompt", "x", "--ms_amp_level", "O2"]
    words += ["--ms_amp_dtype", "bfloat16", "--out", str(tmp_path / "g.png")]
    assert main(["sample", *words]) == 2
    assert "error: --ms_amp_dtype bfloat16: this device does not" in capsys.readouterr().err


def test_a_image_depends_on_seed_prompt_and_place_alone(plain: Path, device: str) -> None:
    sampler, _ = restore_sampler(plain)
    both = sampler.draw(["an owl", "a key"], 2, 3.0, 5)
    np.testing.assert_allclose(sampler.draw(["an owl"], 2, 3.0, 5)[0], both[0], atol=1e-4)
    np.testing.assert_allclose(sampler.draw(["a cat", "a key"], 2, 3.0, 5)[1], both[1], atol=1e-4)
    assert not np.allclose(sampler.draw(["an owl"], 2, 3.0, 6)[0], both[0])
    assert not np.allclose(sampler.draw(["an owl"], 2, 1.0, 5)[0], both[0])
    assert not np.allclose(sampler.draw(["an owl"], 3, 3.0, 5)[0], both[0])


def test_more_prompts_than_fit_a_batch_are_all_drawn(plain: Path, device: str) -> None:
    sampler, _ = restore_sampler(plain)
    prompts = [f"image {number}" for number in range(10)]
    drawn = sampler.draw(prompts, 1, 1.0, 0)
    assert drawn.shape == (10, 3, 16, 16)
    assert len({row.tobytes() for row in drawn}) == 10


def test_a_plugin_that_is_gone_is_named(edm: Path, monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(discovery, "discover", lambda: [])
    assert sample(edm, "--prompt", "x", "--out", str(tmp_path / "g.png")) == 2
    assert "plugin edm is not installed; pip install sdxl-edm" in capsys.readouterr().err


def test_weights_draw_what_their_checkpoint_draws(plain: Path, tmp_path: Path, capsys) -> None:
    """The same image, where the same is said: the checkpoint knows the images' typical size."""
    words = ["--prompt", "an owl", "--steps", "2", "--out"]
    assert sample(plain, *words, str(tmp_path / "a.png")) == 0
    weight = ["--weight", str(plain), "--config", TINY]
    told = ["--original_size", "64x64"]
    assert main(["sample", *weight, *told, *words, str(tmp_path / "b.png")]) == 0
    said = capsys.readouterr().out
    assert f"weights     {plain} (checkpoint of step 3)" in said
    assert main(["sample", *weight, *words, str(tmp_path / "c.png")]) == 0
    first, second, third = (image(tmp_path / f"{name}.png") for name in "abc")
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, third)


@pytest.mark.parametrize(
    "flags",
    [
        ["--negative_prompt", "a key"],
        ["--sampler", "heun"],
        ["--spacing", "karras"],
        ["--crop_top_left", "0x40"],
        ["--target_size", "64x32"],
        ["--original_size", "512x512"],
    ],
    ids=lambda flags: flags[0][2:],
)
def test_each_flag_changes_the_image(
    flags: list[str], plain: Path, tmp_path: Path, device: str
) -> None:
    words = ["--prompt", "an owl", "--steps", "3", "--guidance_scale", "4", "--out"]
    assert sample(plain, *words, str(tmp_path / "a.png")) == 0
    assert sample(plain, *flags, *words, str(tmp_path / "b.png")) == 0
    assert not np.array_equal(image(tmp_path / "a.png"), image(tmp_path / "b.png"))


def test_the_size_is_that_of_the_image(plain: Path, device: str) -> None:
    sampler, _ = restore_sampler(plain, size=(16, 32))
    assert sampler.draw(["an owl"], 1, 1.0, 0).shape == (1, 3, 16, 32)


def test_a_size_given_with_weights_is_the_original_size_too(
    plain: Path, tmp_path: Path, capsys
) -> None:
    """Unless that is given as well."""
    words = ["--weight", str(plain), "--config", TINY, "--prompt", "x", "--steps", "1"]
    sizes = ["--size", "16x32"], ["--size", "16x32", "--original_size", "16x32"]
    for name, flags in zip("ab", sizes, strict=True):
        assert main(["sample", *words, *flags, "--out", str(tmp_path / f"{name}.png")]) == 0
    np.testing.assert_array_equal(image(tmp_path / "a.png"), image(tmp_path / "b.png"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--size", "15x16"], "--size 15x16: autoencoder and network downsample by 2"),
        (["--size", "0x16"], "--size 0x16: autoencoder and network downsample by 2"),
        (["--aesthetic_score", "7"], "--aesthetic_score: has no effect, this model has no"),
    ],
)
def test_what_the_model_can_not_take_is_refused(
    flags: list[str], message: str, plain: Path, tmp_path: Path, capsys
) -> None:
    assert sample(plain, "--prompt", "x", *flags, "--out", str(tmp_path / "a.png")) == 2
    assert message in capsys.readouterr().err


def test_weights_with_other_heads_are_refused(plain: Path, tmp_path: Path, capsys) -> None:
    """Names and shapes are the same; what is computed would not be."""
    words = ["--weight", str(plain), "--config", TINY, "--prompt", "x"]
    for key, place in (
        ("network_config.params.num_head_channels", "16"),
        ("conditioner_config.params.emb_models[1].params.heads", "4"),
    ):
        assert main(["sample", *words, f"model.params.{key}={place}"]) == 2
        said = capsys.readouterr().err
        assert f"model.params.{key}: {place} does not fit" in said


def test_plugins_are_given_to_weights_as_to_training(edm: Path, tmp_path: Path, capsys) -> None:
    weight = ["--weight", str(edm), "--config", TINY, "--prompt", "x", "--steps", "1"]
    out = ["--out", str(tmp_path / "a.png")]
    assert main(["sample", *weight, *out, "--plugins", "edm", "--edm_sigma_data", "0.7"]) == 0
    assert "objective   edm, spacing karras" in capsys.readouterr().out
    assert main(["sample", *weight, *out]) == 0
    said = capsys.readouterr().out
    assert "note        these weights were trained with the objective edm, not eps" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "n", "--weight", "n", "--prompt", "x"], "give either --checkpoint"),
        (["--checkpoint", "n", "--config", "c", "--prompt", "x"], "a checkpoint has its own"),
        (["--weight", "n", "--prompt", "x", "--stepz", "1"], "--stepz: there is no such flag"),
        (["--weight", "", "--prompt", "x"], "--weight: is empty"),
        (["--weight", ",", "--prompt", "x"], "--weight ',': names no file"),
        (["--weight", "n", "--prompt", "x", "--sample_steps", "9"], "--sample_steps: is a setting"),
        (["--weight", "n", "--prompt", "x", "train.seed=1"], "train.seed=1: is a setting of"),
        (["--weight", "nowhere", "--prompt", "x"], "nowhere: there is no such file or folder"),
        (["--weight", "n", "--prompt", "x", "--size", "10"], "--size 10: must be two numbers"),
        (["--checkpoint", "n", "--prompt", "x", "--sampler", "hein"], "did you mean heun?"),
        (["--checkpoint", "n", "--prompt", "x", "--spacing", "even"], "--spacing even: must be"),
        (
            [
                "--checkpoint",
                "n",
                "--prompt",
                "x",
                "--negative_prompt",
                "y",
                "--guidance_scale",
                "1",
            ],
            "--negative_prompt: has no effect",
        ),
        (["--checkpoint", "nowhere", "--prompt", "x"], "nowhere: is no checkpoint"),
        (["--prompt", "x"], "--checkpoint"),
        (["--checkpoint", "nowhere"], "--prompt"),
        (
            ["--checkpoint", "n", "--prompt", "x", "--steps", "0"],
            "--steps: 0 is out of range",
        ),
        (["--checkpoint", "n", "--prompt", "x", "--seed", "-1"], "--seed: -1 is out of range"),
        (["--checkpoint", "n", "--prompt", "x", "--seed", str(2**64)], f"--seed: {2**64} is out"),
        (
            ["--checkpoint", "n", "--prompt", "x", "--guidance_scale", "nan"],
            "--guidance_scale: nan",
        ),
        (["--checkpoint", "n", "--prompt", "x", "--out", "a.jpg"], "must end with .png"),
        (["--checkpoint", "n", "--prompt", "x", "--out", "file/a.png"], "can't be written"),
        (["--checkpoint", "n", "--prompt", "x", "--stepz", "1"], "(did you mean steps?)"),
    ],
)
def test_bad_input_is_one_clear_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert main(["sample", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("sdxl-host: error: ")
    assert said.count("\n") == 1
    assert message in said


def test_settings_of_training_are_refused_unless_drawing_heeds_them() -> None:
    from sdxl_host.commands.sample import _check_for_training

    for word in ("--ms_mode", "--ms_amp_level=O2", "train.device_target=CPU", "model.params.x=1"):
        _check_for_training(word)
    for word in ("--clip_grad", "--data-path", "--task", "train.seed=1", "data.ms_mode=1"):
        with pytest.raises(ConfigError, match=rf"^{re.escape(word)}: is a setting of training"):
            _check_for_training(word)
