"""Options: what a dataclass field declares, and which values it takes."""

from __future__ import annotations

import dataclasses
import math
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from sdxl_host.errors import ConfigError, HostError, PluginError
from sdxl_host.settings.options import build_options, describe, option, type_name


@dataclass
class Options:
    gamma: float = option(5.0, help="upper bound", minimum=0.0, maximum=100.0)
    count: int = option(3, help="how many", above=0)
    share: float = option(0.25, help="of all", above=0, maximum=1.0)
    normalize: bool = option(False, help="mean 1")
    label: str = option("plain", help="a word")
    strategy: Literal["later", "earlier", "range"] = option("later", help="which end")
    level: Literal[1, 2] = option(1, help="how far")
    limit: float | None = option(None, help="nothing means no limit", minimum=0.0)
    numbers: list[int] = option([1, 2], help="some", minimum=0)
    factors: list[float] = option([0.5], help="more", minimum=0.0)
    names: dict[str, int] = option({"a": 1}, help="by name")


@dataclass
class Plain:
    """A dataclass that knows nothing of option()."""

    steps: int = 10
    words: list[str] = field(default_factory=lambda: ["x"])
    ratio: float = 0.5


@dataclass
class Range:
    begin: int = option(0, help="first", minimum=0)
    end: int = option(1000, help="one past the last")

    def __post_init__(self) -> None:
        if self.begin >= self.end:
            raise ValueError(f"begin {self.begin} must be below end {self.end}")


@dataclass
class Required:
    path: str = dataclasses.field(metadata={"help": "a folder"})


@dataclass
class Refusing:
    value: int = 0

    def __post_init__(self) -> None:
        if self.value == 1:
            raise TypeError("1 is not liked")
        if self.value == 2:
            raise PluginError("2 needs another package; pip install it")


@dataclass
class BadDefault:
    gamma: float = option(-1.0, help="its own default breaks its bound", minimum=0.0)


def build(kind: type = Options, **values: Any) -> Any:
    return build_options(kind, values, "plugins.snr")


# ---- defaults and good values


def test_defaults_stand_where_nothing_is_given():
    assert build() == Options()
    assert isinstance(build(), Options)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("gamma", 1.5),
        ("gamma", 0.0),
        ("gamma", 100.0),
        ("count", 1),
        ("share", 1.0),
        ("normalize", True),
        ("label", "other"),
        ("label", ""),
        ("strategy", "range"),
        ("level", 2),
        ("limit", None),
        ("limit", 0.0),
        ("limit", 2.5),
        ("numbers", []),
        ("numbers", [3]),
        ("factors", [1.0, 2.0]),
        ("names", {"b": 2}),
    ],
)
def test_a_fitting_value_is_taken_and_the_others_keep_their_defaults(key, value):
    built = build(**{key: value})
    expected = dataclasses.replace(Options(), **{key: value})
    if key == "names":  # OmegaConf merges mappings
        assert built.names["b"] == 2
    else:
        assert built == expected
        assert type(getattr(built, key)) is type(value)


@pytest.mark.parametrize("key", ["gamma", "limit"])
def test_a_whole_number_for_a_float_becomes_a_float_without_a_warning(key):
    """`gamma: 3` in a YAML file is 3.0, and nothing is said about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value = getattr(build(**{key: 3}), key)
    assert value == 3.0
    assert type(value) is float


def test_a_list_of_whole_numbers_for_floats_becomes_floats():
    assert [type(value) for value in build(factors=[1, 2]).factors] == [float, float]


def test_whole_numbers_in_an_optional_list_or_a_mapping_become_floats():
    @dataclass
    class Local:
        factors: list[float] | None = None
        weights: dict[str, float] = field(default_factory=dict)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = build(Local, factors=[1], weights={"a": 2})
    assert [type(value) for value in (made.factors[0], made.weights["a"])] == [float, float]


def test_a_plain_dataclass_works_without_option():
    assert build(Plain) == Plain()
    assert build(Plain, steps=3, words=["y"]) == Plain(3, ["y"])
    with pytest.raises(ConfigError, match=r"^plugins\.snr\.steps: "):
        build(Plain, steps="many")


def test_no_options_at_all():
    @dataclass
    class Nothing:
        pass

    assert isinstance(build(Nothing), Nothing)
    with pytest.raises(ConfigError, match=r"^plugins\.snr\.gamma: there is no .*snr: none"):
        build(Nothing, gamma=1.0)


# ---- mutable defaults


def test_mutable_defaults_are_copied():
    """Changing one instance's list changes neither the next instance nor the declared default."""
    given = [1, 2]
    mapping = {"a": 1}

    @dataclass
    class Local:
        numbers: list = option(given, help="some")
        names: dict = option(mapping, help="some")

    one = Local()
    one.numbers.append(3)
    one.names["b"] = 2
    given.append(4)
    assert one.numbers == [1, 2, 3]
    assert Local().numbers is not given
    assert 3 not in Local().numbers
    assert Local().names == {"a": 1}


