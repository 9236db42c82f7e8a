"""A setting declares its facts at its field, and every table of settings is derived from them."""

from __future__ import annotations

from dataclasses import dataclass, fields, make_dataclass
from typing import Any

import pytest

from sdxl_host.settings.declarations import (
    FLAGS,
    SCHEMAS,
    SETTINGS,
    TrainSettings,
)
from sdxl_host.settings.facts import Needs, Setting, setting, settings_of
from sdxl_host.settings.options import build_options, describe, option

NEEDS = Needs(lambda section: section.switch, "switch is off", "use --switch True")


@dataclass
class Section:
    switch: bool = setting(False, help="on or off", touches="graph", flag=True)
    size: int = setting(
        3,
        help="how big",
        touches="speed",
        minimum=1,
        needs=NEEDS,
        path="a folder",
        for_drawing=True,
    )
    names: list[str] = setting(["a"], help="some", touches="numbers")


def test_a_field_gives_all_that_it_declares() -> None:
    switch, size, names = settings_of("section", Section)
    assert switch == Setting(
        "section.switch", bool, False, "on or off", touches="graph", flag="switch"
    )
    assert size == Setting(
        "section.size", int, 3, "how big", touches="speed", needs=NEEDS, path="a folder",
        for_drawing=True,
    )  # fmt: skip
    assert names == Setting("section.names", list[str], ["a"], "some", touches="numbers")
    assert [one.may_differ for one in (switch, size, names)] == [False, True, False]


def test_its_range_and_its_help_are_those_of_an_option() -> None:
    assert describe(Section)[1] == {
        "name": "size", "type": "int", "default": 3, "help": "how big", "minimum": 1
    }  # fmt: skip
    assert build_options(Section, {"size": 5}, "section").size == 5
    assert Section().names is not Section().names


def test_every_field_of_train_is_a_flag_and_no_other_unless_it_says_so() -> None:
    assert [one.flag for one in settings_of("train", Section)] == ["switch", "size", "names"]
    assert [one.flag for one in settings_of("data", Section)] == ["switch", "", ""]


def test_a_field_that_declares_nothing_is_refused() -> None:
    other = make_dataclass("Other", [("size", int, option(1, help="how big"))])
    with pytest.raises(TypeError, match=r"^Other\.size: must be declared by `setting`"):
        list(settings_of("train", other))


def test_every_field_of_a_section_stands_in_the_tables() -> None:
    keys = {f"{name}.{f.name}" for name, schema in SCHEMAS.items() for f in fields(schema)}
    assert set(SETTINGS) == keys | {"data.dataset_config.params.data_path"}
    assert {f.name for f in fields(TrainSettings)} <= set(FLAGS)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (False, False)),
        ({"resume": "latest"}, (True, False)),
        ({"resume": "a/run/checkpoints/step_2"}, (True, True)),
        ({"resume": "runs/run/checkpoints/step_2"}, (True, False)),
        ({"weight": "a/checkpoints/step_2"}, (False, False)),
        ({"weight": "a/checkpoints/step_2", "resume_step": 2}, (True, True)),
        ({"weight": "runs/x/checkpoints/step_2", "optimizer_weight": "o"}, (True, False)),
    ],
)
def test_whether_a_run_goes_on_and_where(
    given: dict[str, Any], expected: tuple[bool, bool]
) -> None:
    train = TrainSettings(**given)
    assert (train.continues, train.continues_elsewhere) == expected
