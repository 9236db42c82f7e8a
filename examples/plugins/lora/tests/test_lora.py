"""Adapters: only they are trained, and what is written is what the network computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from sdxl_host.testing import HostError, PluginContract, TinyRun, tiny_run

from lora import FILE, LoRA, Options, is_adapter

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:mindspore.*")

OPTIONS = {"rank": 4, "alpha": 6.0}
SCALE = 1.5
# The smallest model has attention in its middle alone.
ATTENTION = ["model.params.network_config.params.attention_resolutions=[2]"]
NETWORK = "model.diffusion_model."
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
Train = Callable[..., TinyRun]


class TestContract(PluginContract):
    plugin = "lora"
    options = OPTIONS


# ---- runs


def started(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers for a parameter that an untrained network starts at 0."""
    return np.random.default_rng([*name.encode()]).normal(0, 0.1, shape).astype(np.float32)


def trained_before(trainer: Any) -> None:
    """Gives the network's last layers numbers: while they are 0, attention has no effect."""
    from mindspore import Tensor

    for name, parameter in trainer.state.networks.network.items():
        if not is_adapter(name) and not parameter.asnumpy().any():
            parameter.set_data(Tensor(started(name, parameter.shape)))


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Tiny runs with lora's options from a network that is not untrained."""

    def run(plugins: Sequence[str], **named: Any) -> TinyRun:
        folder = tmp_path_factory.mktemp("runs")
        options = {"lora": {**OPTIONS, **named.pop("options", {})}}
        chosen = {name: options[name] for name in plugins if name in options}
        named |= {"flags": ATTENTION, "prepare": trained_before}
        return tiny_run(plugins, folder=folder, options=chosen, **named)

    return run


@pytest.fixture(scope="module")
def plain(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[TinyRun, dict[str, np.ndarray]]:
    """A run without plugins, and the weights before its first step."""
    before: dict[str, np.ndarray] = {}

    def prepare(trainer: Any) -> None:
        trained_before(trainer)
        before.update({n: p.asnumpy().copy() for n, p in trainer.state.networks.network.items()})

    folder = tmp_path_factory.mktemp("plain")
    return tiny_run([], folder=folder, flags=ATTENTION, prepare=prepare), before


@pytest.fixture(scope="module")
def adapted(train: Train) -> TinyRun:
    return train(["lora"])


@pytest.fixture(scope="module")
def with_edm(train: Train) -> TinyRun:
    return train(["lora", "edm"])


def test_up_starts_at_0_so_the_first_loss_is_that_of_the_network_alone(
    plain: tuple[TinyRun, Any], adapted: TinyRun
) -> None:
    assert adapted.losses[0] == plain[0].losses[0]
    assert all(a != b for a, b in zip(adapted.losses[1:], plain[0].losses[1:], strict=True))


def test_only_the_adapters_are_trained(
    plain: tuple[TinyRun, dict[str, np.ndarray]], adapted: TinyRun
) -> None:
    """Every weight that was there before is the same to the bit, under its old name."""
    _, before = plain
    after = adapted.weights()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array, err_msg=name)
    added = set(after) - set(before)
    assert added == {name for name in after if is_adapter(name)}
    plugin = LoRA(Options(**OPTIONS))
    for name in added:
        if name.endswith(".lora_up.weight"):
            assert after[name].any(), name
        else:
            path = name.removeprefix(NETWORK).removesuffix(".lora_down.weight")
            assert (after[name] != plugin.start(path, after[name].shape[1])).any(), name


def test_every_projection_of_the_attention_has_an_adapter_and_nothing_else(
    adapted: TinyRun,
) -> None:
    weights = adapted.weights()
    layers = [
        name.removesuffix(".weight")
        for name in weights
        if any(name.endswith((f"attn1.{p}.weight", f"attn2.{p}.weight")) for p in PROJECTIONS)
    ]
    assert len(layers) == 4 * 8  # transformer blocks, projections in each
    parts = {f"{layer}.lora_{part}.weight" for layer in layers for part in ("down", "up")}
    assert parts == {name for name in weights if is_adapter(name)}
    for layer in layers:
        outputs, inputs = weights[f"{layer}.weight"].shape
        assert weights[f"{layer}.lora_down.weight"].shape == (4, inputs)
        assert weights[f"{layer}.lora_up.weight"].shape == (outputs, 4)


def test_the_optimizer_holds_the_adapters_alone(adapted: TinyRun) -> None:
    state = load_file(adapted.checkpoint / "optimizer.safetensors")
    adapters = {n.removeprefix(NETWORK) for n in adapted.weights() if is_adapter(n)}
    moments = {f"adam_{kind}.{name}" for kind in "mv" for name in adapters}
    assert moments <= set(state)
    assert not any(name.startswith("adam_") for name in set(state) - moments)


