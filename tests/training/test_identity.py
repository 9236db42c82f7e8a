"""The digest of a graph: the same for the same, another for whatever may be a constant in it."""

from __future__ import annotations

import collections
import functools
import types
from collections.abc import Callable
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops

from sdxl_host.config.load import load
from sdxl_host.models.precision import apply_precision
from sdxl_host.plugins.hooks import make_hooks
from sdxl_host.training import identity
from sdxl_host.training.identity import Undeclared, graph_digest
from sdxl_host.training.step import TrainStep
from sdxl_host.weights.networks import build_networks

pytestmark = pytest.mark.usefixtures("device")

SIGNATURE = (((2, 3), ms.float32),)
NETWORK = "model.params.network_config.params"
FACTOR = 2.0


def digest(cell: nn.Cell, method: str = "construct", signature: Any = SIGNATURE, **facts: Any):
    return graph_digest(cell, method, signature, facts)


class Layer(nn.Cell):
    """A cell that holds something of every kind."""

    bias = 0.5

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = np.random.default_rng(seed)
        self.weight = Parameter(Tensor(generator.random((2, 3), np.float32)), name="weight")
        self.constant = Tensor(np.ones(3, np.float32))
        self.array = np.ones(3)
        self.scale, self.flag, self.name_ = 1.0, True, "a"
        self.sizes, self.table, self.words = (1, 2), {"a": [1]}, {"x", "y"}
        self.low = ms.float16
        self.dense = nn.Dense(3, 3)
        self.square = ops.Square()
        self.pool = ops.ReduceSum(keep_dims=False)
        self.options = types.SimpleNamespace(rank=4)
        self.function = _closure(3.0)
        self.layers = [nn.ReLU()]
        self.loop: list[Any] = []
        self.loop.append(self.loop)

    def construct(self, x):
        return x * self.weight


def _closure(factor: float) -> Callable[[Any], Any]:
    def function(x: Any) -> Any:
        return x * factor

    return function


def change(path: str, value: Any) -> Callable[[Layer], None]:
    def make(layer: Layer) -> None:
        target: Any = layer
        *parts, last = path.split(".")
        for part in parts:
            target = getattr(target, part)
        setattr(target, last, value)

    return make


def test_two_cells_built_alike_have_one_digest_whatever_their_weights() -> None:
    assert digest(Layer(0)) == digest(Layer(1))


def test_running_a_cell_leaves_its_digest() -> None:
    """Eager or compiled: MindSpore then keeps things in it that are no part of a graph."""
    ran = Layer()
    x = Tensor(np.ones((2, 3), np.float32))
    ran(x)
    ms.jit(ran.construct)(x)
    ms.jit(ran.dense.construct)(x)
    assert digest(ran) == digest(Layer())


@pytest.mark.parametrize(
    "changed",
    [
        change("scale", 2.0),
        change("scale", 1),  # int in place of float: another type of output
        change("scale", np.float32(1.0)),
        change("flag", False),
        change("name_", "b"),
        change("sizes", (1, 3)),
        change("sizes", [1, 2]),
        change("table", {"a": [2]}),
        change("words", {"x"}),
        change("low", ms.float32),
        change("constant", Tensor(np.zeros(3, np.float32))),
        change("constant", Tensor(np.ones(3, np.float16))),
        change("array", np.zeros(3)),
        change("options.rank", 8),
        change("function", _closure(4.0)),
        change("function", len),
        change("square", ops.Abs()),
        change("pool", ops.ReduceSum(keep_dims=True)),
        change("dense.has_bias", False),
        change("dense.weight.requires_grad", False),
        change("dense", nn.Dense(3, 3, has_bias=False)),
        change("dense.weight", Parameter(Tensor(np.ones((3, 3), np.float16)), name="dense.weight")),
        change("weight", Parameter(Tensor(np.ones((3, 3), np.float32)), name="weight")),
        change("added", 1),
        lambda layer: layer.layers.append(nn.ReLU()),
        lambda layer: layer.dense.to_float(ms.float16),
        lambda layer: layer.set_train(),
        lambda layer: layer.dense.register_forward_hook(_closure(1.0)),
    ],
)
def test_whatever_a_cell_holds_counts(changed: Callable[[Layer], Any]) -> None:
    layer = Layer()
    changed(layer)
    assert digest(layer) != digest(Layer())


