"""16-bit weights, bfloat16, and the first stage's precision."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn
from safetensors.numpy import load_file

from sdxl_host import device as device_module
from sdxl_host.config.load import load
from sdxl_host.errors import ConfigError
from sdxl_host.models import precision
from sdxl_host.models.first_stage import AutoencoderKLInferenceWrapper
from sdxl_host.models.precision import (
    apply_precision,
    check_precision,
    halve_parameters,
    is_scaled,
    precision_line,
    set_precision,
)
from sdxl_host.models.unet import UNetModel
from sdxl_host.settings.declarations import TrainSettings
from sdxl_host.training.build import make_trainer
from sdxl_host.training.optimizer import AdamW
from sdxl_host.training.step import StepRunner, TrainStep
from sdxl_host.training.update_table import update_table

pytestmark = pytest.mark.usefixtures("device")

BATCH, CHANNELS, SIDE = 2, 3, 4


class Tiny(nn.Cell):
    """A convolution, a norm and a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, 4, 3, pad_mode="pad", padding=1, has_bias=True)
        self.norm = nn.GroupNorm(2, 4)
        self.dense = nn.Dense(3, 4)
        self.out = nn.Conv2d(4, CHANNELS, 1, has_bias=True)

    def construct(self, x, c_noise, context, vector, mask):
        level = self.dense(vector + c_noise.expand_dims(1) + context.mean(axis=1) * mask)
        return self.out(self.norm(self.conv(x) + level.expand_dims(-1).expand_dims(-1)))


def make(half: bool, batches: int = 1) -> tuple[TrainStep, Tiny]:
    """A step at O2 with weights around 1; half: kept in float16."""
    network = Tiny()
    generator = np.random.default_rng(5)
    for parameter in network.get_parameters():
        values = 1.0 + 0.3 * generator.standard_normal(parameter.shape)
        parameter.set_data(Tensor(values.astype(np.float32)))
    apply_precision(network, "O2")
    copies = halve_parameters(network, "float16") if half else None
    step = TrainStep(
        network, list(network.get_parameters()),
        loss_scale=256.0, batches=batches, has_ema=True, float32=copies,
    )  # fmt: skip
    return step, network


def inputs(seed: int) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    shapes = [(BATCH, CHANNELS, SIDE, SIDE)] * 2 + [(6, BATCH), (BATCH, 5, 3), (BATCH, 3)]
    shapes += [(BATCH, 3)]
    return [generator.uniform(0.5, 1.0, shape).astype(np.float32) for shape in shapes]


def values(parameters: Any) -> dict[str, np.ndarray]:
    return {p.name: p.asnumpy().astype(np.float64) for p in parameters}


# ---- weights in float16


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_updates_are_made_on_float32_copies(eager: bool) -> None:
    """Steps of 1e-5 from weights around 1, of which float16 knows three digits: its own rounding
    would lose every one. After 30 the copies are where float32 weights are, the parameters are the
    copies rounded, and the EMA is of the copies."""
    (half, network), (full, _) = make(True), make(False)
    begun = values(half.weights)
    table = update_table(AdamW(weight_decay=0.0), np.full(50, 1e-5), ema_decay=0.9999)
    runners = [StepRunner(step, table, None if eager else ms.jit) for step in (half, full)]
    for seed in range(30):
        for runner in runners:
            assert bool(runner([inputs(seed)])[3].asnumpy())
    copies, expected = values(half.weights), values(full.weights)
    for parameter, copy, plain in zip(half.parameters, half.weights, full.parameters, strict=True):
        moved = np.abs(expected[plain.name] - begun[copy.name])
        assert moved.max() > 1e-4
        difference = np.abs(copies[copy.name] - expected[plain.name])
        assert difference.max() <= 0.1 * moved.max(), copy.name
        rounded = copy.asnumpy().astype(parameter.asnumpy().dtype)
        assert rounded.tobytes() == parameter.asnumpy().tobytes()
        ema = values(half.ema.ema)[f"ema.{parameter.name}"]
        assert (np.abs(ema - copies[copy.name]) <= moved + 1e-6).all()
    halves = {p.name for p in network.get_parameters() if p.dtype == ms.float16}
    assert halves == {p.name for p in network.get_parameters()} - {"norm.gamma", "norm.beta"}


