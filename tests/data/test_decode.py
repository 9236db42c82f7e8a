"""Every kind of image file becomes what was painted; every kind of bad file becomes one line."""

from __future__ import annotations

import inspect
import os
import re
import socket
import struct
import threading
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, features
from support.profiles import DISPLAY_P3, DISPLAY_P3_2_2, GREY_LINEAR, SRGB, cmyk_without_black

from sdxl_host.data import decode as decode_module
from sdxl_host.data.captioned import Captioned
from sdxl_host.data.decode import FORMATS, BadImage, Decoded, Remark, decode, scaled_part

SIZE = (6, 4)  # width, height
RED = (200, 30, 30)
WHITE = (255, 255, 255)


def entry(file: Path) -> Captioned:
    return Captioned(file.name, str(file), "x")


def save(file: Path, mode: str, color: Any, **options: Any) -> Path:
    Image.new(mode, SIZE, color).save(file, **options)
    return file


def color(file: Path) -> tuple[int, ...]:
    """The one colour of an image."""
    pixels = np.asarray(decode(entry(file)).image)
    assert pixels.shape == (4, 6, 3)
    assert pixels.dtype == np.uint8
    assert (pixels == pixels[0, 0]).all()
    return tuple(pixels[0, 0].tolist())


def near(found: tuple[int, ...], wanted: tuple[int, ...], levels: int = 2) -> bool:
    return bool((np.abs(np.subtract(found, wanted)) <= levels).all())


# ---- formats and modes


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.bmp", "a.gif", "a.tif", "a.avif"])
def test_each_format_gives_its_colour(tmp_path: Path, name: str) -> None:
    if name == "a.avif" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    assert near(color(save(tmp_path / name, "RGB", RED)), RED, 4)


