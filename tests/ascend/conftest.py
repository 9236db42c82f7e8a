"""Commands that run one after the other in one process, each with the smallest network."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from support.ascend.calls import attentions, problems
from support.ascend.dry_run import DryRun, dry_run

NETWORK = "model.params.network_config.params"
TRAIN = [
    *("train", "--config", "tiny.yaml", "--device_target", "Ascend", "--ms_mode", "0"),
    *("--save_path_with_time", "False", "--sample_count", "1", "--sample_steps", "1"),
    *("--guidance_scale", "1", "--total_step", "2"),
    *(f"{NETWORK}.channel_mult=[1]", f"{NETWORK}.transformer_depth=[1]"),
]
# What sdxl-host says of attention where it is the fused operator.
FUSED = re.compile(r"^attention +flash", re.MULTILINE)

Find = Callable[[str], DryRun]


@pytest.fixture(scope="module")
def find(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Find:
    """The run of a name in the module's `RUNS`, whose words are added to `TRAIN`, or are a command
    of their own where the first is no flag. A run is saved in the folder of its name."""
    commands = []
    for name, words in request.module.RUNS.items():
        if not words[0].startswith("--"):
            commands.append(words)
            continue
        usual = list(TRAIN)
        for flag in {word for word in words if word.startswith("--")} & set(usual):
            at = usual.index(flag)
            del usual[at : at + 2]
        commands.append([*usual, *words, "--save_path", name])
    found, end = dry_run(tmp_path_factory.mktemp("ascend"), commands)
    runs = dict(zip(request.module.RUNS, found, strict=True))

    def find_run(name: str) -> DryRun:
        assert runs[name].exit_code == 0, runs[name].printed[-2000:] or end
        return runs[name]

    return find_run


def check(run: DryRun) -> None:
    """Everything has a kernel on the device, static shapes, and types that the 910B takes; and
    attention is fused where the run says that it is."""
    assert run.calls
    assert run.on_the_host == []
    assert "dynamic shape" not in run.log
    assert problems(run.calls) == []
    if FUSED.search(run.printed):
        found = attentions(run.calls)
        assert found
        assert {kind for kind, _, _ in found} <= {"float16", "bfloat16"}


@pytest.fixture(name="check")
def check_fixture() -> Callable[[DryRun], None]:
    """See `check`."""
    return check
