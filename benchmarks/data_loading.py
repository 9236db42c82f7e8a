"""Images per second from files to batches: ours, torch's DataLoader, and Pillow in one thread.

    make .venv-parity/ready        # torch, once
    python benchmarks/data_loading.py [--images 64] [--batches 24] [--rounds 3]

Photographs of 1600 x 1200 pixels are made as JPEG files; each is decoded, scaled so that its
shorter side has 1024 pixels, cropped to a square at random, and put into batches of 4 float32
arrays in [-1, 1], by 2 threads of ours or 2 processes of DataLoader. The three take turns, and the
median of the rounds counts; only ratios within one run mean anything.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIDE, BATCH, WORKERS = 1024, 4, 2
ROOT = Path(__file__).parents[1]


def main() -> int:
    """Measure; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--torch", default=str(ROOT / ".venv-parity" / "bin" / "python"))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # a peer and its folder
    arguments = parser.parse_args()
    if arguments.one:
        peer, folder = arguments.one
        print(json.dumps(PEERS[peer](Path(folder), arguments.batches)))
        return 0
    if not Path(arguments.torch).is_file():
        sys.exit(f"--torch {arguments.torch}: is not there; run `make .venv-parity/ready`")
    pythons = {"ours": sys.executable, "DataLoader": arguments.torch, "Pillow": sys.executable}
    rates: dict[str, list[float]] = {peer: [] for peer in pythons}
    with tempfile.TemporaryDirectory() as place:
        make_photographs(Path(place), arguments.images)
        for _ in range(arguments.rounds):
            for peer, python in pythons.items():
                words = ["--batches", str(arguments.batches), "--one", peer, place]
                done = subprocess.run(
                    [python, __file__, *words], check=True, stdout=subprocess.PIPE, text=True
                )
                rates[peer].append(json.loads(done.stdout))
    base = statistics.median(rates["DataLoader"])
    for peer, found in rates.items():
        rate = statistics.median(found)
        print(f"{peer:<12}{rate:7.2f} images/s{rate / base:7.2f} of DataLoader's")
    return 0


def make_photographs(folder: Path, count: int) -> None:
    """JPEG files with the detail of photographs: smooth colour and fine grain."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for index in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3)).astype(np.uint8))
        smooth = np.asarray(coarse.resize((1600, 1200), Image.Resampling.BICUBIC), np.float32)
        grain = random.standard_normal((1200, 1600, 1)) * 6
        Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(
            folder / f"{index:03d}.jpg", quality=92
        )
        (folder / f"{index:03d}.txt").write_text(f"photograph {index}")


# ---- the three


def ours(folder: Path, batches: int) -> float:
    """Images per second of `Batches`, whose noise is as small as can be."""
    import numpy as np

    from sdxl_host.data.dataset import make_dataset
    from sdxl_host.data.order import Order
    from sdxl_host.settings.declarations import DataSettings
    from sdxl_host.training.batches import Batches

    transforms = [
        {"target": "sdxl_host.Resize", "params": {"size": SIDE}},
        {"target": "sdxl_host.Rescaler"},
        {"target": "sdxl_host.AddOriginalImageSizeAsTupleAndCropToSquare"},
        {"target": "sdxl_host.Transpose"},
    ]
    params = {"data_path": str(folder), "target_size": SIDE, "transforms": transforms}
    node = {"target": "sdxl_host.Text2ImageDataset", "params": params}
    dataset = make_dataset(DataSettings(dataset_config=node))
    order = Order([np.arange(len(dataset))], BATCH, 42, shuffle=True)
    given = {"threads": WORKERS, "total": batches + 1, "ahead": WORKERS}
    made = Batches(dataset, order, range(BATCH), 42, [(1, 1, 1)], 0.0, False, **given)
    made.get(1)  # threads and the first batches
    started = time.perf_counter()
    for step in range(2, batches + 2):
        batch = made.get(step)
        assert batch.pixels is not None and batch.pixels.shape == (BATCH, 3, SIDE, SIDE)
    seconds = time.perf_counter() - started
    made.close()
    return batches * BATCH / seconds


def loaded(file: Path, random):
    """An image as an array (3, SIDE, SIDE), by Pillow and numpy alone."""
    import numpy as np
    from PIL import Image

    with Image.open(file) as opened:
        image = opened.convert("RGB")
    scale = SIDE / min(image.size)
    image = image.resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
    )
    left = int(random.integers(0, image.width - SIDE + 1))
    top = int(random.integers(0, image.height - SIDE + 1))
    pixels = np.asarray(image.crop((left, top, left + SIDE, top + SIDE)), np.float32)
    return np.ascontiguousarray((pixels / 127.5 - 1).transpose(2, 0, 1))


def data_loader(folder: Path, batches: int) -> float:
    """Images per second of torch's DataLoader."""
    import numpy as np
    import torch  # pyright: ignore[reportMissingImports]
    from torch.utils.data import (  # pyright: ignore[reportMissingImports]
        DataLoader,
        Dataset,
    )

    files = sorted(folder.glob("*.jpg"))

    class Images(Dataset):
        def __len__(self) -> int:
            return (batches + 1) * BATCH

        def __getitem__(self, index: int):
            random = np.random.default_rng(index)
            return torch.from_numpy(loaded(files[index % len(files)], random))

    found = iter(DataLoader(Images(), BATCH, shuffle=True, num_workers=WORKERS))
    next(found)
    started = time.perf_counter()
    for batch in found:
        assert batch.shape == (BATCH, 3, SIDE, SIDE)
    return batches * BATCH / (time.perf_counter() - started)


def pillow(folder: Path, batches: int) -> float:
    """Images per second of Pillow in one thread."""
    import numpy as np

    files = sorted(folder.glob("*.jpg"))
    random = np.random.default_rng(0)
    started = time.perf_counter()
    for index in range(batches):
        np.stack([loaded(files[(index * BATCH + k) % len(files)], random) for k in range(BATCH)])
    return batches * BATCH / (time.perf_counter() - started)


PEERS = {"ours": ours, "DataLoader": data_loader, "Pillow": pillow}


if __name__ == "__main__":
    sys.exit(main())