def test_built_lists_are_plain_and_independent():
    one = build()
    one.numbers.append(9)
    one.names["z"] = 1
    assert type(one.numbers) is list
    assert type(one.names) is dict
    assert build().numbers == [1, 2]
    assert build().names == {"a": 1}


# ---- refusals


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("gama", r"did you mean gamma\?"),
        ("strateg", r"did you mean strategy\?"),
        ("zzzz", r"no such option \(options of plugins\.snr: gamma, count, share, "),
    ],
)
def test_an_unknown_key_is_refused_with_a_suggestion(key, message):
    with pytest.raises(ConfigError, match=rf"^plugins\.snr\.{key}: .*{message}"):
        build(**{key: 1})


def test_nothing_similar_is_not_suggested():
    with pytest.raises(ConfigError) as refused:
        build(zzzz=1)
    assert "did you mean" not in str(refused.value)


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("count", True, "int"),
        ("count", 1.5, "int"),
        ("count", 2.0, "int"),
        ("count", "x", "int"),
        ("count", None, "int"),
        ("count", math.nan, "int"),
        ("count", [1], "int"),
        ("gamma", True, "float"),
        ("gamma", "x", "float"),
        ("gamma", None, "float"),
        ("gamma", {"a": 1.0}, "float"),
        ("normalize", 1, "bool"),
        ("normalize", 0, "bool"),
        ("normalize", 1.0, "bool"),
        ("normalize", "x", "bool"),
        ("normalize", None, "bool"),
        ("gamma", "1.5", "float"),
        ("gamma", 10**400, "float"),
        ("count", "5", "int"),
        ("normalize", "yes", "bool"),
        ("normalize", "True", "bool"),
        ("label", 5, "str"),
        ("label", 1.5, "str"),
        ("label", True, "str"),
        ("label", None, "str"),
        ("label", ["a"], "str"),
        ("strategy", "latest", "one of later, earlier, range"),
        ("strategy", True, "one of later, earlier, range"),
        ("strategy", None, "one of later, earlier, range"),
        ("level", 3, "one of 1, 2"),
        ("level", True, "one of 1, 2"),
        ("limit", True, r"float \| None"),
        ("limit", "x", r"float \| None"),
        ("limit", "1.5", r"float \| None"),
        ("numbers", 3, r"list\[int\]"),
        ("numbers", ["x"], r"list\[int\]"),
        ("numbers", [1.5], r"list\[int\]"),
        ("numbers", [True], r"list\[int\]"),
        ("numbers", ["1"], r"list\[int\]"),
        ("factors", ["0.5"], r"list\[float\]"),
        ("names", {"b": "2"}, r"dict\[str, int\]"),
        ("names", {"b": 1.0}, r"dict\[str, int\]"),
        ("factors", [True], r"list\[float\]"),
        ("names", [1], r"dict\[str, int\]"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(key, value, kind):
    """The message begins with the key, shows the value and names the type."""
    with pytest.raises(
        ConfigError, match=rf"^plugins\.snr\.{key}: .*does not fit.* {kind}"
    ) as refused:
        build(**{key: value})
    assert repr(value) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("label", 5, 'put it in quotes, "5"'),
        ("gamma", "1.5", "remove the quotes"),
        ("count", "-1e3", "remove the quotes"),
        ("normalize", "yes", "remove the quotes"),
    ],
)
def test_quotes_that_are_missing_or_too_many_are_told(key, value, remedy):
    with pytest.raises(ConfigError, match=rf"^plugins\.snr\.{key}: .*; {remedy}$"):
        build(**{key: value})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", ["gamma", "share", "limit"])
def test_a_value_that_is_not_finite_is_refused(key, value):
    with pytest.raises(ConfigError, match=rf"^plugins\.snr\.{key}: .*is not a finite number$"):
        build(**{key: value})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_list_with_a_number_that_is_not_finite_is_refused(value):
    with pytest.raises(ConfigError, match=r"^plugins\.snr\.factors\[1\]: .*not a finite number"):
        build(factors=[1.0, value])


