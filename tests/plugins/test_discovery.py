"""Finding plugins by metadata alone, and what is said of one that can't be used."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from sdxl_host.errors import PluginError
from sdxl_host.plugins.discovery import (
    GROUP,
    RESERVED_NAMES,
    Installed,
    discover,
    find,
    fitting,
    import_class,
    normalize,
    timed_import,
)
from sdxl_host.version import __version__

FITS = "sdxl-host>=0.1,<0.2"
Install = Callable[..., str]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts a distribution with one plugin on sys.path; returns the name of its module."""
    before = set(sys.modules)

    def add(
        name: str,
        source: str = "class Plugin: ...\n",
        *,
        distribution: str | None = None,
        version: str = "1.0",
        requires: list[str] | None = None,
        attribute: str = ":Plugin",
        group: str = GROUP,
    ) -> str:
        distribution = distribution or f"fake-{name}"
        folder = tmp_path / f"{distribution}-{version}-{len(list(tmp_path.iterdir()))}"
        module = f"module_of_{distribution.replace('-', '_')}"
        metadata = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        metadata.mkdir(parents=True)
        lines = ["Metadata-Version: 2.1", f"Name: {distribution}", f"Version: {version}"]
        lines += [f"Requires-Dist: {line}" for line in ([FITS] if requires is None else requires)]
        (metadata / "METADATA").write_text("\n".join(lines) + "\n", "utf-8")
        (metadata / "entry_points.txt").write_text(
            f"[{group}]\n{name} = {module}{attribute}\n", "utf-8"
        )
        (folder / f"{module}.py").write_text(source, "utf-8")
        monkeypatch.syspath_prepend(str(folder))
        return module

    yield add
    for module in set(sys.modules) - before:
        if module.startswith("module_of_"):
            del sys.modules[module]


def listed(name: str) -> list[Installed]:
    return [plugin for plugin in discover() if plugin.name == name]


def plugin(name: str = "fake", requires: str | None = ">=0.1,<0.2", **changed: str) -> Installed:
    values = {"distribution": f"dist-{name}", "version": "1.0", "module": "m", "attribute": "P"}
    values.update(changed)
    return Installed(
        name=name, requires=None if requires is None else SpecifierSet(requires), **values
    )


# ---- listing


def test_discover_reads_the_metadata(install: Install):
    module = install("dimmer", distribution="sdxl-dimmer", version="2.3")
    assert listed("dimmer") == [
        Installed(
            name="dimmer",
            distribution="sdxl-dimmer",
            version="2.3",
            requires=SpecifierSet(">=0.1,<0.2"),
            module=module,
            attribute="Plugin",
        )
    ]
    assert str(listed("dimmer")[0]) == "dimmer (sdxl-dimmer 2.3)"


@pytest.mark.parametrize("source", ["raise RuntimeError('no')\n", "def broken(:\n"])
def test_discover_imports_nothing(install: Install, source: str):
    """A plugin whose module can't be imported is listed like any other, and fit until selected."""
    module = install("dimmer", source)
    found = discover()
    assert find("dimmer", found).module == module
    assert module not in sys.modules


def test_other_groups_are_not_listed(install: Install):
    install("dimmer", group="sdxl_host.other")
    assert listed("dimmer") == []


def test_discover_is_sorted_by_name(install: Install):
    for name in ("zebra", "ant", "mole"):
        install(name)
    names = [one.name for one in discover()]
    assert names == sorted(names)
    assert {"ant", "mole", "zebra"} <= set(names)


@pytest.mark.parametrize("written", ["light-dimmer", "light_dimmer"])
def test_a_hyphen_reads_as_an_underscore(install: Install, written: str):
    install(written)
    assert normalize(written) == "light_dimmer"
    assert find(normalize("light-dimmer"), discover()).name == "light_dimmer"


def test_normalize_strips_blanks():
    assert normalize(" snr ") == "snr"


# ---- not installed


