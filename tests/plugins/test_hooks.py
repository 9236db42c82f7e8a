"""How plugins compose: who answers a hook, what is refused, and who is blamed for an error."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from packaging.specifiers import SpecifierSet

from sdxl_host.diffusion.conditioning import PromptEmbedding, TextEncoders
from sdxl_host.diffusion.distributions import DiscreteDistribution
from sdxl_host.diffusion.model import DiffusionModel, Lazy, SamplingDefaults
from sdxl_host.diffusion.objective import NoiseLevels
from sdxl_host.diffusion.preconditioning import EpsPreconditioning, VPreconditioning
from sdxl_host.diffusion.schedule import NoiseSchedule
from sdxl_host.errors import ConfigError, PluginError
from sdxl_host.hookspecs import HOOKS, hookimpl
from sdxl_host.plugins.discovery import Installed
from sdxl_host.plugins.hooks import Hooks, Plugin
from sdxl_host.plugins.roles import Implementation, implementations

SCHEDULE = NoiseSchedule.scaled_linear()
UNIFORM = DiscreteDistribution(SCHEDULE)
NOISE = NoiseLevels.at(np.array([0.5, 1.0, 2.0]), SCHEDULE, UNIFORM)
ANSWERED = ("build_model", "sample_timesteps", "weight_loss", "encode_prompt")


def never() -> Any:
    raise AssertionError("hooks must not build networks")


# Every part that is built when first used, and none may be.
PARTS = {
    part.name: Lazy(never) for part in dataclasses.fields(DiffusionModel) if "_part" in part.name
}
MODEL = DiffusionModel(
    preconditioning=EpsPreconditioning(SCHEDULE),
    schedule=SCHEDULE,
    sampling=SamplingDefaults("trailing", 0.03, 14.6),
    distribution=UNIFORM,
    offset_noise_level=0.0,
    **PARTS,
)
ENCODERS = TextEncoders(
    [SimpleNamespace(width=4, pooled_width=0), SimpleNamespace(width=6, pooled_width=5)]
)
PROMPTS = ["a cat", "a dog"]


def embedding(
    context: tuple[int, ...] = (2, 7, 10), pooled: tuple[int, ...] = (2, 5), mask: Any = None
) -> PromptEmbedding:
    return PromptEmbedding(np.zeros(context, np.float32), np.zeros(pooled, np.float32), mask)


# What each hook is called with, and a good answer to it.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "build_model": {"config": {"model": "tiny"}},
    "sample_timesteps": {"model": MODEL, "step": 3},
    "weight_loss": {"model": MODEL, "noise": NOISE, "step": 3},
    "encode_prompt": {"prompts": PROMPTS, "encoders": ENCODERS},
    "on_step_end": {"trainer": SimpleNamespace(), "result": SimpleNamespace()},
}
GOOD: dict[str, Any] = {
    "build_model": MODEL,
    "sample_timesteps": UNIFORM,
    "weight_loss": np.ones(3),
    "encode_prompt": embedding(),
}


class Defaults:
    """The host's own answers."""

    @hookimpl
    def build_model(self):
        return GOOD["build_model"]

    @hookimpl
    def sample_timesteps(self):
        return GOOD["sample_timesteps"]

    @hookimpl
    def weight_loss(self):
        return GOOD["weight_loss"]

    @hookimpl
    def encode_prompt(self):
        return GOOD["encode_prompt"]


def installed(name: str) -> Installed:
    return Installed(name, f"dist-{name}", "2.1", SpecifierSet(">=0"), f"module_{name}", "Plugin")


def selected(**instances: Any) -> list[Plugin]:
    return [Plugin(installed(name), None, instance) for name, instance in instances.items()]


def hooks_of(**instances: Any) -> Hooks:
    return Hooks(Defaults(), selected(**instances))


def call(hooks: Hooks, hook: str) -> Any:
    return getattr(hooks, hook)(**ARGUMENTS[hook])


def made(hook: str, method: Callable[..., Any], **mark: Any) -> Any:
    """An instance of a plugin class with one hook."""
    return type("Made", (), {hook: hookimpl(**mark)(method)})()


def claiming(hook: str, answer: Callable[[], Any]) -> Any:
    def method(self):
        return answer()

    return made(hook, method)


