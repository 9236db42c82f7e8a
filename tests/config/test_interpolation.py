"""Interpolation between keys is allowed, and nothing that a value could call."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

from sdxl_host.config.load import load
from sdxl_host.errors import ConfigError

# No plugin is installed as far as these tests see.
pytestmark = pytest.mark.usefixtures("site")

SIZE = "data.dataset_config.params.transforms[0].params.size"


def refuse(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(arguments)


def test_interpolation_between_keys_is_allowed(write, default):
    """One size for the dataset and its transforms."""
    data = default["data"]
    size = "${data.dataset_config.params.target_size}"
    data["dataset_config"]["params"]["transforms"][0]["params"]["size"] = size
    config = load([*write(data=data), "data.dataset_config.params.target_size=48"])
    assert config.data.dataset_config["params"]["transforms"][0]["params"]["size"] == 48
    assert "${" not in OmegaConf.to_yaml(config.tree)


def test_interpolation_works_in_overrides():
    config = load([f"{SIZE}=${{data.dataset_config.params.target_size}}"])
    assert config.data.dataset_config["params"]["transforms"][0]["params"]["size"] == 32


@pytest.fixture
def resolver():
    """A registered resolver that says whether it was called."""
    calls: list[Any] = []

    def spy(*arguments: Any) -> str:
        calls.append(arguments)
        return "secret"

    OmegaConf.register_resolver("spy", spy)
    yield calls
    OmegaConf.clear_resolver("spy")


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"train": {"weight": "${spy:HOME}"}}, []),
        ({"train": {"weight": "a/${spy:}/b"}}, []),
        ({"train": {"weight": "${train.${spy:seed}}"}}, []),
        ({"train": {"sample_prompts": ["a", "${ spy:HOME }"]}}, []),
        ({"model": "${spy:HOME}"}, []),
        ({"train": "${spy:HOME}"}, []),
        ({"plugins": "${spy:HOME}"}, []),
        ({"plugins": {"snr": "${spy:HOME}"}}, []),
        ({}, ["train.weight=${spy:HOME}"]),
        ({}, ["model.params.x=[1, '${spy:HOME}']"]),
        ({}, ["--weight", "${spy:HOME}"]),
        ({}, ["--data_path=${spy:HOME}"]),
        ({"train": {"save_path": "spy", "weight": "${${train.save_path}:HOME}"}}, []),
        ({"data": "${spy:HOME}"}, ["--data_path", "x"]),
        ({"data": "${spy:HOME}"}, ["data.per_batch_size=3"]),
        ({}, ["model.params.x=${spy:HOME}", "model.params.x.y=1"]),
    ],
)
def test_resolvers_are_refused_wherever_they_stand_and_never_called(
    site, write, resolver, sections, words
):
    site.add("snr", "gamma: float = 5.0")
    with pytest.raises(ConfigError, match="calls a resolver, which a config may not"):
        load([*write(**sections), *words])
    assert resolver == []


def test_two_texts_may_not_make_a_resolver_together(write, resolver):
    train = {
        "save_path": "$",
        "resume": "{spy:HOME}",
        "weight": "${train.save_path}${train.resume}",
    }
    refuse(write(train=train), r"^train\.weight: '\$\{spy:HOME\}' would be filled in once more")
    assert resolver == []


def test_a_colon_outside_an_interpolation_is_no_resolver(write):
    train = {"weight": "a: ${train.save_path}: {b: c}", "save_path": "there"}
    assert load(write(train=train)).train.weight == "a: there: {b: c}"


def test_a_flag_reaches_what_refers_to_its_key(write, default):
    """Interpolations are filled in last; the key need not be in the file."""
    data = default["data"]
    train = {"weight": "${data.dataset_config.params.data_path}/w"}
    config = load([*write(data=data, train=train), "--data_path", "there"])
    assert config.train.weight == "there/w"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"weight": "${train.nothing}"}}, r"^train\.weight: .*train\.nothing.*not found"),
        ({"train": {"weight": "${train.weight}"}}, r"^train\.weight: "),
        ({"train": {"weight": "${"}}, r"mine\.yaml: "),
        ({"model": "${nowhere}"}, r"model.*nowhere"),
        ({"train": "${nowhere}"}, r"train.*nowhere"),
        ({"plugins": {"snr": "${nowhere}"}}, r"plugins\.snr.*nowhere"),
    ],
)
def test_an_interpolation_that_leads_nowhere_is_refused(site, write, sections, message):
    site.add("snr", "gamma: float = 5.0")
    refuse(write(**sections), message)
