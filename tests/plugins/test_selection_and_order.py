"""Which plugins run, in which order, and how their options are set."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from sdxl_host.config.load import RunConfig, load, restore
from sdxl_host.config.yaml_files import DEFAULT_CONFIG, packaged_configs
from sdxl_host.errors import ConfigError, HostError, PluginError

SIZE = 'size: int = option(3, help="how big", minimum=0)'
BROKEN = "raise RuntimeError('this package is broken')"


@pytest.fixture
def three(site):
    """Three plugins, `ash`, `birch` and `cedar_oak`, each with an option `size`."""
    for name in ("ash", "birch", "cedar_oak"):
        site.add(name, SIZE)
    return site


@pytest.fixture
def configured(tmp_path):
    """Arguments naming a config whose section `plugins` is what is given."""

    def configured(plugins: Any) -> list[str]:
        tree = yaml.safe_load((packaged_configs() / DEFAULT_CONFIG).read_text("utf-8"))
        file = tmp_path / "mine.yaml"
        file.write_text(yaml.safe_dump({**tree, "plugins": plugins}, sort_keys=False), "utf-8")
        return ["--config", str(file)]

    return configured


def names(config: RunConfig) -> list[str]:
    """The selection; the tree, which is saved, says the same in the same order."""
    found = [plugin.installed.name for plugin in config.plugins]
    assert list(config.tree.plugins) == found
    return found


def refuse(words: list[str], message: str, kind: type[HostError] = HostError) -> str:
    with pytest.raises(kind, match=message) as refused:
        load(words)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# ---- ways to select


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], []),
        (["--plugins", "ash"], ["ash"]),
        (["--plugins", "ash,birch"], ["ash", "birch"]),
        (["--plugins", "birch,ash"], ["birch", "ash"]),
        (["--plugins=birch, ash,"], ["birch", "ash"]),
        (["--plugins", "cedar-oak"], ["cedar_oak"]),
        (["--plugins", "none"], []),
        (["--ash", "True"], ["ash"]),
        (["--ash"], ["ash"]),
        (["--ash", "--birch"], ["ash", "birch"]),
        (["--birch", "--ash"], ["birch", "ash"]),
        (["--ash", "False"], []),
        (["--cedar-oak"], ["cedar_oak"]),
        (["--ash_size", "1"], ["ash"]),
        (["--cedar_oak_size=1"], ["cedar_oak"]),
        (["--cedar-oak-size", "1"], ["cedar_oak"]),
        (["--birch_size", "1", "--ash"], ["birch", "ash"]),
        (["plugins.ash.size=1"], ["ash"]),
        (["plugins.birch.size=1", "plugins.ash.size=1"], ["birch", "ash"]),
        (["plugins.cedar-oak.size=1"], ["cedar_oak"]),
        (["--plugins", "birch", "--ash"], ["birch", "ash"]),
        (["--ash", "--plugins", "birch"], ["birch", "ash"]),
        (["--plugins", "none", "--ash_size", "1"], ["ash"]),
        (["--plugins", "birch,ash", "--ash", "True", "--birch_size", "1"], ["birch", "ash"]),
        (["--plugins", "birch,ash", "--birch", "False"], ["ash"]),
        (["--ash", "seed", "--birch"], None),
    ],
)
def test_ways_to_select(three, words, expected):
    """By --plugins, by name, by a flag of the plugin or by a dotted override; flags append."""
    if expected is None:
        refuse(words, r"^--ash seed: does not fit its type, bool; give True or False$")
    else:
        assert names(load(words)) == expected


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (None, []),
        ({}, []),
        ({"ash": None}, ["ash"]),
        ({"birch": {}, "ash": {"size": 1}}, ["birch", "ash"]),
        ({"ash": None, "birch": None}, ["ash", "birch"]),
        ({"cedar-oak": {"size": 1}, "ash": None}, ["cedar_oak", "ash"]),
    ],
)
def test_the_configs_section_selects_in_the_order_written_there(
    three, configured, section, expected
):
    assert names(load(configured(section))) == expected


def test_an_empty_entry_means_defaults(three, configured):
    (plugin,) = load(configured({"ash": None})).plugins
    assert plugin.options.size == 3


@pytest.mark.parametrize(
    ("words", "expected", "off"),
    [
        (["--plugins", "birch,ash"], ["birch", "ash"], []),
        (["--plugins", "birch"], ["birch"], ["ash"]),
        (["--plugins", "cedar_oak"], ["cedar_oak"], ["ash", "birch"]),
        (["--plugins", "cedar_oak,birch"], ["cedar_oak", "birch"], ["ash"]),
        (["--plugins", "none"], [], ["ash", "birch"]),
        (["--ash", "False"], ["birch"], ["ash"]),
        (["--cedar_oak"], ["ash", "birch", "cedar_oak"], []),
        (["--plugins", "birch", "--ash"], ["birch", "ash"], []),
        (["--plugins", "none", "--birch_size", "8"], ["birch"], ["ash"]),
        (["--plugins", "none", "plugins.birch.size=8"], [], ["ash", "birch"]),
    ],
)
def test_plugins_replaces_the_configs_list_and_what_is_off_is_named(
    three, configured, words, expected, off
):
    config = load([*configured({"ash": {"size": 7}, "birch": None}), *words])
    assert names(config) == expected
    assert list(config.notices) == [f"plugins.{n} is configured but switched off" for n in off]
    for plugin in config.plugins:
        if plugin.installed.name == "ash":
            assert plugin.options.size == 7  # options stay with what is still selected


def test_a_flag_of_a_plugin_contradicts_switching_it_off(three):
    for words in (["--ash_size", "1", "--ash", "False"], ["--ash=no", "--ash_size", "1"]):
        refuse(words, r"^--ash False contradicts --ash_size; remove one of them$", ConfigError)


@pytest.mark.parametrize("plugins", ["ash,ash", "ash,birch,ash", "cedar-oak,cedar_oak"])
def test_a_plugin_is_named_once(three, plugins):
    refuse(["--plugins", plugins], r"^--plugins .* is given twice; name each plugin once")


def test_a_config_that_spells_one_plugin_in_two_ways_is_refused(three, configured):
    section = {"cedar-oak": {"size": 1}, "cedar_oak": {"size": 2}}
    refuse(configured(section), r"cedar.oak")


@pytest.mark.parametrize("override", ["cedar-oak", "cedar_oak"])
@pytest.mark.parametrize("written", ["cedar-oak", "cedar_oak"])
def test_an_override_and_the_file_may_spell_a_plugin_differently(
    three, configured, override, written
):
    config = load([*configured({written: {"size": 1}}), f"plugins.{override}.size=2"])
    assert names(config) == ["cedar_oak"]
    assert config.plugins[0].options.size == 2


@pytest.mark.parametrize("plugins", ["", ",", "none,ash", "ash,none"])
def test_none_stands_alone_and_a_list_has_names(three, plugins):
    refuse(["--plugins", plugins], r"^--plugins .*: give plugin names with commas between, or none")


def test_a_list_in_the_config_is_refused(three, configured):
    refuse(configured(["ash"]), r"plugins must be a mapping", ConfigError)


def test_the_selection_carries_package_class_and_options(three):
    (plugin,) = load(["--plugins", "ash"]).plugins
    assert str(plugin.installed) == "ash (fake-ash 1.0)"
    assert plugin.cls.__name__ == "Fake"
    assert isinstance(plugin.options, plugin.cls.Options)


def test_a_written_config_restores_selection_order_and_options(three, tmp_path):
    config = load(["--plugins", "cedar_oak,ash", "--ash_size", "9"])
    file = tmp_path / "config.yaml"
    file.write_text(OmegaConf.to_yaml(config.tree), "utf-8")
    again = restore(file)
    assert names(again) == ["cedar_oak", "ash"]
    assert [asdict(p.options) for p in again.plugins] == [{"size": 3}, {"size": 9}]


# ---- missing, broken, unselected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plugins", "snr"], r"^plugin snr is not installed; pip install sdxl-snr$"),
        (["--snr", "True"], r"^plugin snr is not installed; pip install sdxl-snr$"),
        (["plugins.snr.gamma=5"], r"^plugin snr is not installed; pip install sdxl-snr$"),
        (["--snr_gamma", "5"], r"^--snr_gamma: .*snr is not installed; pip install sdxl-snr$"),
        (["--timestep_bias_multiplier", "2"], r"pip install sdxl-timestep-bias$"),
        (["--lpw"], r"pip install sdxl-lpw$"),
        (["--plugins", "bich"], r"^plugin bich is not installed \(did you mean birch\?\)"),
        (["--plugins", "zzz"], r"installed: ash, birch, cedar_oak\); pip install the package"),
    ],
)
def test_what_is_not_installed_is_named_with_what_to_install(three, words, message):
    refuse(words, message, PluginError)


def test_a_configured_plugin_that_is_not_installed_is_refused(three, configured):
    refuse(configured({"snr": {"gamma": 5}}), r"plugin snr is not installed; pip install sdxl-snr")


def test_a_plugin_that_is_not_installed_may_be_switched_off(three):
    """The guide's `--lpw False` asks for nothing."""
    assert names(load(["--lpw", "False"])) == []


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--plugins", "ash"],
        ["--ash_size", "1"],
        ["--cedar_oak_size", "1"],
        ["--cedar_oak"],
        ["plugins.cedar_oak.size=1"],
        ["--seed", "1"],
    ],
)
def test_a_broken_unselected_plugin_hurts_nothing(three, words):
    """Not even one whose name begins the flag of another plugin."""
    broken = [three.add(name, source=BROKEN) for name in ("willow", "cedar")]
    load(words)
    assert broken[0] not in sys.modules