def adapting(hook: str, after: Any = lambda r: r, before: Callable[[], Any] = lambda: None) -> Any:
    def method(self):
        before()
        result = yield
        return after(result)

    return made(hook, method, wrapper=True)


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise error

    return fail


def answering(value: Any) -> Callable[..., Any]:
    return lambda *_: value


# ---- who answers


@pytest.mark.parametrize("hook", ANSWERED)
def test_the_host_answers_where_no_plugin_claims(hook):
    assert hooks_of().chain(hook) == "host"
    np.testing.assert_equal(call(hooks_of(), hook), GOOD[hook])


@pytest.mark.parametrize("hook", ANSWERED)
def test_a_claim_answers_in_the_hosts_place(hook):
    """The host's default is not even called."""
    other = {
        "build_model": MODEL.with_preconditioning(VPreconditioning(SCHEDULE)),
        "sample_timesteps": DiscreteDistribution(SCHEDULE),
        "weight_loss": np.array([1.0, 2.0, 3.0]),
        "encode_prompt": embedding((2, 9, 10)),
    }[hook]
    defaults = type("D", (Defaults,), {hook: hookimpl(lambda self: never())})()
    hooks = Hooks(defaults, selected(snr=claiming(hook, lambda: other)))
    np.testing.assert_equal(call(hooks, hook), other)
    assert hooks.chain(hook) == "snr"


@pytest.mark.parametrize("hook", ANSWERED)
def test_a_claim_on_one_hook_leaves_the_others_to_the_host(hook):
    hooks = hooks_of(snr=claiming(hook, lambda: GOOD[hook]))
    for other in ANSWERED:
        np.testing.assert_equal(call(hooks, other), GOOD[other])
        assert hooks.chain(other) == ("snr" if other == hook else "host")


@pytest.mark.parametrize("hook", ANSWERED)
@pytest.mark.parametrize("claimed", [False, True])
def test_wrappers_adapt_in_the_order_of_the_list(hook, claimed):
    """The first of the list adapts first: it sees the claim's answer, the second sees its."""
    seen = []

    def noting(name):
        def after(result):
            seen.append(name)
            return result

        return after

    plugins = {
        "one": adapting(hook, noting("one")),
        "claim": claiming(hook, lambda: seen.append("claim") or GOOD[hook]),
        "two": adapting(hook, noting("two")),
        "three": adapting(hook, noting("three")),
    }
    if not claimed:
        del plugins["claim"]
    hooks = hooks_of(**plugins)
    call(hooks, hook)
    first = "claim" if claimed else "host"
    assert seen == ([first] if claimed else []) + ["one", "two", "three"]
    assert hooks.chain(hook) == f"{first} -> one -> two -> three"


def test_each_wrapper_changes_what_the_one_before_it_returned():
    double = adapting("weight_loss", lambda weights: 2 * weights)
    add = adapting("weight_loss", lambda weights: weights + 1)
    np.testing.assert_array_equal(call(hooks_of(double=double, add=add), "weight_loss"), [3, 3, 3])
    np.testing.assert_array_equal(call(hooks_of(add=add, double=double), "weight_loss"), [4, 4, 4])


def test_observers_are_called_in_the_order_of_the_list_and_the_hosts_own_last():
    seen = []

    def observer(name):
        return made("on_step_end", lambda self: seen.append(name))

    own = SimpleNamespace(on_step_end=lambda trainer, result: seen.append("progress"))
    plugins = selected(one=observer("one"), two=observer("two"), three=observer("three"))
    call(Hooks(Defaults(), plugins, [own]), "on_step_end")
    assert seen == ["one", "two", "three", "progress"]


def test_any_number_may_observe():
    """Observing is no claim."""
    hooks = hooks_of(a=made("on_step_end", lambda self: 1), b=made("on_step_end", lambda self: 2))
    assert call(hooks, "on_step_end") is None


@pytest.mark.parametrize("hook", HOOKS)
def test_an_implementation_gets_the_arguments_it_names(hook):
    seen: dict[str, Any] = {}
    names = list(ARGUMENTS[hook])
    namespace: dict[str, Any] = {"seen": seen, "answer": GOOD.get(hook)}
    source = f"def method(self, {', '.join(reversed(names))}):\n"
    source += "".join(f"    seen[{name!r}] = {name}\n" for name in names) + "    return answer\n"
    exec(source, namespace)
    call(hooks_of(snr=made(hook, namespace["method"])), hook)
    assert seen == ARGUMENTS[hook]


