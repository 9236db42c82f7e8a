"""Whole runs of the smallest model: the laws that can only be seen end to end.

Steps are eager, because compiling takes longer than all of them together; one run is compiled, to
see that it is the same.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from sdxl_host.commands.printer import lines_of
from sdxl_host.config.load import load, restore
from sdxl_host.diffusion.objective import NoiseLevels
from sdxl_host.errors import ConfigError, DataError, HostError
from sdxl_host.training.build import make_trainer

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")
PLUGINS = ("edm", "lpw", "snr", "timestep_bias")
# Makes the bias one that three small steps can't miss; alone it selects nothing.
BIAS = ["plugins.timestep_bias.strategy=later", "plugins.timestep_bias.multiplier=8"]

Train = Callable[..., Path]


@pytest.fixture(scope="module")
def train(device: str, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Runs `sdxl-host train --config tiny.yaml ARGUMENTS` in this process; gives its folder."""

    def run(*arguments: str) -> Path:
        words = ["--config", TINY, *arguments]
        if not any(word.startswith("--save_path") for word in arguments):
            words += ["--save_path", str(tmp_path_factory.mktemp("runs"))]
        trainer = make_trainer(load(words), say=lambda line: None)
        trainer.run()
        return trainer.save_path

    return run


@pytest.fixture(scope="module")
def long_captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images whose captions have more than 77 tokens, with the differences at the end."""
    folder = tmp_path_factory.mktemp("images")
    for index, name in enumerate(("red", "green", "blue", "grey")):
        pixels = np.random.default_rng(index).integers(0, 256, (20, 24, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("a small image of something " * 20 + name)
    return folder


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> tuple[float, ...]:
    return tuple(line["loss"] for line in metrics(run))


def weights(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "checkpoints" / "latest" / "network.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name], err_msg=name)


# ---- what a run leaves


@pytest.fixture(scope="module")
def plain(train: Train) -> Path:
    """Three steps without plugins."""
    return train("--plugins", "none")


def test_a_run_leaves_metrics_settings_a_checkpoint_and_images(plain: Path) -> None:
    lines = metrics(plain)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert set(lines[0]) == {
        "step",
        "loss",
        "unweighted_loss",
        "learning_rate",
        "gradient_norm",
        "mean_sigma",
        "mean_weight",
    }
    assert (plain / "checkpoints" / "latest").resolve().name == "step_00000003"
    with Image.open(plain / "samples" / "step_00000003.png") as grid:
        assert grid.size[0] >= 128
    assert (plain / "config.yaml").is_file()


def test_the_first_loss_of_a_network_that_answers_zero_is_the_noise_squared(plain: Path) -> None:
    assert losses(plain)[0] == pytest.approx(1.0, abs=0.1)


def test_the_config_beside_a_run_repeats_it(train: Train, plain: Path) -> None:
    again = make_trainer(
        load(["--config", str(plain / "config.yaml"), "--save_path", str(plain / "again")]),
        say=lambda line: None,
    )
    again.run()
    assert losses(again.save_path) == losses(plain)
    assert_same_weights(again.save_path, plain)


def test_another_seed_is_another_run(train: Train, plain: Path) -> None:
    assert losses(train("--seed", "7")) != losses(plain)


# ---- plugins


def test_each_of_the_sixteen_subsets_trains_and_differs_from_every_other(
    train: Train, long_captions: Path
) -> None:
    """Law 8."""
    seen: dict[tuple[float, ...], tuple[str, ...]] = {}
    for size in range(len(PLUGINS) + 1):
        for subset in itertools.combinations(PLUGINS, size):
            extra = BIAS if "timestep_bias" in subset else []
            run = train(
                "--plugins", ",".join(subset) or "none", "--data_path", str(long_captions), *extra
            )
            found = losses(run)
            assert len(found) == 3
            assert np.isfinite(found).all()
            assert found not in seen, f"{subset} has the losses of {seen.get(found)}"
            seen[found] = subset
    assert len(seen) == 16


def test_an_installed_plugin_that_is_not_selected_changes_nothing(
    train: Train, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 2: with the plugins installed, and with none to be found."""
    from sdxl_host.plugins import discovery

    assert {plugin.name for plugin in discovery.discover()} >= set(PLUGINS)
    monkeypatch.setattr(discovery, "discover", lambda: [])
    without = train("--plugins", "none")
    assert losses(without) == losses(plain)
    assert_same_weights(without, plain)


