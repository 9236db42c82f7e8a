"""How often a run calls a plugin's hooks, whatever else is asked of it at the start."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sdxl_host.testing import tiny_run

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:mindspore.*")

COUNTING = """
from collections import Counter
from sdxl_host import hookimpl

CALLS = Counter()

class Fake:
    def __init__(self):
        self.calls = Counter()  # of this object alone

    def count(self, hook):
        self.calls[hook] += 1
        CALLS[hook] += 1

    @hookimpl(wrapper=True)
    def build_model(self):
        self.count("build_model")
        self.model = yield
        return self.model

    @hookimpl(wrapper=True)
    def sample_timesteps(self):
        self.count("sample_timesteps")
        distribution = yield
        assert self.model.schedule is distribution.schedule
        return distribution

    @hookimpl(wrapper=True)
    def weight_loss(self):
        self.count("weight_loss")
        return (yield)

    def notes(self, distribution):
        return [f"asked {self.calls['sample_timesteps']}, weighed {self.calls['weight_loss']}"]

    @hookimpl
    def on_step_end(self, trainer):
        for hook, count in self.calls.items():
            trainer.log(hook, count)

    def state_dict(self):
        return {"weighed": self.calls["weight_loss"]}

    def load_state_dict(self, state):
        self.calls["weight_loss"] = state["weighed"]
"""


def test_build_model_is_called_once_a_run(site: Any, tmp_path: Path) -> None:
    """And the others once a step: the curves and notes at its start ask a copy."""
    module = site.add("counting", source=COUNTING)
    run = tiny_run(["counting"], folder=tmp_path, steps=2)
    assert sys.modules[module].CALLS["build_model"] == 1
    last = run.metrics.splitlines()[-1].decode()
    assert '"build_model": 1' in last
    assert '"sample_timesteps": 2' in last
    assert '"weight_loss": 2' in last
    assert "note: counting: asked 2, weighed 1" in run.lines
    # The copy of a resumed run goes on from the checkpoint's state.
    resumed = tiny_run(["counting"], folder=tmp_path / "more", steps=3, resume=run.checkpoint)
    assert "note: counting: asked 2, weighed 3" in resumed.lines
    assert sys.modules[module].CALLS["build_model"] == 2


def test_build_model_is_called_once_a_plan(site: Any, device: str, here: Path) -> None:
    from sdxl_host.cli import main

    module = site.add("counting", source=COUNTING)
    assert main(["plan", "--config", "tiny.yaml", "--plugins", "counting"]) == 0
    assert Counter(build_model=1, sample_timesteps=2, weight_loss=1) == sys.modules[module].CALLS
