"""The documentation is run, compared with the program, and complete."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

import sdxl_host
from sdxl_host import cli, hookspecs
from sdxl_host.errors import PluginError
from sdxl_host.plugins import discovery, inspection
from sdxl_host.plugins import roles as implementations
from sdxl_host.settings.declarations import FLAGS, SCHEMAS
from sdxl_host.settings.options import describe

ROOT = Path(sdxl_host.__file__).parents[1]
DOCS = ROOT / "docs"


def loaded(path: Path) -> ModuleType:
    """A file that is in no package, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


write_docs = loaded(ROOT / "scripts" / "write_docs.py")
frozen = loaded(ROOT / "tests" / "test_public_interface.py")  # its tables are the contract
PAGES = write_docs.pages()
PLUGINS = write_docs.FIRST_PARTY


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# ---- a page is a program


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_the_blocks_run_and_what_they_print_stands_below_them(page: Path):
    """And commands print what is quoted of them, and tables are those of the code."""
    assert write_docs.rendered(page) == page.read_text("utf-8")


def test_every_block_of_python_is_run():
    """But the tests of the tutorial's package, which run where that package is made."""
    left = {relative(page): len(write_docs.not_run(page)) for page in PAGES}
    assert {name: count for name, count in left.items() if count} == {"docs/plugins.md": 1}


