"""That the dry run finds what is wrong: operators that the 910B does not take, in each way that
they are noticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.ascend.calls import problems
from support.ascend.dry_run import run_program

pytestmark = pytest.mark.ascend

PROGRAM = """
import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops.operations._rl_inner_ops import CudnnGRU

ms.set_device("Ascend")


class Only(nn.Cell):
    def __init__(self, operator):
        super().__init__()
        self.operator = operator

    def construct(self, *inputs):
        return self.operator(*inputs)


class Attention(nn.Cell):
    def construct(self, x):
        return ops.flash_attention_score(x, x, x, 4, input_layout="BSH")


class Product(nn.Cell):
    def construct(self, x):
        return x @ x


def ones(dtype, *shape):
    return Tensor(np.ones(shape, dtype))


def compiled(name, cell, *inputs):
    try:
        ms.jit(cell.construct, jit_level="O0")(*inputs)
        said = "accepted"
    except Exception as error:
        said = "refused: " + " ".join(str(error).split())[:300]
    print(f"RESULT {name}: {said}", flush=True)


f16, f32, f64, i32 = np.float16, np.float32, np.float64, np.int32
compiled("matmul float16", Product(), ones(f16, 64, 64))
compiled("attention float16", Attention(), ones(f16, 1, 128, 256))
compiled("GPU alone", Only(CudnnGRU(4, 4, 1, True, False, 0.0)),
         ones(f32, 3, 2, 4), ones(f32, 1, 2, 4), ones(f32, 120))
compiled("convolution float64", Only(ops.Conv2D(8, 3)),
         ones(f64, 1, 4, 8, 8), ones(f64, 8, 4, 3, 3))
compiled("dynamic shape", Only(ops.Unique()), ones(i32, 8))
open(__import__("os").environ["CANN_STUB_CALLS"], "w").close()
compiled("matmul int32", Product(), ones(i32, 64, 64))
compiled("SiLU float64", Only(ops.auto_generate.SiLU()), ones(f64, 4))
compiled("attention of heads of 1000 channels", Attention(), ones(f16, 1, 128, 4000))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], list[str]]:
    """What MindSpore said of each, and the problems of the calls."""
    folder = tmp_path_factory.mktemp("checker")
    (folder / "program.py").write_text(PROGRAM)
    printed, calls = run_program(folder, ["program.py"])
    lines = [line.removeprefix("RESULT ") for line in printed.splitlines() if "RESULT " in line]
    results = dict(line.split(": ", 1) for line in lines)
    assert results, printed[-3000:]
    return results, problems(json.loads(line) for line in calls)


@pytest.mark.parametrize("name", ["matmul float16", "attention float16"])
def test_what_the_910b_takes_is_accepted(said, name):
    assert said[0][name] == "accepted"


@pytest.mark.parametrize(
    ("name", "reason"),
    [("GPU alone", "needs to be supplemented"), ("convolution float64", "float64")],
)
def test_what_mindspore_knows_is_refused_by_it(said, name, reason):
    assert said[0][name].startswith("refused: ")
    assert reason.lower() in said[0][name].lower()


def test_a_dynamic_shape_is_refused(said):
    assert said[0]["dynamic shape"].startswith("refused: ")
    assert "dynamic" in said[0]["dynamic shape"]


@pytest.mark.parametrize(
    "problem",
    [
        "aclnnMatmul does not take int32",
        "aclnnSilu does not take float64",
        "aclnnFlashAttentionScore does not take heads of 1000 channels",
    ],
)
def test_what_mindspore_hands_on_is_found_in_the_calls(said, problem):
    assert any(line.startswith(problem) for line in said[1]), said[1]


def test_an_operator_that_no_table_has_is_named():
    assert problems([{"op": "aclnnNothing", "args": []}]) == [
        "aclnnNothing is not in the table (1 calls)"
    ]


def test_a_name_that_cann_s_library_lacks_is_noticed(tmp_path: Path) -> None:
    """MindSpore asks for it when it prepares the operator."""
    program = """
import ctypes, os
library = ctypes.CDLL(os.environ["ASCEND_HOME_PATH"] + "/lib64/libopapi.so")
print("THERE", hasattr(library, "aclnnMatmulGetWorkspaceSize"), hasattr(library, "aclnnNothing"))
"""
    (tmp_path / "program.py").write_text(program)
    printed, _ = run_program(tmp_path, ["program.py"])
    assert "THERE True False" in printed