def test_a_plugin_with_several_hooks():
    class Both:
        @hookimpl(wrapper=True)
        def weight_loss(self):
            weights = yield
            return weights * 3

        @hookimpl
        def sample_timesteps(self):
            return UNIFORM

        @hookimpl
        def on_step_end(self, result):
            result.seen = True

    hooks = hooks_of(both=Both())
    assert implementations(installed("both"), Both) == [
        Implementation("sample_timesteps", "claims"),
        Implementation("weight_loss", "adapts"),
        Implementation("on_step_end", "observes"),
    ]
    assert hooks.describe() == [
        "both (dist-both 2.1): claims sample_timesteps, adapts weight_loss, observes on_step_end"
    ]
    np.testing.assert_array_equal(call(hooks, "weight_loss"), [3, 3, 3])
    result = SimpleNamespace()
    hooks.on_step_end(trainer=None, result=result)
    assert result.seen


@pytest.mark.parametrize("hook", ANSWERED)
def test_a_plugin_may_be_a_dataclass(hook):
    """An instance that has __eq__ and no __hash__ claims and adapts like any other."""

    def method(self):
        return GOOD[hook]

    claim = dataclasses.make_dataclass("Claim", [], namespace={hook: hookimpl(method)})
    adapter = dataclasses.dataclass(type(adapting(hook)))
    assert claim.__hash__ is None
    hooks = hooks_of(one=claim(), two=adapter())
    np.testing.assert_equal(call(hooks, hook), GOOD[hook])


def test_inherited_hooks_count():
    class Base:
        @hookimpl
        def sample_timesteps(self):
            return UNIFORM

    class Derived(Base):
        pass

    assert implementations(installed("a"), Derived) == [
        Implementation("sample_timesteps", "claims")
    ]


# ---- two owners


@pytest.mark.parametrize("hook", ANSWERED)
def test_two_claims_on_one_hook_are_refused(hook):
    """Before anything is called, naming both plugins, their packages and the way out."""
    with pytest.raises(PluginError) as refused:
        hooks_of(edm=claiming(hook, never), bias=adapting("weight_loss"), snr=claiming(hook, never))
    assert str(refused.value) == (
        f"{hook} is claimed by two plugins, edm (dist-edm 2.1) and snr (dist-snr 2.1); "
        "select one of them with --plugins"
    )


def replacing(kind: type) -> Any:
    return adapting("build_model", lambda model: model.with_preconditioning(kind(SCHEDULE)))


def test_one_plugin_may_replace_the_preconditioning():
    hooks = hooks_of(bias=adapting("build_model"), edm=replacing(VPreconditioning))
    for _ in range(2):  # nothing of one call is held against the next
        assert call(hooks, "build_model").preconditioning.name == "v"


@pytest.mark.parametrize("claimed", [False, True])
def test_a_second_replacement_of_the_preconditioning_is_refused(claimed):
    """`preconditioning` has one owner, be it an adapter or the plugin that claims the model."""
    first = (
        claiming("build_model", lambda: MODEL.with_preconditioning(VPreconditioning(SCHEDULE)))
        if claimed
        else replacing(VPreconditioning)
    )
    hooks = hooks_of(edm=first, bias=adapting("build_model"), flow=replacing(EpsPreconditioning))
    for _ in range(2):
        with pytest.raises(PluginError) as refused:
            call(hooks, "build_model")
        message = str(refused.value)
        assert message.startswith("build_model: ")
        assert message.endswith("; select one of them with --plugins")
        assert "edm" in message
        assert "flow" in message
        assert "bias" not in message


def test_the_same_plugin_twice_is_refused():
    plugin = Plugin(installed("snr"), None, claiming("weight_loss", never))
    with pytest.raises(PluginError, match="snr"):
        Hooks(Defaults(), [plugin, plugin])


# ---- refused at registration


class TryFirst:
    @hookimpl(tryfirst=True)
    def weight_loss(self): ...