def fenced(page: Path, language: str) -> list[str]:
    """The blocks of a page in a language."""
    pattern = rf"^```{language}\n(.*?)^```$"
    return re.findall(pattern, page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def test_settings_in_yaml_and_toml_can_be_read():
    tomllib = pytest.importorskip("tomllib")
    assert all(yaml.safe_load(block) for page in PAGES for block in fenced(page, "yaml"))
    tables = [tomllib.loads(block) for page in PAGES for block in fenced(page, "toml") if block]
    assert len(tables) >= 3


def test_the_plugin_of_the_readme_is_the_one_that_is_shipped():
    """It says of itself that it is the whole of Min-SNR."""
    from sdxl_host import DiscreteDistribution, NoiseLevels, NoiseSchedule

    schedule = NoiseSchedule.scaled_linear()
    noise = NoiseLevels.at(np.array([0.1, 1.0, 9.0]), schedule, DiscreteDistribution(schedule))
    names: dict[str, Any] = {}
    write_docs.rendered(ROOT / "README.md", names)
    told = names["MinSNR"](names["Options"]()).weight_loss(noise)
    cls = write_docs.plugin_class("snr")
    assert told.tolist() == cls(cls.Options()).weight_loss(None, noise).tolist()
    assert told.tolist() == [5.0, 1.0, 1 / 81]


# ---- nothing is left out


def sections(page: Path) -> dict[str, str]:
    """The text below each heading, up to the next one; fenced blocks hold none."""
    found: dict[str, str] = {}
    title, fenced = "", False
    for line in page.read_text("utf-8").splitlines():
        fenced ^= line.startswith("```")
        if line.startswith("#") and not fenced:
            title = line.lstrip("#").strip()
            assert title not in found, f"{page} has two headings {title}"
            found[title] = ""
        elif title:
            found[title] += f"{line}\n"
    return found


def column(text: str) -> list[str]:
    """What stands in backticks in the first column of the tables."""
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


def words(text: str) -> set[str]:
    """Every name in backticks: of `a.b(c, d=1)` a, b, c and d."""
    return {word for code in re.findall(r"`([^`\n]+)`", text) for word in re.findall(r"\w+", code)}


HOOKS_PAGE = sections(DOCS / "hooks.md")
ALL_DOCS = "".join(page.read_text("utf-8") for page in sorted(DOCS.glob("*.md")))


@pytest.mark.parametrize("hook", hookspecs.HOOKS)
def test_a_hook_has_its_arguments_its_return_its_checks_and_an_example(hook: str):
    text = HOOKS_PAGE[hook]
    arguments = list(inspect.signature(getattr(hookspecs, hook)).parameters)
    tables = text.partition("<!-- table")[0]  # the generated one has no arguments
    assert column(tables) == arguments == frozen.HOOK_ARGUMENTS[hook]
    assert re.search(r"^Called ", text, re.MULTILINE)
    assert re.search(r"^Returns ", text, re.MULTILINE)
    assert "The host checks" in text or hook == "on_step_end"
    assert f"<!-- table: roles {hook} -->" in text
    assert re.search(rf"```python\n(?:(?!```).)*@hookimpl.*?\n    def {hook}\(", text, re.DOTALL)
    assert re.search(r"^(assert |np\.testing\.)", text, re.MULTILINE)


def spelled(name: str) -> str:
    """A function as the documentation writes it: `reweighted(weights)`, defaults included."""
    found: Any = sdxl_host
    for part in name.split("."):
        found = getattr(found, part)
    parts = [
        p.name if p.default is inspect.Parameter.empty else f"{p.name}={p.default!r}"
        for p in inspect.signature(found).parameters.values()
        if p.name != "self"
    ]
    owner, _, last = name.rpartition(".")
    return f"{owner if last == '__init__' else last}({', '.join(parts)})"


@pytest.mark.parametrize("name", frozen.SIGNATURES)
def test_a_frozen_method_is_documented_with_its_parameters(name: str):
    owner = name.partition(".")[0]
    text = HOOKS_PAGE.get(owner, "".join(HOOKS_PAGE.values()))
    assert f"`{spelled(name)}`" in text


@pytest.mark.parametrize("name", frozen.FIELDS)
def test_frozen_fields_are_documented_in_their_order(name: str):
    assert [row for row in column(HOOKS_PAGE[name]) if "(" not in row] == frozen.FIELDS[name]


# What is on these classes and not for plugins.
PRIVATE = {
    "DiffusionModel": {
        *("conditioner", "conditioner_part", "network_part", "first_stage_part", "encoders_part"),
        "changes",
    },
}
CLASSES = {
    "NoiseLevels": "diffusion/objective.py",
    "NoiseDistribution": "diffusion/distributions.py",
    "NoiseSchedule": "diffusion/schedule.py",
    "DiffusionModel": "diffusion/model.py",
    "Preconditioning": "diffusion/preconditioning.py",
    "SamplingDefaults": "diffusion/model.py",
    "TextEncoders": "diffusion/conditioning.py",
    "TextEncoder": "diffusion/conditioning.py",
    "PromptEmbedding": "diffusion/conditioning.py",
    "StepResult": "plugins/step_result.py",
    "TrainerView": "plugins/step_result.py",
}


@pytest.mark.parametrize("name", CLASSES)
def test_what_crosses_a_hook_is_documented_attribute_by_attribute(name: str):
    """No attribute is missing, and none is told of that is not there."""
    public = {
        attribute
        for attribute in frozen.attributes_of(CLASSES[name], name)
        if not attribute.startswith("_")
    }
    told = {row.partition("(")[0] for row in column(HOOKS_PAGE[name])}
    arguments = {"change", "trainable", "export"} if name == "DiffusionModel" else set()
    assert told - arguments <= public
    assert public - PRIVATE.get(name, set()) <= words(HOOKS_PAGE[name])


@pytest.mark.parametrize(
    ("name", "attributes"),
    [
        ("DiffusionModel", frozen.MODEL_ATTRIBUTES),
        ("StepResult", frozen.RESULT_ATTRIBUTES),
        ("TrainerView", frozen.TRAINER_ATTRIBUTES),
    ],
)
def test_frozen_attributes_have_a_line_each(name: str, attributes: list[str]):
    assert set(attributes) <= {row.partition("(")[0] for row in column(HOOKS_PAGE[name])}


def test_the_arguments_of_with_network_are_those_that_its_functions_get():
    told = [row for row in column(HOOKS_PAGE["DiffusionModel"]) if row.split("(")[0] in ARGUMENTS]
    assert told == [f"{name}({given})" for name, given in ARGUMENTS.items()]
    assert list(ARGUMENTS) == frozen.SIGNATURES["DiffusionModel.with_network"][1:]


ARGUMENTS = {"change": "network", "trainable": "name", "export": "parameters, folder"}


def test_the_optional_methods_of_a_plugin_are_documented():
    told = {row.partition("(")[0] for row in column(HOOKS_PAGE["The class of a plugin"])}
    assert {"Options", "__init__", "notes", "state_dict", "load_state_dict"} <= told


def test_what_an_import_may_not_load_is_documented():
    assert set(inspection.HEAVY) <= words(HOOKS_PAGE["The class of a plugin"])


def test_the_public_names_are_these():
    assert column(HOOKS_PAGE["The public names"]) == sdxl_host.__all__


def test_the_names_for_tests_are_these():
    testing = importlib.import_module("sdxl_host.testing")
    told = {row.partition("(")[0] for row in column(HOOKS_PAGE["The names for tests"])}
    assert told == set(testing.__all__)


def rows(text: str) -> list[tuple[str, str]]:
    """Name and default of each row of a table with three columns."""
    return re.findall(r"^\| `(\w+)` \| (?:`(.*?)`)? ?\| [^|]+ \|$", text, re.MULTILINE)


def test_the_attributes_of_the_contract_are_these():
    contract = importlib.import_module("sdxl_host.testing").PluginContract
    kept = [(name, repr(getattr(contract, name))) for name in contract.__annotations__]
    assert rows(HOOKS_PAGE["PluginContract"]) == kept


def test_the_arguments_of_a_tiny_run_are_these():
    testing = importlib.import_module("sdxl_host.testing")
    taken = inspect.signature(testing.tiny_run).parameters.values()
    empty = inspect.Parameter.empty
    told = [(one.name, "" if one.default is empty else repr(one.default)) for one in taken]
    assert rows(HOOKS_PAGE["tiny_run"]) == told


def test_the_fields_of_a_tiny_run_are_these():
    testing = importlib.import_module("sdxl_host.testing")
    fields = [field.name for field in dataclasses.fields(testing.TinyRun)]
    assert column(HOOKS_PAGE["TinyRun"]) == fields
    methods = {n for n, value in vars(testing.TinyRun).items() if inspect.isfunction(value)}
    public = {name for name in methods if not name.startswith("_")}
    assert public <= words(HOOKS_PAGE["TinyRun"])


@pytest.mark.parametrize("name", PLUGINS)
def test_every_option_of_a_first_party_plugin_is_documented(name: str):
    for row in describe(write_docs.plugin_class(name).Options):
        assert f"| `plugins.{name}.{row['name']}` | `--{name}_{row['name']}` |" in ALL_DOCS


@pytest.mark.parametrize("section", SCHEMAS)
def test_every_key_and_every_flag_is_documented(section: str):
    for row in describe(SCHEMAS[section]):
        assert f"| `{section}.{row['name']}` |" in ALL_DOCS
        assert f"| `--{row['name']}` |" in ALL_DOCS or section != "train"


def test_flags_outside_their_section_are_documented():
    for flag in ("config", "plugins", *FLAGS):
        assert re.search(rf"\| `--{flag}[` ]", ALL_DOCS), flag


@pytest.mark.parametrize("command", cli._COMMANDS)
def test_every_command_is_documented(command: str):
    text = sections(DOCS / "settings.md")[f"sdxl-host {command}"]
    # The flags of train are the tables of that page.
    assert f"<!-- output: sdxl-host {command} --help -->" in text or command == "train"


# ---- every refusal


def raised_in(function: Any) -> set[int]:
    """Lines of the file at which a function raises a PluginError of its own."""
    lines, first = inspect.getsourcelines(function)
    tree = ast.parse("".join(lines))
    return {node.lineno + first - 1 for node in ast.walk(tree) if isinstance(node, ast.Raise)}


def line_of(error: PluginError) -> int:
    trace = error.__traceback__
    assert trace is not None
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_lineno


def test_every_refusal_of_a_class_is_quoted():
    quoted = {line_of(write_docs.refusal_of_class(cls)) for cls in write_docs.CLASSES.values()}
    assert quoted == raised_in(implementations.implementations) | raised_in(
        implementations._check_marked
    )
    for option in implementations._REFUSED_OPTIONS:
        assert any(f"({option}=" in what for what in write_docs.CLASSES)


def test_every_refusal_of_a_package_is_quoted():
    returns = [
        node
        for function in (discovery.fitting, discovery._version_problem)
        for node in ast.walk(ast.parse(inspect.getsource(function)))
        if isinstance(node, ast.Return)
    ]
    # One hands on what the other says, and the last says that it fits.
    assert len(write_docs.PACKAGES) == len(returns) - 2
    assert len({write_docs.refusal_of_package(p) for p in write_docs.PACKAGES.values()}) == len(
        write_docs.PACKAGES
    )


def test_every_refusal_on_the_way_to_the_class_is_quoted():
    """But that of a package that does not fit, which the other table has."""
    quoted = {line_of(write_docs.refusal_of_import(get)) for get in write_docs.IMPORTS.values()}
    found = raised_in(discovery.find) | raised_in(discovery.import_class)
    again = {line for line in found if _source_line(discovery, line) == "raise"}
    unfit = {line_of(_unfit())}
    assert quoted == found - again - unfit


def _source_line(module: ModuleType, line: int) -> str:
    return inspect.getsource(module).splitlines()[line - 1].strip()


def _unfit() -> PluginError:
    packages = write_docs.PACKAGES["no version of `sdxl-host`"]
    return write_docs.refusal_of_import(lambda: discovery.find("mine", packages))


# ---- links


def markdown_files() -> list[Path]:
    """Those of the project, and none of what is built or installed in its folder."""
    return [
        path
        for path in sorted(ROOT.rglob("*.md"))
        if not any(
            part.startswith(".") or part in ("build", "dist")
            for part in path.relative_to(ROOT).parts
        )
    ]


def prose(path: Path) -> str:
    """A page without its fenced blocks and its code."""
    text = re.sub(r"^(`{3,}).*?^\1$", "", path.read_text("utf-8"), flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`(?!\])", "", text)


def anchors(path: Path) -> set[str]:
    """The headings of a page, as links to them are written."""
    titles = [title.lower() for title in sections(path)]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", markdown_files(), ids=relative)
def test_relative_links_lead_somewhere(path: Path):
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose(path)):
        if "://" in target or target.startswith("mailto:"):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


# ---- what writes the pages


def page_of(folder: Path, text: str) -> Path:
    page = folder / "page.md"
    page.write_text(text, "utf-8")
    return page


PRINTED = "```python\nprint(1 + 1)\n```\n\n<!-- output: the block above -->\n{}<!-- end -->\n"


def test_what_a_block_prints_is_written_below_it(tmp_path: Path):
    page = page_of(tmp_path, PRINTED.format("```\n3\n```\n"))
    assert write_docs.rendered(page) == PRINTED.format("```\n2\n```\n")
    page = page_of(tmp_path, PRINTED.format(""))
    assert write_docs.rendered(page) == PRINTED.format("```\n2\n```\n")


def test_blocks_share_their_names_in_order(tmp_path: Path):
    page = page_of(tmp_path, "```python\nx = 1\n```\ntext\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as raised:
        write_docs.rendered(page)
    last = raised.traceback[-1]
    assert (last.path, last.lineno + 1) == (page, 6)


def test_a_block_may_say_why_it_is_not_run(tmp_path: Path):
    text = "<!-- not run: a fragment -->\n```python\nnothing(\n```\n"
    page = page_of(tmp_path, text)
    assert write_docs.rendered(page) == text
    assert write_docs.not_run(page) == ["nothing(\n"]
    page = page_of(tmp_path, text.replace("-->\n", "-->\n\n"))  # no longer right above it
    with pytest.raises(SyntaxError):
        write_docs.rendered(page)
    assert write_docs.not_run(page) == []


def test_milliseconds_may_differ_and_nothing_else(tmp_path: Path):
    text = PRINTED.replace("1 + 1", "'imported in 2.5 ms'")
    same = text.format("```\nimported in 17 ms\n```\n")
    assert write_docs.rendered(page_of(tmp_path, same)) == same
    other = text.format("```\nimported in 17 s\n```\n")
    assert write_docs.rendered(page_of(tmp_path, other)) != other


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- output: sdxl-host plugins -->\n```\n```\n", "1 outputs and tables begin and 0 end"),
        ("<!-- table: nothing -->\n<!-- end -->\n", "there is none of that name"),
        ("<!-- output: ls -->\n<!-- end -->\n", "ls: is no command of sdxl-host"),
    ],
)
def test_a_comment_that_means_nothing_is_refused(tmp_path: Path, text: str, message: str):
    with pytest.raises(ValueError, match=message):
        write_docs.rendered(page_of(tmp_path, text))


def test_check_names_the_pages_that_are_out_of_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """And leaves them as they are; without it they are written, and then all is well."""
    stale = PRINTED.format("```\n3\n```\n")
    page = tmp_path / "README.md"
    page.write_text(stale, "utf-8")
    monkeypatch.setattr(write_docs, "ROOT", tmp_path)
    assert write_docs.main(["--check"]) == 1
    assert capsys.readouterr().out == "README.md: is out of date\n"
    assert page.read_text("utf-8") == stale
    assert write_docs.main([]) == 0
    assert page.read_text("utf-8") == PRINTED.format("```\n2\n```\n")
    assert write_docs.main(["--check"]) == 0
    assert write_docs.main(["--chekc"]) == 2
