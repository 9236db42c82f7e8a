"""Builds the stand-ins for CANN's libraries, with g++, once for each version of them.

Which functions they need is read from MindSpore's libraries: those that no library here defines,
and those that are looked up by name while they run.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import importlib_metadata

MINDSPORE = "2.10.0"
HERE = Path(__file__).parent
SOURCES = ("acl.c", "called.c", "ge.cc", "opapi.cc", "preload.cc")
# Each is a library of its own to the linker; all their functions are in libascendcl.so.
LINKED = (
    "ge_runner", "graph", "msprofiler", "hccl", "runtime", "platform", "c_sec", "nnopbase",
    "ascend_hal", "profapi",
)  # fmt: skip
OPENED = ("acl_op_compiler", "acl_tdt_channel", "ascend_ml")
SYSTEM = (
    "libstdc++.so.6", "libc.so.6", "libm.so.6", "libgcc_s.so.1", "libgomp.so.1", "librt.so.1",
    "libdl.so.2", "libpthread.so.0", "ld-linux-x86-64.so.2",
)  # fmt: skip
# CANN and MindSpore use the string of before C++11.
OLD_STRINGS = "-D_GLIBCXX_USE_CXX11_ABI=0"


class KitError(Exception):
    """Why the stand-ins can't be built here, in one line."""


def build(root: Path) -> Path:
    """The home of the stand-ins below `root`, built there if it is not yet.

    Raises KitError for another MindSpore than the one that they are made for, and where a compiler
    is missing.
    """
    version = importlib_metadata.version("mindspore")
    if version != MINDSPORE:
        raise KitError(f"the dry run is made for MindSpore {MINDSPORE}, and {version} is here")
    for program in ("gcc", "g++", "nm", "ldconfig"):
        if shutil.which(program) is None and not Path("/sbin", program).exists():
            raise KitError(f"{program} is missing; apt install g++ binutils libc-bin")
    digest = hashlib.sha256(version.encode())
    for file in (*SOURCES, Path(__file__).name):
        digest.update((HERE / file).read_bytes())
    folder = root / digest.hexdigest()[:16]
    home = folder / "ascend-toolkit" / "latest"  # MindSpore looks for a folder named latest
    if not (folder / "built").exists():
        shutil.rmtree(folder, ignore_errors=True)
        _build(folder, home)
        (folder / "built").touch()
    return home


def _build(folder: Path, home: Path) -> None:
    found = importlib.util.find_spec("mindspore")
    assert found is not None and found.submodule_search_locations
    mindspore = Path(found.submodule_search_locations[0]) / "lib"
    library = home / "lib64"
    for part in ("lib64/driver", "opp", "compiler", "python/hccl"):
        (home / part).mkdir(parents=True)

    def run(*words: str | Path) -> None:
        done = subprocess.run([*map(str, words)], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise KitError(f"{words[0]} failed: {done.stderr.strip().splitlines()[-1]}")

    options = ("-std=c++17", "-O1", "-fPIC")
    run("gcc", "-O1", "-fPIC", "-c", HERE / "called.c", HERE / "acl.c")
    run("g++", *options, OLD_STRINGS, "-fkeep-inline-functions", "-c", HERE / "ge.cc")
    run("g++", "-shared", "-o", "own.so", "called.o", "acl.o", "ge.o")
    (folder / "missing.s").write_text(_assembly(_missing(mindspore, folder / "own.so"), _ANSWERS_0))
    run("gcc", "-c", "missing.s", "-o", "missing.o")
    acl = library / "libascendcl.so"
    objects = ("called.o", "acl.o", "ge.o", "missing.o")
    run("g++", "-shared", "-Wl,-soname,libascendcl.so", "-o", acl, *objects)
    for name in LINKED:
        words = ("-shared", "-Wl,--no-as-needed", f"-Wl,-soname,lib{name}.so", f"-L{library}")
        run("gcc", *words, "-o", library / f"lib{name}.so", "-lascendcl", "-x", "c", "/dev/null")
    (folder / "operators.s").write_text(_assembly(_operators(mindspore), _PREPARES))
    run("gcc", "-c", "operators.s", "-o", "operators.o")
    run("g++", *options, "-c", HERE / "opapi.cc", "-o", "opapi.o")
    words = ("-shared", "-Wl,-soname,libopapi.so", "-o", library / "libopapi.so")
    run("g++", *words, "opapi.o", "operators.o")
    words = ("-shared", "-o", library / "preload.so", HERE / "preload.cc", "-ldl")
    run("g++", *options, OLD_STRINGS, *words)
    for name in OPENED:
        (library / f"lib{name}.so").symlink_to("libascendcl.so")
    (library / "driver" / "libascend_hal.so").symlink_to("../libascend_hal.so")
    (home / "python/hccl/__init__.py").touch()
    (home / "python/hccl/sys_version.py").write_text('__sys_version__ = "8.5.0"\n')
    (home / "compiler/version.info").write_text("Version=8.5.0\n")


# ---- which functions

_LOOKED_UP = re.compile(
    rb"(?<![A-Za-z0-9_])(?:acl(?:rt|mdl|op|prof|sys|tdt)?[A-Z]|Hccl[A-Z]|Msprof[A-Z]|rt[A-Z])\w+(?=\0)"
)
_OPERATOR = re.compile(rb"(?<![A-Za-z0-9_])aclnn[A-Z][A-Za-z0-9]*(?=\0)")
# Names so short lie in the code of MindSpore's libraries, not among their texts.
_SHORT = (
    "Abs Add Addmm Adds All Any Arange Bmm Cast Cat Ceil Conv Copy Cos Div Divs Dot Eq Equal "
    "Erf Exp Fill Floor Gather Ge Gelu Gt Le Less Log Lt Matmul Max Maximum Mean Min Minimum "
    "Mm Mod Mul Muls Ne Neg Pow Range Relu Round Rsqrt Sigmoid Sign Silu Sin Softmax Sort "
    "Split Sqrt Stack Sub Subs Sum Tanh Topk Tril Triu Where"
)


def _missing(mindspore: Path, own: Path) -> list[str]:
    """What MindSpore's Ascend libraries want of CANN, but for what `own` defines.

    Not of all its libraries: with stand-ins for what libdvpp_utils.so wants, MindSpore's datasets
    take them for an image processor, and crash.
    """
    users = [
        mindspore / "plugin" / "libmindspore_ascend.so.2",
        mindspore / "plugin" / "libmindspore_ops_ascend.so",
        mindspore / "libmindspore_ge_backend.so",
        *(
            mindspore / "plugin" / "ascend" / f"lib{name}.so"
            for name in ("mindspore_ascend_res_manager", "mindspore_graph_ir", "d_collective")
        ),
        mindspore / "plugin" / "ascend" / "libhccl_plugin.so",
        *(mindspore / "plugin" / "ascend").glob("ms_kernels_symmetric_memory/**/lib/*.so"),
    ]
    users = [file for file in users if file.exists()]
    listed = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=True)
    lines = (line.strip().partition(" (") for line in listed.stdout.splitlines())
    system = {name: rest.rpartition(" => ")[2] for name, _, rest in lines if "x86-64" in rest}
    known: set[str] = set()
    others = [Path(system[name]) for name in SYSTEM if name in system]
    for file in (*mindspore.glob("*.so*"), *users, *others, own):
        known.update(_symbols("--defined-only", file))
    wanted = {name for file in users for name in _symbols("--undefined-only", file)}
    for file in users:
        wanted |= {name.decode() for name in _LOOKED_UP.findall(file.read_bytes())}
    return sorted(name for name in wanted - known if not name.startswith(("Py", "_Py")))


