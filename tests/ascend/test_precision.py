"""Law 11: steps of every precision compile to what the Ascend 910B takes.

The public commands run, on MindSpore's own Ascend backend with stand-ins for CANN: see
tests/support/ascend. Every number is 0; what is shown is that all operators have kernels on the
device, that no shape is dynamic, and that every call's types are ones that CANN takes. The networks
have few layers; a whole one is the same layers more often.
"""

from __future__ import annotations

import pytest
from support.ascend.calls import attentions

pytestmark = pytest.mark.ascend

NETWORK = "model.params.network_config.params"
PLAIN = ("--plugins", "none", "--ms_amp_level")
RUNS = {
    "O0": [*PLAIN, "O0"],
    "O1": [*PLAIN, "O1"],
    "O2": [*PLAIN, "O2"],
    "O3": [*PLAIN, "O3"],
    "bfloat16": [*PLAIN, "O2", "--ms_amp_dtype", "bfloat16"],
    "recompute": [*PLAIN, "O2", f"{NETWORK}.use_recompute=True"],
}


@pytest.mark.parametrize("name", RUNS)
def test_it_ends_well_on_the_device_alone(find, check, name):
    check(find(name))


def test_attention_is_fused_in_16_bits_and_not_in_32(find):
    """In float32 it is computed block by block; what a run says of it is so."""
    kinds = {name: {kind for kind, _, _ in attentions(find(name).calls)} for name in RUNS}
    half = {"float16"}
    assert kinds == {
        "O0": set(), "O1": half, "O2": half, "O3": half, "bfloat16": {"bfloat16"}, "recompute": half
    }  # fmt: skip
