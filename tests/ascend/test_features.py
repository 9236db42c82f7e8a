"""Law 11: what options and plugins add to a step, and images, compile to what the 910B takes.

The public commands run, on MindSpore's own Ascend backend with stand-ins for CANN: see
tests/support/ascend. Every number is 0; what is shown is that all operators have kernels on the
device, that no shape is dynamic, and that every call's types are ones that CANN takes. The networks
have few layers; a whole one is the same layers more often.
"""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.ascend

HALF = ("--ms_amp_level", "O2")
RUNS = {
    "half parameters, EMA, accumulation": [
        *("--plugins", "none", *HALF, "--param_fp16", "True"),
        *("--use_ema", "True", "--gradient_accumulation_steps", "2"),
    ],
    "fused by jit_level O1": ["--plugins", "none", *HALF, "--jit_level", "O1"],
    "all plugins": [
        *("--plugins", "edm,snr,timestep_bias,lpw", *HALF),
        *("--timestep_bias_strategy", "later", "--timestep_bias_multiplier", "2"),
    ],
    "lora": ["--plugins", "lora", *HALF],
    "data sink": [
        *("--plugins", "none", *HALF, "--data_sink", "True"),
        *("--sink_size", "2", "--total_step", "4"),
    ],
    "sample": [
        *("sample", "--checkpoint", "all plugins/checkpoints/latest", "--prompt", "an owl"),
        *("--steps", "2"),
    ],
}


@pytest.mark.parametrize("name", RUNS)
def test_it_ends_well_on_the_device_alone(find, check, name):
    check(find(name))
