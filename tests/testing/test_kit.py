"""`sdxl_host.testing`: what its parts and runs are, and that each check finds its fault."""

from __future__ import annotations

import logging
import os
import random
import re
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import importlib_metadata
import numpy as np
import pytest

import sdxl_host
from sdxl_host import encode_truncated
from sdxl_host.errors import ConfigError, HostError, PluginError
from sdxl_host.plugins.discovery import discover, import_class, make_instance
from sdxl_host.plugins.inspection import check_import, check_metadata, check_options
from sdxl_host.testing import checks, hashes, run_checks
from sdxl_host.testing.parts import noise_levels, tiny_encoders, tiny_model
from sdxl_host.testing.run_checks import Runs
from sdxl_host.testing.runs import TinyRun, only, tiny_run, train_tiny
from sdxl_host.testing.snapshot import attributes, changed, class_attributes
from sdxl_host.testing.subject import Subject

pytest_plugins = ["pytester"]

HOST = Path(sdxl_host.__file__).parent
HEAD = """
from dataclasses import dataclass, field, replace
import numpy as np
from sdxl_host import (
    DiscreteDistribution, NoiseDistribution, Preconditioning, SamplingDefaults, encode_truncated,
    hookimpl, option,
)
"""
WEIGHT = """
class Fake:
    @hookimpl
    def weight_loss(self, noise):
        return {}
"""


@pytest.fixture
def subject(site: Any, tmp_path: Path) -> Callable[..., Subject]:
    """Installs a plugin `oak` whose module ends with the given source."""

    def install(source: str, **options: Any) -> Subject:
        site.add("oak", source=HEAD + source)
        return Subject("oak", tmp_path / "contract", options, steps=2)

    return install


def fault(check: Callable[..., Any], *arguments: Any) -> str:
    """What the check finds: one line, with the plugin first and a remedy last."""
    with pytest.raises(PluginError) as found:
        check(*arguments)
    told = str(found.value)
    assert re.match(r"plugin oak\b|\w+: .*plugin oak\b", told)
    assert ";" in told
    return told


# ---- without a run: kept


GOOD = """
class Halved(Preconditioning):
    name = "halved"

    def __init__(self, kind):
        self.kind = kind

    def c_skip(self, sigma):
        return self.kind.c_skip(sigma) / 2

    def c_out(self, sigma):
        return self.kind.c_out(sigma) / 2

    def c_in(self, sigma):
        return self.kind.c_in(sigma)

    def c_noise(self, sigma):
        return self.kind.c_noise(sigma)


@dataclass
class Options:
    low: float = option(0.5, help="the least weight")
    names: list[str] = option(["a", "b"], help="some names")


class Fake:
    Options = Options

    def __init__(self, options):
        self.options = options
        self._kept = None

    @hookimpl(wrapper=True)
    def build_model(self):
        model = yield
        return model.with_preconditioning(Halved(model.preconditioning))

    @hookimpl(wrapper=True)
    def sample_timesteps(self):
        distribution = yield
        if self._kept is None or self._kept[0] is not distribution:
            weights = np.linspace(1.0, 2.0, 1000)
            self._kept = distribution, distribution.reweighted(weights)
        return self._kept[1]

    @hookimpl(wrapper=True)
    def weight_loss(self, noise):
        weights = yield
        return np.maximum(weights / weights.mean(), self.options.low)

    @hookimpl
    def encode_prompt(self, prompts, encoders):
        return encode_truncated([prompt.upper() for prompt in prompts], encoders)
"""

LIGHT_CHECKS = (
    checks.check_build_model,
    checks.check_notes,
    checks.check_sample_timesteps,
    checks.check_weight_loss,
    checks.check_encode_prompt,
)


@pytest.mark.parametrize("options", [{}, {"low": 0.25, "names": []}])
def test_a_plugin_that_keeps_its_promises_passes(subject, options):
    """One that has every hook, and weighs a batch as a whole."""
    found = subject(GOOD, **options)
    check_metadata(found.installed, discover())
    assert check_import(found.installed) > 0
    assert list(found.roles) == ["build_model", "sample_timesteps", "weight_loss", "encode_prompt"]
    assert check_options(found.installed, found.cls, options).low == options.get("low", 0.5)
    for check in LIGHT_CHECKS:
        check(found)


