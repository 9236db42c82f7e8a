"""One call of a hook: the order of its chain, and which plugin each fault is attributed to."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sdxl_host.errors import ConfigError, PluginError
from sdxl_host.hookspecs import HOOKS, hookimpl
from sdxl_host.plugins.attribution import Plugin
from sdxl_host.plugins.defaults import Defaults
from sdxl_host.plugins.discovery import Installed
from sdxl_host.plugins.hooks import Hooks
from sdxl_host.testing import noise_levels, tiny_encoders, tiny_model

MODEL, ENCODERS, NOISE = tiny_model(), tiny_encoders(), noise_levels(3)
ANSWERED = ("build_model", "sample_timesteps", "weight_loss", "encode_prompt")
# What each hook is called with.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "build_model": {"config": {"model": "tiny"}},
    "sample_timesteps": {"model": MODEL, "step": 3},
    "weight_loss": {"model": MODEL, "noise": NOISE, "step": 3},
    "encode_prompt": {"prompts": ["a cat", "a dog"], "encoders": ENCODERS},
    "on_step_end": {"trainer": SimpleNamespace(), "result": SimpleNamespace()},
}


class Host(Defaults):
    """The host's answers, with a model of numbers alone."""

    @hookimpl
    def build_model(self):
        return MODEL


def hooks_of(defaults: Any = None, **instances: Any) -> Hooks:
    """The hooks of plugins named as the arguments are, in their order."""
    plugins = [
        Plugin(Installed(name, f"dist-{name}", "2.1", None, name, ""), None, instance)
        for name, instance in instances.items()
    ]
    return Hooks(defaults or Host(), plugins)


def call(hooks: Hooks, hook: str = "weight_loss") -> Any:
    return getattr(hooks, hook)(**ARGUMENTS[hook])


def made(method: Callable[..., Any], hook: str = "weight_loss", **mark: Any) -> Any:
    """An object of a plugin class whose one hook is `method`."""
    return type("Made", (), {hook: hookimpl(**mark)(method)})()


def claiming(answer: Callable[[], Any], hook: str = "weight_loss") -> Any:
    return made(lambda self: answer(), hook)


def adapting(after: Any = lambda r: r, before: Any = lambda: None, hook="weight_loss") -> Any:
    def method(self):
        before()
        result = yield
        return after(result)

    return made(method, hook, wrapper=True)


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise error

    return fail


def refusal(hooks: Hooks, hook: str = "weight_loss") -> str:
    """What the user is told when the call is refused."""
    with pytest.raises(PluginError) as refused:
        call(hooks, hook)
    return str(refused.value)


# ---- who answers, and in which order


@pytest.mark.parametrize("hook", ANSWERED)
@pytest.mark.parametrize("is_claimed", [False, True])
def test_a_chain_is_one_answer_and_the_wrappers_in_the_order_of_the_list(hook, is_claimed):
    """Whichever place in the list the claim has; the host is not called where a plugin claims."""
    seen: list[str] = []

    def noted(name: str) -> Any:
        return adapting(lambda result: seen.append(name) or result, hook=hook)

    good = call(hooks_of(), hook)
    claim = claiming(lambda: seen.append("claim") or good, hook)
    plugins = {"one": noted("one"), "claim": claim, "two": noted("two"), "three": noted("three")}
    defaults = type("D", (Host,), {hook: hookimpl(lambda self: seen.append("host") or good)})()
    if not is_claimed:
        del plugins["claim"]
    hooks = hooks_of(defaults, **plugins)
    np.testing.assert_equal(call(hooks, hook), good)
    first = "claim" if is_claimed else "host"
    assert seen == [first, "one", "two", "three"]
    assert hooks.chain(hook) == f"{first} -> one -> two -> three"


def test_each_wrapper_changes_what_the_one_before_it_returned():
    double, add = adapting(lambda weights: 2 * weights), adapting(lambda weights: weights + 1)
    plain = call(hooks_of())
    np.testing.assert_array_equal(call(hooks_of(double=double, add=add)), 2 * plain + 1)
    np.testing.assert_array_equal(call(hooks_of(add=add, double=double)), 2 * (plain + 1))


def test_the_last_wrapper_runs_first_up_to_its_yield():
    """As pluggy's own wrappers do: the last of the list surrounds those before it."""
    seen: list[str] = []
    plugins = {name: adapting(before=lambda n=name: seen.append(n)) for name in ("one", "two")}
    call(hooks_of(**plugins))
    assert seen == ["two", "one"]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("is_wrapper", [False, True])
