"""Datasets and transforms of other packages, by the names that they declare."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from support.images import captioned

from sdxl_host.config.load import load
from sdxl_host.data.dataset import Text2ImageDataset, make_dataset
from sdxl_host.errors import ConfigError, DataError, PluginError

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"

SOURCE = """
from typing import TYPE_CHECKING

from sdxl_host import Captioned, DataError, Listing, Problem, Text2ImageDataset

if TYPE_CHECKING:
    from somewhere import Odd


class Nightly(Text2ImageDataset):
    def __init__(self, suffix: str = ".png", **others):
        self.suffix = suffix
        super().__init__(**others)

    def list_images(self, source):
        if self.suffix == "data":
            raise DataError(f"{source}: tonight's list is missing; wait for it")
        if self.suffix == "value":
            raise ValueError("suffix must begin with a dot")
        if self.suffix == "bug":
            return [][0]
        if self.suffix == "list":
            return []
        files = sorted(source.glob(f"*{self.suffix}"))
        images = [Captioned(f.name, str(f), f"tonight {f.stem}") for f in files]
        return Listing(images, [Problem("late", "z.png")], ["It is night."])


class Plain(Text2ImageDataset):
    pass


class Other:
    def __init__(self, target_size: int, transforms: list, data_path: str = ""):
        pass


class Invert:
    def __init__(self, by: "Odd" = 255, wrong: bool = False):
        self.by = by

    def __call__(self, sample, generator):
        return {**sample, "image": self.by - sample["image"]}


def function(parts):
    return {}
