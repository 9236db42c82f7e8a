"""One call of a hook: its chain, run link by link.

A chain is one answer, of the plugin that claims the hook or else of the host, and then the wrappers
that adapt it, in the order of `--plugins`:

    sample_timesteps: edm -> timestep_bias

Each link receives only the arguments that its signature names. What it answers is checked, and
what it raises is attributed, before the next link sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from pluggy import HookImpl

from sdxl_host.plugins.attribution import AttributedError, Plugin, attributed

__all__ = ["HookCall", "Link"]

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Link:
    """An implementation of a hook and the plugin it belongs to; None is the host."""

    implementation: HookImpl
    plugin: Plugin | None

    @property
    def name(self) -> str:
        return "host" if self.plugin is None else self.plugin.name

    def call(self, arguments: Mapping[str, Any]) -> Any:
        """Calls it with those of the hook's arguments that it names."""
        given = {name: arguments[name] for name in self.implementation.argnames}
        return self.implementation.function(**given)


@dataclass(frozen=True)
class HookCall(Generic[Answer]):
    """A call of a hook whose chain is `links`, with `arguments` by name.

    check: is given what a link answered and the link's plugin, and returns what the next link
    receives; it raises TypeError or ValueError, whose text ends "the plugin returned ...".
    """

    hook: str
    links: Sequence[Link]
    check: Callable[[Any, Plugin | None], Answer]
    arguments: Mapping[str, Any]

    @property
    def where(self) -> str:
        """The hook and its chain, as messages begin."""
        return f"{self.hook}: {' -> '.join(link.name for link in self.links)}"

    def answer(self) -> Answer:
        """What comes out of the last link. Raises AttributedError for what a plugin does wrong."""
        return self._answer(len(self.links) - 1)

    def _answer(self, position: int) -> Answer:
        """What comes out of the link at `position`, which adapts what comes out of those before."""
        link = self.links[position]
        if link.plugin is not None and link.implementation.wrapper:
            answer = self._adapt(link, link.plugin, partial(self._answer, position - 1))
        else:
            with attributed(link.plugin, self.where):
                answer = link.call(self.arguments)
        with attributed(link.plugin, self.where, "returned"):
            return self.check(answer, link.plugin)

    def _adapt(self, link: Link, plugin: Plugin, inner: Callable[[], Answer]) -> Any:
        """What a wrapper returns: it runs to its `yield`, receives there what `inner` answers or
        raises, and runs on to its `return`."""
        with attributed(plugin, self.where):
            wrapper = link.call(self.arguments)
            try:
                yielded = next(wrapper)
            except StopIteration:
                raise self._fault(
                    plugin,
                    f" ends {self.hook} before its `yield`; put `result = yield` on every path",
                ) from None
        if yielded is not None:
            raise self._fault(
                plugin,
                f" yields a value on {self.hook}; a bare `yield` waits for the result; write "
                "`result = yield`",
            )
        thrown: BaseException | None = None
        try:
            resume = partial(wrapper.send, inner())
        except BaseException as error:
            thrown, resume = error, partial(wrapper.throw, error)
        try:
            resume()
        except StopIteration as end:
            answer = end.value
        except BaseException as error:
            if error is thrown:  # it only passed through this wrapper
                raise
            with attributed(plugin, self.where):
                raise
        else:
            raise self._fault(
                plugin, f" yields twice on {self.hook}; a wrapper has one `result = yield`"
            ) from thrown
        if answer is None:
            raise self._fault(
                plugin,
                f": {self.hook} is a wrapper that returns nothing; end it with `return result`",
            )
        return answer

    def _fault(self, plugin: Plugin, text: str) -> AttributedError:
        return AttributedError(f"{self.where}: plugin {plugin.installed}{text}")