@pytest.mark.parametrize("check", LIGHT_CHECKS)
def test_a_hook_that_is_not_there_is_the_host_s(subject, check):
    check(subject("class Fake:\n    @hookimpl\n    def on_step_end(self): pass\n"))


def test_the_light_checks_need_no_mindspore(site):
    site.add("oak", source=HEAD + GOOD)
    code = (
        "import sys, tempfile, pathlib\n"
        "from sdxl_host.testing import checks\n"
        "from sdxl_host.testing.subject import Subject\n"
        "oak = Subject('oak', pathlib.Path(tempfile.mkdtemp()))\n"
        "for name in checks.__all__:\n"
        "    if name.startswith('check_'):\n"
        "        getattr(checks, name)(oak)\n"
        "assert 'mindspore' not in sys.modules and 'pytest' not in sys.modules\n"
    )
    run_python(code, site.python_path)


def run_python(code: str, path: str | None = None) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path or str(HOST.parent)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- without a run: broken


@pytest.mark.parametrize(
    ("requires", "missing"),
    [
        ("sdxl-host>=0.1", "no upper bound"),
        ("sdxl-host!=0.5,>0.0", "no upper bound"),
        ("sdxl-host<0.2", "no lower bound"),
        ("sdxl-host!=0.5", "no lower and no upper bound"),
    ],
)
def test_both_bounds_on_the_host_are_needed(site, requires, missing):
    site.add("oak", requires=requires)
    (oak,) = discover()
    told = fault(check_metadata, oak, [oak])
    assert f"has {missing}; it must declare both" in told
    assert told.endswith("sdxl-host>=0.1,<0.2")


@pytest.mark.parametrize("requires", ["sdxl-host~=0.1.0", "sdxl-host==0.1.*", "sdxl-host>0,<=0.1"])
def test_bounds_may_be_written_in_other_ways(site, requires):
    site.add("oak", requires=requires)
    (oak,) = discover()
    check_metadata(oak, [oak])


def test_an_entry_point_without_a_class(site):
    site.add("oak")
    points = next(site.folder.glob("*.dist-info")) / "entry_points.txt"
    points.write_text("[sdxl_host.plugins]\noak = some_module\n")
    (oak,) = discover()
    assert "names no class" in fault(check_metadata, oak, [oak])


def test_a_plugin_that_is_not_installed(site, tmp_path):
    site.add("birch")
    told = fault(lambda: Subject("oak", tmp_path).installed)
    assert told == (
        "plugin oak is not installed (installed: birch); run pip install -e . in its folder"
    )


@pytest.mark.parametrize("name", ["torch", "scipy", "PIL", "transformers"])
def test_a_heavy_import_is_named(site, subject, name):
    (site.folder / f"{name}.py").write_text("")
    found = subject(f"import {name}\nclass Fake: pass\n")
    told = fault(check_import, found.installed)
    assert f"importing it imports {name}; import them inside" in told
    assert name not in found.__dict__


def test_what_an_import_prints_is_not_taken_for_an_answer(subject):
    source = "import os\nprint('{\"error\": \"no\"}')\nos.write(1, b'noise')\nclass Fake: pass\n"
    assert check_import(subject(source).installed) >= 0