"""
NAMES = {
    "my.Nightly": "Nightly",
    "my.Plain": "Plain",
    "my.Other": "Other",
    "my.Invert": "Invert",
    "my.function": "function",
    "my.missing": "missing",
}


@pytest.fixture
def package(site) -> str:
    """The module of a package with datasets and transforms, and no plugin."""
    return site.add("nightly", source=SOURCE, targets=NAMES, has_plugin=False)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return captioned(tmp_path / "images", a="cat", b="dog")


def build(tmp_path: Path, *words: str, **node: Any) -> Text2ImageDataset:
    """The dataset of the tiny config with another node for it."""
    tree = OmegaConf.load(TINY)
    given = OmegaConf.to_container(tree.data.dataset_config)
    params = {**given["params"], **node.pop("params", {})}  # type: ignore[index, call-overload]
    tree.data.dataset_config = {**given, **node, "params": params}  # type: ignore[dict-item]
    file = tmp_path / "nightly.yaml"
    OmegaConf.save(tree, file)
    return make_dataset(load(["--config", str(file), *words]).data)


def test_a_dataset_lists_its_own_images(package, images, tmp_path):
    """Its parameters, and through `**others` those of its base, by flags too."""
    data = build(
        tmp_path, "--data_path", str(images), target="my.Nightly", params={"suffix": "a.png"}
    )
    assert type(data).__module__ == package
    assert [(image.name, image.text) for image in data.images] == [("a.png", "tonight a")]
    assert [problem.kind for problem in data.problems] == ["late"]
    assert data.notes == ["It is night."]
    assert data.sample(0, np.random.default_rng(0)).pixels is not None


def test_a_dataset_that_lists_its_own_never_trains_on_the_carried_images(package, tmp_path):
    """Without data_path, a start must not say that these are they."""
    assert not build(tmp_path, target="my.Nightly").is_demo
    assert build(tmp_path, target="my.Plain").is_demo


def test_a_transform_takes_part(package, images, tmp_path):
    tiny = OmegaConf.to_container(OmegaConf.load(TINY).data.dataset_config.params.transforms)
    usual = build(tmp_path, "--data_path", str(images))
    params = {"transforms": [{"target": "my.Invert", "params": {"by": 255}}, *tiny]}  # type: ignore[misc]
    inverted = build(tmp_path, "--data_path", str(images), params=params)
    one, other = (data.sample(0, np.random.default_rng(0)).pixels for data in (usual, inverted))
    np.testing.assert_allclose(one, -other, atol=1e-6)


def test_what_no_config_names_is_not_imported(package, images, tmp_path):
    build(tmp_path, "--data_path", str(images))
    assert package not in sys.modules


PLACE = r"^data\.dataset_config"
FIRST = r"^data\.dataset_config\.params\.transforms\[0\]"


@pytest.mark.parametrize(
    ("target", "params", "error", "message"),
    [
        ("my.Nightly", {"sufix": ".png"}, ConfigError,
         PLACE + r"\.params\.sufix: my\.Nightly has no such parameter \(did you mean suffix\?\) "
         r"\(parameters: suffix, target_size, transforms, data_path, only, aesthetic_score\)"),
        ("my.Nightly", {"suffix": 5}, ConfigError, PLACE + r"\.params\.suffix: 5 does not fit"),
        ("my.Nightly", {"target_size": "x"}, ConfigError, PLACE + r"\.params\.target_size: 'x' do"),
        ("my.Nightly", {"suffix": "data"}, DataError, r"tonight's list is missing; wait for it$"),
        ("my.Nightly", {"suffix": "value"}, ConfigError,
         PLACE + r"\.params: suffix must begin with a dot \(says my\.Nightly of fake-nightly 1\.0"),
        ("my.Nightly", {"suffix": "bug"}, PluginError,
         PLACE + r": my\.Nightly of fake-nightly 1\.0 failed: IndexError: .*; mend the package"),
        ("my.Nightly", {"suffix": "list"}, PluginError,
         PLACE + r": my\.Nightly of fake-nightly 1\.0 failed: AttributeError"),
        ("my.Nightly", {"suffix": ".none"}, DataError, "holds no captioned image"),
        ("my.Other", {}, PluginError,
         PLACE + r"\.target: my\.Other is not derived from sdxl_host\.Text2ImageDataset; its"),
        ("my.Nihgtly", {}, ConfigError,
         PLACE + r"\.target: my\.Nihgtly: there is no such target"),
        ("my.function", {}, PluginError,
         PLACE + r"\.target: my\.function of fake-nightly 1\.0 is no class; what stands for a"),
        ("my.missing", {}, PluginError,
         PLACE + r"\.target: my\.missing of fake-nightly 1\.0 could not be imported: Attribute"),
    ],
)  # fmt: skip
def test_refused_datasets(package, images, tmp_path, target, params, error, message):
    with pytest.raises(error, match=message) as refused:
        build(tmp_path, "--data_path", str(images), target=target, params=params)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("target", "params", "error", "message"),
    [
        ("my.Invert", {"off": 1}, ConfigError, FIRST + r"\.params\.off: .*parameters: by, wrong"),
        ("my.function", {}, PluginError, FIRST + r"\.target: my\.function of .* is no class"),
        ("my.Brighter", {}, ConfigError, FIRST + r"\.target: my\.Brighter: there is no such"),
    ],
)
def test_refused_transforms(package, images, tmp_path, target, params, error, message):
    nodes = {"transforms": [{"target": target, "params": params}]}
    with pytest.raises(error, match=message):
        build(tmp_path, "--data_path", str(images), params=nodes)


def test_a_name_that_two_packages_declare_is_refused(site, package, tmp_path):
    site.add("other", source=SOURCE, targets={"my.Nightly": "Nightly"}, has_plugin=False)
    with pytest.raises(PluginError, match=r"both declare the target my\.Nightly; uninstall one"):
        build(tmp_path, target="my.Nightly")


@pytest.mark.parametrize(
    ("requires", "message"),
    [
        ("sdxl-host>=9", r"fake-nightly 1\.0 needs sdxl-host>=9, and this is sdxl-host"),
        ("", r"fake-nightly 1\.0 does not say which versions of sdxl-host it works with"),
    ],
)
def test_a_package_for_another_host_is_refused(site, tmp_path, requires, message):
    site.add("nightly", source=SOURCE, targets=NAMES, has_plugin=False, requires=requires)
    with pytest.raises(PluginError, match=rf"{PLACE}\.target: my\.Nightly: {message}"):
        build(tmp_path, target="my.Nightly")


def test_a_package_that_cant_be_imported_is_named(site, tmp_path):
    site.add("nightly", source="1 / 0", targets=NAMES, has_plugin=False)
    message = r"my\.Nightly of fake-nightly 1\.0 could not be imported: ZeroDivisionError: .*again"
    with pytest.raises(PluginError, match=message):
        build(tmp_path, target="my.Nightly")


def test_a_class_is_no_part_of_a_model(site, tmp_path):
    site.add("nightly", source=SOURCE + "\nclass Fake:\n    pass\n", targets=NAMES)
    tree = OmegaConf.load(TINY)
    place = "model.params.denoiser_config.params.scaling_config"
    OmegaConf.update(tree, place, {"target": "my.Nightly"}, merge=False)
    OmegaConf.save(tree, tmp_path / "t.yaml")
    message = r"the target my\.Nightly is a class, which can stand for a dataset or a transform"
    with pytest.raises(PluginError, match=message):
        load(["--config", str(tmp_path / "t.yaml")])
