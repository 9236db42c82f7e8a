"""The contract of plugins as one test class, a method a promise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from sdxl_host.errors import HostError
from sdxl_host.plugins.discovery import normalize
from sdxl_host.plugins.inspection import check_options
from sdxl_host.testing import checks, prompt_checks, run_checks
from sdxl_host.testing.run_checks import FIRST_PARTY, Runs

if TYPE_CHECKING:
    from sdxl_host.testing.runs import TinyRun

__all__ = ["PluginContract"]


# MindSpore's own words about its own insides are not the plugin's.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:mindspore.*")
class PluginContract:
    """What the host promises its users of every plugin; a subclass names the plugin:

        class TestContract(PluginContract):
            plugin = "my_weight"

    Each test fails with the plugin's name, what is wrong and how to mend it. Runs are those of
    `tiny_run`: configs/tiny.yaml, eagerly on the CPU, seeing no plugin but this one and, in
    `test_pairing`, its partner. A test of a hook that the plugin does not have looks at what the
    host answers with the plugin in place.

    Attributes:
        plugin: the name of the entry point.
        options: options of the plugin for all checks, by name; choose them so that it acts.
        steps: of the runs; at least 2. A run is resumed in the middle.
        pairings: plugins that it is run with, before it and after it.
    """

    plugin: ClassVar[str] = ""
    options: ClassVar[Mapping[str, Any]] = {}
    steps: ClassVar[int] = 4
    pairings: ClassVar[Sequence[str]] = FIRST_PARTY

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One `test_pairing` for each partner and order."""
        if {"partner", "order"} <= set(metafunc.fixturenames):
            own = normalize(self.plugin)
            others = [name for name in map(normalize, self.pairings) if name != own]
            pairs = [(name, order) for name in others for order in ("before", "after")]
            names = [f"{order} {name}" for name, order in pairs]
            metafunc.parametrize(("partner", "order"), pairs, ids=names)

    # ---- without a run

    def test_metadata(self, contract_runs: Runs) -> None:
        """Installed once, with an entry point, a name that is free, and bounds on sdxl-host."""
        _keep(lambda: contract_runs.subject.installed)

    def test_import(self, contract_runs: Runs) -> None:
        """Its entry point is a class, and importing it imports nothing heavy."""
        _keep(lambda: contract_runs.import_seconds)

    def test_hooks(self, contract_runs: Runs) -> None:
        """Every hook exists, takes arguments that exist, and is marked as what it is."""
        _keep(lambda: contract_runs.subject.roles)

    def test_options(self, contract_runs: Runs) -> None:
        """Options have defaults and help, and come back from a config as they were."""
        subject = contract_runs.subject
        _keep(lambda: check_options(subject.installed, subject.cls))
        _keep(lambda: check_options(subject.installed, subject.cls, subject.options))

    def test_notes(self, contract_runs: Runs) -> None:
        """What it says at the start of a run are lines."""
        _keep(lambda: checks.check_notes(contract_runs.subject))

    def test_build_model(self, contract_runs: Runs) -> None:
        """The model's numbers are finite and fit each other; the original is left as it was."""
        _keep(lambda: checks.check_build_model(contract_runs.subject))

    def test_sample_timesteps(self, contract_runs: Runs) -> None:
        """Noise levels come from a distribution whose quantile and cdf agree, within the model's
        range."""
        _keep(lambda: checks.check_sample_timesteps(contract_runs.subject))

    def test_weight_loss(self, contract_runs: Runs) -> None:
        """Weights are finite and above 0 from SNR 1e-4 to 1e4, one for each sample."""
        _keep(lambda: checks.check_weight_loss(contract_runs.subject))

    def test_encode_prompt(self, contract_runs: Runs) -> None:
        """An embedding has the encoders' widths and depends on its prompt alone."""
        _keep(lambda: prompt_checks.check_encode_prompt(contract_runs.subject))

    # ---- in runs

    def test_determinism(self, contract_runs: Runs) -> None:
        """Two runs with one seed are equal to the bit."""
        _keep(lambda: run_checks.check_determinism(contract_runs))

    def test_state(self, contract_runs: Runs) -> None:
        """What state_dict gives can be saved, and a new object takes it back whole."""
        _keep(lambda: run_checks.check_state(contract_runs))

    def test_resume(self, contract_runs: Runs) -> None:
        """A run that was stopped and resumed is equal to the bit to one that was not."""
        _keep(lambda: run_checks.check_resume(contract_runs))

    def test_objects_share_nothing(self, contract_runs: Runs) -> None:
        """A run leaves nothing on the class or in its other objects."""
        _keep(lambda: run_checks.check_shared_state(contract_runs))

    def test_unused(self, contract_runs: Runs, contract_plain_run: TinyRun) -> None:
        """Installed and not selected, it is not imported and changes nothing."""
        _keep(lambda: run_checks.check_unused(contract_runs.subject, contract_plain_run))

    def test_pairing(self, contract_runs: Runs, partner: str, order: str) -> None:
        """Before or after another plugin it trains, or one of them is refused by name."""
        _keep(lambda: run_checks.check_pairing(contract_runs.subject, partner, order))

    def test_cost(
        self, contract_runs: Runs, record_property: Callable[[str, object], None]
    ) -> None:
        """Import time and time a step; pytest prints them in the end. Nothing is asserted."""
        record_property("sdxl_host_cost", _keep(lambda: run_checks.cost_line(contract_runs)))


def _keep(promise: Callable[[], Any]) -> Any:
    """What `promise()` gives; where it is broken, the test fails with the message alone, unless an
    error of the plugin's own stands behind it, whose place in the plugin is then shown."""
    try:
        return promise()
    except HostError as error:
        if error.__cause__ is not None:
            raise
        told = str(error)
    pytest.fail(told, pytrace=False)
