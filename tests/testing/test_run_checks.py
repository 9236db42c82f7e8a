"""`tiny_run`, and what the checks with runs accept and find."""

from __future__ import annotations

import re
import sys
from typing import Any

import importlib_metadata
import numpy as np
import pytest

from sdxl_host.errors import PluginError
from sdxl_host.plugins.discovery import discover
from sdxl_host.testing import run_checks
from sdxl_host.testing.run_checks import Runs
from sdxl_host.testing.runs import TinyRun, only, tiny_run, train_tiny

WEIGHT = """
class Fake:
    @hookimpl
    def weight_loss(self, noise):
        return {}
"""


# ---- discovery


def test_only_what_is_named_is_seen(site):
    site.add("oak", targets=["a.Target"])
    site.add("light-ash", targets=["b.Target"])
    everything = importlib_metadata.entry_points
    with only(["light_ash"]):
        assert [plugin.name for plugin in discover()] == ["light_ash"]
        names = [entry.name for entry in importlib_metadata.entry_points(group="sdxl_host.targets")]
        assert names == ["b.Target"]
    with only([]):
        assert discover() == []
    assert importlib_metadata.entry_points is everything
    assert len(discover()) == 2


def test_other_groups_are_seen_as_ever():
    with only([]):
        assert "sdxl_host" in importlib_metadata.entry_points(group="pytest11").names


# ---- runs