class TryLast:
    @hookimpl(trylast=True)
    def weight_loss(self): ...


class OptionalHook:
    @hookimpl(optionalhook=True)
    def weight_loss(self): ...


class SpecName:
    @hookimpl(specname="weight_loss")
    def weight(self): ...


class HookWrapper:
    @hookimpl(hookwrapper=True)
    def weight_loss(self):
        yield


class WrapsObserver:
    @hookimpl(wrapper=True)
    def on_step_end(self):
        result = yield
        return result


class WrapsObserverWithoutYield:
    @hookimpl(wrapper=True)
    def on_step_end(self): ...


class YieldsInObserver:
    @hookimpl
    def on_step_end(self):
        yield


class HasDefault:
    @hookimpl
    def weight_loss(self, noise, step=0): ...


class KeywordDefault:
    @hookimpl
    def weight_loss(self, noise, *, gamma=5.0): ...


class Unmarked:
    @hookimpl
    def sample_timesteps(self): ...

    def weight_loss(self): ...


class UnmarkedStatic:
    @staticmethod
    def weight_loss(noise): ...


class NoHook:
    def helper(self): ...


class ForgetsToReturn:
    @hookimpl(wrapper=True)
    def weight_loss(self):
        weights = yield
        weights *= 2


class ReturnsNone:
    @hookimpl(wrapper=True)
    def weight_loss(self):
        yield
        return None


class ReturnsBare:
    @hookimpl(wrapper=True)
    def weight_loss(self, step):
        weights = yield
        if step > 3:
            return
        weights *= 2


class NoYield:
    @hookimpl(wrapper=True)
    def weight_loss(self):
        return 1


class YieldWithoutWrapper:
    @hookimpl
    def weight_loss(self):
        weights = yield
        return weights


class UnknownHook:
    @hookimpl
    def weigh_loss(self): ...


class UnlikeAnyHook:
    @hookimpl
    def zzz(self): ...


class UnknownArgument:
    @hookimpl
    def weight_loss(self, nois): ...


class UnlikeAnyArgument:
    @hookimpl
    def weight_loss(self, zzz): ...


class SavesOnly:
    @hookimpl
    def weight_loss(self): ...

    def state_dict(self): ...