@pytest.mark.parametrize("words", [["--plugins", "willow"], ["--willow"], ["--willow_size", "1"]])
def test_a_broken_selected_plugin_is_named_with_package_and_cause(three, words):
    three.add("willow", source=BROKEN)
    said = refuse(words, r"willow \(fake-willow 1\.0\) could not be imported: RuntimeError: ")
    assert "this package is broken" in said


def test_an_unselected_plugin_is_not_imported(site):
    modules = [site.add("ash", SIZE), site.add("birch", SIZE)]
    load(["--plugins", "birch"])
    load(["--seed", "1"])
    assert [module in sys.modules for module in modules] == [False, True]


# ---- whose flag


@pytest.fixture
def ambiguous(site):
    """`--ash_tree_size` is ash's tree_size and ash_tree's size."""
    site.add("ash", 'tree_size: int = option(1, help="of the tree")')
    site.add("ash_tree", 'size: int = option(1, help="of it")')
    return site


def test_an_ambiguous_flag_is_refused_with_both_names_and_the_remedy(ambiguous):
    said = refuse(["--ash_tree_size", "4"], r"^--ash_tree_size: could belong to .*ash and ash_tree")
    assert "--plugins" in said
    assert "plugins.ash.tree_size=..." in said
    assert "plugins.ash_tree.size=..." in said