@pytest.fixture(scope="module")
def plain(device: str, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return run_checks.plain_run(tmp_path_factory.mktemp("plain"))


def test_a_tiny_run_tells_what_it_left(plain):
    assert len(plain.losses) == len(plain.metrics.splitlines()) == 2
    assert plain.checkpoint == plain.save_path.resolve() / "checkpoints" / "step_00000002"
    assert plain.lines[0] == "plugins: none"
    assert all(array.dtype == np.float32 for array in plain.weights().values())


def test_it_sees_no_plugin_but_those_named(site, tmp_path, device):
    site.add("oak")
    with pytest.raises(PluginError, match="plugin oak is not installed"):
        train_tiny(["oak"], folder=tmp_path, steps=1, visible=[])
    with pytest.raises(PluginError, match="plugin snr is not installed"):
        tiny_run(["snr"], folder=tmp_path)


STATEFUL = """
@dataclass
class Options:
    kept: bool = option(True, help="whether its state is saved")
    odd: bool = option(False, help="whether it draws from where it should not")

class Fake:
    Options = Options
    {shared}

    def __init__(self, options):
        self.options, self.seen = options, np.zeros(2)

    @hookimpl
    def weight_loss(self, noise):
        return noise.snr + self.seen.sum()

    @hookimpl
    def on_step_end(self, trainer, result):
        {step}
        self.seen += result.loss

    def state_dict(self):
        return {{"seen": {state}}}

    def load_state_dict(self, state):
        self.seen = state["seen"]
"""


def stateful(shared: str = "", step: str = "pass", state: str = "self.seen") -> str:
    return STATEFUL.format(shared=shared, step=step, state=state)


def test_a_plugin_with_state_keeps_its_promises(subject, plain, device):
    """One set of runs; what they show is asked for as the contract does."""
    runs = Runs(subject(stateful()))
    run_checks.check_determinism(runs)
    run_checks.check_state(runs)
    run_checks.check_resume(runs)
    run_checks.check_shared_state(runs)
    run_checks.check_unused(runs.subject, plain)
    assert runs.changed == ["seen"]
    assert runs.whole.losses != plain.losses  # it acts
    line = run_checks.cost_line(runs)
    assert re.fullmatch(
        r"oak \(fake-oak 1\.0\): imported in \d+ ms, [\d,]+ us a step \(weight_loss [\d,]+, "
        r"on_step_end [\d,]+\)",
        line,
    )


def test_state_that_is_not_kept_shared_or_drawn_anew_is_found(subject, device, fault):
    """One run for three faults: the state is zeros, the class counts, a clock is logged."""
    source = stateful(
        "steps = []",
        "self.steps.append(1); trainer.log('steps', len(self.steps))",
        "np.zeros(2)",
    )
    runs = Runs(subject(source))
    told = fault(run_checks.check_determinism, runs)
    assert "two runs with the same seed differ: at step 1 steps is 1.0 and 3.0" in told
    told = fault(run_checks.check_resume, runs)
    assert "a run resumed at step 1 differs from one that was not: at step 2 loss is" in told
    assert told.endswith("load_state_dict take it back (changed during the run: seen)")
    told = fault(run_checks.check_shared_state, runs)
    assert "a run changes steps of objects that took no part in it" in told


def test_state_that_does_not_come_back(subject, device, fault):
    source = stateful().replace('self.seen = state["seen"]', "pass")
    told = fault(run_checks.check_state, Runs(subject(source)))
    assert "its state_dict after load_state_dict differs in 0 state_dict.seen" in told


def test_state_that_holds_a_number_that_is_not_one(subject, device):
    """Before something is measured, for one."""
    runs = Runs(subject(stateful(state="self.seen, 'none': float('nan')")))
    run_checks.check_state(runs)


def test_state_that_can_t_be_saved(subject, device, fault):
    runs = Runs(subject(stateful(state="{1, 2}")))
    told = fault(run_checks.check_state, runs)
    assert "is a set; only str, int, float" in told
    with pytest.raises(PluginError) as again:
        _ = runs.whole
    assert str(again.value) == told  # kept, not run once more


def test_a_package_that_changes_what_it_is_not_part_of_is_found(
    subject, site, plain, device, fault
):
    """It is imported by a module that the run imports, and here changes nothing: that is enough."""
    oak = subject("class Fake: pass")
    before = sys.modules[oak.installed.module] = type(sys)("before")
    hook = f"import {oak.installed.module}\nclass Other: pass\n"
    (site.folder / "other.py").write_text(hook)
    import sdxl_host.config.load

    load = sdxl_host.config.load.load

    def loading(words: list[str]) -> Any:
        __import__(oak.installed.module)
        return load(words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sdxl_host.testing.runs.load", loading)
        told = fault(run_checks.check_unused, oak, plain)
    assert f"a run that does not select it imports {oak.installed.module}" in told
    assert sys.modules[oak.installed.module] is before


# ---- pairings


def test_a_pair_that_is_refused_by_both_names(site, subject, device, head):
    site.add("elm", source=head + WEIGHT.format("noise.snr"))
    oak = subject(WEIGHT.format("noise.snr"))
    for order in ("before", "after"):
        run_checks.check_pairing(oak, "elm", order)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("if model: raise ValueError('elm and oak')", "raised ValueError"),
        (
            "from sdxl_host import PluginError\n        if model: raise PluginError('not so')",
            "not so",
        ),
    ],
)
def test_a_pair_that_fails_is_not_refused(site, subject, device, body, told, fault):
    site.add("elm")
    source = (
        "class Fake:\n    @hookimpl(wrapper=True)\n    def build_model(self):\n"
        f"        model = yield\n        {body}\n        return model\n"
    )
    message = fault(run_checks.check_pairing, subject(source), "elm", "before")
    assert "with --plugins oak,elm a run neither trains nor is refused: build_model:" in message
    assert told in message


def test_a_partner_that_is_not_installed(site, subject):
    oak = subject("class Fake: pass")
    with pytest.raises(PluginError) as missing:
        run_checks.check_pairing(oak, "edm", "before")
    assert str(missing.value) == (
        "plugin edm is not installed, and the contract of oak (fake-oak 1.0) trains beside it; "
        "pip install 'sdxl-host[all]'"
    )


def test_a_pair_draws_no_images_and_saves_nothing(site, subject, device):
    """There are eight of them to a contract."""
    site.add("elm")
    oak = subject(WEIGHT.format("noise.snr"))
    run_checks.check_pairing(oak, "elm", "before")
    assert sorted(path.name for path in (oak.folder / "pair-oak-elm" / "run").glob("[!.]*")) == [
        "config.yaml",
        "metrics.jsonl",
    ]
