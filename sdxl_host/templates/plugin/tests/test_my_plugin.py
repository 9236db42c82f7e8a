"""The contract of sdxl-host, and this plugin's own formulas."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from sdxl_host import (
    DiscreteDistribution,
    NoiseLevels,
    NoiseSchedule,
    TextEncoders,
    encode_truncated,
)
from sdxl_host.testing import PluginContract

from my_plugin import MyPlugin, Options


class TestContract(PluginContract):
    """What every plugin is asked; `pytest -v` names each check."""

    plugin = "my_plugin"


# [build_model]
def test_only_the_chosen_part_is_trained() -> None:
    plugin = MyPlugin(Options(part="attn2"))
    block = "model.diffusion_model.middle_block.1.transformer_blocks.0"
    assert plugin.is_trained(f"{block}.attn2.to_k.weight")
    assert not plugin.is_trained(f"{block}.attn1.to_k.weight")


# [sample_timesteps]
def test_the_noisiest_timestep_is_drawn_tilt_times_as_often_as_the_cleanest() -> None:
    schedule = NoiseSchedule.scaled_linear()
    weights = MyPlugin(Options(tilt=3.0)).timestep_weights(len(schedule))
    ratio = DiscreteDistribution(schedule).reweighted(weights).density_ratio(schedule.sigmas)
    np.testing.assert_allclose(ratio[-1] / ratio[0], 3.0, rtol=1e-12)
    assert (np.diff(ratio) > 0).all()


# [weight_loss]
def test_the_weight_is_a_harmonic_sum(noise_levels: NoiseLevels) -> None:
    """1 / lambda = 1 / SNR + 1 / gamma."""
    weights = MyPlugin(Options(gamma=4.0)).weight_loss(noise_levels)
    np.testing.assert_allclose(1 / weights, 1 / noise_levels.snr + 1 / 4.0, rtol=1e-12)


# [encode_prompt]
def test_every_prompt_begins_with_the_prefix(tiny_encoders: TextEncoders) -> None:
    plugin = MyPlugin(Options(prefix="a photo of"))
    ours = plugin.encode_prompt(["a cat", "an owl"], tiny_encoders)
    expected = encode_truncated(["a photo of a cat", "a photo of an owl"], tiny_encoders)
    np.testing.assert_array_equal(ours.context, expected.context)
    np.testing.assert_array_equal(ours.pooled, expected.pooled)


# [on_step_end]
def test_the_logged_loss_is_a_running_mean() -> None:
    logged: list[float] = []
    trainer: Any = SimpleNamespace(log=lambda name, value: logged.append(value))
    plugin = MyPlugin(Options(memory=0.5))
    for loss, skipped in ((4.0, False), (2.0, False), (float("inf"), True), (8.0, False)):
        result: Any = SimpleNamespace(loss=loss, skipped=skipped)
        plugin.on_step_end(trainer, result)
    assert logged == [4.0, 3.0, 5.5]


# [end]
