"""Golden runs: compares two commits bit by bit, and writes the losses that the tests compare with.

    python scripts/golden.py --against REV            # this work tree against a commit
    python scripts/golden.py --against REV --subsets  # the same, over all 16 subsets of the plugins
    python scripts/golden.py --record FILE [--subsets]
    python scripts/golden.py --compare FILE [--subsets]
    python scripts/golden.py --write-losses

The first four train configs/tiny.yaml with a fixed seed, compiled, once for each case. Each run
gives `metrics.jsonl` and the SHA-256 of the weights in its last checkpoint. Where two runs differ,
the largest relative difference of their losses is printed. Exit code 1 where anything differs.

The last trains the same cases eagerly in this process and writes their losses to
tests/golden/losses.json. tests/laws/test_golden_run.py compares with them on any CPU.

A work tree is run by the environment that runs this script, which must have the host and the four
plugins installed; the tree's own sources go before those.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from safetensors.numpy import load_file

ROOT = Path(__file__).parents[1]
LOSSES = ROOT / "tests" / "golden" / "losses.json"
PLUGINS = ("edm", "snr", "timestep_bias", "lpw")
# Options that make each plugin do something at this size.
FLAGS = {
    "timestep_bias": [
        *("--timestep_bias_strategy", "later", "--timestep_bias_multiplier", "2"),
        *("--timestep_bias_portion", "0.5"),
    ],
    "lpw": ["--lpw_max_embeddings_multiples", "2"],
}

Outcome = dict[str, str]


@dataclass(frozen=True)
class Case:
    """A run: its plugins in order, and how many updates it has."""

    plugins: tuple[str, ...]
    steps: int

    @property
    def name(self) -> str:
        """The plugins as `--plugins` takes them."""
        return ",".join(self.plugins) or "none"

    @property
    def flags(self) -> list[str]:
        """The arguments that give the plugins their options."""
        return [word for name in self.plugins for word in FLAGS.get(name, ())]


LONG = [Case(names, 20) for names in ((), ("edm", "snr"), PLUGINS)]
SUBSETS = [Case(names, 3) for n in range(5) for names in itertools.combinations(PLUGINS, n)]


def run(tree: Path, case: Case) -> Outcome:
    """One run of a work tree: the text of its metrics, and the digest of each file of weights."""
    path = [tree, *sorted((tree / "plugins").glob("sdxl_*")), *sys.path[1:]]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "sdxl_host", "train", "--config", "tiny.yaml"]
        command += ["--plugins", case.name, "--total_step", str(case.steps), *case.flags]
        command += ["--ms_mode", "0", "--save_path", folder, "--save_path_with_time", "False"]
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        latest = Path(folder) / "checkpoints" / "latest"
        outcome = {"metrics": (Path(folder) / "metrics.jsonl").read_text("utf-8")}
        for file in sorted(latest.glob("*.safetensors")):
            digest = hashlib.sha256()
            for name, array in sorted(load_file(file).items()):
                digest.update(f"{name} {array.dtype} {array.shape}".encode())
                digest.update(array.tobytes())
            outcome[file.name] = digest.hexdigest()
        return outcome


def run_all(tree: Path, with_subsets: bool) -> dict[str, Outcome]:
    """Every run of a work tree."""
    outcomes = {}
    for case in SUBSETS if with_subsets else LONG:
        print(f"{tree.name}: {case.name}", file=sys.stderr, flush=True)
        outcomes[case.name] = run(tree, case)
    return outcomes


def eager_losses(case: Case, folder: Path) -> list[float]:
    """The loss of every step of a run in this process; `folder` is empty."""
    from sdxl_host.testing import tiny_run

    return tiny_run(case.plugins, folder=folder, steps=case.steps, flags=case.flags).losses


def write_losses() -> None:
    """Writes tests/golden/losses.json."""
    losses = {}
    for case in LONG:
        with tempfile.TemporaryDirectory() as folder:
            losses[case.name] = eager_losses(case, Path(folder) / "run")
    LOSSES.write_text(json.dumps(losses, indent=1) + "\n", "utf-8")


def losses(outcome: Outcome) -> list[float]:
    """The loss of every step."""
    return [json.loads(line)["loss"] for line in outcome["metrics"].splitlines()]


def differences(old: dict[str, Outcome], new: dict[str, Outcome]) -> list[str]:
    """A line for each run that differs: what of it, and by how much its losses do."""
    lines = []
    for name in old | new:
        if name not in old or name not in new:
            lines.append(f"{name}: only {'there' if name in old else 'here'}")
            continue
        here, there = new[name], old[name]
        changed = [part for part in here | there if here.get(part) != there.get(part)]
        if changed:
            pairs = zip(losses(there), losses(here), strict=True)
            most = max(abs(a - b) / max(abs(a), 1e-30) for a, b in pairs)
            lines.append(f"{name}: {', '.join(changed)} differ; losses by at most {most:.2g}")
    return lines


def main() -> int:
    """Runs and compares; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--subsets", action="store_true", help="all 16 subsets, three steps each")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--against", metavar="REV", help="a commit to run too")
    what.add_argument("--record", metavar="FILE", type=Path, help="write what the runs gave")
    what.add_argument("--compare", metavar="FILE", type=Path, help="with what --record wrote")
    what.add_argument("--write-losses", action="store_true", help=f"to {LOSSES.relative_to(ROOT)}")
    given = parser.parse_args()
    if given.write_losses:
        write_losses()
        return 0
    if given.record:
        given.record.write_text(json.dumps(run_all(ROOT, given.subsets), indent=1), "utf-8")
        return 0
    if given.compare:
        old = json.loads(given.compare.read_text("utf-8"))
    else:
        with tempfile.TemporaryDirectory() as folder:
            tree = Path(folder) / given.against.replace("/", "-")
            git = ["git", "-C", str(ROOT), "worktree"]
            subprocess.run([*git, "add", "--detach", str(tree), given.against], check=True)
            try:
                old = run_all(tree, given.subsets)
            finally:
                subprocess.run([*git, "remove", "--force", str(tree)], check=True)
    lines = differences(old, run_all(ROOT, given.subsets))
    print("\n".join(lines) or "every run is the same, bit for bit")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