def test_the_order_of_lora_and_edm_makes_no_difference(
    train: Train, adapted: TinyRun, with_edm: TinyRun
) -> None:
    swapped = train(["edm", "lora"])
    assert with_edm.metrics == swapped.metrics
    assert with_edm.losses != adapted.losses
    for name, array in with_edm.weights().items():
        np.testing.assert_array_equal(swapped.weights()[name], array, err_msg=name)


def test_with_edm_and_snr_a_resumed_run_is_the_uninterrupted_one(train: Train) -> None:
    plugins = ["lora", "edm", "snr"]
    whole = train(plugins, steps=4, save_every=2)
    halfway = whole.save_path / "checkpoints" / "step_00000002"
    resumed = train(plugins, steps=4, resume=halfway)
    assert resumed.metrics == whole.metrics
    # The second half moved the adapters, so there was something to get wrong.
    before, after = load_file(halfway / FILE), load_file(whole.checkpoint / FILE)
    assert any(not np.array_equal(before[key], after[key]) for key in after)
    for name in (FILE, "network.safetensors", "optimizer.safetensors"):
        one, other = load_file(resumed.checkpoint / name), load_file(whole.checkpoint / name)
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[key], other[key]) for key in one)


def test_recomputed_blocks_train_alike(tmp_path: Path, adapted: TinyRun) -> None:
    """Parameters that a block gets later have a gradient too where the block is recomputed."""
    before: dict[str, np.ndarray] = {}

    def prepare(trainer: Any) -> None:
        trained_before(trainer)
        before.update({n: p.asnumpy().copy() for n, p in trainer.state.networks.network.items()})

    flags = [*ATTENTION, "model.params.network_config.params.use_recompute=True"]
    options = {"lora": OPTIONS}
    run = tiny_run(
        ["lora"], folder=tmp_path, steps=2, options=options, flags=flags, prepare=prepare
    )
    for name, array in run.weights().items():
        assert (array != before[name]).any() == is_adapter(name), name
    ours = load_file(run.checkpoint / FILE)
    assert ours.keys() == load_file(adapted.checkpoint / FILE).keys()


# ---- options


def test_down_is_uniform_as_in_the_paper_s_code() -> None:
    """Kaiming uniform with a = sqrt(5): sqrt(2 / (1 + a^2)) * sqrt(3 / inputs) = 1 / sqrt(inputs),
    with which the deviation is that of a uniform variable, bound / sqrt(3)."""
    down = LoRA(Options(rank=64)).start("input_blocks.4.1", 640)
    bound = np.sqrt(2 / (1 + 5)) * np.sqrt(3 / 640)
    assert down.shape == (64, 640)
    assert down.dtype == np.float32
    assert 0.999 * bound < np.abs(down).max() <= bound * (1 + 1e-6)
    assert down.std() == pytest.approx(bound / np.sqrt(3), rel=0.01)
    assert down.mean() == pytest.approx(0, abs=0.01 * bound)


def test_down_is_a_function_of_seed_and_name() -> None:
    first = LoRA(Options()).start("a.to_q", 8)
    np.testing.assert_array_equal(LoRA(Options(alpha=2.0)).start("a.to_q", 8), first)
    assert (LoRA(Options()).start("a.to_k", 8) != first).all()
    assert (LoRA(Options(seed=1)).start("a.to_q", 8) != first).all()


@pytest.mark.parametrize("changed", [{"rank": 2}, {"alpha": 12.0}, {"seed": 1}])
def test_every_option_changes_what_is_learned(
    changed: dict[str, Any], train: Train, adapted: TinyRun
) -> None:
    other = train(["lora"], options=changed, steps=2)
    assert other.losses[0] == adapted.losses[0]
    assert other.losses[1] != adapted.losses[1]


@pytest.mark.parametrize(
    ("weight", "resume", "told"), [("", "", 1), ("base.safetensors", "", 0), ("", "latest", 0)]
)
def test_a_note_says_that_untrained_weights_leave_nothing_to_learn(
    weight: str, resume: str, told: int
) -> None:
    plugin = LoRA(Options())
    settings = SimpleNamespace(train=SimpleNamespace(weight=weight, resume=resume))
    next(plugin.build_model(settings))
    assert len(plugin.notes()) == told
    assert all("--weight" in line for line in plugin.notes())


def test_and_so_it_is(tmp_path: Path) -> None:
    run = tiny_run(["lora"], folder=tmp_path, steps=2, options={"lora": OPTIONS})
    assert not any(a.any() for name, a in run.weights().items() if ".lora_up." in name)
    assert any(line.startswith("note: lora: an untrained network") for line in run.lines)


# ---- the file