class LoadsOnly:
    @hookimpl
    def weight_loss(self): ...

    def load_state_dict(self, state): ...


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (
            TryFirst,
            "weight_loss uses @hookimpl(tryfirst=...), which is refused; the order is that ",
        ),
        (
            TryLast,
            "weight_loss uses @hookimpl(trylast=...), which is refused; the order is that of ",
        ),
        (
            OptionalHook,
            "weight_loss uses @hookimpl(optionalhook=...), which is refused; a misspelt ",
        ),
        (
            SpecName,
            "weight uses @hookimpl(specname=...), which is refused; a method must have the ",
        ),
        (
            HookWrapper,
            "weight_loss uses @hookimpl(hookwrapper=...), which is refused; use wrapper=",
        ),
        (WrapsObserver, "on_step_end observes; it can't be a wrapper"),
        (WrapsObserverWithoutYield, "on_step_end observes; it can't be a wrapper"),
        (YieldsInObserver, "on_step_end observes; it can't be a wrapper"),
        (
            HasDefault,
            "weight_loss gives the parameter step a default, so it would never be passed; ",
        ),
        (KeywordDefault, "weight_loss gives the parameter gamma a default, so it would never be "),
        (Unmarked, "weight_loss has a hook's name but is not marked; put @hookimpl above it"),
        (UnmarkedStatic, "weight_loss has a hook's name but is not marked; put @hookimpl above it"),
        (NoHook, "implements no hook; mark at least one of build_model, sample_timesteps, weight_"),
        (ForgetsToReturn, "weight_loss is a wrapper that returns nothing; end it with `return "),
        (ReturnsNone, "weight_loss is a wrapper that returns nothing; end it with `return result`"),
        (ReturnsBare, "weight_loss is a wrapper that returns nothing; end it with `return result`"),
        (NoYield, "weight_loss is a wrapper without `result = yield`; add it, or remove wrapper="),
        (YieldWithoutWrapper, "weight_loss has a yield but is no wrapper; use @hookimpl(wrapper="),
        (
            UnknownHook,
            "there is no hook named weigh_loss (did you mean weight_loss?) (hooks: build",
        ),
        (
            UnlikeAnyHook,
            "there is no hook named zzz (hooks: build_model, sample_timesteps, weight_",
        ),
        (
            UnknownArgument,
            "weight_loss has no argument nois (did you mean noise?) (arguments: model, ",
        ),
        (UnlikeAnyArgument, "weight_loss has no argument zzz (arguments: model, noise, step)"),
        (SavesOnly, "has state_dict but no load_state_dict; it needs both or neither"),
        (LoadsOnly, "has load_state_dict but no state_dict; it needs both or neither"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_refused_at_registration(cls, message):
    """Each by name: the plugin, its package, the method and the remedy."""
    for refuse in (
        lambda: implementations(installed("snr"), cls),
        lambda: hooks_of(snr=cls()),
    ):
        with pytest.raises(PluginError) as refused:
            refuse()
        text = str(refused.value)
        assert text.startswith("plugin snr (dist-snr 2.1)")
        assert message in text


@pytest.mark.parametrize(
    "ending", ["return result", "return result if step else 2 * result", "return 0.0"]
)
def test_a_wrapper_that_may_return_something_is_accepted(ending):
    namespace: dict[str, Any] = {}
    exec(f"def method(self, step):\n    result = yield\n    {ending}\n", namespace)
    plugin = made("weight_loss", namespace["method"], wrapper=True)
    assert implementations(installed("snr"), type(plugin)) == [
        Implementation("weight_loss", "adapts")
    ]


# ---- what came back

WRONG = {
    "build_model": {
        "none": (None, "None, not a DiffusionModel"),
        "type": ({"network": 1}, "a dict, not a DiffusionModel"),
        "preconditioning": (MODEL.with_preconditioning("eps"), "Preconditioning"),  # type: ignore
    },
    "sample_timesteps": {
        "none": (None, "None, not a NoiseDistribution"),
        "type": (np.ones(3), "a ndarray, not a NoiseDistribution"),
        "class": (DiscreteDistribution, "not a NoiseDistribution"),
    },
    "weight_loss": {
        "none": (None, "None, not a ndarray"),
        "type": ([1.0, 1.0, 1.0], "a list, not a ndarray"),
        "number": (1.0, "a float, not a ndarray"),
        "scalar": (np.array(1.0), "an array of shape (), not (3,)"),
        "short": (np.ones(2), "an array of shape (2,), not (3,)"),
        "column": (np.ones((3, 1)), "an array of shape (3, 1), not (3,)"),
        "nan": (np.array([1.0, np.nan, 1.0]), "not finite"),
        "infinite": (np.array([1.0, np.inf, 1.0]), "not finite"),
        "negative": (np.array([1.0, -1e-9, 1.0]), "negative weights"),
        "words": (np.array(["a", "b", "c"]), ""),
    },
    "encode_prompt": {
        "none": (None, "None, not a PromptEmbedding"),
        "type": ((np.zeros((2, 7, 10)), np.zeros((2, 5))), "a tuple, not a PromptEmbedding"),
        "fewer rows": (embedding((1, 7, 10)), "a context of shape (1, 7, 10), not (2, 7, 10)"),
        "channels": (embedding((2, 7, 9)), "a context of shape (2, 7, 9), not (2, 7, 10)"),
        "flat context": (embedding((2, 70)), "context of shape (2, 70)"),
        "one axis": (embedding((2,)), "context of shape (2,)"),
        "pooled": (embedding(pooled=(2, 6)), "a pooled of shape (2, 6), not (2, 5)"),
        "pooled rows": (embedding(pooled=(1, 5)), "a pooled of shape (1, 5), not (2, 5)"),
        "no context": (PromptEmbedding(None, np.zeros((2, 5))), "context"),  # type: ignore
        "no pooled": (PromptEmbedding(np.zeros((2, 7, 10)), None), "pooled"),  # type: ignore
        "nan context": (
            PromptEmbedding(np.full((2, 7, 10), np.nan), np.zeros((2, 5))),
            "a context that is not finite",
        ),
        "nan pooled": (
            PromptEmbedding(np.zeros((2, 7, 10)), np.full((2, 5), np.inf)),
            "a pooled that is not finite",
        ),
        "mask shape": (
            embedding(mask=np.ones((2, 8), bool)),
            "a mask of shape (2, 8) and type bool, not (2, 7) and bool",
        ),
        "mask type": (embedding(mask=np.ones((2, 7))), "type float64, not (2, 7) and bool"),
        "mask list": (embedding(mask=[[True] * 7] * 2), "mask"),
        "mask row": (
            embedding(mask=np.array([[True] * 7, [False] * 7])),
            "a mask with a row that attends nothing",
        ),
    },
}
WRONG_ANSWERS = [
    pytest.param(hook, value, said, id=f"{hook}-{case}".replace(" ", "_"))
    for hook, cases in WRONG.items()
    for case, (value, said) in cases.items()
]


@pytest.mark.parametrize(("hook", "value", "said"), WRONG_ANSWERS)
def test_a_wrong_answer_of_a_claim_is_refused(hook, value, said):
    """None among them: the host does not quietly answer in the claim's place."""
    hooks = hooks_of(one=adapting(hook), two=claiming(hook, answering(value)), three=adapting(hook))
    with pytest.raises(PluginError) as refused:
        call(hooks, hook)
    text = str(refused.value)
    assert text.startswith(f"{hook}: two -> one -> three: plugin two (dist-two 2.1) returned ")
    assert said in text
    assert text.endswith("; mend the plugin, or run without it")


@pytest.mark.parametrize(("hook", "value", "said"), WRONG_ANSWERS)
def test_a_wrong_answer_of_a_wrapper_is_refused(hook, value, said):
    """Not the wrapper before it and not the one after it, which would trip over the result."""
    hooks = hooks_of(
        one=adapting(hook),
        two=adapting(hook, answering(value)),
        three=adapting(hook, lambda result: result.nothing_like_this),
    )
    with pytest.raises(PluginError) as refused:
        call(hooks, hook)
    text = str(refused.value)
    assert text.startswith(
        f"{hook}: host -> one -> two -> three: plugin two (dist-two 2.1) returned "
    )
    assert said in text


@pytest.mark.parametrize("hook", ANSWERED)
def test_a_wrapper_that_returns_none_on_one_path_is_refused_there(hook):
    """No check of the source can see it, so the call does."""
    asked = []

    def method(self):
        result = yield
        asked.append(1)
        if len(asked) < 2:
            return result

    hooks = hooks_of(one=made(hook, method, wrapper=True), two=adapting(hook))
    np.testing.assert_equal(call(hooks, hook), GOOD[hook])
    with pytest.raises(PluginError, match=r"plugin one \(dist-one 2\.1\) returned None, not a "):
        call(hooks, hook)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, int, bool])