def test_an_import_that_ends_python_or_never_ends(subject, monkeypatch):
    found = subject("import os, sys\nprint('so it goes', file=sys.stderr)\nsys.stderr.flush()\n"
                    "os._exit(3)\n")  # fmt: skip
    told = fault(check_import, found.installed)
    assert "is broken: importing it ended Python with exit code 3 (so it goes)" in told
    monkeypatch.setattr("sdxl_host.plugins.inspection._PATIENCE", 0.01)
    assert "importing it takes over 0 s" in fault(check_import, found.installed)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("size: int", "its option size has no default"),
        ("size: int = 3", "its option size has no help"),
        ("size: int = option(3, help=' ')", "its option size has no help"),
        ("size: int = option(3, help='a\\nb')", "the help of its option size has several lines"),
        ("size: int = option(3.5, help='big')", "can't be made from their defaults"),
        ("size: int = option(-1, help='big', minimum=0)", "out of range"),
        ("size: np.ndarray = option(None, help='big')", "can't be made from their defaults"),
        ("size: 'Nowhere' = option(1, help='big')", "can't be made from their defaults: NameError"),
        (
            "size: list[int] = field(default_factory=lambda: SHARED, metadata={'help': 'big'})",
            "its option size has one list for all instances",
        ),
        (
            "size: int = option(3, help='big')\n    def __post_init__(self): self.size += 1",
            "its option size is 4, and 5 once it was written to a config",
        ),
        (
            "size: int = option(3, help='big')\n    def __post_init__(self): raise KeyError('no')",
            "can't be made from their defaults: KeyError",
        ),
    ],
)
def test_options_at_fault(subject, body, told):
    source = (
        f"SHARED = [1]\n@dataclass\nclass Options:\n    {body}\nclass Fake:\n    Options = Options"
    )
    found = subject(source)
    assert told in fault(check_options, found.installed, found.cls)


def test_options_that_are_no_dataclass(subject):
    found = subject("class Fake:\n    class Options:\n        size = 3\n")
    told = fault(check_options, found.installed, found.cls)
    assert "its Options is not a dataclass" in told


def test_values_that_do_not_fit_are_the_contract_s_own(subject):
    found = subject(GOOD)
    with pytest.raises(ConfigError, match=r"plugins\.oak\.lwo: there is no such option"):
        check_options(found.installed, found.cls, {"lwo": 1.0})
    none = subject_without_options = import_class(found.installed)
    del none.Options
    told = fault(check_options, found.installed, subject_without_options, {"low": 1.0})
    assert told.endswith("has no options; leave out low")


def test_an_object_that_can_t_be_made(subject):
    found = subject("class Fake:\n    def __init__(self): self.a = 1 / 0\n")
    told = fault(make_instance, found.installed, found.cls, None)
    assert "could not be made from its options: ZeroDivisionError" in told