def _symbols(flag: str, file: Path) -> Iterator[str]:
    done = subprocess.run(["nm", "-D", flag, str(file)], capture_output=True, text=True)
    for line in done.stdout.splitlines():
        kind, name = line.split()[-2:]
        if kind not in "wv":
            yield name.partition("@")[0]


def _operators(mindspore: Path) -> list[str]:
    """Every `aclnnXxx` that MindSpore's libraries name."""
    names = {f"aclnn{name}" for name in _SHORT.split()}
    for file in (
        "plugin/libmindspore_ascend.so.2",
        "plugin/libmindspore_ops_ascend.so",
        "plugin/ascend/libmindspore_ascend_res_manager.so",
        "libmindspore_pyboost.so",
        "libmindspore_backend_common.so",
        "libmindspore_ops.so",
    ):
        names |= {name.decode() for name in _OPERATOR.findall((mindspore / file).read_bytes())}
    return sorted({name.removesuffix("GetWorkspaceSize") for name in names})


# ---- their code

# Hands its name to `cann_stub_called`, which gives 0.
_ANSWERS_0 = """\
.globl {name}
.type {name},@function
{name}:
  leaq .n{number}(%rip), %rdi
  jmp cann_stub_called@PLT
.section .rodata
.n{number}: .asciz "{name}"
.text
"""
# The operator itself does nothing. What prepares it hands its name, its six integer registers, the
# stack above its return address and four floating-point registers to `opapi_prepare`.
_PREPARES = """\
.globl {name}
.type {name},@function
{name}:
  xorl %eax, %eax
  ret
.globl {name}GetWorkspaceSize
.type {name}GetWorkspaceSize,@function
{name}GetWorkspaceSize:
  pushq %rbp
  movq %rsp, %rbp
  subq $112, %rsp
  movq %rdi, -112(%rbp)
  movq %rsi, -104(%rbp)
  movq %rdx, -96(%rbp)
  movq %rcx, -88(%rbp)
  movq %r8, -80(%rbp)
  movq %r9, -72(%rbp)
  movsd %xmm0, -64(%rbp)
  movsd %xmm1, -56(%rbp)
  movsd %xmm2, -48(%rbp)
  movsd %xmm3, -40(%rbp)
  leaq .n{number}(%rip), %rdi
  leaq -112(%rbp), %rsi
  leaq 16(%rbp), %rdx
  leaq -64(%rbp), %rcx
  call opapi_prepare@PLT
  leave
  ret
.section .rodata
.n{number}: .asciz "{name}GetWorkspaceSize"
.text
"""


def _assembly(names: Iterable[str], code: str) -> str:
    functions = (code.format(name=name, number=number) for number, name in enumerate(names))
    return f'.text\n{"".join(functions)}.section .note.GNU-stack,"",@progbits\n'