@pytest.mark.parametrize("name", ["edm", "lpw", "snr", "timestep_bias"])
def test_a_known_plugin_that_is_missing_comes_with_its_package(name: str):
    expected = f"plugin {name} is not installed; pip install sdxl-{name.replace('_', '-')}"
    with pytest.raises(PluginError) as refused:
        find(name, [plugin("other")])
    assert str(refused.value) == expected


@pytest.mark.parametrize(
    ("name", "suggested"), [("timestep_bia", "timestep_bias"), ("dimer", "dimmer")]
)
def test_an_unknown_plugin_comes_with_a_suggestion(name: str, suggested: str):
    """Of what is installed and of what could be."""
    with pytest.raises(PluginError) as refused:
        find(name, [plugin("dimmer"), plugin("other")])
    message = str(refused.value)
    assert message.startswith(f"plugin {name} is not installed")
    assert f"did you mean {suggested}?" in message
    assert "(installed: dimmer, other)" in message
    assert message.endswith("; pip install the package that provides it")


def test_nothing_like_it_and_nothing_installed():
    with pytest.raises(PluginError) as refused:
        find("zzzz", [])
    assert "did you mean" not in str(refused.value)
    assert "(installed: none)" in str(refused.value)


# ---- unfit


def test_a_fitting_plugin_is_found(install: Install):
    install("dimmer", requires=["numpy>=1", "SDXL_Host>=0.1,<0.2", "pluggy"])
    found = discover()
    assert fitting(find("dimmer", found), found) is None


@pytest.mark.parametrize("requires", ["sdxl-host>=0.2", "sdxl-host<0.1", "sdxl-host==99"])
def test_another_host_version_is_refused_before_the_import(install: Install, requires: str):
    module = install("dimmer", "raise RuntimeError\n", requires=[requires])
    with pytest.raises(PluginError) as refused:
        find("dimmer", discover())
    bound = requires.removeprefix("sdxl-host")
    assert str(refused.value) == (
        f"plugin dimmer: fake-dimmer 1.0 needs sdxl-host{bound}, and this is sdxl-host "
        f"{__version__}; pip install --upgrade fake-dimmer sdxl-host"
    )
    assert module not in sys.modules


@pytest.mark.parametrize(
    "requires",
    [
        [],
        ["numpy>=1"],
        ["sdxl-host-extras>=0.1"],
        ["sdxl-host>=0.1; extra == 'dev'"],
        ["sdxl-host>=0.1; python_version < '3'"],
        ["sdxl-host"],
    ],
    ids=["nothing", "others", "similar", "extra", "marker", "bare"],
)
def test_a_package_that_states_no_host_version_is_refused(install: Install, requires: list[str]):
    """`Requires-Dist: sdxl-host>=X,<Y` is the contract; a bare name says nothing either."""
    install("dimmer", requires=requires)
    with pytest.raises(
        PluginError, match=r"^plugin dimmer: fake-dimmer 1\.0 does not say which ver"
    ):
        find("dimmer", discover())


def test_a_marker_that_applies_counts(install: Install):
    install("dimmer", requires=["not a requirement !!", "sdxl-host<0.1; python_version > '3'"])
    with pytest.raises(PluginError, match=r"needs sdxl-host<0\.1, "):
        find("dimmer", discover())


def test_a_prerelease_of_the_host_is_within_its_bounds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sdxl_host.plugins.discovery.__version__", "0.2.0rc1")
    assert fitting(plugin(requires=">=0.1"), [plugin(requires=">=0.1")]) is None


@pytest.mark.parametrize("names", [("dimmer", "dimmer"), ("light-dimmer", "light_dimmer")])
def test_two_packages_with_one_plugin_name_are_refused(install: Install, names: tuple[str, str]):
    """Neither is dropped without a word, whichever comes first on the path."""
    install(names[0], distribution="dist-a", version="1.0")
    install(names[1], distribution="dist-b", version="2.0")
    name = normalize(names[0])
    assert [one.distribution for one in listed(name)] == ["dist-a", "dist-b"]
    with pytest.raises(PluginError) as refused:
        find(name, discover())
    assert str(refused.value) == (
        f"plugin {name}: dist-a 1.0 and dist-b 2.0 both provide a plugin named {name}; "
        "uninstall one of them (pip uninstall dist-b)"
    )