@pytest.mark.parametrize("chosen", ["ash", "ash_tree"])
@pytest.mark.parametrize("flag_first", [True, False])
def test_a_selected_plugin_comes_before_others(ambiguous, chosen, flag_first):
    words, flag = ["--plugins", chosen], ["--ash_tree_size", "4"]
    config = load(flag + words if flag_first else words + flag)
    assert names(config) == [chosen]
    assert list(asdict(config.plugins[0].options).values()) == [4]


def test_a_flag_of_two_selected_plugins_is_refused(ambiguous):
    refuse(["--plugins", "ash,ash_tree", "--ash_tree_size", "4"], r"could belong to")
    ways = ["plugins.ash.tree_size=5", "plugins.ash_tree.size=6"]
    ash, ash_tree = load(["--plugins", "ash,ash_tree", *ways]).plugins
    assert (ash.options.tree_size, ash_tree.options.size) == (5, 6)


def test_a_flag_of_the_host_stays_the_hosts(site):
    site.add("sample", 'steps: int = option(1, help="of its own")')
    config = load(["--sample_steps", "5"])
    assert config.train.sample_steps == 5
    assert names(config) == []


def test_a_longer_plugin_name_is_no_prefix_problem(site):
    """`--bias_range_size` is bias_range's, because bias has no option range_size."""
    site.add("bias", SIZE)
    site.add("bias_range", SIZE)
    assert names(load(["--bias_range_size", "1"])) == ["bias_range"]
    assert names(load(["--bias_size", "1"])) == ["bias"]