def test_method_inputs_and_facts_count() -> None:
    layer = Layer()
    digests = {
        digest(layer),
        digest(layer, "other"),
        digest(layer, signature=(((2, 4), ms.float32),)),
        digest(layer, signature=(((2, 3), ms.float16),)),
        digest(layer, signature=SIGNATURE * 2),
        digest(layer, jit_level="O1"),
        digest(layer, ranks=2),
    }
    assert len(digests) == 7


def test_class_and_module_count_as_they_are_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph holds plain values of a class or a module, whoever has set them."""
    before = digest(Layer())
    monkeypatch.setattr(Layer, "bias", 0.25)
    of_class = digest(Layer())
    monkeypatch.undo()
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    assert len({before, of_class, digest(Layer())}) == 3


def _of_default(x: Any, factor: Any = 1.0) -> Any:
    return x * factor


GLOBAL: Any = None
HELPERS = types.ModuleType("helpers_of_test")


class User(nn.Cell):
    """A cell whose code names globals: at once, inside a nested function, of another module, and in
    a function that it calls."""

    table: Any = None

    def construct(self, x):
        def nested(y):
            return HELPERS.made(y, GLOBAL)

        return _calls_back(nested(x))

    @property
    def shown(self):
        return self.table

    @staticmethod
    def static(x):
        return x


def _calls_back(x: Any) -> Any:
    return User.static(x) * GLOBAL


@pytest.fixture
def helpers(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
    """The folder of a package whose function `made` the cell calls; nothing else leads to it."""
    folder = tmp_path / "helpers_of_test"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    HELPERS.__file__ = str(folder / "__init__.py")
    monkeypatch.setitem(identity.sys.modules, "helpers_of_test", HELPERS)
    monkeypatch.setattr(HELPERS, "made", _of_default, raising=False)
    return folder


@pytest.mark.parametrize(
    "values",
    [
        (1, 2),
        ((1,), (2,)),
        ([1], [2]),
        ({"a": 1}, {"a": 2}),
        (Tensor(np.ones(2, np.float32)), Tensor(np.zeros(2, np.float32))),
        (np.ones(2), np.zeros(2)),
        (functools.partial(_of_default, factor=1), functools.partial(_of_default, factor=2)),
        (types.SimpleNamespace(a=1), types.SimpleNamespace(a=2)),
        (_closure(1.0), _closure(2.0)),
        (lambda x: x + 1, lambda x: x + 2),
        (type("A", (), {"rate": (1,)}), type("A", (), {"rate": (2,)})),
    ],
)
@pytest.mark.parametrize("place", ["global", "module", "class"])
def test_what_code_finds_outside_its_cell_counts(
    values: tuple[Any, Any], place: str, helpers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put(value: Any) -> str:
        if place == "global":
            monkeypatch.setitem(globals(), "GLOBAL", value)
        elif place == "module":
            monkeypatch.setattr(HELPERS, "made", value)
        else:
            monkeypatch.setattr(User, "table", value)
        return digest(User())

    first, second = values
    assert put(first) != put(second)
    assert put(first) == put(first)


@pytest.mark.parametrize("wrap", [lambda f: f, staticmethod, classmethod, property])
@pytest.mark.parametrize("cls", [User, nn.Dense])
def test_a_method_put_into_a_class_counts(
    cls: type, wrap: Any, helpers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also into a class of MindSpore, whose version stands for its methods otherwise."""
    digests = set()
    for function in (_closure(1.0), _closure(2.0), _of_default):
        monkeypatch.setattr(cls, "patched", wrap(function), raising=False)
        digests.add(digest(cls(3, 3) if cls is nn.Dense else cls()))
    assert len(digests) == 3


def test_a_function_put_into_mindspore_counts(
    helpers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HELPERS, "made", lambda x: ops.relu(x))
    before = digest(User())
    monkeypatch.setattr(ops, "relu", _of_default)
    assert digest(User()) != before