BUILD = """
class Fake:
    @hookimpl(wrapper=True)
    def build_model(self):
        model = yield
        {}
        return model
"""
KIND = """
from sdxl_host import NoiseSchedule
class Kind(Preconditioning):
    name = "kind"
    def c_skip(self, sigma): return np.ones_like(sigma)
    def c_out(self, sigma): return -sigma
    def c_in(self, sigma): return np.ones_like(sigma)
    def c_noise(self, sigma): return np.log(sigma)
    {}
class Fake:
    @hookimpl(wrapper=True)
    def build_model(self):
        model = yield
        return model.with_preconditioning(Kind(){})
"""


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (KIND.format("def c_in(self, sigma): return 1.0", ""), "c_in gives the shape ()"),
        (KIND.format("def c_in(self, sigma): return sigma > 1", ""), "c_in gives bool"),
        (
            KIND.format("def c_in(self, sigma): return [float(s) for s in sigma]", ""),
            "c_in gives a list",
        ),
        (KIND.format("def c_noise(self, sigma): return sigma / 0.0", ""), "c_noise is inf"),
        (KIND.format("def c_noise(self, sigma): sigma *= 2; return sigma", ""), "changes the sigm"),
        (KIND.format("def c_out(self, sigma): return np.floor(sigma)", ""), "c_out is 0 at sigma"),
        (KIND.format("def loss_weight(self, sigma): return -sigma", ""), "is negative"),
        (
            KIND.format("def one_minus_c_skip(self, sigma): return sigma * 0.1", ""),
            "one_minus_c_skip is 0.00291",
        ),
        (KIND.format("name = ''", ""), "name is ''"),
        (KIND.format("def scheduler_config(self): return {}", ""), "has no _class_name"),
        (
            KIND.format("def scheduler_config(self): return {'_class_name': np.ones(2)}", ""),
            "scheduler_config raised TypeError",
        ),
        (KIND.format("", ', SamplingDefaults("trailing", 3.0, 1.0)'), "goes from sigma 3.0 to 1.0"),
        (
            KIND.format("", ', SamplingDefaults("even", 0.1, 1.0)'),
            "has the spacing 'even'; use one of tr",
        ),
        (KIND.format("", ', SamplingDefaults("edm", 0.1, 1.0, "rk4")'), "has the sampler 'rk4'"),
        (BUILD.format("model.schedule.sigmas[0] /= 2"), "build_model changed"),
        (
            BUILD.format("model.preconditioning.c_noise = lambda s: 0 * s"),
            "build_model changed preconditioning.c_noise of the model it was given",
        ),
        (BUILD.format("if model: return None"), "None, not a DiffusionModel"),
        (BUILD.format("if model: raise ValueError('no')"), "raised ValueError: no"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_a_model_at_fault(subject, source, told):
    assert told in fault(checks.check_build_model, subject(source))


def test_notes_that_are_no_lines(subject):
    oak = "class Fake:\n    @hookimpl\n    def on_step_end(self): pass\n    def notes(self): {}\n"
    assert "'oak: a\\nb'" in fault(checks.check_notes, subject(oak.format("return ['a\\nb']")))


def test_notes_that_raise(subject):
    oak = (
        "class Fake:\n    @hookimpl\n    def on_step_end(self): pass\n    def notes(self): 1 / 0\n"
    )
    told = "notes: oak: plugin oak (fake-oak 1.0) raised ZeroDivisionError"
    assert told in fault(checks.check_notes, subject(oak))


def test_a_model_of_a_narrow_range(subject):
    """Its noise levels are fewer than the shapes that the preconditioning is asked with."""
    checks.check_build_model(subject(KIND.format("", ', SamplingDefaults("edm", 0.99, 1.01)')))


def test_a_range_that_the_host_s_draws_leave(subject):
    """The host draws for a plugin that does not."""
    oak = subject(KIND.format("", ', SamplingDefaults("edm", 0.99, 1.01)'))
    told = fault(checks.check_sample_timesteps, oak)
    assert "95% of the draws (sample_timesteps: host) reach from sigma" in told


DRAW = """
class Drawn(NoiseDistribution):
    def __init__(self, schedule):
        self.schedule = schedule
    def quantile(self, u): return 0.03 + 14 * u
    def cdf(self, sigma): return np.clip((sigma - 0.03) / 14, 0, 1)
    {}
class Fake:
    drawn = None
    @hookimpl
    def sample_timesteps(self, model):
        self.drawn = self.drawn or Drawn(model.schedule)
        return self.drawn
"""


def test_a_distribution_that_is_as_it_should_be(subject):
    checks.check_sample_timesteps(subject(DRAW.format("")))


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("def quantile(self, u): return 14.03 - 14 * u", "quantile falls from"),
        ("def quantile(self, u): return 14 * (u - 0.1)", "quantile is -1.398 at u 0.0001221"),
        ("def quantile(self, u): return np.ones(3)", "quantile gives the shape (3,)"),
        ("def quantile(self, u): return np.tan(u)[0]", "quantile gives the shape ()"),
        ("def quantile(self, u): u *= 2; return 0.03 + 7 * u", "changes the u it is given"),
        ("def quantile(self, u): return u.tolist()[9999]", "quantile raised IndexError"),
        (
            "def quantile(self, u): return 0.03 + 99 * u",
            "(sample_timesteps: oak) reach from sigma 2.505 to 96.55",
        ),
        ("def cdf(self, sigma): return np.clip(sigma / 15, 0, 1)", "cdf is 0.0021"),
        ("def cdf(self, sigma): return np.ones_like(sigma)", "cdf is 1 at sigma"),
        ("def cdf(self, sigma): return sigma", "cdf leaves 0 to 1"),
        ("def cdf(self, sigma): return np.nan * sigma", "cdf is nan"),
        ("def expect(self, f): return 0.7", "expect gives 0.7"),
        ("def density_ratio(self, sigma): return 1.0", "ratio gives the shape ()"),
        ("def reweighted(self, weights): return DiscreteDistribution(self.schedule)", "reweighted"),
    ],
)
def test_a_distribution_at_fault(subject, body, told):
    assert told in fault(checks.check_sample_timesteps, subject(DRAW.format(body)))