@pytest.mark.parametrize(
    ("key", "value", "index"), [("factors", [1.0, -0.5], 1), ("numbers", [-1], 0)]
)
def test_the_bounds_of_a_list_hold_for_each_of_its_numbers(key, value, index):
    place = rf"^plugins\.snr\.{key}\[{index}\]: "
    with pytest.raises(ConfigError, match=rf"{place}.*must be at least 0"):
        build(**{key: value})


@pytest.mark.parametrize(
    ("key", "value", "limit"),
    [
        ("gamma", -1e-9, "must be at least 0.0"),
        ("gamma", 100.0001, "must be at most 100.0"),
        ("count", 0, "must be above 0"),
        ("count", -1, "must be above 0"),
        ("share", 0.0, "must be above 0"),
        ("share", 1.0001, "must be at most 1.0"),
        ("limit", -0.5, "must be at least 0.0"),
    ],
)
def test_a_value_out_of_range_is_refused(key, value, limit):
    with pytest.raises(
        ConfigError, match=rf"^plugins\.snr\.{key}: {value} is out of range; it {limit}$"
    ):
        build(**{key: value})


def test_a_default_out_of_its_own_range_is_refused():
    with pytest.raises(ConfigError, match=r"^plugins\.snr\.gamma: -1\.0 is out of range"):
        build(BadDefault)


def test_a_field_without_default_must_be_given():
    assert build(Required, path="here") == Required("here")
    with pytest.raises(ConfigError, match=r"^plugins\.snr: .*path"):
        build(Required)


@pytest.mark.parametrize("value", ["${nowhere}", "???"])
def test_omegaconf_words_that_lead_nowhere_are_refused(value):
    with pytest.raises(ConfigError, match=r"^plugins\.snr: "):
        build(label=value)


def test_an_error_of_post_init_becomes_a_config_error():
    """Checks of several fields together stand in __post_init__ and read like all others."""
    assert build(Range, begin=200, end=500) == Range(200, 500)
    with pytest.raises(ConfigError, match=r"^plugins\.snr: begin 500 must be below end 200$"):
        build(Range, begin=500, end=200)
    with pytest.raises(ConfigError, match=r"^plugins\.snr: .*1 is not liked$"):
        build(Refusing, value=1)


def test_a_plugins_own_error_of_post_init_passes_as_it_is():
    with pytest.raises(PluginError, match=r"^2 needs another package; pip install it$"):
        build(Refusing, value=2)


@pytest.mark.parametrize("kind", [ConfigError, PluginError])
def test_errors_a_user_can_mend_have_one_base(kind):
    assert issubclass(kind, HostError)


# ---- description


def test_option_is_a_dataclass_field():
    """Sugar for field(default=..., metadata={"help": ...}), bounds included."""
    fields = {entry.name: entry for entry in dataclasses.fields(Options)}
    assert fields["gamma"].default == 5.0
    assert dict(fields["gamma"].metadata) == {
        "help": "upper bound",
        "minimum": 0.0,
        "maximum": 100.0,
    }
    assert dict(fields["label"].metadata) == {"help": "a word"}


def test_describe_gives_every_field_in_order():
    rows = describe(Options)
    assert [row["name"] for row in rows] == [entry.name for entry in dataclasses.fields(Options)]
    by_name = {row["name"]: row for row in rows}
    assert by_name["gamma"] == {
        "name": "gamma",
        "type": "float",
        "default": 5.0,
        "help": "upper bound",
        "minimum": 0.0,
        "maximum": 100.0,
    }
    assert by_name["share"]["above"] == 0
    assert by_name["limit"] == {
        "name": "limit",
        "type": "float | None",
        "default": None,
        "help": "nothing means no limit",
        "minimum": 0.0,
    }
    assert by_name["numbers"]["default"] == [1, 2]


def test_describe_of_a_plain_dataclass():
    steps, words, _ = describe(Plain)
    assert steps == {"name": "steps", "type": "int", "default": 10, "help": ""}
    assert words["default"] == ["x"]


def test_describe_leaves_out_a_default_that_is_not_there():
    assert describe(Required) == [{"name": "path", "type": "str", "help": "a folder"}]


@pytest.mark.parametrize(
    ("hint", "said"),
    [
        (int, "int"),
        (bool, "bool"),
        (type(None), "None"),
        (float | None, "float | None"),
        (Literal["a", "b"], "one of a, b"),
        (Literal["a"] | None, "one of a | None"),
        (list[int], "list[int]"),
        (Any, "Any"),
    ],
)
def test_type_names_are_said_as_a_user_would(hint, said):
    assert type_name(hint) == said