def test_weights_become_float64_for_whoever_comes_next(dtype):
    seen = []
    hooks = hooks_of(
        snr=claiming("weight_loss", lambda: np.array([0, 1, 1], dtype)),
        bias=adapting("weight_loss", lambda weights: seen.append(weights.dtype) or weights),
    )
    result = call(hooks, "weight_loss")
    assert result.dtype == np.float64
    np.testing.assert_array_equal(result, [0, 1, 1])
    assert seen == [np.float64]


@pytest.mark.parametrize("mask", [None, np.arange(14).reshape(2, 7) % 2 == 0])
def test_a_longer_context_and_a_mask_are_good_answers(mask):
    for length in (7, 1, 300):
        given = embedding((2, length, 10), mask=None if length != 7 else mask)
        hooks = hooks_of(lpw=claiming("encode_prompt", answering(given)))
        assert call(hooks, "encode_prompt") is given


def test_the_same_distribution_object_passes_unchanged():
    """Its tables are kept by identity."""
    other = UNIFORM.reweighted(np.ones(1000))
    hooks = hooks_of(edm=claiming("sample_timesteps", lambda: other))
    assert call(hooks, "sample_timesteps") is other


# ---- what was raised

ERRORS = {
    "other": (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
    "value": (ValueError("gamma"), "ValueError: gamma"),
    "own": (PluginError("gamma is too small; raise it"), "gamma is too small; raise it"),
    "config": (ConfigError("data.size: too small"), "data.size: too small"),
}


def assert_blamed(caught, name: str, hook: str, chain: str, error: Exception, told: str) -> None:
    assert str(caught.value) == (
        f"{hook}: {chain}: plugin {name} (dist-{name} 2.1) raised {told}; "
        "mend the plugin, or run without it"
    )
    assert caught.value.__cause__ is error  # the plugin's own traceback is kept


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("hook", ANSWERED)
def test_an_error_of_a_claim_is_said_of_it(hook, error):
    raised, told = ERRORS[error]
    hooks = hooks_of(one=adapting(hook), two=claiming(hook, raising(raised)), three=adapting(hook))
    with pytest.raises(PluginError) as caught:
        call(hooks, hook)
    assert_blamed(caught, "two", hook, "two -> one -> three", raised, told)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("guilty", ["one", "two", "three"])
@pytest.mark.parametrize("hook", ANSWERED)
def test_an_error_of_a_wrapper_is_said_of_it(hook, guilty, when, error):
    """Before its yield and after it, whichever of three it is."""
    raised, told = ERRORS[error]
    plugins = {name: adapting(hook) for name in ("one", "two", "three")}
    plugins[guilty] = adapting(hook, **{when: raising(raised)})
    with pytest.raises(PluginError) as caught:
        call(hooks_of(**plugins), hook)
    assert_blamed(caught, guilty, hook, "host -> one -> two -> three", raised, told)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("guilty", ["one", "two", "three"])
def test_an_error_of_an_observer_is_said_of_it(guilty, error):
    """The ones before it were called, those after it were not."""
    raised, told = ERRORS[error]
    seen: list[str] = []

    def observer(name):
        def on_step_end(self):
            seen.append(name)
            if name == guilty:
                raise raised

        return made("on_step_end", on_step_end)

    hooks = hooks_of(**{name: observer(name) for name in ("one", "two", "three")})
    with pytest.raises(PluginError) as caught:
        call(hooks, "on_step_end")
    assert_blamed(caught, guilty, "on_step_end", guilty, raised, told)
    assert seen == ["one", "two", "three"][: seen.index(guilty) + 1]


@pytest.mark.parametrize("hook", ANSWERED)
def test_a_wrapper_that_answers_before_it_yields_is_blamed(hook):
    def method(self):
        if hook:
            return GOOD[hook]
        yield

    hooks = hooks_of(one=adapting(hook), two=made(hook, method, wrapper=True), three=adapting(hook))
    with pytest.raises(PluginError, match=r"plugin two \(dist-two 2\.1\) raised RuntimeError"):
        call(hooks, hook)


@pytest.mark.parametrize("hook", ANSWERED)
def test_a_wrapper_that_yields_twice_is_refused(hook):
    """pluggy raises it past all other wrappers; it must still be an error of a plugin."""

    def method(self):
        result = yield
        result = yield
        return result

    hooks = hooks_of(one=adapting(hook), two=made(hook, method, wrapper=True), three=adapting(hook))
    with pytest.raises(PluginError, match=f"{hook}: host -> one -> two -> three: .*second yield"):
        call(hooks, hook)


@pytest.mark.parametrize("adapters", [(), ("one",), ("one", "two")])
@pytest.mark.parametrize("hook", ANSWERED)
def test_an_error_of_the_host_is_no_plugins_fault(hook, adapters):
    """It arrives as it was raised, with its own type, however many plugins adapt the hook."""
    error = ConfigError("model.params: there is no such key")
    defaults = type("D", (Defaults,), {hook: hookimpl(lambda self: raising(error)())})()
    hooks = Hooks(defaults, selected(**{name: adapting(hook) for name in adapters}))
    with pytest.raises(ConfigError) as caught:
        call(hooks, hook)
    assert caught.value is error


def test_an_error_of_a_host_observer_is_no_plugins_fault():
    error = OSError("disk full")
    own = SimpleNamespace(on_step_end=lambda trainer, result: raising(error)())
    hooks = Hooks(Defaults(), selected(a=made("on_step_end", lambda self: None)), [own])
    with pytest.raises(OSError, match="disk full") as caught:
        call(hooks, "on_step_end")
    assert caught.value is error


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit])
def test_an_interruption_is_not_wrapped(interruption):
    hooks = hooks_of(
        one=claiming("weight_loss", raising(interruption())), two=adapting("weight_loss")
    )
    with pytest.raises(interruption):
        call(hooks, "weight_loss")