def test_a_distribution_without_schedule_or_made_anew(subject):
    source = DRAW.format("").replace("self.schedule = schedule", "pass")
    assert "has no schedule" in fault(checks.check_sample_timesteps, subject(source))


def test_a_distribution_made_anew(subject):
    source = DRAW.format("").replace("self.drawn or ", "")
    assert "a new distribution at each call" in fault(
        checks.check_sample_timesteps, subject(source)
    )


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ("np.ones(3)", "weight_loss gives the shape (3,) for noise.snr of shape (166,)"),
        ("1.0", "weight_loss gives the shape ()"),
        ("None", "weight_loss gives None; return a float64 array"),
        ("np.ones(len(noise.snr), int)", "weight_loss gives int64, not floating numbers"),
        ("np.where(noise.snr > 9e3, np.nan, 1.0)", "weight_loss is nan at noise.snr 1e+04"),
        ("np.maximum(noise.snr - 1, 0)", "weight_loss gives 0 at SNR"),
        ("1 - noise.snr", "weight_loss gives -"),
        ("np.multiply(noise.snr, 2, out=noise.snr)", "weight_loss changes noise.snr"),
        ("np.arange(1.0, 1 + len(noise.snr))", "another weight at another place in the batch"),
        ("np.random.rand(len(noise.snr))", "another weight at another place in the batch"),
        ("noise.snr[1:3].mean() * np.ones_like(noise.snr) * noise.sigma[2]", "another place"),
        ("noise.snr / 0", "raised RuntimeWarning: divide by zero"),
    ],
)
@pytest.mark.filterwarnings("error:divide by zero")
def test_weights_at_fault(subject, weights, told):
    assert told in fault(checks.check_weight_loss, subject(WEIGHT.format(weights)))


ENCODE = """
from sdxl_host import PromptEmbedding
class Fake:
    asked = 0
    @hookimpl
    def encode_prompt(self, prompts, encoders):
        self.asked += 1
        plain = encode_truncated(prompts, encoders)
        {}
"""


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("return replace(plain, context=plain.context.astype(float))", "a context of float64"),
        ("return replace(plain, pooled=plain.pooled.astype(np.float16))", "a pooled of float16"),
        ("return replace(plain, context=plain.context[:, :, 1:])", "a context of shape (5, 77, 7)"),
        ("return replace(plain, pooled=plain.pooled * np.nan)", "a pooled that is not finite"),
        ("return replace(plain, mask=plain.context[:, :, 0] > 9)", "attends nothing"),
        ("return replace(plain, mask=np.ones((1, 77)))", "a mask of shape (1, 77)"),
        ("return replace(plain, pooled=plain.pooled + np.float32(self.asked))", "the second time"),
        (
            "return replace(plain, context=plain.context - plain.context.mean(0))",
            "gives the prompt '' another context alone",
        ),
        (
            "return replace(plain, pooled=plain.pooled[:1].repeat(len(prompts), 0))",
            "gives the prompt 'a cat on a mat' another pooled alone",
        ),
        ("return {}", "a dict, not a PromptEmbedding"),
        ("return encode_truncated([p or p[0] for p in prompts], encoders)", "raised IndexError"),
        (
            "return encode_truncated([p.encode('ascii').decode() for p in prompts], encoders)",
            "Unicode",
        ),
    ],
)
def test_embeddings_at_fault(subject, body, told):
    assert told in fault(checks.check_encode_prompt, subject(ENCODE.format(body)))


def test_padding_that_is_masked_may_be_as_long_as_the_batch_needs(subject):
    """An embedding is compared where it is attended."""
    checks.check_encode_prompt(
        subject(
            ENCODE.format(
                "longest = max(len(p.split()) for p in prompts) + 77\n"
                "        context = np.zeros((len(prompts), longest, 8), np.float32)\n"
                "        context[:, :77] = plain.context\n"
                "        mask = np.arange(longest) < np.full((len(prompts), 1), 77)\n"
                "        return PromptEmbedding(context, plain.pooled, mask)"
            )
        )
    )