def test_long_captions_are_cut_off_without_lpw_and_read_with_it(
    train: Train, long_captions: Path
) -> None:
    """The captions differ after 77 tokens only: without the plugin they are one caption."""
    trainer = make_trainer(
        load(["--config", TINY, "--plugins", "none", "--save_path", str(long_captions / "r")]),
        say=lambda line: None,
    )
    captions = [file.read_text() for file in sorted(long_captions.glob("*.txt"))]
    plain = trainer.hooks.encode_prompt(captions, trainer.model.encoders).context
    assert (plain == plain[:1]).all()
    longer = make_trainer(
        load(["--config", TINY, "--plugins", "lpw", "--save_path", str(long_captions / "s")]),
        say=lambda line: None,
    )
    context = longer.hooks.encode_prompt(captions, longer.model.encoders).context
    assert not (context[1:] == context[:1]).all(axis=(1, 2)).any()


@pytest.mark.parametrize(
    ("arguments", "selected", "option"),
    [
        (
            "--timestep_bias_multiplier 2 --timestep_bias_strategy range --timestep_bias_begin 200 "
            "--timestep_bias_end 500 --timestep_bias_portion 0.25",
            "timestep_bias",
            {"multiplier": 2.0, "strategy": "range", "begin": 200, "end": 500, "portion": 0.25},
        ),
        ("--snr_gamma 5.0", "snr", {"gamma": 5.0}),
        ("--lpw True", "lpw", {}),
    ],
)
def test_the_commands_of_the_training_guide_run(
    train: Train, arguments: str, selected: str, option: dict[str, object]
) -> None:
    run = train(*arguments.split())
    written = restore(run / "config.yaml")
    assert [plugin.installed.name for plugin in written.plugins] == [selected]
    for name, value in option.items():
        assert getattr(written.plugins[0].options, name) == value


def test_an_idle_option_is_named_and_not_refused(device: str, tmp_path: Path) -> None:
    said: list[str] = []
    words = "--timestep_bias_multiplier 2 --timestep_bias_strategy range --timestep_bias_end 500"
    make_trainer(
        load(["--config", TINY, *words.split(), "--save_path", str(tmp_path)]), say=said.append
    )
    assert any("portion" in str(fact) and "no effect" in str(fact) for fact in said)


def test_the_start_says_who_does_what(device: str, tmp_path: Path) -> None:
    said: list[str] = []
    make_trainer(
        load(["--config", TINY, "--plugins", "edm,snr", "--save_path", str(tmp_path)]),
        say=lambda fact: said.extend(lines_of(fact)),
    )
    text = "\n".join(said)
    assert "edm (sdxl-edm 0.1.0): adapts build_model, claims sample_timesteps" in text
    assert "snr (sdxl-snr 0.1.0): claims weight_loss" in text
    assert "Fluent Emoji" in text


# ---- resuming


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, type], None]:
    """Makes a class selectable as the plugin of a name, beside those that are installed."""
    from packaging.specifiers import SpecifierSet

    from sdxl_host.plugins import discovery

    def install_class(name: str, cls: type) -> None:
        found = discovery.Installed(
            name, f"sdxl-{name}", "1.0", SpecifierSet(">=0.1"), f"{name}_module", cls.__name__
        )
        discover, import_class = discovery.discover, discovery.import_class
        monkeypatch.setattr(discovery, "discover", lambda: [*discover(), found])
        monkeypatch.setattr(
            discovery,
            "import_class",
            lambda plugin: cls if plugin == found else import_class(plugin),
        )

    return install_class


@pytest.fixture
def counting(install: Callable[[str, type], None]) -> None:
    """Makes a stateful plugin `counting` selectable, as an installed package would be."""
    from sdxl_host import hookimpl

    class Counting:
        """Keeps state: it weighs by how often it was asked, and logs it."""

        def __init__(self) -> None:
            self.asked = 0
            self.seen = np.zeros(3)

        @hookimpl(wrapper=True)
        def weight_loss(self):  # type: ignore[no-untyped-def]
            weights = yield
            self.asked += 1
            return weights * (1.0 + 0.1 * self.asked)

        @hookimpl
        def on_step_end(self, trainer, result):  # type: ignore[no-untyped-def]
            self.seen[result.step % 3] += result.loss
            trainer.log("asked", self.asked)

        def state_dict(self) -> dict[str, object]:
            return {"asked": self.asked, "seen": self.seen}

        def load_state_dict(self, state: dict[str, object]) -> None:
            self.asked, self.seen = state["asked"], state["seen"]  # type: ignore[assignment]

    install("counting", Counting)