def test_a_wrapper_may_answer_for_what_failed_inside_it():
    def method(self):
        try:
            return (yield)
        except PluginError:
            return np.full(3, 7.0)

    hooks = hooks_of(
        one=claiming("weight_loss", raising(ValueError("broken"))),
        two=made("weight_loss", method, wrapper=True),
    )
    np.testing.assert_array_equal(call(hooks, "weight_loss"), [7, 7, 7])


# ---- what is known of the plugins


def test_describe_is_one_line_a_plugin_in_order():
    hooks = hooks_of(
        snr=claiming("weight_loss", never),
        bias=adapting("sample_timesteps"),
        watch=made("on_step_end", lambda self: None),
    )
    assert hooks.describe() == [
        "snr (dist-snr 2.1): claims weight_loss",
        "bias (dist-bias 2.1): adapts sample_timesteps",
        "watch (dist-watch 2.1): observes on_step_end",
    ]


def test_notes_are_prefixed_with_the_plugins_name():
    """What a plugin has to say of its options, `notes(model)`; optional."""
    one, two, three = (adapting("weight_loss") for _ in range(3))
    one.notes = lambda model: [f"schedule of {len(model.schedule)}", "multiplier 1 does nothing"]
    three.notes = lambda model: ["mean factor 0.9"]
    assert hooks_of(one=one, two=two, three=three).notes(MODEL) == [
        "one: schedule of 1000",
        "one: multiplier 1 does nothing",
        "three: mean factor 0.9",
    ]