# ---- the parts


def test_noise_levels_go_from_1e4_to_1e_4():
    noise = noise_levels()
    assert noise.snr[[0, -1]] == pytest.approx([1e4, 1e-4])
    assert (np.diff(noise.sigma) > 0).all()
    assert noise.sigma.shape == noise.timestep.shape == (161,)
    assert len(noise_levels(5).sigma) == 5


def test_the_tiny_model_has_numbers_and_no_network():
    model = tiny_model()
    assert model.preconditioning.name == "eps"
    assert len(model.schedule) == 1000
    assert encode_truncated(["a"], model.encoders).context.shape == (1, 77, 8)
    for part in ("network", "first_stage", "conditioner"):
        with pytest.raises(HostError, match=rf"has no {part.replace('_', ' ')}; .* use tiny_run"):
            getattr(model, part)


def test_the_tiny_encoders_tell_prompts_apart():
    """By words, their letters and their order; and a position knows nothing of later ones."""
    embedding = encode_truncated(["cat dog", "dog cat", "cta dog", "cat bird"], tiny_encoders())
    for one in range(4):
        for other in range(one):
            assert not np.array_equal(embedding.pooled[one], embedding.pooled[other])
    assert np.array_equal(embedding.context[0, :2], embedding.context[3, :2])
    assert embedding.context.dtype == embedding.pooled.dtype == np.float32


def test_attributes_that_change_are_found():
    class One:
        count = 0
        shared: ClassVar[list[int]] = []

        def __init__(self) -> None:
            self.array, self.rng, self.table = np.zeros(2), np.random.default_rng(0), {"a": [1]}
            self.inner = noise_levels(3)

    one = One()
    before = attributes(one), class_attributes(One)
    assert changed(before[0], attributes(one)) == []
    one.array[0] = 1
    one.rng.random()
    one.table["a"].append(2)
    one.inner.sigma[0] = 7
    one.new = 1
    assert changed(before[0], attributes(one)) == ["array", "rng", "table", "inner", "new"]
    One.shared.append(1)
    One.count += 1
    assert changed(before[1], class_attributes(One)) == ["count", "shared"]


def test_what_belongs_to_others_is_not_looked_into():
    """Loggers know of all loggers, modules of all there is, and tensors compute to compare."""
    from mindspore import Parameter, Tensor, nn

    class Adapter(logging.LoggerAdapter[logging.Logger]):
        pass

    class Inner:
        pass

    class One:
        log, numpy = logging.getLogger(__name__), np

        def __init__(self) -> None:
            self.log, self.adapter, self.np = type(self).log, Adapter(type(self).log, {}), np
            self.tensor, self.cell = Tensor(np.ones(2)), nn.Cell()
            self.inner = Inner()
            self.inner.weights = [Parameter(np.ones(2, np.float32))]
            self.recent = deque([1.0])
            self.chance = random.Random(0)
            self.parts = np.array([np.ones(2), None], object)
            self.kind = Inner

    one = One()
    before = attributes(one), class_attributes(One)
    logging.getLogger(f"{__name__}.later")
    assert changed(before[0], attributes(one)) == []
    assert changed(before[1], class_attributes(One)) == []
    one.tensor, one.inner.weights[0] = Tensor(np.ones(2)), Parameter(np.ones(2, np.float32))
    one.recent.append(2.0)
    one.chance.random()
    one.parts[0][0] = 2.0
    found = changed(before[0], attributes(one))
    assert found == ["tensor", "inner", "recent", "chance", "parts"]


def test_an_array_of_another_library_is_compared_element_by_element():
    class Array:
        def __ne__(self, other: object) -> Any:
            return np.array([False, True])

        def __hash__(self) -> int:
            return 0

    assert changed({"a": Array()}, {"a": Array()}) == ["a"]


def test_a_property_that_is_kept_is_no_change():
    one = type("One", (), {})()
    one.schedule = tiny_model().schedule
    before = attributes(one)
    assert one.schedule.edges is not None
    assert "edges" in vars(one.schedule)
    assert changed(before, attributes(one)) == []


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
    assert plain.lines[0].split() == ["plugins", "none"]
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


