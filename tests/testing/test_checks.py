"""What the checks without a run accept and find."""

from __future__ import annotations

import pytest

from sdxl_host.errors import ConfigError
from sdxl_host.plugins.discovery import discover
from sdxl_host.plugins.inspection import check_import, check_metadata, check_options
from sdxl_host.testing import checks, hashes, prompt_checks

# ---- without a run: kept


WEIGHT = """
class Fake:
    @hookimpl
    def weight_loss(self, noise):
        return {}
"""
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
    prompt_checks.check_encode_prompt,
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


def test_values_that_do_not_fit_are_the_contract_s_own(subject, fault):
    found = subject(GOOD)
    with pytest.raises(ConfigError, match=r"plugins\.oak\.lwo: there is no such option"):
        check_options(found.installed, found.cls, {"lwo": 1.0})
    del found.cls.Options
    told = fault(check_options, found.installed, found.cls, {"low": 1.0})
    assert told.endswith("has no options; leave out low")


@pytest.mark.parametrize("check", LIGHT_CHECKS)
def test_a_hook_that_is_not_there_is_the_host_s(subject, check):
    check(subject("class Fake:\n    @hookimpl\n    def on_step_end(self): pass\n"))


def test_the_light_checks_need_no_mindspore(site, run_python, head):
    site.add("oak", source=head + GOOD)
    code = (
        "import sys, tempfile, pathlib\n"
        "from sdxl_host.testing import checks, prompt_checks\n"
        "from sdxl_host.testing.subject import Subject\n"
        "oak = Subject('oak', pathlib.Path(tempfile.mkdtemp()))\n"
        "for module in (checks, prompt_checks):\n"
        "    for name in module.__all__:\n"
        "        if name.startswith('check_'):\n"
        "            getattr(module, name)(oak)\n"
        "assert 'mindspore' not in sys.modules and 'pytest' not in sys.modules\n"
    )
    run_python(code, site.python_path)


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
        (BUILD.format("if model: return None"), "is a wrapper that returns nothing"),
        (BUILD.format("if model: raise ValueError('no')"), "raised ValueError: no"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_a_model_at_fault(subject, source, told, fault):
    assert told in fault(checks.check_build_model, subject(source))


def test_notes_that_are_no_lines(subject, fault):
    oak = "class Fake:\n    @hookimpl\n    def on_step_end(self): pass\n    def notes(self): {}\n"
    assert "'oak: a\\nb'" in fault(checks.check_notes, subject(oak.format("return ['a\\nb']")))


def test_notes_that_raise(subject, fault):
    oak = (
        "class Fake:\n    @hookimpl\n    def on_step_end(self): pass\n    def notes(self): 1 / 0\n"
    )
    told = "notes: oak: plugin oak (fake-oak 1.0) raised ZeroDivisionError"
    assert told in fault(checks.check_notes, subject(oak))


def test_a_model_of_a_narrow_range(subject):
    """Its noise levels are fewer than the shapes that the preconditioning is asked with."""
    checks.check_build_model(subject(KIND.format("", ', SamplingDefaults("edm", 0.99, 1.01)')))


def test_a_range_that_the_host_s_draws_leave(subject, fault):
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
def test_a_distribution_at_fault(subject, body, told, fault):
    assert told in fault(checks.check_sample_timesteps, subject(DRAW.format(body)))


def test_a_distribution_without_schedule_or_made_anew(subject, fault):
    source = DRAW.format("").replace("self.schedule = schedule", "pass")
    assert "has no schedule" in fault(checks.check_sample_timesteps, subject(source))


def test_a_distribution_made_anew(subject, fault):
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
def test_weights_at_fault(subject, weights, told, fault):
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
def test_embeddings_at_fault(subject, body, told, fault):
    assert told in fault(prompt_checks.check_encode_prompt, subject(ENCODE.format(body)))


def test_padding_that_is_masked_may_be_as_long_as_the_batch_needs(subject):
    """An embedding is compared where it is attended."""
    prompt_checks.check_encode_prompt(
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
def test_what_depends_on_hash_is_found(subject, hook, body, fault):
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
def test_a_process_that_fails(subject, body, told, fault):
    oak = subject(
        f"class Fake:\n    @hookimpl\n    def weight_loss(self, noise):\n        {body}\n"
    )
    assert told in fault(hashes.check_hashes, oak)


def test_the_processes_need_no_mindspore(site, run_python, head):
    site.add("oak", source=head + GOOD)
    code = (
        "import sys, tempfile, pathlib\n"
        "from sdxl_host.testing.hashes import digests\n"
        "from sdxl_host.testing.subject import Subject\n"
        "assert len(digests(Subject('oak', pathlib.Path(tempfile.mkdtemp())))) == 3\n"
        "assert 'mindspore' not in sys.modules and 'pytest' not in sys.modules\n"
    )
    run_python(code, site.python_path)