def test_norms_are_left_out_by_their_type() -> None:
    network = UNetModel(3, 3, 32, [1, 2], 1, [2], [0, 1], 32, 32, 64)
    copies = halve_parameters(network, "float16")
    norms = [c for _, c in network.cells_and_names() if isinstance(c, nn.LayerNorm | nn.GroupNorm)]
    own = {id(p) for cell in norms for p in cell.get_parameters()}
    for parameter in network.get_parameters():
        is_norm = id(parameter) in own
        assert parameter.dtype == (ms.float32 if is_norm else ms.float16), parameter.name
        assert (id(parameter) in copies) != is_norm


def param_fp16_notes(facts: list[Any]) -> list[str]:
    """The texts of notes on param_fp16."""
    rows = (fact for fact in facts if isinstance(fact, tuple))
    return [text for label, text in rows if label == "note" and text.startswith("param_fp16: ")]


def test_a_run_saves_float32_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    """What a checkpoint holds are the copies, so nothing is rounded by a resume."""
    words = ["--config", "tiny.yaml", "--plugins", "none", "--guidance_scale", "1"]
    words += ["--save_path_with_time", "False", "--ms_amp_level", "O2", "--param_fp16", "True"]
    # A float16 operator is slow on a CPU, so few layers.
    few = "channel_mult=[1]", "attention_resolutions=[]", "transformer_depth=[1]"
    words += [f"model.params.network_config.params.{word}" for word in few]
    said: list[Any] = []
    whole = make_trainer(load([*words, "--save_path", str(tmp_path / "a")]), say=said.append)
    whole.run()
    assert len(param_fp16_notes(said)) == 1
    assert any("weights in float16 with float32 copies" in str(fact) for fact in said)
    part = [*words, "--save_path", str(tmp_path / "b")]
    make_trainer(load([*part, "data.total_step=2"]), say=lambda line: None).run()
    latest = tmp_path / "b" / "checkpoints" / "latest"
    make_trainer(load([*part, "--resume", str(latest)]), say=lambda line: None).run()
    one, other = (load_file(tmp_path / n / "checkpoints/latest/network.safetensors") for n in "ab")
    for name, array in one.items():
        assert array.dtype == np.float32
        assert array.tobytes() == other[name].tobytes(), name
    first, second = (tmp_path / name / "metrics.jsonl" for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    parameters = whole.state.networks.network
    rounded = [p for p in parameters.values() if p.dtype == ms.float16]
    assert rounded
    inexact = [
        name for name, p in parameters.items()
        if p.dtype == ms.float16 and (one[name] != one[name].astype(np.float16)).any()
    ]  # fmt: skip
    assert inexact


PARTIAL = """
from sdxl_host import hookimpl

class Fake:
    @hookimpl(wrapper=True)
    def build_model(self):
        model = yield
        return model.with_network(lambda network: None, trainable=lambda n: ".input_blocks.0." in n)
"""


def test_what_is_not_trained_is_saved_rounded_and_the_start_says_so(site, tmp_path: Path) -> None:
    """Its only copy is the one in 16 bits: without it a checkpoint would be of other weights than
    those that the run computes with."""
    site.add("partial", source=PARTIAL)
    saved, notes = {}, {}
    for half in ("False", "True"):
        words = ["--config", "tiny.yaml", "--plugins", "partial", "--ms_amp_level", "O2"]
        words += ["--save_path", str(tmp_path / half), "--param_fp16", half]
        said: list[Any] = []
        trainer = make_trainer(load(words), said.append)
        saved[half] = load_file(trainer.checkpoints.save() / "network.safetensors")
        trainer.folder.close()
        notes[half] = param_fp16_notes(said)
    rounded = {
        name for name, array in saved["False"].items()
        if saved["True"][name].tobytes() != array.tobytes()
    }  # fmt: skip
    assert rounded
    for name, array in saved["False"].items():
        expected = array.astype(np.float16).astype(np.float32) if name in rounded else array
        assert saved["True"][name].tobytes() == expected.tobytes(), name
    assert not any(".input_blocks.0." in name for name in rounded)  # it is trained
    kept = sum(
        p.size for name, p in trainer.state.networks.network.items()
        if p.dtype == ms.float16 and ".input_blocks.0." not in name
    )  # fmt: skip
    assert notes["False"] == []
    assert len(notes["True"]) == 2
    assert f"{kept:,} weights that are not trained have no float32 copy" in notes["True"][1]


# ---- what the device has


def settings(**given: Any) -> TrainSettings:
    return TrainSettings(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ms_amp_dtype": "bfloat16"}, r"^--ms_amp_dtype bfloat16: has no use at ms_amp_level O0"),
        ({"param_fp16": True}, r"^--param_fp16 True: has no use at ms_amp_level O0"),
        (
            {"ms_amp_dtype": "bfloat16", "ms_amp_level": "O2"},
            r"^--ms_amp_dtype bfloat16: this device does not compute in it .*; use float16",
        ),
    ],
)
def test_what_a_cpu_or_float32_can_t_have(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_precision(settings(**given))
    check_precision(settings(ms_amp_level="O2", param_fp16=True))
    check_precision(settings())


@pytest.mark.parametrize(
    ("chip", "has"), [("ascend910b", True), ("ascend910", False), ("ascend310p", False)]
)
def test_bfloat16_is_that_of_the_chip(
    chip: str, has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_module, "on_ascend", lambda: True)
    monkeypatch.setattr(device_module, "ascend_generation", lambda: chip)
    assert device_module.has_bfloat16() == has
    monkeypatch.setattr(precision, "has_bfloat16", device_module.has_bfloat16)
    given = settings(ms_amp_dtype="bfloat16", ms_amp_level="O1")
    if has:
        check_precision(given)
    else:
        with pytest.raises(ConfigError, match="bfloat16"):
            check_precision(given)


def test_mindspore_is_asked_for_the_chip_as_it_wants_to_be() -> None:
    assert device_module.ascend_generation() == ""  # on a CPU


def test_only_float16_needs_a_loss_scale() -> None:
    assert not is_scaled(settings())
    assert is_scaled(settings(ms_amp_level="O1"))
    assert not is_scaled(settings(ms_amp_level="O2", ms_amp_dtype="bfloat16"))


def test_the_precision_in_words() -> None:
    assert precision_line(settings()) == "O0, float32"
    told = precision_line(settings(ms_amp_level="O1", ms_amp_dtype="bfloat16"))
    assert told.startswith("O1, products in bfloat16, everything between them in float32, weights")


def test_a_cell_is_set_to_bfloat16() -> None:
    """No operator of a CPU takes it, so nothing is run."""
    network = Tiny()
    apply_precision(network, "O2", "bfloat16")
    assert all(cell.bf16 and not cell.fp16 for cell in (network.conv, network.dense, network.out))
    assert network.norm.fp32 and not network.norm.bf16


# ---- the first stage


CONFIG = {
    "double_z": True, "z_channels": 4, "in_channels": 3, "out_ch": 3, "ch": 32,
    "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip


@pytest.mark.parametrize("keeps", [True, False])
def test_the_first_stage_follows_the_level_only_where_the_config_says(keeps: bool) -> None:
    """disable_first_stage_amp: True keeps every bit of it in float32."""
    stage = AutoencoderKLInferenceWrapper(CONFIG, 1.0)
    generator = np.random.default_rng(3)
    for parameter in stage.cell.get_parameters():
        drawn = generator.standard_normal(parameter.shape) / max(1, parameter.size) ** 0.25
        parameter.set_data(Tensor(drawn.astype(np.float32)))
    pixels = generator.uniform(-1, 1, (1, 3, 16, 16)).astype(np.float32)
    before = stage.encode(pixels)
    stage.keeps_float32 = keeps
    model: Any = SimpleNamespace(network=Tiny(), first_stage=stage)
    set_precision(model, settings(ms_amp_level="O2"))
    after = stage.encode(pixels)
    assert after.dtype == np.float32
    assert stage.decode(after).dtype == np.float32
    if keeps:
        assert after.tobytes() == before.tobytes()
    else:
        assert (after != before).any()
        np.testing.assert_allclose(after, before, atol=0.02 * np.abs(before).max())


@pytest.mark.parametrize("disabled", [True, False])
def test_the_config_says_it(disabled: bool) -> None:
    from sdxl_host.plugins.hooks import make_hooks

    words = [f"model.params.disable_first_stage_amp={disabled}"]
    config = load(["--config", "tiny.yaml", "--plugins", "none", *words])
    model = make_hooks(config.plugins).build_model(config.tree)
    assert model.first_stage.keeps_float32 == disabled


def test_a_parameter_that_was_in_16_bits_already_is_left(device: str) -> None:
    network = Tiny()
    network.dense.weight.set_dtype(ms.float16)
    assert id(network.dense.weight) not in halve_parameters(network, "float16")
    assert isinstance(network.dense.weight, Parameter)
