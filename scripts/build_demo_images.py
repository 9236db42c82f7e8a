"""Build the 64 captioned images that the package carries for its first run.

    python scripts/build_demo_images.py            # rewrite sdxl_host/data/demo and demo16.txt
    python scripts/build_demo_images.py --check    # rebuild aside and compare with what is stored

The images are Microsoft's Fluent Emoji in 3D, the captions come from Unicode's names. Both are
read from npm packages of a pinned version and hash, so every run writes the same bytes (another
release of Pillow may pack the same pixels into other bytes). Needs `npm`, the network (16 MB) and
Pillow; NOTICE.md beside the images is written by hand.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import math
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

SIZE = 64
SHORT_LIST = 16
DATA = Path(__file__).resolve().parent.parent / "sdxl_host" / "data"


@dataclass(frozen=True)
class Package:
    """An npm package at the one version that the stored images were made from."""

    name: str
    version: str
    sha512: str  # base64, as npm itself writes it in lock files


ART = Package(
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
)
NAMES = Package(
    "unicode-emoji-json",
    "0.9.0",
    "HdrQW/7SdbXUsTd8uTATv7LvQJkCSgbAgRCDCtOhQ6xn3EAx+xZHQtRniOXWJK3ywIqPegkNhP4U4EbuFsiQng==",
)

# The choice, by the slug of the Unicode name, under the article that its caption takes: English
# has too many exceptions ("a unicorn", "an hourglass", "scissors") for a rule to be shorter than a
# list. Only shapes that a person tells apart at 64x64, and only emoji that stand in Microsoft's own
# published set: the art package holds flags and others beyond it.
ARTICLES: dict[str, str] = {
    "a": """
        butterfly crab flamingo hedgehog honeybee lady_beetle parrot penguin snail tropical_fish
        turtle whale zebra
        banana birthday_cake carrot cheese_wedge doughnut hamburger kiwi_fruit lollipop pineapple
        red_apple strawberry watermelon
        cactus four_leaf_clover mushroom palm_tree sunflower tulip
        bicycle fire_engine helicopter locomotive rocket sailboat tractor
        basketball chess_pawn crown gem_stone guitar key magnet soccer_ball top_hat
        blue_heart green_heart red_heart
        crescent_moon rainbow
    """,
    "an": "elephant octopus owl avocado eggplant alarm_clock anchor umbrella",
    "the": "sun",
    "": "broccoli grapes scissors",
}


@dataclass(frozen=True)
class DemoImage:
    """One image (64x64, RGB) with its caption and the name of the file it is stored in."""

    file_name: str
    text: str
    image: Image.Image


def fetch(package: Package, folder: Path) -> Path:
    """Download `package` into `folder` with npm and return the tarball.

    Raises:
        ValueError: the tarball isn't the one whose hash is pinned here.
    """
    subprocess.run(
        ["npm", "pack", "--silent", f"{package.name}@{package.version}"],
        cwd=folder,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    tarball = folder / f"{package.name.removeprefix('@').replace('/', '-')}-{package.version}.tgz"
    found = base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()
    if found != package.sha512:
        raise ValueError(
            f"{package.name} {package.version} has the sha512 {found}, not the pinned "
            f"{package.sha512}: do not use it before you know why"
        )
    return tarball


def read_names(tarball: Path) -> dict[str, tuple[str, str]]:
    """Return {slug: (emoji, Unicode name)}."""
    with tarfile.open(tarball) as archive:
        member = archive.extractfile("package/data-by-emoji.json")
        assert member is not None, "data-by-emoji.json is a regular file"
        table: dict[str, dict[str, str]] = json.load(member)
    return {entry["slug"]: (emoji, entry["name"]) for emoji, entry in table.items()}


def render(archive: tarfile.TarFile, emoji: str) -> Image.Image:
    """Return `emoji` from the art package over white, 64x64, RGB."""
    code_points = [f"{ord(character):x}" for character in emoji]
    member = archive.extractfile(f"package/assets/{'-'.join(code_points)}.webp")
    assert member is not None, "an image is a regular file"
    art = Image.open(member).convert("RGBA")
    white = Image.new("RGBA", art.size, "white")
    return Image.alpha_composite(white, art).convert("RGB").resize((SIZE, SIZE), Image.LANCZOS)


def make_images() -> list[DemoImage]:
    """Download both packages and return all images, sorted by file name."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        names = read_names(fetch(NAMES, folder))
        images: list[DemoImage] = []
        with tarfile.open(fetch(ART, folder)) as archive:
            for article, slugs in ARTICLES.items():
                for slug in slugs.split():
                    emoji, label = names[slug]
                    text = f"{article} {label}".strip()
                    images.append(DemoImage(f"{slug}.png", text, render(archive, emoji)))
    return sorted(images, key=lambda image: image.file_name)