def test_defaults_of_a_method_count(helpers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(User())
    monkeypatch.setattr(User.static, "__defaults__", ((1, 2),))
    assert digest(User()) != before


def test_what_code_names_and_no_digest_covers_is_refused(
    helpers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "GLOBAL", Opaque())
    with pytest.raises(Undeclared, match="does not show what it holds"):
        digest(User())
    monkeypatch.setitem(globals(), "GLOBAL", 1)
    (helpers / "__init__.py").unlink()
    with pytest.raises(Undeclared, match="can't be read"):
        digest(User())


def test_sources_of_a_package_met_through_a_global_count(helpers: Any) -> None:
    before = digest(User())
    (helpers / "part.py").write_text("y = 1\n")
    assert digest(User()) != before


def test_sources_in_a_namespace_package_count(
    helpers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a file in it; and all of a package in it."""
    (helpers / "__init__.py").rename(helpers / "part.py")
    inner = helpers / "inner"
    inner.mkdir()
    for name in ("__init__.py", "beside.py"):
        (inner / name).write_text("")
    monkeypatch.setattr(HELPERS, "__file__", None)
    monkeypatch.setattr(HELPERS, "__path__", [str(helpers)], raising=False)
    for name, file in (("part", helpers / "part.py"), ("inner", inner / "__init__.py")):
        module = types.ModuleType(f"helpers_of_test.{name}")
        module.__file__ = str(file)
        monkeypatch.setitem(identity.sys.modules, module.__name__, module)
    digests = set()
    for name, changed in (("part", helpers / "part.py"), ("inner", inner / "beside.py")):
        made = type("Made", (Layer,), {"__module__": f"helpers_of_test.{name}"})
        digests.add(digest(made()))
        changed.write_text("z = 1\n")
        digests.add(digest(made()))
    assert len(digests) == 4


def test_another_class_with_the_same_attributes_is_another_graph() -> None:
    other = type("Other", (Layer,), {"__module__": Layer.__module__})
    assert digest(other()) != digest(Layer())


def test_sources_of_the_packages_that_cells_come_from_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    (tmp_path / "__init__.py").write_text("x = 1\n")
    (tmp_path / "part.py").write_text("y = 1\n")
    package = types.ModuleType("made")
    package.__file__ = str(tmp_path / "__init__.py")
    monkeypatch.setitem(identity.sys.modules, "made", package)
    made = type("Made", (Layer,), {"__module__": "made"})
    before = digest(made())
    (tmp_path / "part.py").write_text("y = 2\n")
    assert digest(made()) != before


class Opaque:
    """Holds something that Python does not show."""

    __slots__ = ()

    def __new__(cls) -> Opaque:
        return super().__new__(cls)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([nn.Dense(3, 3)], "parameter weight"),
        (Opaque(), "does not show what it holds"),
        ({("a", 1)}, "a set"),
        (collections.deque([1]), "does not show what it holds"),
        (functools.reduce(lambda inner, _: [inner], range(5000), []), "too deep"),
        (type("Nowhere", (), {"__module__": "nowhere"})(), "nowhere, which is no module"),
        (_closure(Parameter(Tensor(1.0), name="foreign")), "parameter foreign"),  # type: ignore
    ],
)
def test_what_can_t_be_covered_is_refused(value: Any, reason: str) -> None:
    """A kept graph would compute with something else in its place."""
    layer = Layer()
    layer.more = value
    with pytest.raises(Undeclared, match=reason):
        digest(layer)


# ---- the training step


def step(*words: str, level: str = "O0", **given: Any) -> str:
    """The digest of a step on the tiny network."""
    config = load(["--config", "tiny.yaml", *words])
    model = make_hooks(config.plugins).build_model(config.tree)
    networks = build_networks(model, seed=0)
    apply_precision(model.network, level)
    return digest(TrainStep(networks.cell, networks.trained, **given))


def test_numbers_of_plugins_and_of_the_optimizer_are_not_in_the_step() -> None:
    words = ["--plugins", "edm,snr", "--snr_gamma", "3", "--edm_p_mean", "-1.0"]
    words += ["optim.base_learning_rate=1e-3", "optim.optimizer_config.params.beta2=0.9"]
    words += ["--total_step", "7", "--sample_interval", "2", "--max_grad_norm", "3"]
    assert step(*words) == step("--plugins", "none")


def test_what_is_in_the_step_makes_another_one() -> None:
    none = ("--plugins", "none")
    digests = {
        step(*none),
        step(*none, f"{NETWORK}.transformer_depth=[0,2]"),
        step(*none, f"{NETWORK}.num_head_channels=16"),
        step("--plugins", "lora"),
        step("--plugins", "lora", "--lora_alpha", "3"),
        step(*none, level="O1"),
        step(*none, level="O2"),
        step(*none, level="O3"),
        step(*none, batches=2),
        step(*none, ranks=2),
        step(*none, has_ema=True),
        step(*none, loss_scale=2.0),
        step(*none, rows=2048),
    }
    assert len(digests) == 13