class Counter:
    def __init__(self) -> None:
        self.steps = 0

    @hookimpl
    def on_step_end(self):
        self.steps += 1

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


def test_state_makes_a_round_trip():
    hooks = hooks_of(one=Counter(), bias=adapting("weight_loss"), two=Counter())
    for _ in range(3):
        call(hooks, "on_step_end")
    hooks.plugins[2].instance.steps = 7
    states = hooks.state_dict()
    assert states == {"one": {"steps": 3}, "two": {"steps": 7}}

    fresh = hooks_of(two=Counter(), one=Counter())
    fresh.load_state_dict(states)
    assert fresh.state_dict() == states
    call(fresh, "on_step_end")
    assert fresh.state_dict() == {"one": {"steps": 4}, "two": {"steps": 8}}


def test_a_checkpoint_without_a_plugins_state_is_refused():
    with pytest.raises(PluginError) as refused:
        hooks_of(one=Counter(), two=Counter()).load_state_dict({"one": {"steps": 3}})
    assert str(refused.value) == (
        "plugin two (dist-two 2.1): the checkpoint holds no state of it; start a new run"
    )


def test_state_of_a_plugin_that_is_no_longer_selected_is_left_alone():
    hooks = hooks_of(one=Counter())
    hooks.load_state_dict({"one": {"steps": 3}, "gone": {"steps": 9}})
    assert hooks.state_dict() == {"one": {"steps": 3}}


def test_a_model_is_copied_with_its_unbuilt_parts():
    """Adapters change a copy; the networks are shared and still not built."""

    def change(network):
        return None

    copy = MODEL.with_preconditioning(
        VPreconditioning(SCHEDULE), SamplingDefaults("karras", 0.002, 80.0)
    )
    assert copy.preconditioning.name == "v"
    assert copy.sampling == SamplingDefaults("karras", 0.002, 80.0)
    assert copy.network_part is MODEL.network_part
    assert MODEL.preconditioning.name == "eps"
    assert copy.with_preconditioning(MODEL.preconditioning).sampling == copy.sampling
    twice = copy.with_network(change, trainable=str.isupper).with_network(print)
    assert [one.change for one in twice.changes] == [change, print]
    assert [one.trainable for one in twice.changes] == [str.isupper, None]
    assert copy.changes == ()


def test_a_lazy_part_is_built_once_when_first_asked_for():
    built = []
    part = Lazy(lambda: built.append(1) or object())
    assert built == []
    assert part.get() is part.get()
    assert built == [1]
