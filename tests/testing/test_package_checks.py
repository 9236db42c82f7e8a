"""What is found at fault in a plugin's package, import and options."""

from __future__ import annotations

import pytest

from sdxl_host.plugins.discovery import discover, make_instance
from sdxl_host.plugins.inspection import check_import, check_metadata, check_options
from sdxl_host.testing.subject import Subject

# ---- without a run: broken


@pytest.mark.parametrize(
    ("requires", "missing"),
    [
        ("sdxl-host>=0.1", "no upper bound"),
        ("sdxl-host!=0.5,>0.0", "no upper bound"),
        ("sdxl-host<0.2", "no lower bound"),
        ("sdxl-host!=0.5", "no lower and no upper bound"),
    ],
)
def test_both_bounds_on_the_host_are_needed(site, requires, missing, fault):
    site.add("oak", requires=requires)
    (oak,) = discover()
    told = fault(check_metadata, oak, [oak])
    assert f"has {missing}; it must declare both" in told
    assert told.endswith("sdxl-host>=0.1,<0.2")


@pytest.mark.parametrize("requires", ["sdxl-host~=0.1.0", "sdxl-host==0.1.*", "sdxl-host>0,<=0.1"])
def test_bounds_may_be_written_in_other_ways(site, requires):
    site.add("oak", requires=requires)
    (oak,) = discover()
    check_metadata(oak, [oak])


def test_an_entry_point_without_a_class(site, fault):
    site.add("oak")
    points = next(site.folder.glob("*.dist-info")) / "entry_points.txt"
    points.write_text("[sdxl_host.plugins]\noak = some_module\n")
    (oak,) = discover()
    assert "names no class" in fault(check_metadata, oak, [oak])


def test_a_plugin_that_is_not_installed(site, tmp_path, fault):
    site.add("birch")
    told = fault(lambda: Subject("oak", tmp_path).installed)
    assert told == (
        "plugin oak is not installed (installed: birch); run pip install -e . in its folder"
    )


@pytest.mark.parametrize("name", ["torch", "scipy", "PIL", "transformers"])
def test_a_heavy_import_is_named(site, subject, name, fault):
    (site.folder / f"{name}.py").write_text("")
    found = subject(f"import {name}\nclass Fake: pass\n")
    told = fault(check_import, found.installed)
    assert f"importing it imports {name}; import them inside" in told
    assert name not in found.__dict__


def test_what_an_import_prints_is_not_taken_for_an_answer(subject):
    source = "import os\nprint('{\"error\": \"no\"}')\nos.write(1, b'noise')\nclass Fake: pass\n"
    assert check_import(subject(source).installed) >= 0


def test_an_import_that_ends_python_or_never_ends(subject, monkeypatch, fault):
    found = subject("import os, sys\nprint('so it goes', file=sys.stderr)\nsys.stderr.flush()\n"
                    "os._exit(3)\n")  # fmt: skip
    told = fault(check_import, found.installed)
    assert "is broken: importing it ended Python with exit code 3 (so it goes)" in told
    monkeypatch.setattr("sdxl_host.plugins.inspection._PATIENCE", 0.01)
    assert "importing it takes over 0 s" in fault(check_import, found.installed)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("size: int", "its option size has no default"),
        ("size: int = 3", "its option size has no help"),
        ("size: int = option(3, help=' ')", "its option size has no help"),
        ("size: int = option(3, help='a\\nb')", "the help of its option size has several lines"),
        ("size: int = option(3.5, help='big')", "can't be made from their defaults"),
        ("size: int = option(-1, help='big', minimum=0)", "out of range"),
        ("size: np.ndarray = option(None, help='big')", "can't be made from their defaults"),
        ("size: 'Nowhere' = option(1, help='big')", "can't be made from their defaults: NameError"),
        (
            "size: list[int] = field(default_factory=lambda: SHARED, metadata={'help': 'big'})",
            "its option size has one list for all instances",
        ),
        (
            "size: int = option(3, help='big')\n    def __post_init__(self): self.size += 1",
            "its option size is 4, and 5 once it was written to a config",
        ),
        (
            "size: int = option(3, help='big')\n    def __post_init__(self): raise KeyError('no')",
            "can't be made from their defaults: KeyError",
        ),
    ],
)
def test_options_at_fault(subject, body, told, fault):
    source = (
        f"SHARED = [1]\n@dataclass\nclass Options:\n    {body}\nclass Fake:\n    Options = Options"
    )
    found = subject(source)
    assert told in fault(check_options, found.installed, found.cls)


def test_options_that_are_no_dataclass(subject, fault):
    found = subject("class Fake:\n    class Options:\n        size = 3\n")
    told = fault(check_options, found.installed, found.cls)
    assert "its Options is not a dataclass" in told


def test_an_object_that_can_t_be_made(subject, fault):
    found = subject("class Fake:\n    def __init__(self): self.a = 1 / 0\n")
    told = fault(make_instance, found.installed, found.cls, None)
    assert "could not be made from its options: ZeroDivisionError" in told