def most_different(images: list[DemoImage], count: int) -> list[DemoImage]:
    """Return `count` images as unlike each other as can be, most unlike first.

    Greedy farthest-point selection on the Euclidean distance of 32x32 pixels: the two farthest
    apart, then whichever is farthest from all that were taken. Each beginning of the result is thus
    a good choice of its own length. The first by file name wins a tie.
    """
    pixels = {p.file_name: list(p.image.resize((32, 32), Image.BOX).tobytes()) for p in images}

    def distance(one: DemoImage, other: DemoImage) -> float:
        return math.dist(pixels[one.file_name], pixels[other.file_name])

    pairs = ((one, other) for i, one in enumerate(images) for other in images[i + 1 :])
    chosen = list(max(pairs, key=lambda pair: distance(*pair)))
    nearest = {p.file_name: min(distance(p, taken) for taken in chosen) for p in images}
    while len(chosen) < count:
        farthest = max(images, key=lambda image: nearest[image.file_name])
        chosen.append(farthest)
        for image in images:
            gap = distance(image, farthest)
            nearest[image.file_name] = min(nearest[image.file_name], gap)
    return chosen


def write(images: list[DemoImage], data: Path) -> None:
    """Write `data`/demo/*.png, `data`/demo/metadata.jsonl and `data`/demo16.txt."""
    demo = data / "demo"
    demo.mkdir(parents=True, exist_ok=True)
    for entry in images:
        entry.image.save(demo / entry.file_name, optimize=True)
    lines = [json.dumps({"file_name": p.file_name, "text": p.text}) + "\n" for p in images]
    (demo / "metadata.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
    short_list = "".join(f"{p.file_name}\n" for p in most_different(images, SHORT_LIST))
    (data / "demo16.txt").write_text(short_list, encoding="utf-8", newline="\n")


def differences(built: Path, stored: Path) -> list[str]:
    """Name every way in which the folder `stored` differs from `built`, one sentence each.

    Images are compared by their decoded pixels: another zlib packs the same ones into other
    bytes.
    """
    found: list[str] = []
    for name in ("demo/metadata.jsonl", "demo16.txt"):
        if not (stored / name).is_file():
            found.append(f"{name} is missing")
            continue
        wanted = (built / name).read_text(encoding="utf-8").splitlines()
        present = (stored / name).read_text(encoding="utf-8").splitlines()
        found += [f"{name} lacks the line {line}" for line in wanted if line not in present]
        found += [f"{name} has the stray line {line}" for line in present if line not in wanted]
        if wanted != present and set(wanted) == set(present):
            found.append(f"{name} has its lines in another order, or one twice")
    fresh = {path.name for path in (built / "demo").glob("*.png")}
    kept = {path.name for path in (stored / "demo").glob("*.png")}
    found += [f"demo/{name} is missing" for name in sorted(fresh - kept)]
    found += [f"demo/{name} is stray" for name in sorted(kept - fresh)]
    for name in sorted(fresh & kept):
        with Image.open(built / "demo" / name) as one, Image.open(stored / "demo" / name) as other:
            if (one.mode, one.size, one.tobytes()) != (other.mode, other.size, other.tobytes()):
                found.append(f"demo/{name} has other pixels")
    notice = stored / "demo" / "NOTICE.md"
    text = notice.read_text(encoding="utf-8") if notice.is_file() else ""
    for package in (ART, NAMES):
        if f"`{package.name}` {package.version}" not in text:
            found.append(f"demo/NOTICE.md does not name `{package.name}` {package.version}")
    return found


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description="Build the demo images of sdxl-host.")
    parser.add_argument(
        "--out",
        type=Path,
        default=DATA,
        help="folder that takes demo/ and demo16.txt (%(default)s)",
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if --out is out of date"
    )
    arguments = parser.parse_args()
    out: Path = arguments.out
    images = make_images()
    if not arguments.check:
        write(images, out)
        print(f"{len(images)} images written to {out / 'demo'}")
        return 0
    with tempfile.TemporaryDirectory() as name:
        write(images, Path(name))
        found = differences(Path(name), out)
    for sentence in found:
        print(sentence, file=sys.stderr)
    if found:
        print("Run scripts/build_demo_images.py without --check to mend this.", file=sys.stderr)
        return 1
    print(f"{len(images)} images are up to date in {out / 'demo'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