# ---- options


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ash_sise", "1"], r"^--ash_sise: there is no such flag \(did you mean ash_size\?\)"),
        (["plugins.ash.sise=1"], r"^plugins\.ash\.sise: .*did you mean size\?.*plugins\.ash: size"),
        (["--ash_size", "-1"], r"^plugins\.ash\.size: -1 is out of range; .*at least 0"),
        (["plugins.ash.size=-1"], r"^plugins\.ash\.size: -1 is out of range"),
        (["--ash_size", "x"], r"^--ash_size x: does not fit its type, int"),
        (["--ash_size"], r"^--ash_size: needs a value \(int\)"),
        (["plugins.ash.size=big"], r"^plugins\.ash\.size: 'big' does not fit its type, int"),
        (["plugins.ash=5"], r"^plugins=?.*not understood|^plugins\.ash: must be a mapping"),
        (["--ash_size", "1", "--ash_size", "1"], r"^--ash_size: given twice"),
    ],
)
def test_an_option_that_cant_be_set_is_refused(three, words, message):
    refuse(words, message, ConfigError)


@pytest.mark.parametrize("words", [[], ["--ash_size", "1"]])
def test_an_entry_that_is_no_mapping_is_refused(three, configured, words):
    refuse(
        [*configured({"ash": 5}), *words], r"^plugins\.ash: must be a mapping, not 5", ConfigError
    )


@pytest.mark.parametrize("words", [["plugins.elm.size=1"], ["--plugins", "elm", "--elm_size", "1"]])
def test_a_plugin_without_options_takes_none(site, words):
    site.add("elm")
    assert load(["--plugins", "elm"]).plugins[0].options is None
    refuse(words, r"^(plugins\.elm\.size: .*has no options|--elm_size: there is no such flag)")


def test_flags_come_after_overrides_come_after_the_file(three, configured):
    words = configured({"ash": {"size": 5}})
    assert load(words).plugins[0].options.size == 5
    assert load([*words, "plugins.ash.size=6"]).plugins[0].options.size == 6
    assert load([*words, "--ash_size=7", "plugins.ash.size=6"]).plugins[0].options.size == 7