def test_two_copies_of_one_package_are_one_plugin(install: Install):
    """The first on the path shadows the other, as it does for an import."""
    install("dimmer", distribution="dist-a", version="1.0")
    install("dimmer", distribution="dist-a", version="2.0")
    assert [one.version for one in listed("dimmer")] == ["2.0"]
    assert find("dimmer", discover()).version == "2.0"


@pytest.mark.parametrize("name", ["Dimmer", "2dimmer", "_dimmer", "dim.mer", "dim mer", "dimmér"])
def test_a_bad_name_is_refused(install: Install, name: str):
    install(name, distribution="dist-a")
    with pytest.raises(PluginError) as refused:
        find(name, discover())
    message = str(refused.value)
    assert f"{name!r} is not a plugin name" in message
    assert message.endswith("; dist-a must rename its entry point")


@pytest.mark.parametrize("name", ["host", "train", "data", "model", "optim", "plugins"])
def test_a_reserved_name_is_refused(install: Install, name: str):
    install(name, distribution="dist-a")
    with pytest.raises(PluginError) as refused:
        find(name, discover())
    assert str(refused.value) == (
        f"plugin {name}: the name {name} belongs to the host; dist-a must rename its entry point"
    )


def test_none_is_reserved_as_well():
    """`--plugins none` empties the selection."""
    assert set(RESERVED_NAMES) == {"host", "train", "data", "model", "optim", "plugins", "none"}


def test_an_unfit_plugin_does_not_hurt_another(install: Install):
    install("dimmer")
    install("Broken", "raise RuntimeError\n", requires=[])
    install("old", requires=["sdxl-host<0.1"])
    assert find("dimmer", discover()).name == "dimmer"


# ---- importing


def test_import_gives_the_class(install: Install):
    module = install("dimmer", "class Plugin:\n    mark = 7\n")
    found = find("dimmer", discover())
    assert import_class(found).mark == 7
    assert import_class(found).__module__ == module
    cls, seconds = timed_import(found)
    assert cls is import_class(found)
    assert seconds >= 0


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("raise RuntimeError('out of luck')\n", "RuntimeError: out of luck"),
        ("import nothing_of_this_name\n", "ModuleNotFoundError: No module named 'nothing_of_this_"),
        ("def broken(:\n", "SyntaxError: "),
        ("raise SystemExit(3)\n", "SystemExit: 3"),
        ("raise BaseException('odd')\n", "BaseException: odd"),
        ("from sdxl_host import nothing\n", "ImportError: cannot import name 'nothing'"),
    ],
)
def test_an_import_that_fails_names_package_and_cause(install: Install, source: str, cause: str):
    install("dimmer", source, version="1.5")
    with pytest.raises(PluginError) as refused:
        import_class(find("dimmer", discover()))
    message = str(refused.value)
    assert message.startswith(f"plugin dimmer (fake-dimmer 1.5) could not be imported: {cause}")
    assert message.endswith("; pip install --force-reinstall fake-dimmer, or run without it")
    assert refused.value.__cause__ is not None


def test_an_interruption_while_importing_stays_one(install: Install):
    install("dimmer", "raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        import_class(find("dimmer", discover()))


@pytest.mark.parametrize(
    ("source", "attribute"),
    [
        ("Plugin = 3\n", ":Plugin"),
        ("def Plugin(options): ...\n", ":Plugin"),
        ("class Other: ...\n", ":Plugin"),
        ("class Plugin: ...\n", ""),
    ],
    ids=["value", "function", "missing", "module"],
)
def test_an_entry_point_that_is_no_class_is_refused(install: Install, source: str, attribute: str):
    module = install("dimmer", source, attribute=attribute)
    with pytest.raises(PluginError) as refused:
        import_class(find("dimmer", discover()))
    assert str(refused.value) == (
        f"plugin dimmer (fake-dimmer 1.0): its entry point {module}:{attribute.lstrip(':')} is not "
        "a class; fake-dimmer must name the plugin's class there"
    )