@pytest.mark.parametrize(
    ("name", "mode", "painted", "seen"),
    [
        ("a.tif", "I;16", 100 * 257, (100, 100, 100)),
        ("a.png", "I;16", 65535, WHITE),
        ("a.tif", "LA", (100, 0), WHITE),
        ("a.tif", "RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("a.webp", "RGBA", (0, 0, 0, 0), WHITE),
        ("a.tif", "CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("a.jpg", "CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("a.tif", "1", 1, WHITE),
        ("a.tif", "YCbCr", (255, 128, 128), WHITE),
    ],
)
def test_each_mode_gives_its_colour(
    tmp_path: Path, name: str, mode: str, painted: Any, seen: tuple[int, ...]
) -> None:
    """JPEG rounds."""
    options = {"lossless": True} if name.endswith("webp") else {}
    assert near(color(save(tmp_path / name, mode, painted, **options)), seen)


def test_a_lab_image_is_converted(tmp_path: Path) -> None:
    """L* = 50, a* = b* = 0 is the grey of linear 0.184, 119 in sRGB."""
    file = save(tmp_path / "a.tif", "LAB", (128, 128, 128))
    assert near(color(file), (119, 119, 119), 1)


def test_a_gif_with_a_transparent_entry_is_white_there(tmp_path: Path) -> None:
    image = Image.new("P", SIZE, 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(tmp_path / "a.gif", transparency=1)
    assert color(tmp_path / "a.gif") == WHITE


def test_a_colour_of_rgb_that_is_transparent_is_white(tmp_path: Path) -> None:
    file = save(tmp_path / "a.png", "RGB", (1, 2, 3), transparency=(1, 2, 3))
    assert color(file) == WHITE


@pytest.mark.parametrize(
    ("mode", "value", "what"),
    [("F", 0.5, "floating-point numbers"), ("I", 70000, "integers of more than 16 bits")],
)
def test_numbers_without_a_white_are_refused(
    tmp_path: Path, mode: str, value: float, what: str
) -> None:
    file = save(tmp_path / "a.tif", mode, value)
    bad = refused(file)
    assert (bad.kind, bad.detail) == (
        "an image whose white is not known",
        f"{what}; save it with 8 or 16 bits",
    )


def test_only_the_first_frame_is_taken_and_that_is_remarked(tmp_path: Path) -> None:
    frames = [Image.new("RGB", SIZE, one) for one in ("red", "blue")]
    for name in ("a.gif", "a.webp", "a.tif", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        assert near(color(tmp_path / name), (255, 0, 0), 4), name
        assert decode(entry(tmp_path / name)).remarks == Remark.FRAMES, name
    # A telephone's photograph with a second image for its depth or brightness is no animation.
    frames[0].save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=frames[1:])
    assert decode(entry(tmp_path / "a.jpg")).remarks == Remark.NONE


# ---- rotation


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_corner_and_the_size_are_those_of_the_turned_image(
    tmp_path: Path, name: str, orientation: int
) -> None:
    """The stored top left quarter is white, and EXIF says where row 0 and column 0 are seen."""
    image = Image.new("RGB", (64, 32))
    image.paste("white", (0, 0, 32, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / name, exif=exif)
    found = decode(entry(tmp_path / name))
    height, width = found.size
    assert (height, width) == ((64, 32) if orientation > 4 else (32, 64))
    assert found.image.size == (width, height)
    rows, columns = np.nonzero(np.asarray(found.image.convert("L")) > 128)
    is_at_bottom, is_at_right = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    assert (rows.mean() > height / 2, columns.mean() > width / 2) == (is_at_bottom, is_at_right)


def test_exif_data_that_is_broken_is_remarked_and_no_failure(tmp_path: Path) -> None:
    file = tmp_path / "a.jpg"
    save(file, "RGB", RED, exif=b"Exif\0\0MM\0\x2a\0\0\0\x08\0\x05\x01\x12")
    found = decode(entry(file))
    assert near(color(file), RED, 4)
    assert found.remarks in (Remark.EXIF, Remark.NONE)  # some Pillows read what is there


# ---- colour profiles


def test_a_display_p3_image_is_converted_to_srgb(tmp_path: Path) -> None:
    """By hand: with the curve of sRGB, 200 and 30 are 0.5776 and 0.0130 in linear light; the matrix
    from P3 to sRGB makes 0.7046, below 0 and 0.0019 of them, which are 219, 0 and 6."""
    new = save(tmp_path / "a.png", "RGB", RED, icc_profile=DISPLAY_P3)
    assert near(color(new), (219, 0, 6), 1)
    old = save(tmp_path / "b.png", "RGB", RED, icc_profile=DISPLAY_P3_2_2)
    assert near(color(old), (220, 0, 0))
    jpeg = save(tmp_path / "c.jpg", "RGB", RED, icc_profile=DISPLAY_P3_2_2, quality=100)
    assert near(color(jpeg), (220, 0, 0))


def test_transparency_and_palettes_have_profiles_too(tmp_path: Path) -> None:
    file = save(tmp_path / "a.png", "RGBA", (*RED, 255), icc_profile=DISPLAY_P3_2_2)
    assert near(color(file), (220, 0, 0))
    clear = save(tmp_path / "b.png", "RGBA", (*RED, 0), icc_profile=DISPLAY_P3_2_2)
    assert color(clear) == WHITE
    image = Image.new("P", SIZE, 0)
    image.putpalette(RED)
    image.save(tmp_path / "c.png", icc_profile=DISPLAY_P3_2_2)
    assert near(color(tmp_path / "c.png"), (220, 0, 0))


@pytest.mark.parametrize(("mode", "level"), [("L", 128), ("LA", (128, 255)), ("I;16", 128 * 257)])
def test_a_grey_profile_is_converted(tmp_path: Path, mode: str, level: Any) -> None:
    """Linear 128 / 255 is 188 in sRGB."""
    file = save(tmp_path / "a.png", mode, level, icc_profile=GREY_LINEAR)
    assert near(color(file), (188, 188, 188), 1)


@pytest.mark.parametrize("name", ["a.tif", "a.jpg"])
def test_a_cmyk_profile_is_converted(tmp_path: Path, name: str) -> None:
    """This printer's magenta prints nothing, and half of its black is L* = 50."""
    profile = cmyk_without_black()
    white = save(tmp_path / name, "CMYK", (0, 200, 0, 0), icc_profile=profile)
    assert near(color(white), WHITE)
    grey = save(tmp_path / name, "CMYK", (0, 200, 0, 128), icc_profile=profile)
    assert near(color(grey), (118, 118, 118))


def test_srgb_under_any_name_changes_nothing(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png", icc_profile=SRGB)
    assert (np.asarray(decode(entry(tmp_path / "a.png")).image) == pixels).all()


@pytest.mark.parametrize("profile", [b"junk" * 50, DISPLAY_P3[:200], GREY_LINEAR, DISPLAY_P3[:10]])
def test_a_profile_that_is_broken_or_of_other_colours_is_remarked(
    tmp_path: Path, profile: bytes
) -> None:
    file = save(tmp_path / "a.png", "RGB", RED, icc_profile=profile)
    assert color(file) == RED
    assert decode(entry(file)).remarks == Remark.PROFILE


def test_threads_may_share_a_transform(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    file = tmp_path / "a.png"
    Image.fromarray(pixels).save(file, icc_profile=DISPLAY_P3)
    alone = np.asarray(decode(entry(file)).image)
    found: list[Decoded] = []
    threads = [
        threading.Thread(target=lambda: found.extend(decode(entry(file)) for _ in range(5)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20
    assert all((np.asarray(one.image) == alone).all() for one in found)


# ---- less than the whole


@pytest.mark.parametrize(
    ("at_least", "decoded"),
    [
        ((100, 100), (200, 400)),
        ((101, 101), (400, 800)),
        ((201, 201), (800, 1600)),
        ((10, 150), (200, 400)),
        ((10, 401), (800, 1600)),
        ((1, 1), (100, 200)),
        (None, (800, 1600)),
    ],
)
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_decoded_to_twice_what_is_needed_or_more(
    tmp_path: Path, at_least: Any, decoded: tuple[int, int], orientation: int
) -> None:
    """The size that is told stays that of the file."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (1600, 800), RED).save(tmp_path / "a.jpg", exif=exif)
    turn = 1 if orientation == 1 else -1
    found = decode(entry(tmp_path / "a.jpg"), at_least and at_least[::turn])
    assert (found.image.height, found.image.width)[::turn] == decoded
    assert found.size[::turn] == (800, 1600)
    if at_least is not None:
        assert found.image.height >= min(2 * at_least[::turn][0], found.size[0])
        assert found.image.width >= min(2 * at_least[::turn][1], found.size[1])


def test_other_formats_are_always_whole(tmp_path: Path) -> None:
    Image.new("RGB", (160, 80)).save(tmp_path / "a.png")
    assert decode(entry(tmp_path / "a.png"), (2, 2)).image.size == (160, 80)


def test_a_part_of_a_scaled_image_is_made_alone() -> None:
    """Within a level of scaling all of it; and the 800,000 pixels of a spacer are never made."""
    pixels = np.random.default_rng(1).integers(0, 256, (30, 50, 3), np.uint8)
    image, bicubic = Image.fromarray(pixels), Image.Resampling.BICUBIC
    for size in ((96, 160), (15, 25)):
        whole = np.asarray(image.resize(size[::-1], bicubic)).astype(int)
        part = scaled_part(image, size, (3, 7), (12, 10), bicubic)
        assert np.abs(np.asarray(part) - whole[3:15, 7:17]).max() <= 1
    spacer = Image.new("RGB", (800, 1), RED)
    part = scaled_part(spacer, (1024, 819200), (0, 818176), (1024, 1024), bicubic)
    assert part.size == (1024, 1024)
    assert part.getpixel((1023, 1023)) == RED


# ---- bad files


def refused(file: Path) -> BadImage:
    """The error of a file, which is one line and ends with the remedy."""
    with pytest.raises(BadImage) as raised:
        decode(entry(file))
    assert "\n" not in str(raised.value)
    assert str(raised.value) == (
        f"{file}: can't be read as an image ({raised.value.detail}); replace or remove it"
    )
    return raised.value


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def header(width: int, height: int) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(touch x) run\n"


def test_files_that_are_no_images(tmp_path: Path) -> None:
    for name, content in {
        "html.jpg": b"<!DOCTYPE html><html>not found</html>",
        "text.png": b"hello",
        "eps.png": EPS,
        "psd.png": b"8BPS\0\1" + b"\0" * 30,
        "qoi.jpg": b"qoif" + b"\0" * 30,
    }.items():
        (tmp_path / name).write_bytes(content)
        bad = refused(tmp_path / name)
        assert bad.kind == "a file that is no image", name
        assert bad.detail.startswith(f"it begins with {content[:16]!r}, as no JPEG, "), name


def test_files_that_are_empty_or_break_off(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    assert refused(tmp_path / "a.png").kind == "an empty image file"
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for suffix in ("jpg", "png", "webp", "bmp", "tif", "gif"):
        file = tmp_path / f"cut.{suffix}"
        Image.fromarray(pixels).save(file)
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        assert refused(file).kind in ("an image file that breaks off", "a damaged image file")
        assert refused(file).is_lasting


def test_a_bomb_a_long_text_and_a_photograph_of_100_megapixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the last is read, and Pillow's warning of it is not printed. It warns of images that
    have more pixels than its limit, and refuses those with twice as many."""
    idat = (b"IDAT", zlib.compress(b""))
    (tmp_path / "bomb.png").write_bytes(png(header(20000, 20000), idat))
    bad = refused(tmp_path / "bomb.png")
    assert (bad.kind, bad.detail) == (
        "an image of too many pixels",
        f"more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels",
    )
    text = b"Comment\0\0" + zlib.compress(b"x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1))
    (tmp_path / "text.png").write_bytes(png(header(4, 4), (b"zTXt", text), idat))
    assert refused(tmp_path / "text.png").kind == "an image with a text chunk too large"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("1", (40, 30)).save(tmp_path / "large.png")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert decode(entry(tmp_path / "large.png")).size == (30, 40)
    assert not said


def test_a_pipe_a_socket_a_device_and_a_folder_are_never_opened(tmp_path: Path) -> None:
    """To open a pipe that nobody writes to would wait for ever."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "device.png").symlink_to("/dev/zero")
    kept = Path.cwd()
    os.chdir(tmp_path)  # a socket's path may not be long
    listening = socket.socket(socket.AF_UNIX)
    try:
        listening.bind("socket.png")
    finally:
        os.chdir(kept)
        listening.close()
    for kind in ("pipe", "folder", "device", "socket"):
        bad = refused(tmp_path / f"{kind}.png")
        assert bad.kind == "not a file, but a pipe, device or folder"
        assert bad.detail == f"a {kind}"


def test_what_the_disk_is_at_fault_for_is_not_lasting(tmp_path: Path) -> None:
    bad = refused(tmp_path / "gone.png")
    assert (bad.kind, bad.is_lasting) == ("an image file that can't be opened", False)
    assert bad.detail == "No such file or directory"


def test_damage_of_any_kind_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Flipped bytes anywhere: an image, or a line that names it. Nothing else is raised, and
    neither Pillow nor the libraries below it print a word."""
    generator = np.random.default_rng(3)
    pixels = generator.integers(0, 256, (24, 24, 3), np.uint8)
    bad = 0
    for suffix in ("jpg", "png", "webp", "bmp", "tif", "gif"):
        options = {"compression": "tiff_lzw"} if suffix == "tif" else {}
        Image.fromarray(pixels).save(tmp_path / f"whole.{suffix}", **options)
        content = (tmp_path / f"whole.{suffix}").read_bytes()
        for number in range(60):
            spoilt = bytearray(content)
            for place in generator.integers(0, min(len(content), 300), 3):
                spoilt[place] = generator.integers(0, 256)
            file = tmp_path / f"{number}.{suffix}"
            file.write_bytes(spoilt)
            try:
                decode(entry(file))
            except BadImage as error:
                bad += "\n" not in str(error)
    assert bad > 100
    assert capfd.readouterr() == ("", "")


def test_the_formats_are_those_that_pillow_reads_itself() -> None:
    assert set(FORMATS) >= {"JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"}
    assert "EPS" not in FORMATS


def test_every_kind_of_bad_file_is_documented() -> None:
    source = inspect.getsource(decode_module)
    kinds = set(re.findall(r'"((?:an? |not a )[a-z][^":]{12,})"', source))
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text("utf-8")
    section = page.partition("## Images that can't be used")[2].partition("\n## ")[0]
    documented = set(re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE))
    assert {kind for kind in kinds if "image" in kind or "file" in kind} == documented
