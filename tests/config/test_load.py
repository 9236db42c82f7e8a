"""Config and command line: four layers, one tree, and nothing ignored silently."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from sdxl_host.config.load import load, restore
from sdxl_host.config.yaml_files import packaged_configs
from sdxl_host.errors import ConfigError, HostError
from sdxl_host.settings.declarations import FLAGS

# No plugin is installed as far as these tests see.
pytestmark = pytest.mark.usefixtures("site")

SIZE = "data.dataset_config.params.transforms[0].params.size"


def refuse(arguments: list[str], message: str) -> str:
    with pytest.raises(ConfigError, match=message) as refused:
        load(arguments)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# ---- layers


@pytest.mark.parametrize(
    ("in_file", "words", "expected"),
    [
        (None, [], 1),
        (3, [], 3),
        (3, ["data.per_batch_size=5"], 5),
        (3, ["--per_batch_size=7"], 7),
        (3, ["data.per_batch_size=5", "--per_batch_size=7"], 7),
        (None, ["--per_batch_size=7", "data.per_batch_size=5"], 7),
    ],
)
def test_defaults_then_file_then_overrides_then_flags(write, default, in_file, words, expected):
    """The later layer wins wherever it stands in the line."""
    data = default["data"]
    del data["per_batch_size"]
    if in_file:
        data["per_batch_size"] = in_file
    config = load([*write(data=data), *words])
    assert config.data.per_batch_size == config.tree.data.per_batch_size == expected


def test_a_layer_changes_what_it_names_and_nothing_else():
    before = OmegaConf.to_container(load([]).tree)
    after = OmegaConf.to_container(load(["optim.base_learning_rate=1e-5", "--seed", "7"]).tree)
    before["optim"]["base_learning_rate"] = 1e-5
    before["train"]["seed"] = 7
    assert after == before


def test_the_last_of_two_overrides_stands():
    assert load(["train.seed=1", "train.seed=2"]).train.seed == 2


def test_the_tree_is_read_only():
    with pytest.raises(Exception, match="read-only"):
        load([]).tree.train.seed = 1


def test_the_settings_hold_every_default():
    """What neither file nor line sets is in the tree too, so a saved tree says all."""
    tree = load([]).tree
    assert tree.train.device_target == "auto"
    assert tree.train.sample_prompts == []
    assert tree.plugins == {}


# ---- dotted overrides


@pytest.mark.parametrize("place", range(4))
def test_overrides_may_stand_anywhere(place):
    words = [["--clip_grad"], ["--seed", "3"], ["--save_path", "out"]]
    words.insert(place, ["optim.base_learning_rate=1e-5"])
    config = load([word for group in words for word in group])
    assert config.optim.base_learning_rate == 1e-5
    assert config.train.clip_grad is True
    assert config.train.seed == 3
    assert config.train.save_path == "out"


def test_an_override_after_a_bare_switch_is_not_its_value():
    config = load(["train.clip_grad=False", "--clip_grad", "optim.base_learning_rate=1e-5"])
    assert config.train.clip_grad is True
    assert config.optim.base_learning_rate == 1e-5


def test_overrides_reach_into_lists():
    config = load([f"{SIZE}=64", "model.params.network_config.params.channel_mult[1]=3"])
    assert config.data.dataset_config["params"]["transforms"][0]["params"]["size"] == 64
    assert config.tree.model.params.network_config.params.channel_mult == [1, 3, 4]
    assert config.data.dataset_config["params"]["transforms"][3]["params"] == {"type": "hwc2chw"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-5", 1e-5),
        ("-2", -2),
        ("True", True),
        ("null", None),
        ("[1, 2]", [1, 2]),
        ("{a: 1}", {"a": 1}),
        ("a=b", "a=b"),
        ("a b", "a b"),
        ("'3'", "3"),
    ],
)
def test_an_override_is_read_as_yaml_would(text, value):
    tree = OmegaConf.to_container(load([f"model.params.anything={text}"]).tree)
    assert tree["model"]["params"]["anything"] == value
    assert type(tree["model"]["params"]["anything"]) is type(value)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("trian.seed=1", r"^trian\.seed: there is no such section \(did you mean train\?\)"),
        ("train.sede=1", r"^train\.sede: .*did you mean seed\?"),
        ("optim.base_learning_rat=1", r"did you mean base_learning_rate\?"),
        (f"{SIZE.replace('[0]', '[9]')}=1", r"transforms\[9\].*: can't be set: .*out of range"),
        ("data.dataset_config.params.transforms.first=1", r"can't be set"),
        ("train.sample_prompts=[a", r"^train\.sample_prompts=\[a: can't be set"),
        ("train.seed=x", r"^train\.seed: 'x' does not fit its type, int"),
        ("train.seed=", r"^train\.seed: None does not fit its type, int"),
        ("train.seed=1.5", r"^train\.seed: 1\.5 does not fit its type, int"),
        ("train.clip_grad=1", r"^train\.clip_grad: 1 does not fit its type, bool"),
        ("train.seed=-1", r"^train\.seed: -1 is out of range; it must be at least 0"),
        ("optim.base_learning_rate=0", r"^optim\.base_learning_rate: 0.* must be above 0"),
        ("optim.base_learning_rate=.nan", r"^optim\.base_learning_rate: nan is not a finite"),
        ("train.device_target=GPU", r"^train\.device_target: 'GPU'.*auto, CPU, Ascend"),
        ("train.seed=???", r"^train\.seed: '\?\?\?' does not fit its type, int"),
        ("train.save_path=???", r"^train: .*save_path"),
        (
            "train.sink_queue_size=0",
            r"^train\.sink_queue_size: a queue of 0 steps .*; give at least 1",
        ),
        ("data.per_batch_size.x=1", r"^data\.per_batch_size: "),
        ("plugins.snr=5", r"^plugins\.snr: must be a mapping, not 5; write its options below it$"),
        ("seed=1", r"^seed=1: not understood"),
        ("word", r"^word: not understood"),
    ],
)
def test_an_override_that_fits_nowhere_is_refused(word, message):
    refuse([word], message)


@pytest.mark.parametrize("text", ["5", "1.50", "007", "1e-5", "True", "off"])
def test_a_word_may_look_like_a_number_on_the_command_line(text):
    """A shell takes the quotes off that a file would have; the last override counts."""
    assert load(["train.save_path=x", f"train.save_path={text}"]).train.save_path == text
    assert load([f"train.save_path={text}", "train.save_path=x"]).train.save_path == "x"
    assert load([f"train.save_path={text}", "--save_path", "x"]).train.save_path == "x"


def test_a_number_for_a_word_in_a_file_is_refused(write):
    refuse(write(train={"save_path": 5}), r'^train\.save_path: 5 does not fit.*in quotes, "5"$')


# ---- flags


@pytest.mark.parametrize("words", [["--seed=7"], ["--seed", "7"]])
def test_a_flag_takes_its_value_after_an_equals_sign_or_a_space(words):
    assert load(words).train.seed == 7


def test_hyphens_in_flags_read_as_underscores():
    assert load(["--save-path", "there"]).train.save_path == "there"


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--clip_grad"], True),
        (["--clip_grad", "--seed", "1"], True),
        (["--clip_grad", "train.seed=1"], True),
        (["--clip_grad", "True"], True),
        (["--clip_grad", "true"], True),
        (["--clip_grad", "yes"], True),
        (["--clip_grad", "on"], True),
        (["--clip_grad=True"], True),
        (["--clip_grad", "False"], False),
        (["--clip_grad", "no"], False),
        (["--clip_grad=off"], False),
    ],
)
def test_a_switch_alone_is_true_and_takes_a_truth_value(words, value):
    assert load(["train.clip_grad=" + str(not value), *words]).train.clip_grad is value


@pytest.mark.parametrize("words", [["--clip_grad", "maybe"], ["--clip_grad=maybe"]])
def test_a_word_after_a_switch_that_is_no_truth_value_is_refused_with_the_flag(words):
    refuse(words, r"^--clip_grad maybe: does not fit its type, bool; give True or False$")


@pytest.mark.parametrize("name", ["weight", "resume", "optimizer_weight", "save_path", "data_path"])
def test_an_empty_path_of_the_command_line_is_refused(name):
    """An unset variable leaves one; in a file it means none."""
    told = r": is empty, as an unset variable is; give .*, or leave it out$"
    for words in ([f"--{name}", ""], [f"--{name}="], [f"--{name}", " "]):
        refuse(words, f"^--{name}{told}")
    refuse([f"{FLAGS[name].key}="], f"^{re.escape(FLAGS[name].key)}{told}")


@pytest.mark.parametrize("words", [["--seed", "-1"], ["--seed=-1"]])
def test_a_negative_number_is_a_value_and_not_a_flag(words):
    """It reaches the check of the range, which here refuses it."""
    refuse(words, r"^train\.seed: -1 is out of range")


def test_values_may_begin_with_a_hyphen():
    assert load(["--save_path", "-1"]).train.save_path == "-1"
    assert load(["--save_path=--x"]).train.save_path == "--x"


@pytest.mark.parametrize("value", ["a=b", "x.y=z", "model.ckpt"])
def test_a_flags_value_may_hold_an_equals_sign(value):
    assert load(["--weight", value]).train.weight == value
    assert load([f"--weight={value}"]).train.weight == value


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--sample_prompts", "[a cat, a dog]"], ["a cat", "a dog"]),
        (["--sample_prompts=[a cat]"], ["a cat"]),
        (["--sample_prompts", "a cat"], ["a cat"]),
        (["--sample_prompts", "a cat, a dog"], ["a cat, a dog"]),
        (["--sample_prompts", "photo: a cat"], ["photo: a cat"]),
        (["--sample_prompts", "@home"], ["@home"]),
        (["--sample_prompts", "7"], ["7"]),
        (["--sample_prompts", "[]"], []),
    ],
)
def test_a_list_flag_takes_a_list_or_one_item(words, value):
    assert load(words).train.sample_prompts == value


def test_a_list_that_is_not_closed_is_refused():
    with pytest.raises(HostError, match=r"^--sample_prompts \[a cat"):
        load(["--sample_prompts", "[a cat"])


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["--seed", "1", "--seed", "1"], "seed"),
        (["--save-path", "a", "--save_path", "b"], "save_path"),
        (["--clip_grad", "--clip_grad"], "clip_grad"),
        (["--config", "a", "--config=b"], "config"),
        (["--plugins", "none", "--plugins", "none"], "plugins"),
    ],
)
def test_a_flag_given_twice_is_refused(words, flag):
    refuse(words, rf"^--{flag}: given twice; give it once$")


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["--seed"], "seed"),
        (["--seed", "--clip_grad"], "seed"),
        (["--save_path", "--seed", "1"], "save_path"),
        (["--config"], "config"),
        (["--plugins"], "plugins"),
        (["--plugins", "--seed", "1"], "plugins"),
        (["--config", "--seed", "1"], "config"),
    ],
)
def test_a_missing_value_is_named(words, flag):
    refuse(words, rf"^--{flag}: needs a value")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed", "x"], r"^--seed x: does not fit its type, int"),
        (["--seed="], r"^--seed : does not fit its type, int"),
        (["--seed", "1.5"], r"^--seed 1\.5: does not fit its type, int"),
        (["--max_grad_norm", "x"], r"^--max_grad_norm x: does not fit its type, float"),
        (["--max_grad_norm", "nan"], r"^train\.max_grad_norm: nan is not a finite number"),
        (["--max_grad_norm", "0"], r"^train\.max_grad_norm: 0\.0 is out of range.* above 0"),
        (["--per_batch_size", "0"], r"^data\.per_batch_size: 0 is out of range.* at least 1"),
        (["--total_step", "0"], r"^data\.total_step: 0 is out of range"),
        (["--ms_mode", "2"], r"^train\.ms_mode: 2 is out of range.* at most 1"),
        (["--device_target", "GPU"], r"^--device_target GPU: .*one of auto, CPU, Ascend"),
        (["--config="], r"^--config: needs a value"),
        (["--save_path", "${"], r"^--save_path \$\{: can't be set: "),
        (["--sede", "1"], r"^--sede: there is no such flag \(did you mean seed\?\)"),
        (["--per_batch_siz", "1"], r"did you mean per_batch_size\?"),
        (["--zzzz"], r"^--zzzz: there is no such flag; .*--help"),
        (["--"], r"no such flag"),
        (["--seed", str(2**64)], r"^train\.seed: .*out of range"),
    ],
)
def test_a_flag_that_cant_be_used_is_refused(words, message):
    refuse(words, message)


def test_flags_have_one_home():
    """--data_path is the dataset's, --per_batch_size and --total_step are data's."""
    config = load(["--data_path", "there", "--per_batch_size", "2", "--total_step", "9"])
    assert config.data.dataset_config["params"]["data_path"] == "there"
    assert (config.data.per_batch_size, config.data.total_step) == (2, 9)


def test_data_path_reaches_a_dataset_without_params(write):
    data = {"dataset_config": {"target": "sdxl_host.Text2ImageDataset"}}
    config = load([*write(data=data), "--data_path", "there"])
    assert config.data.dataset_config["params"] == {"data_path": "there"}


# ---- files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model:\n  a: [1\n  b: 2\n", r"mine\.yaml, line 3: not valid YAML: "),
        ("model: {}\nmodel: {}\n", r"mine\.yaml, line 2: not valid YAML: .*duplicate key model"),
        ("model: !!python/object/apply:os.getcwd []", r"mine\.yaml, line 1: not valid YAML"),
        ("model:\n\tx: 1\n", r"mine\.yaml, line 2: not valid YAML"),
        (b"model: \x00\n", r"mine\.yaml.*: not valid YAML"),
        (b"model: \xff\n", r"mine\.yaml: can't be read: 'utf-8'"),
        ("", r"mine\.yaml: has no section model; copy it from configs/default\.yaml"),
        ("# nothing\n", r"mine\.yaml: has no section model"),
        ("- 1\n- 2\n", r"mine\.yaml: holds no mapping"),
        ("7\n", r"mine\.yaml: "),
        ("word\n", r"mine\.yaml: "),
        ("modle: {}\n", r"mine\.yaml: modle: .*did you mean model\?"),
    ],
)
def test_a_file_that_cant_be_used_is_named_with_the_line(write, text, message):
    refuse(write(text), message)


@pytest.mark.parametrize("section", ["model", "optim", "data"])
def test_a_missing_section_is_named(write, section):
    refuse(write(**{section: None}), rf"mine\.yaml: has no section {section}; copy it from")


@pytest.mark.parametrize("section", ["train", "plugins"])
@pytest.mark.parametrize("value", [None, {}])
def test_train_and_plugins_may_be_left_out(write, section, value):
    assert OmegaConf.to_container(load(write(**{section: value})).tree[section]) is not None


def test_an_empty_section_is_one_without_keys(write, default):
    tree = default
    text = yaml.safe_dump({k: v for k, v in tree.items() if k not in ("train", "plugins")})
    config = load(write(text + "train:\nplugins:\n"))
    assert config.train.seed == 42
    assert config.plugins == ()


@pytest.mark.parametrize("section", ["train", "plugins", "optim", "data"])
@pytest.mark.parametrize("value", [5, "x", [1]])
def test_a_section_that_is_no_mapping_is_refused(write, section, value):
    refuse(write(**{section: value}), rf"\b{section}:? must be a mapping, not")


@pytest.mark.parametrize("flag", [["--seed", "1"], ["--per_batch_size", "2"], ["--data_path", "x"]])
@pytest.mark.parametrize("section", ["train", "optim", "data"])
def test_a_section_that_is_no_mapping_is_refused_whatever_flags_follow(write, section, flag):
    refuse([*write(**{section: [5]}), *flag], rf"\b{section}:? must be a mapping, not")


def test_an_unknown_key_of_the_file_is_refused_with_a_suggestion(write):
    refuse(write(train={"save_pth": "x"}), r"^train\.save_pth: .*did you mean save_path\?")


def test_the_dataset_and_the_optimizer_must_be_there(write):
    refuse(write(data={"per_batch_size": 1}), r"^data\.dataset_config: needs a `target`")
    refuse(write(optim={"base_learning_rate": 1.0}), r"^optim\.optimizer_config: needs a `target`")


def test_processes_for_images_are_refused_with_the_remedy(write, default):
    data = {**default["data"], "python_multiprocessing": True}
    refuse(write(data=data), r"^data\.python_multiprocessing: True is not supported.*False$")


@pytest.mark.parametrize(
    "name", ["configs/default.yaml", "./configs/default.yaml", "default.yaml", "learn_demo.yaml"]
)
def test_packaged_configs_are_found_from_an_empty_folder(tmp_path, monkeypatch, name):
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    config = load(["--config", name])
    expected = yaml.safe_load((packaged_configs() / Path(name).name).read_text("utf-8"))
    assert config.data.total_step == expected["data"]["total_step"]
    assert config.explicit_config == name
    assert not os.listdir(empty)


def test_a_file_on_disk_comes_before_a_packaged_one(tmp_path, monkeypatch, write):
    file = Path(write(train={"seed": 99})[1])
    (tmp_path / "configs").mkdir()
    file.rename(tmp_path / "configs" / "default.yaml")
    monkeypatch.chdir(tmp_path)
    assert load(["--config", "configs/default.yaml"]).train.seed == 99
    assert load([]).train.seed == 42  # without --config it is always the packaged one


@pytest.mark.parametrize("name", ["configs/defualt.yaml", "nowhere/else.yaml", "configs", "."])
def test_a_config_that_is_nowhere_is_refused_with_those_there_are(name):
    said = refuse(["--config", name], r"^--config .*: there is no such file")
    assert "configs/default.yaml" in said
    assert ("did you mean configs/default.yaml?" in said) == ("defualt" in name)


def test_explicit_config_is_empty_without_one():
    assert load([]).explicit_config == ""


# ---- the guide's flags


def test_the_old_name_of_training_is_read_as_train(write):
    for words in (["--task", "txt2img"], write(train={"task": "txt2img"})):
        config = load(words)
        assert (config.train.task, config.tree.train.task) == ("train", "train")
    assert load(write(train={"task": "cache"})).train.task == "cache"
    refuse(["--task", "kache"], r"^--task.*kache.*cache")


def test_nothing_is_named_where_nothing_is_idle():
    assert load([]).notices == ()


# ---- round trip


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--seed", "7", "optim.base_learning_rate=1e-5", f"{SIZE}=64", "--clip_grad", "False"],
        ["optim.scheduler_config=null", "--save_path", "1e-5"],
        [
            "train.sample_prompts=['yes', '1e-5', 'null', '7', 'a: b', '# c', 'ä\u2028猫', '']",
            "--weight",
            "~",
        ],
        [f"{SIZE}=${{data.dataset_config.params.target_size}}", "--data_path", "a b/c"],
    ],
)
def test_a_written_config_restores_the_same_run(tmp_path, words):
    """What a run writes beside itself repeats it."""
    config = load(words)
    file = tmp_path / "config.yaml"
    file.write_text(OmegaConf.to_yaml(config.tree), "utf-8")
    again = restore(file)
    assert OmegaConf.to_container(again.tree) == OmegaConf.to_container(config.tree)
    assert (again.train, again.data, again.optim) == (config.train, config.data, config.optim)
    assert load(["--config", str(file)]).tree == config.tree
    assert OmegaConf.to_yaml(again.tree) == OmegaConf.to_yaml(config.tree)