def test_state_that_is_not_kept_shared_or_drawn_anew_is_found(subject, device):
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


def test_state_that_does_not_come_back(subject, device):
    source = stateful().replace('self.seen = state["seen"]', "pass")
    told = fault(run_checks.check_state, Runs(subject(source)))
    assert "its state_dict after load_state_dict differs in 0 state_dict.seen" in told


def test_state_that_holds_a_number_that_is_not_one(subject, device):
    """Before something is measured, for one."""
    runs = Runs(subject(stateful(state="self.seen, 'none': float('nan')")))
    run_checks.check_state(runs)


def test_state_that_can_t_be_saved(subject, device):
    runs = Runs(subject(stateful(state="{1, 2}")))
    told = fault(run_checks.check_state, runs)
    assert "is a set; only str, int, float" in told
    with pytest.raises(PluginError) as again:
        _ = runs.whole
    assert str(again.value) == told  # kept, not run once more


def test_a_package_that_changes_what_it_is_not_part_of_is_found(subject, site, plain, device):
    """It is imported by a module that the run imports, and here changes nothing; that is enough."""
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


def test_a_pair_that_is_refused_by_both_names(site, subject, device):
    site.add("elm", source=HEAD + WEIGHT.format("noise.snr"))
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
def test_a_pair_that_fails_is_not_refused(site, subject, device, body, told):
    site.add("elm")
    source = BUILD.format(body)
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


# ---- in another process


@pytest.mark.parametrize(
    ("hook", "body"),
    [
        (
            "sample_timesteps",
            "@hookimpl(wrapper=True)\n"
            "    def sample_timesteps(self):\n"
            "        distribution = yield\n"
            "        return distribution.reweighted(1.0 + np.arange(1000) * (hash('a') % 97))\n",
        ),
        (
            "weight_loss",
            "@hookimpl\n"
            "    def weight_loss(self, noise):\n"
            "        return noise.snr + [ord(n) for n in set('abcdefghijklmnopqrstuvwxyz')][0]\n",
        ),
        (
            "encode_prompt",
            "@hookimpl\n"
            "    def encode_prompt(self, prompts, encoders):\n"
            "        texts = [' '.join(set(prompt.split())) for prompt in prompts]\n"
            "        return encode_truncated(texts, encoders)\n",
        ),
    ],
)
def test_what_depends_on_hash_is_found(subject, hook, body):
    told = fault(hashes.check_hashes, subject(f"class Fake:\n    {body}"))
    assert f": {hook} answers otherwise in another process with the same seed; sort" in told


def test_what_does_not_depend_on_hash_passes(subject):
    hashes.check_hashes(subject(f"print('hello')\n{GOOD}", low=0.25))


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("import os; os._exit(3)", "a process that calls its hooks ended with exit code 3"),
        ("import os; os._exit(0)", "a process that calls its hooks ended without a word"),
        ("raise ValueError('no')", "weight_loss: oak: plugin oak (fake-oak 1.0) raised ValueE"),
    ],
)
def test_a_process_that_fails(subject, body, told):
    oak = subject(
        f"class Fake:\n    @hookimpl\n    def weight_loss(self, noise):\n        {body}\n"
    )
    assert told in fault(hashes.check_hashes, oak)


def test_the_processes_need_no_mindspore(site):
    site.add("oak", source=HEAD + GOOD)
    code = (
        "import sys, tempfile, pathlib\n"
        "from sdxl_host.testing.hashes import digests\n"
        "from sdxl_host.testing.subject import Subject\n"
        "assert len(digests(Subject('oak', pathlib.Path(tempfile.mkdtemp())))) == 3\n"
        "assert 'mindspore' not in sys.modules and 'pytest' not in sys.modules\n"
    )
    run_python(code, site.python_path)


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


def test_the_contract_in_pytest(site, pytester, device):
    """Broken promises fail with their message and nothing else; the cost is told in the end."""
    site.add("elm")
    site.add("oak", source=HEAD + WEIGHT.format("noise.snr") + "    Options = 3\n")
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
