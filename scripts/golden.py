"""Runs two commits on this machine and compares them bit by bit.

    python scripts/golden.py --against REV            # this work tree against a commit
    python scripts/golden.py --against REV --subsets  # the same, over all 16 subsets of the plugins
    python scripts/golden.py --record FILE [--subsets]
    python scripts/golden.py --compare FILE [--subsets]

Each run trains configs/tiny.yaml with a fixed seed, compiled, and gives `metrics.jsonl` and the
SHA-256 of the weights in its last checkpoint. Where two runs differ, the largest relative
difference of their losses is printed. Exit code 1 where anything differs.

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
from pathlib import Path

from safetensors.numpy import load_file

ROOT = Path(__file__).parents[1]
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


def cases(with_subsets: bool) -> dict[str, list[str]]:
    """The runs by name, each with its arguments."""
    if with_subsets:
        chosen = [s for n in range(5) for s in itertools.combinations(PLUGINS, n)]
        steps = 3
    else:
        chosen, steps = [(), ("edm", "snr"), PLUGINS], 20
    return {
        ",".join(names) or "none": [
            *("--plugins", ",".join(names) or "none", "--total_step", str(steps)),
            *(word for name in names for word in FLAGS.get(name, ())),
        ]
        for names in chosen
    }


def run(tree: Path, words: list[str]) -> Outcome:
    """One run of a work tree: the text of its metrics, and the digest of each file of weights."""
    path = [tree, *sorted((tree / "plugins").glob("sdxl_*")), *sys.path[1:]]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "sdxl_host", "train", "--config", "tiny.yaml", *words]
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
    for name, words in cases(with_subsets).items():
        print(f"{tree.name}: {name}", file=sys.stderr, flush=True)
        outcomes[name] = run(tree, words)
    return outcomes


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
    given = parser.parse_args()
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