def test_an_implementation_gets_the_arguments_it_names(hook, is_wrapper):
    if is_wrapper and hook == "on_step_end":
        is_wrapper = False  # it has no wrappers
    seen: dict[str, Any] = {}
    answer = None if hook == "on_step_end" else call(hooks_of(), hook)
    namespace: dict[str, Any] = {"seen": seen, "answer": answer}
    names = list(ARGUMENTS[hook])
    source = f"def method(self, {', '.join(reversed(names))}):\n"
    source += "".join(f"    seen[{name!r}] = {name}\n" for name in names)
    source += "    yield\n" * is_wrapper + "    return answer\n"
    exec(source, namespace)
    mark = {"wrapper": True} if is_wrapper else {}
    call(hooks_of(snr=made(namespace["method"], hook, **mark)), hook)
    assert seen == ARGUMENTS[hook]


def test_observers_are_called_in_the_order_of_the_list_and_the_hosts_own_last():
    """Observing is no claim: any number may, and what they return is nothing."""
    seen: list[str] = []

    def observer(name: str) -> Any:
        return made(lambda self: seen.append(name) or 7, "on_step_end")

    observers = {name: observer(name) for name in ("one", "two", "three")}
    hooks = hooks_of(**observers)
    hooks.observe([SimpleNamespace(on_step_end=lambda trainer, result: seen.append("progress"))])
    assert call(hooks, "on_step_end") is None
    assert seen == ["one", "two", "three", "progress"]


# ---- what was raised

ERRORS = {
    "other": (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
    "host's": (PluginError("gamma is too small; raise it"), "gamma is too small; raise it"),
}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("guilty", ["one", "claim before", "two before", "two after", "three"])
def test_an_error_names_the_plugin_that_raised_it(guilty, error):
    """With the chain, the cause and the remedy, whichever link it is and wherever it raises."""
    raised, text = ERRORS[error]
    fail, (name, _, when) = raising(raised), guilty.partition(" ")
    plugins = {each: adapting() for each in ("one", "two", "three")}
    if name == "claim":
        plugins["claim"] = claiming(fail)
    else:
        plugins[name] = adapting(**{when or "after": fail})
    with pytest.raises(PluginError) as caught:
        call(hooks_of(**plugins))
    first = "claim" if name == "claim" else "host"
    assert str(caught.value) == (
        f"weight_loss: {first} -> one -> two -> three: plugin {name} (dist-{name} 2.1) raised "
        f"{text}; mend the plugin, or run without it"
    )
    assert caught.value.__cause__ is raised  # the plugin's own traceback is kept


def test_an_error_of_an_observer_is_its_own_and_those_after_it_are_not_called():
    seen: list[str] = []

    def observer(name: str) -> Any:
        def on_step_end(self):
            seen.append(name)
            if name == "two":
                raise KeyError("gone")

        return made(on_step_end, "on_step_end")

    text = refusal(hooks_of(**{n: observer(n) for n in ("one", "two", "three")}), "on_step_end")
    assert text.startswith("on_step_end: two: plugin two (dist-two 2.1) raised KeyError: 'gone'; ")
    assert seen == ["one", "two"]


@pytest.mark.parametrize("adapters", [0, 2])
def test_an_error_of_the_host_is_no_plugins_fault(adapters):
    """It arrives as it was raised, with its own type, however many plugins adapt the hook."""
    error = ConfigError("model.params: there is no such key")
    defaults = type("D", (Host,), {"weight_loss": hookimpl(lambda self: raising(error)())})()
    with pytest.raises(ConfigError) as caught:
        call(hooks_of(defaults, **{f"p{index}": adapting() for index in range(adapters)}))
    assert caught.value is error
    own = SimpleNamespace(on_step_end=lambda trainer, result: raising(error)())
    hooks = hooks_of(a=made(lambda self: None, "on_step_end"))
    hooks.observe([own])
    with pytest.raises(ConfigError) as caught:
        call(hooks, "on_step_end")
    assert caught.value is error


def test_an_error_that_replaces_the_hosts_is_the_plugins():
    def method(self):
        try:
            yield
        except ConfigError as error:
            raise ValueError("worse") from error

    fail = hookimpl(lambda self: raising(ConfigError("bad"))())
    defaults = type("D", (Host,), {"weight_loss": fail})()
    text = refusal(hooks_of(defaults, one=made(method, wrapper=True), two=adapting()))
    assert "plugin one (dist-one 2.1) raised ValueError: worse" in text


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit])
def test_an_interruption_is_not_wrapped_and_wrappers_clean_up(interruption):
    seen: list[str] = []

    def method(self):
        try:
            return (yield)
        finally:
            seen.append("closed")

    one, two = claiming(raising(interruption())), made(method, wrapper=True)
    with pytest.raises(interruption):
        call(hooks_of(one=one, two=two))
    assert seen == ["closed"]