def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(
    train: Train, counting: None, long_captions: Path
) -> None:
    """With dropout, epochs that end inside a batch, and plugins that keep state."""
    arguments = [
        "--plugins",
        "edm,snr,timestep_bias,lpw,counting",
        *BIAS,
        "--data_path",
        str(long_captions),
        "data.total_step=5",
        "--per_batch_size=3",
        "--save_ckpt_interval=2",
    ]
    whole = train(*arguments)
    part = train(*(a.replace("total_step=5", "total_step=2") for a in arguments))
    resumed = train(*arguments, "--resume", str(part / "checkpoints" / "latest"))
    assert resumed == part
    assert (resumed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert metrics(resumed)[-1]["asked"] == 5
    assert_same_weights(resumed, whole)
    one, other = (run / "checkpoints" / "latest" for run in (whole, resumed))
    for name in ("optimizer.safetensors", "plugins/counting.safetensors"):
        first, second = load_file(one / name), load_file(other / name)
        assert first.keys() == second.keys()
        assert all((first[key] == second[key]).all() for key in first), name
    assert (one / "plugins/counting.json").read_text() == (
        other / "plugins/counting.json"
    ).read_text()


def test_resuming_an_earlier_checkpoint_drops_the_lines_after_it(train: Train, plain: Path) -> None:
    run = train("--save_ckpt_interval=1")
    before = (run / "metrics.jsonl").read_bytes()
    train("--resume", str(run / "checkpoints" / "step_00000001"), "--save_ckpt_interval=1")
    assert (run / "metrics.jsonl").read_bytes() == before
    assert losses(run) == losses(plain)


def test_resume_latest_finds_the_newest_run(train: Train, tmp_path: Path, plain: Path) -> None:
    first = train("--save_path", str(tmp_path), "data.total_step=2")
    resumed = train("--save_path", str(tmp_path), "--resume", "latest")
    assert resumed == first
    assert losses(resumed) == losses(plain)


def test_a_run_that_was_killed_after_its_last_step_is_finished(
    train: Train, tmp_path: Path
) -> None:
    """Older checkpoints are removed and images drawn after the last one is saved."""
    arguments = ["--save_path", str(tmp_path), "--save_path_with_time=False"]
    arguments += ["--save_ckpt_interval=1", "--log_interval=2"]
    run = train(*arguments)

    def files() -> dict[Path, bytes]:
        return {f: f.read_bytes() for f in run.rglob("*") if f.is_file() and f.suffix != ".yaml"}

    whole = files()
    oldest = run / "checkpoints" / "step_00000001"
    shutil.rmtree(run / "samples")
    assert train(*arguments, "--resume", "latest", "--max_num_ckpt=2") == run
    assert files() == {
        file: content for file, content in whole.items() if oldest not in file.parents
    }
    assert not oldest.exists()


def test_fewer_steps_than_are_made_are_refused(train: Train, plain: Path) -> None:
    with pytest.raises(ConfigError, match="3 steps are already made; set it higher than 3"):
        train("--resume", str(plain / "checkpoints" / "latest"), "data.total_step=2")


def test_a_folder_that_holds_a_run_is_not_written_over(train: Train, tmp_path: Path) -> None:
    arguments = ["--save_path", str(tmp_path), "--save_path_with_time", "False"]
    train(*arguments)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(DataError, match="already holds a run"):
        train(*arguments, "--seed", "1")
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


# ---- weights


def test_training_starts_from_given_weights(train: Train, plain: Path, tmp_path: Path) -> None:
    started = train("--weight", str(plain / "checkpoints" / "latest"), "--seed", "3")
    fresh = train("--seed", "3")
    assert losses(started)[0] != losses(fresh)[0]


def test_weights_without_text_encoders_are_refused_unless_others_bring_them(
    train: Train, plain: Path
) -> None:
    checkpoint = plain / "checkpoints" / "latest"
    network = checkpoint / "network.safetensors"
    with pytest.raises(DataError, match=r"network\.safetensors .*: lacks all \d+ of conditioner\."):
        train("--weight", str(network))
    both = train("--weight", f"{checkpoint},{network}", "--seed", "3")
    assert losses(both) == losses(train("--weight", str(checkpoint), "--seed", "3"))


def test_weights_of_another_model_are_refused_by_name(train: Train, plain: Path) -> None:
    with pytest.raises(DataError, match=r"another shape: model\.diffusion_model\."):
        train(
            "--weight",
            str(plain / "checkpoints" / "latest"),
            "model.params.network_config.params.model_channels=64",
        )


# ---- what goes wrong


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_images(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdxl_host import hookimpl
    from sdxl_host.plugins.defaults import Defaults

    def weight_loss(self: object, noise: NoiseLevels) -> np.ndarray:
        return np.full(noise.sigma.shape, 1e200)

    monkeypatch.setattr(Defaults, "weight_loss", hookimpl(weight_loss))
    with pytest.raises(HostError, match=r"step 1: loss or gradients are not finite .*\.png"):
        train()


def test_a_plugin_that_stops_the_run_gets_a_checkpoint_of_that_step(
    train: Train, install: Callable[[str, type], None]
) -> None:
    from sdxl_host import hookimpl

    class Stopping:
        @hookimpl
        def on_step_end(self, trainer, result):  # type: ignore[no-untyped-def]
            assert (
                result.per_sample_loss.shape
                == result.loss_weight.shape
                == result.noise.sigma.shape
                == (2,)
            )
            assert len(result.sample_ids) == 2
            assert not result.skipped
            assert result.learning_rate > 0
            if result.step == 1:
                trainer.log("first", 1.0)
            if result.step == 2:
                trainer.stop("seen enough")

    install("stopping", Stopping)
    run = train("--plugins", "stopping")
    assert ["first" in line for line in metrics(run)] == [True, False]
    assert (run / "checkpoints" / "latest").resolve().name == "step_00000002"


def test_a_plugin_changes_the_network_and_chooses_what_is_trained(
    train: Train, plain: Path, install: Callable[[str, type], None]
) -> None:
    """`with_network`: the change runs on the loaded network, only the chosen parameters move, and
    export writes into each checkpoint."""
    from sdxl_host import hookimpl

    seen = []

    class Partial:
        @hookimpl(wrapper=True)
        def build_model(self):  # type: ignore[no-untyped-def]
            model = yield
            return model.with_network(
                lambda network: seen.append(network),
                trainable=lambda name: name.startswith("model.diffusion_model.out."),
                export=lambda parameters, folder: (folder / "names.txt").write_text(
                    "\n".join(parameters)
                ),
            )

    install("partial", Partial)
    base = plain / "checkpoints" / "latest"
    run = train("--plugins", "partial", "--weight", str(base))
    assert len(seen) == 1
    before, after = weights(plain), weights(run)
    moved = {name for name in before if (before[name] != after[name]).any()}
    assert moved == {name for name in before if name.startswith("model.diffusion_model.out.")}
    exported = (run / "checkpoints" / "latest" / "names.txt").read_text().splitlines()
    assert sorted(exported) == sorted(before)


def test_noise_offset_changes_the_noise(train: Train, plain: Path) -> None:
    key = "model.params.loss_fn_config.params.offset_noise_level"
    assert losses(train(f"{key}=0.5")) != losses(plain)
    assert losses(train(f"{key}=0.0")) == losses(plain)


# ---- compiled, and offline


def test_a_compiled_run_is_the_same_as_an_eager_one(train: Train, plain: Path) -> None:
    """Law 7, for the whole step."""
    compiled = train("--ms_mode", "0")
    np.testing.assert_allclose(losses(compiled), losses(plain), rtol=1e-5)
    eager = weights(plain)
    for name, array in weights(compiled).items():
        np.testing.assert_allclose(array, eager[name], atol=2e-5, err_msg=name)


def test_a_run_opens_no_network_connection(train: Train, plain: Path, no_network: None) -> None:
    assert losses(train("--plugins", "none")) == losses(plain)
