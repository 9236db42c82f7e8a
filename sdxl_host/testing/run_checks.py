"""The promises of a plugin that only runs can show; see `checks`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdxl_host.errors import HostError, PluginError
from sdxl_host.hookspecs import HOOKS
from sdxl_host.plugins.discovery import KNOWN_DISTRIBUTIONS, discover
from sdxl_host.plugins.inspection import check_import
from sdxl_host.settings.options import first_line
from sdxl_host.testing.hashes import check_hashes
from sdxl_host.testing.runs import TinyRun, train_tiny
from sdxl_host.testing.snapshot import attributes, changed, class_attributes
from sdxl_host.testing.subject import Subject
from sdxl_host.testing.watch import Watch

if TYPE_CHECKING:
    from sdxl_host.training.trainer import Trainer

__all__ = [
    "FIRST_PARTY",
    "Runs",
    "check_determinism",
    "check_pairing",
    "check_resume",
    "check_shared_state",
    "check_state",
    "check_unused",
    "cost_line",
    "plain_run",
]

FIRST_PARTY = tuple(KNOWN_DISTRIBUTIONS)
_PLAIN_STEPS = 2
# What is left out of runs that nobody looks at it of, for the sake of time.
_IMAGES = ("Grids",)
_ALL_BUT_METRICS = ("Grids", "Checkpoints")
# Alone its options leave everything as it is.
_PARTNER_OPTIONS: dict[str, dict[str, Any]] = {
    "timestep_bias": {"strategy": "later", "multiplier": 2.0}
}


class Runs:
    """The runs of a subject that several checks look at; each is made once."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._whole: TinyRun | None = None
        self._error: Exception | None = None
        self.watch: Watch
        self.instance: Any = None  # the plugin's object in `whole`
        self.changed: list[str] = []  # attributes of the run's own object
        self.shared: list[str] = []  # attributes of an object that took no part

    @cached_property
    def import_seconds(self) -> float:
        """What importing the plugin takes. Raises PluginError where it is at fault."""
        return check_import(self.subject.installed)

    @property
    def middle(self) -> int:
        """The step at which a run is stopped to be resumed."""
        return max(1, self.subject.steps // 2)

    @property
    def whole(self) -> TinyRun:
        """A run of `subject.steps` steps with a checkpoint in the middle."""
        if self._error is not None:
            raise self._error
        if self._whole is None:
            try:
                self._whole = self._make_whole()
            except Exception as error:
                self._error = error
                raise
        return self._whole

    def _make_whole(self) -> TinyRun:
        subject = self.subject
        idle = subject.instance()
        bystander = attributes(idle) | class_attributes(subject.cls)
        before: dict[str, Any] = {}

        def prepare(trainer: Trainer) -> None:
            self.watch = Watch(trainer.hooks, subject.name)
            self.instance = trainer.hooks.plugins[0].instance
            before.update(attributes(self.instance))

        run = self.train("whole", save_every=self.middle, prepare=prepare)
        self.changed = changed(before, attributes(self.instance))
        self.shared = changed(bystander, attributes(idle) | class_attributes(subject.cls))
        return run

    def train(self, name: str, **arguments: Any) -> TinyRun:
        """A run with the subject alone, in a folder of its own called `name`."""
        subject = self.subject
        return _attributed(
            subject,
            lambda: train_tiny(
                [subject.name],
                folder=subject.folder / name,
                steps=subject.steps,
                options={subject.name: subject.options},
                **arguments,
            ),
        )


def _attributed(subject: Subject, train: Callable[[], TinyRun]) -> TinyRun:
    try:
        return train()
    except PluginError:
        raise
    except HostError as error:
        raise subject.fault(
            f"a run with it ended: {first_line(error)}", "mend it", error
        ) from error
    except Exception as error:
        told = f"a run with it ended with {type(error).__name__}: {first_line(error)}"
        raise subject.fault(told, "mend it") from error


# ---- the same again


def check_determinism(runs: Runs) -> None:
    """Two runs with one seed: metrics.jsonl and the weights are equal to the bit; and so are the
    plugin's numbers in two processes, whose hash() differs."""
    difference = _difference(runs.whole, runs.train("again", without=_IMAGES))
    if difference:
        raise runs.subject.fault(
            f"two runs with the same seed differ: {difference}",
            "draw from np.random.default_rng([a seed among the options, step]), and keep clocks, "
            "sets and what earlier runs left out of it",
        )
    check_hashes(runs.subject)


def check_resume(runs: Runs) -> None:
    """A run that stopped in the middle and was resumed: equal to the bit to one that was not."""
    # Late: it imports MindSpore.
    from sdxl_host.checkpoints.layout import checkpoint_folder

    subject, whole = runs.subject, runs.whole
    checkpoint = checkpoint_folder(whole.checkpoint.parent, runs.middle)
    if not checkpoint.is_dir():
        raise subject.fault(
            f"it stops a run of {subject.steps} steps before step {runs.middle}",
            "set `options` of the contract so that it does not",
        )
    difference = _difference(whole, runs.train("resumed", resume=checkpoint, without=_IMAGES))
    if not difference:
        return
    told = f"a run resumed at step {runs.middle} differs from one that was not: {difference}"
    remedy = "write what it remembers between steps in state_dict, and take it in load_state_dict"
    if hasattr(subject.cls, "state_dict"):
        remedy = "state_dict must hold all of what it remembers, and load_state_dict take it back"
    if runs.changed:
        remedy += f" (changed during the run: {', '.join(runs.changed)})"
    raise subject.fault(told, remedy)


def _difference(one: TinyRun, other: TinyRun) -> str | None:
    """Where two runs differ first, or None."""
    lines, others = one.metrics.splitlines(), other.metrics.splitlines()
    if len(lines) != len(others):
        return f"one has {len(lines)} steps and the other {len(others)}"
    for mine, theirs in zip(lines, others, strict=True):
        if mine != theirs:
            first, second = json.loads(mine), json.loads(theirs)
            names = [name for name in {**first, **second} if first.get(name) != second.get(name)]
            name = names[0] if names else "the order of its numbers"
            return f"at step {first['step']} {name} is {first.get(name)} and {second.get(name)}"
    weights, same = one.weights(), other.weights()
    for name in {**weights, **same}:
        if name not in weights or name not in same:
            return f"only one of them has the parameter {name}"
        if not np.array_equal(weights[name], same[name]):
            return f"after the last step the parameter {name} is not the same"
    return None


# ---- state


def check_state(runs: Runs) -> None:
    """What `state_dict` gives goes into a file, and comes back from a new object that took it."""
    subject = runs.subject
    if not (hasattr(subject.cls, "state_dict") and runs.whole):
        return
    from sdxl_host.checkpoints.plugin_state import pack, unpack

    def packed(state: Any) -> tuple[Any, dict[str, np.ndarray]]:
        arrays: dict[str, np.ndarray] = {}
        try:
            return json.loads(json.dumps(pack(state, arrays, "state_dict"))), arrays
        except TypeError as error:
            raise subject.fault(
                str(error), "convert it (float(...), int(...), .tolist())"
            ) from error

    with subject.asked("state_dict"):
        state = runs.instance.state_dict()
    if not isinstance(state, dict):
        raise subject.fault(f"state_dict gives a {type(state).__name__}", "return a dict")
    written, arrays = packed(state)
    other = subject.instance()
    with subject.asked("load_state_dict"):
        other.load_state_dict(unpack(written, arrays))
    with subject.asked("state_dict"):
        again, others = packed(other.state_dict())
    # As text, in which NaN is a value like others.
    texts, after = (
        {name: json.dumps(value, sort_keys=True) for name, value in each.items()}
        for each in (written, again)
    )
    names = changed(texts, after) + changed(arrays, others)
    if names:
        raise subject.fault(
            f"its state_dict after load_state_dict differs in {', '.join(names)}",
            "take back every value that state_dict gives",
        )


def check_shared_state(runs: Runs) -> None:
    """A run changes nothing of another object of the class, nor of the class itself."""
    if runs.whole and runs.shared:
        names = ", ".join(runs.shared)
        raise runs.subject.fault(
            f"a run changes {names} of objects that took no part in it",
            f"make {names} anew for each object in __init__ (self.{runs.shared[0]} = ...), not on "
            "the class and not as a default of an argument",
        )


# ---- beside others


def plain_run(folder: Path) -> TinyRun:
    """A short run that sees no plugin: what `check_unused` compares with."""
    return train_tiny((), folder=folder, steps=_PLAIN_STEPS, without=_IMAGES)


def check_unused(subject: Subject, plain: TinyRun) -> None:
    """Installed and not selected, it is not imported, and the run is `plain` to the bit."""
    module = subject.installed.module
    before = {n: sys.modules.pop(n) for n in list(sys.modules) if _is_under(n, module)}
    try:
        run = train_tiny(
            (),
            folder=subject.folder / "unused",
            steps=_PLAIN_STEPS,
            visible=[subject.name],
            without=_IMAGES,
        )
        imported = [name for name in sys.modules if _is_under(name, module)]
    finally:
        for name in [n for n in sys.modules if _is_under(n, module)]:
            del sys.modules[name]
        sys.modules.update(before)
    if imported:
        raise subject.fault(
            f"a run that does not select it imports {', '.join(imported)}",
            "let nothing import it but its entry point",
        )
    difference = _difference(plain, run)
    if difference:
        raise subject.fault(
            f"a run that does not select it is not as without it: {difference}",
            "let its package change nothing outside of its class",
        )


def _is_under(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def check_pairing(subject: Subject, partner: str, order: str) -> None:
    """Before or after `partner`, as `order` says, it trains or is refused by both names."""
    if partner not in {plugin.name for plugin in discover()}:
        remedy = "pip install the package that provides it"
        if partner in KNOWN_DISTRIBUTIONS:
            remedy = "pip install 'sdxl-host[all]'"
        raise PluginError(
            f"plugin {partner} is not installed, and the contract of {subject.installed} trains "
            f"beside it; {remedy}"
        )
    names = [subject.name, partner] if order == "before" else [partner, subject.name]
    options = {subject.name: subject.options, partner: _PARTNER_OPTIONS.get(partner, {})}
    folder = subject.folder / "-".join(["pair", *names])
    try:
        train_tiny(names, folder=folder, steps=1, options=options, without=_ALL_BUT_METRICS)
    except Exception as error:
        if _is_refusal(error, names):
            return
        told = first_line(error) if isinstance(error, HostError) else repr(error)
        raise subject.fault(
            f"with --plugins {','.join(names)} a run neither trains nor is refused: {told}",
            f"work with what {partner} gives, or raise PluginError naming {names[0]} and "
            f"{names[1]}",
        ) from error


def _is_refusal(error: Exception, names: list[str]) -> bool:
    """Whether it was said by someone who knew what is wrong, and of whom."""
    cause: BaseException | None = error
    while cause is not None:
        if not isinstance(cause, HostError):
            return False
        cause = cause.__cause__
    told = str(error)
    return isinstance(error, PluginError) and all(
        re.search(rf"\b{re.escape(name)}\b", told) for name in names
    )


# ---- what it costs


def cost_line(runs: Runs) -> str:
    """Import time, and the time in the plugin's hooks at a step (median), for people to read."""
    times = runs.watch.microseconds() if runs.whole.losses else {}
    # build_model is called once a run, not once a step.
    spent = {hook: times[hook] for hook in HOOKS if hook in times and hook != "build_model"}
    parts = ", ".join(f"{hook} {value:,.0f}" for hook, value in spent.items())
    total = (
        f"{sum(spent.values()):,.0f} us a step ({parts})" if spent else "no hook called at a step"
    )
    return f"{runs.subject.installed}: imported in {runs.import_seconds * 1000:.0f} ms, {total}"
