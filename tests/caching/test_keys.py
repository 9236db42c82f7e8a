"""What of a run can't be in a cache, and which parts are made or read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from support.cache import TINY

from sdxl_host import hookimpl
from sdxl_host.caching.keys import check_cacheable, crops, parts
from sdxl_host.config.load import load
from sdxl_host.errors import ConfigError
from sdxl_host.plugins.defaults import Defaults
from sdxl_host.plugins.discovery import Installed
from sdxl_host.plugins.hooks import Hooks, Plugin

TEXT = ["--cache_text_embedding", "True"]
LATENT = ["--cache_latent", "True"]
CACHE = ["--task", "cache"]


class Encoder:
    @hookimpl(wrapper=True)
    def encode_prompt(self):
        return (yield)


class Varying(Encoder):
    varies_by_step = True


class Stateful(Encoder):
    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


class StatefulElsewhere:
    state_dict = load_state_dict = Stateful.state_dict

    @hookimpl(wrapper=True)
    def weight_loss(self):
        return (yield)


def check(*words: str, plugin: type | None = None, is_fixed: bool = True) -> None:
    found = [Plugin(Installed("mine", "p", "1.0", None, "", ""), None, plugin())] if plugin else []
    dataset: Any = SimpleNamespace(captions=SimpleNamespace(is_fixed=is_fixed))
    check_cacheable(load(["--config", TINY, *words]), Hooks(Defaults(), found), dataset)


@pytest.mark.parametrize("words", [TEXT, CACHE, [*CACHE, *TEXT], [*LATENT, *TEXT]])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"is_fixed": False}, r"^--cache_text_embedding True: captions are shuffled"),
        ({"plugin": Varying}, r"^--cache_text_embedding True: the plugin mine keeps state"),
        ({"plugin": Stateful}, r"^--cache_text_embedding True: the plugin mine keeps state"),
    ],
)
def test_what_differs_from_step_to_step_is_refused(
    words: list[str], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check(*words, **given)


@pytest.mark.parametrize("words", [[], LATENT, [*CACHE, *LATENT]])
def test_it_may_differ_where_embeddings_are_not_kept(words: list[str]) -> None:
    check(*words, plugin=Stateful, is_fixed=False)


@pytest.mark.parametrize("plugin", [None, Encoder, StatefulElsewhere])
def test_an_encoder_without_state_is_kept(plugin: type | None) -> None:
    check(*TEXT, plugin=plugin)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], (False, False)),
        (LATENT, (True, False)),
        (TEXT, (False, True)),
        (CACHE, (True, True)),
        ([*CACHE, *LATENT], (True, False)),
        ([*CACHE, *TEXT], (False, True)),
        ([*CACHE, *LATENT, *TEXT], (True, True)),
    ],
)
def test_without_a_switch_all_is_made_and_nothing_read(
    words: list[str], expected: tuple[bool, bool]
) -> None:
    assert parts(load(["--config", TINY, *words]).train) == expected


@pytest.mark.parametrize(("given", "expected"), [(0, 1), (1, 1), (3, 3)])
def test_a_kept_image_has_at_least_one_crop(given: int, expected: int) -> None:
    assert crops(load(["--config", TINY, "--crops_per_image", str(given)])) == expected
