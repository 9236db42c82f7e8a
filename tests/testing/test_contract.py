"""The contract as pytest runs it."""

from __future__ import annotations

import pytest

pytest_plugins = ["pytester"]

WEIGHT = """
class Fake:
    @hookimpl
    def weight_loss(self, noise):
        return {}
"""


# ---- in pytest


CONTRACT = """
from sdxl_host.testing import PluginContract

class TestContract(PluginContract):
    plugin = "{name}"
    steps = 2
    pairings = ["elm", "{name}"]

def test_fixtures(tiny_model, tiny_encoders, noise_levels):
    assert tiny_model.schedule is not None
    assert len(tiny_encoders) == 2
    assert noise_levels.sigma.shape == (161,)
"""


def test_the_contract_in_pytest(site, pytester, device, head):
    """Broken promises fail with their message and nothing else; the cost is told in the end."""
    site.add("elm")
    site.add("oak", source=head + WEIGHT.format("noise.snr") + "    Options = 3\n")
    pytester.makepyfile(CONTRACT.format(name="oak"))
    result = pytester.runpytest_inprocess(
        "-p", "no:cacheprovider", "-k", "fixtures or metadata or options or weight_loss or cost"
    )
    result.assert_outcomes(passed=4, failed=1)
    told = "plugin oak (fake-oak 1.0): its Options is not a dataclass, so it has no options; put"
    result.stdout.fnmatch_lines([f"{told} @dataclass above the class".replace("[", "[[]")])
    assert "Traceback" not in result.stdout.str()
    result.stdout.fnmatch_lines(
        ["*what the plugins cost*", "oak (fake-oak 1.0): imported in * us a step (weight_loss *)"]
    )


@pytest.mark.parametrize("steps", [1, 0])
def test_a_contract_of_too_few_steps(site, pytester, steps):
    site.add("oak")
    source = CONTRACT.format(name="oak").replace("steps = 2", f"steps = {steps}")
    pytester.makepyfile(source)
    result = pytester.runpytest_inprocess("-k", "metadata")
    result.stdout.fnmatch_lines([f"*TestContract: steps is {steps}; write at least 2, *"])


def test_a_contract_knows_itself_by_any_spelling(site, pytester):
    source = CONTRACT.format(name="light-ash").replace('"elm", ', '"sweet-elm", "light_ash", ')
    pytester.makepyfile(source)
    result = pytester.runpytest_inprocess("--collect-only", "-q")
    lines = [line for line in result.outlines if "test_pairing" in line]
    assert [line.partition("test_pairing")[2] for line in lines] == [
        "[before sweet_elm]",
        "[after sweet_elm]",
    ]


def test_a_contract_pairs_with_each_partner_before_and_after(site, pytester):
    """And never with itself."""
    pytester.makepyfile(CONTRACT.format(name="oak"))
    result = pytester.runpytest_inprocess("--collect-only", "-q")
    lines = [line for line in result.outlines if "test_pairing" in line]
    assert [line.partition("test_pairing")[2] for line in lines] == ["[before elm]", "[after elm]"]


def test_the_contract_names_what_it_needs(pytester):
    pytester.makepyfile(CONTRACT.format(name=""))
    result = pytester.runpytest_inprocess("-k", "metadata")
    result.stdout.fnmatch_lines(["*TestContract: names no plugin; write plugin = *"])


def test_pytest_s_plugin_imports_nothing_that_is_not_asked_for(pytester):
    """Someone else's tests load neither numpy nor a module of the host's beyond its names."""
    pytester.makepyfile(
        """
        import sys

        def test_light():
            assert not {"numpy", "mindspore", "omegaconf", "transformers"} & set(sys.modules)
            assert "sdxl_host.testing.fixtures" in sys.modules
            own = [name for name in sys.modules if name.startswith("sdxl_host")]
            assert len(own) < 8, own
        """
    )
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-W", "error")
    result.assert_outcomes(passed=1)
    assert "what the plugins cost" not in result.stdout.str()