def test_the_file_has_the_names_of_kohya_s_trainer(adapted: TinyRun) -> None:
    weights, tensors = adapted.weights(), load_file(adapted.checkpoint / FILE)
    layer = "middle_block.1.transformer_blocks.0.attn2.to_out.0"
    key = "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_out_0"
    for part in ("down", "up"):
        own = weights[f"{NETWORK}{layer}.lora_{part}.weight"]
        np.testing.assert_array_equal(tensors[f"{key}.lora_{part}.weight"], own)
    assert tensors[f"{key}.alpha"].shape == ()
    assert len(tensors) == 3 * 32
    assert {name.partition(".")[2] for name in tensors} == {
        "lora_down.weight",
        "lora_up.weight",
        "alpha",
    }
    assert all(array == 6.0 for name, array in tensors.items() if name.endswith(".alpha"))
    with safe_open(adapted.checkpoint / FILE, "np") as file:
        assert file.metadata() == {
            "ss_network_module": "networks.lora",
            "ss_network_dim": "4",
            "ss_network_alpha": "6.0",
        }


def merged(base: Mapping[str, np.ndarray], file: Path) -> dict[str, np.ndarray]:
    """W + alpha / rank * up @ down in each layer, as other programs apply such a file."""
    tensors, weights = load_file(file), dict(base)
    for name in base:
        key = f"lora_unet_{name.removeprefix(NETWORK).removesuffix('.weight').replace('.', '_')}"
        if f"{key}.alpha" in tensors:
            down, up = (tensors[f"{key}.lora_{part}.weight"] for part in ("down", "up"))
            weights[name] = base[name] + tensors[f"{key}.alpha"] / len(down) * up @ down
    return weights


@pytest.fixture(scope="module")
def networks(adapted: TinyRun, plain: tuple[TinyRun, Any]) -> tuple[Any, Any]:
    """The run's network with its adapters, and one without into which its file is merged."""
    from mindspore import Tensor

    first, _ = adapted.network()
    second, parameters = plain[0].network()
    weights = {n: a for n, a in adapted.weights().items() if not is_adapter(n)}
    changed = merged(weights, adapted.checkpoint / FILE)
    assert sum((changed[name] != weights[name]).any() for name in weights) == 32
    assert parameters.keys() == changed.keys()
    for name, parameter in parameters.items():
        parameter.set_data(Tensor(changed[name]))
    return first, second


def inputs() -> list[Any]:
    from mindspore import Tensor

    generator = np.random.default_rng(5)
    shapes = ((2, 3, 16, 16), (2,), (2, 77, 32), (2, 64))
    arrays = [generator.standard_normal(shape).astype(np.float32) for shape in shapes]
    return [Tensor(array) for array in (*arrays, np.ones((2, 77), np.float32))]


def test_merged_into_the_weights_it_gives_what_the_network_computes(
    networks: tuple[Any, Any],
) -> None:
    ours, theirs = (network(*inputs()).asnumpy() for network in networks)
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("level", ["O2", "O3"])
def test_adapters_compute_in_float16_with_the_rest(
    level: str, adapted: TinyRun, networks: tuple[Any, Any]
) -> None:
    import mindspore as ms

    network, _ = adapted.network(level)
    layer = network.middle_block[1].transformer_blocks[0].attn1.to_q
    numbers = ms.Tensor(np.ones((2, 3, layer.in_channels), np.float32))
    for cell in (layer, layer.lora_down):
        assert cell(numbers).dtype == ms.float16
    ours, whole = (n(*inputs()).asnumpy().astype(np.float32) for n in (network, networks[0]))
    np.testing.assert_allclose(ours, whole, atol=1e-2 * np.abs(whole).max())


def test_a_compiled_layer_computes_what_an_eager_one_does(networks: tuple[Any, Any]) -> None:
    import mindspore as ms

    layer = networks[0].middle_block[1].transformer_blocks[0].attn1.to_out[0]
    numbers = np.random.default_rng(6).standard_normal((2, 3, layer.in_channels))
    given = ms.Tensor(numbers.astype(np.float32))
    compiled, eager = ms.jit(layer.construct)(given).asnumpy(), layer(given).asnumpy()
    np.testing.assert_allclose(compiled, eager, atol=1e-5 * np.abs(eager).max())
    expected = numbers @ layer.weight.asnumpy().T + layer.bias.asnumpy()
    low = numbers @ layer.lora_down.weight.asnumpy().T @ layer.lora_up.weight.asnumpy().T
    np.testing.assert_allclose(eager, expected + SCALE * low, atol=1e-5 * np.abs(eager).max())


def test_the_checkpoint_is_not_taken_for_weights_of_an_ordinary_network(
    adapted: TinyRun, tmp_path: Path
) -> None:
    """Nothing of the adapters is dropped without a word."""
    with pytest.raises(HostError, match=r"added 64 tensors .*\(build_model: host -> lora\)"):
        tiny_run(folder=tmp_path, flags=["--weight", str(adapted.checkpoint)])