TYPED = """
flag: bool = option(False, help="a switch")
count: int = option(0, help="a whole number")
rate: float = option(0.0, help="a number")
word: str = option("", help="a word")
mode: Literal["later", "earlier"] = option("later", help="one of two")
level: Literal[1, 2] = option(1, help="one of two numbers")
limit: Optional[float] = option(1.0, help="a number or nothing")
choice: Literal["a", "b"] | None = option("a", help="one of two or nothing")
number: int | float = option(0, help="whole or not")
items: list[int] = option([], help="whole numbers")
rates: list[float] = option([], help="numbers")
words: Optional[list[str]] = option(None, help="words or nothing")
"""


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("flag", "True", True),
        ("flag", "False", False),
        ("count", "5", 5),
        ("count", "-5", -5),
        ("rate", "2.5", 2.5),
        ("rate", "2", 2.0),
        ("rate", "-1e-5", -1e-5),
        ("word", "five", "five"),
        ("word", "a5", "a5"),
        ("mode", "earlier", "earlier"),
        ("level", "2", 2),
        ("limit", "0.5", 0.5),
        ("limit", "2", 2.0),
        ("limit", "null", None),
        ("choice", "b", "b"),
        ("choice", "null", None),
        ("number", "0.5", 0.5),
        ("number", "5", 5),
        ("items", "[1, 2]", [1, 2]),
        ("items", "[]", []),
        ("rates", "[1, 0.5]", [1.0, 0.5]),
        ("words", "[a, b]", ["a", "b"]),
        ("words", "null", None),
    ],
)
@pytest.mark.parametrize("way", ["flag", "flag=", "override", "file"])
def test_values_reach_the_options_with_their_types(site, configured, field, text, value, way):
    site.add("yew", TYPED)
    words = {
        "flag": [f"--yew_{field}", text],
        "flag=": [f"--yew_{field}={text}"],
        "override": [f"plugins.yew.{field}={text}"],
        "file": configured({"yew": {field: value}}),
    }[way]
    (plugin,) = load(words).plugins
    found = getattr(plugin.options, field)
    assert found == value
    assert type(found) is type(value)
    if isinstance(value, list):
        assert [type(item) for item in found] == [type(item) for item in value]


def test_a_flag_of_a_word_keeps_what_looks_like_a_number(site):
    site.add("yew", TYPED)
    assert load(["--yew_word", "5"]).plugins[0].options.word == "5"
    assert load(["plugins.yew.word=5"]).plugins[0].options.word == "5"


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        ("names: dict[str, int]", "{a: 1}", {"a": 1}),
        ("rates: list[float]", "[1e-5]", [1e-5]),
        ("rates: list[float]", "2", [2.0]),
        ("rates: Optional[list[float]]", "[2]", [2.0]),
        ("switches: list[bool]", "[True, False]", [True, False]),
        ("words: list[str]", "['7', a]", ["7", "a"]),
    ],
)
def test_lists_and_mappings_as_flags(site, option, text, value):
    field = option.partition(":")[0]
    default = "{}" if "dict" in option else "[]"
    site.add("yew", f'{option} = option({default}, help="some")')
    found = getattr(load([f"--yew_{field}", text]).plugins[0].options, field)
    assert found == value
    assert [type(item) for item in found] == [type(item) for item in value]


def test_a_bare_switch_of_a_plugin(site):
    site.add("yew", TYPED)
    config = load(["--yew_flag", "train.seed=3", "--yew_count", "2"])
    assert config.plugins[0].options.flag is True
    assert config.plugins[0].options.count == 2
    assert config.train.seed == 3


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("flag", "1"),
        ("count", "1.5"),
        ("rate", "nan"),
        ("rate", "x"),
        ("mode", "latest"),
        ("level", "3"),
        ("limit", "inf"),
        ("choice", "c"),
        ("items", "[x]"),
        ("items", "{a: 1}"),
        ("items", "[1"),
    ],
)
def test_a_value_that_does_not_fit_is_refused(site, field, text):
    site.add("yew", TYPED)
    refuse([f"--yew_{field}={text}"], rf"yew[._]{field}\b", ConfigError)


def test_the_options_own_check_is_told_with_its_place(site, make_source):
    check = (
        "    def __post_init__(self):\n"
        "        if self.size == 5:\n"
        "            raise ValueError('taken')\n"
    )
    site.add("yew", source=make_source(SIZE).replace("    size:", check + "    size:"))
    assert load(["--yew_size", "4"]).plugins[0].options.size == 4
    refuse(["--yew_size", "5"], r"^plugins\.yew: taken$", ConfigError)


def test_a_flag_that_may_be_a_broken_plugins_names_the_plugin(site):
    site.add("ash", source=BROKEN)
    refuse(["--ash_size=1"], r"plugin ash .*this package is broken", PluginError)
