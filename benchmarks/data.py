"""How fast data is found and read.

    python benchmarks/data.py listing [--counts 10000 100000 1000000] [--forms table sidecars]

listing: makes folders of that many captioned images, 10,000 in a subfolder, and lists each in a
process of its own, as the start of a run does. Prints a row for each: seconds, those of them that
its processor worked (others may use it too), and the process's largest resident memory. The images
are empty files, because listing opens none. Sidecars are left out where there are more than
100,000, unless `--forms sidecars` is given.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PER_FOLDER = 10_000
CAPTION = "a photograph of the number {} on a wooden table, soft light, shallow depth of field"


def main() -> int:
    """Measure what is asked for; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parts = parser.add_subparsers(dest="part", required=True)
    listing = parts.add_parser("listing", help="the time and memory to list a folder")
    listing.add_argument("--counts", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    listing.add_argument("--forms", nargs="+", choices=list(FORMS), default=None)
    listing.add_argument("--of", help=argparse.SUPPRESS)  # the process that lists one folder
    arguments = parser.parse_args()
    if arguments.of:
        list_one(Path(arguments.of))
    else:
        listings(arguments.counts, arguments.forms)
    return 0


# ---- listing


def listings(counts: list[int], forms: list[str] | None) -> None:
    """A row for each count and form."""
    print(f"{'captions in':<14}{'images':>10}{'seconds':>10}{'working':>10}{'peak MB':>10}")
    for number in counts:
        for form in forms or [name for name in FORMS if name == "table" or number <= 100_000]:
            with tempfile.TemporaryDirectory() as place:
                FORMS[form](Path(place), number)
                command = [sys.executable, __file__, "listing", "--of", place]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found, *measured = json.loads(done.stdout)
                assert found == number, f"{found} of {number} images were listed"
                seconds, working, megabytes = measured
                row = f"{form:<14}{number:>10,}{seconds:>10.2f}{working:>10.2f}{megabytes:>10.0f}"
                print(row, flush=True)


def list_one(folder: Path) -> None:
    """Prints the count of images, the seconds on the wall and at work, and the megabytes."""
    from sdxl_host.data.folder import read_folder

    started, worked = time.perf_counter(), time.process_time()
    found = len(read_folder(folder).images)
    seconds, working = time.perf_counter() - started, time.process_time() - worked
    # Not ru_maxrss, which a process has from the one that started it.
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    print(json.dumps([found, seconds, working, peak]))


def make_images(folder: Path, number: int) -> list[str]:
    """Empty files with the names of images; their paths inside the folder."""
    names = [f"{index // PER_FOLDER:05d}/{index:09d}.jpg" for index in range(number)]
    for index in range(0, number, PER_FOLDER):
        (folder / names[index]).parent.mkdir()
    for name in names:
        open(f"{folder}/{name}", "wb").close()
    return names


def make_table(folder: Path, number: int) -> None:
    """Images with a metadata.jsonl."""
    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as table:
        for index, name in enumerate(make_images(folder, number)):
            row = {"file_name": name, "text": CAPTION.format(index)}
            table.write(json.dumps(row) + "\n")


def make_sidecars(folder: Path, number: int) -> None:
    """Images with a .txt beside each."""
    for index, name in enumerate(make_images(folder, number)):
        with open(f"{folder}/{name[:-4]}.txt", "w", encoding="utf-8") as sidecar:
            sidecar.write(CAPTION.format(index))


FORMS = {"table": make_table, "sidecars": make_sidecars}


if __name__ == "__main__":
    sys.exit(main())