def test_a_wrapper_may_answer_for_what_failed_inside_it():
    def method(self):
        try:
            return (yield)
        except PluginError:
            return np.full(3, 7.0)

    one, two = claiming(raising(ValueError("broken"))), made(method, wrapper=True)
    np.testing.assert_array_equal(call(hooks_of(one=one, two=two)), [7, 7, 7])


# ---- what came back


@pytest.mark.parametrize("hook", ANSWERED)
def test_a_claim_that_answers_none_is_refused(hook):
    """The host does not quietly answer in its place."""
    two = claiming(lambda: None, hook)
    one, three = adapting(hook=hook), adapting(hook=hook)
    text = refusal(hooks_of(one=one, two=two, three=three), hook)
    begin = f"{hook}: two -> one -> three: plugin two (dist-two 2.1) returned None, not a "
    assert text.startswith(begin)
    assert text.endswith("; mend the plugin, or run without it")


@pytest.mark.parametrize("hook", ANSWERED)
def test_a_wrong_answer_of_a_wrapper_is_refused(hook):
    """As that of the wrapper that gave it, not of the next one, which would trip over it."""
    two = adapting(lambda result: object(), hook=hook)
    three = adapting(lambda result: result.nothing_like_this, hook=hook)
    text = refusal(hooks_of(one=adapting(hook=hook), two=two, three=three), hook)
    begin = f"{hook}: host -> one -> two -> three: plugin two (dist-two 2.1) returned a object, "
    assert text.startswith(begin)


def test_a_wrong_answer_of_the_host_is_no_plugins_fault():
    defaults = type("D", (Host,), {"weight_loss": hookimpl(lambda self: None)})()
    with pytest.raises(TypeError):
        call(hooks_of(defaults, one=adapting()))


def test_the_next_link_receives_what_the_check_made_of_an_answer():
    seen: list[Any] = []
    bias = adapting(lambda weights: seen.append(weights.dtype) or weights)
    result = call(hooks_of(snr=claiming(lambda: np.array([0, 1, 1])), bias=bias))
    assert result.dtype == np.float64
    assert seen == [np.float64]


# ---- wrappers that are none


def forgets_to_return(self):
    weights = yield
    weights *= 2


def returns_on_one_path_only(self, step):
    weights = yield
    if step > 3:
        return weights


def ends_before_its_yield(self, step):
    if step:
        return np.ones(3)
    yield


def yields_twice(self):
    weights = yield
    weights = yield
    return weights


def yields_twice_after_an_error(self):
    try:
        weights = yield
    except PluginError:
        weights = yield
    return weights


def yields_a_value(self):
    weights = yield {"step": 7}
    return weights


@pytest.mark.parametrize(
    ("method", "text"),
    [
        (forgets_to_return, ": weight_loss is a wrapper that returns nothing; end it with `return"),
        (returns_on_one_path_only, ": weight_loss is a wrapper that returns nothing; end it with "),
        (ends_before_its_yield, " ends weight_loss before its `yield`; put `result = yield`"),
        (yields_twice, " yields twice on weight_loss; a wrapper has one `result = yield`"),
        (yields_a_value, " yields a value on weight_loss; a bare `yield` waits for the result; "),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_wrapper_that_is_none_is_refused_by_name(method, text):
    hooks = hooks_of(one=adapting(), two=made(method, wrapper=True), three=adapting())
    begin = "weight_loss: host -> one -> two -> three: plugin two (dist-two 2.1)"
    assert refusal(hooks).startswith(begin + text)


def test_a_second_yield_after_an_error_is_refused_too():
    one, two = claiming(raising(KeyError())), made(yields_twice_after_an_error, wrapper=True)
    with pytest.raises(PluginError, match=r"plugin two \(dist-two 2\.1\) yields twice") as refused:
        call(hooks_of(one=one, two=two), "weight_loss")
    assert "plugin one" in str(refused.value.__cause__)
