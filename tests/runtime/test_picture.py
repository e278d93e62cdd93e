"""Pictures and their metadata: round trips, damage, and a disk that refuses."""

from __future__ import annotations

import errno
import io
import os
import resource
import stat
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, PngImagePlugin

from latentrt.engines.errors import NumericError, StorageError, UsageError
from latentrt.runtime.pictures import write as picture
from latentrt.runtime.pictures.write import encode_picture, grid, read_metadata, save_picture, to_pil
from latentrt.runtime.result import check_pictures
from tests.sizes import a_tenth_of

IMAGE = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
INFOTEXT = "a café 日本 😀\nNegative prompt: x\nSteps: 1, Sampler: Euler, Seed: 0"
RECORD = {
    "version": 1,
    "prompt": "a café 日本 😀\n",
    "seed": 2**63,
    "scale": 7.5,
    "none": None,
    "list": [1, "x"],
}
NAMES = ("p.png", "p.jpg", "p.JPEG", "p.webp")


@pytest.mark.parametrize("name", NAMES)
def test_metadata_comes_back(tmp_path, name):
    path = tmp_path / name
    save_picture(path, IMAGE, infotext=INFOTEXT, record=RECORD)
    found = read_metadata(path)
    assert (found.parameters, found.record) == (INFOTEXT, RECORD)
    with Image.open(path) as opened:
        assert opened.size == (40, 24)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("infotext", "record"), [(None, None), (INFOTEXT, None), (None, RECORD)])
def test_metadata_can_be_left_out(tmp_path, name, infotext, record):
    path = tmp_path / name
    save_picture(path, IMAGE, infotext=infotext, record=record)
    found = read_metadata(str(path))
    assert (found.parameters, found.record) == (infotext, record)
    with Image.open(path) as opened:
        opened.load()
        assert not (infotext is record is None and {"parameters", "latentrt", "exif"} & set(opened.info))


def test_png_holds_the_pixels_and_other_programs_read_the_text(tmp_path):
    save_picture(tmp_path / "p.png", to_pil(IMAGE), infotext=INFOTEXT)
    with Image.open(tmp_path / "p.png") as opened:
        assert opened.info["parameters"] == INFOTEXT
        np.testing.assert_array_equal(np.asarray(opened), IMAGE)


def test_jpeg_holds_the_text_where_automatic1111_does(tmp_path):
    save_picture(tmp_path / "p.jpg", IMAGE, infotext=INFOTEXT)
    with Image.open(tmp_path / "p.jpg") as opened:
        comment = opened.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
    assert comment == b"UNICODE\0" + INFOTEXT.encode("utf-16-be")


@a_tenth_of(60)
def test_any_text_comes_back(tmp_path, count):
    @settings(max_examples=count, deadline=None)
    @given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=80), st.sampled_from(NAMES))
    def check(text, name):
        save_picture(tmp_path / name, IMAGE, infotext="Steps: " + text, record={"text": text})
        found = read_metadata(tmp_path / name)
        assert (found.parameters, found.record) == ("Steps: " + text, {"text": text})

    check()


@pytest.mark.parametrize(
    ("comment", "expected"),
    [
        (b"UNICODE\0" + "Steps: 1".encode("utf-16-le"), "Steps: 1"),
        (b"UNICODE\0" + "日本".encode("utf-16-be"), "日本"),
        (b"ASCII\0\0\0Steps: 1", "Steps: 1"),
        (b"\0\0\0\0\0\0\0\0Steps: \xff", "Steps: \ufffd"),
        (b"UNICODE\0odd", "\u6f64\ufffd"),
    ],
)
@pytest.mark.parametrize("nested", [True, False])
def test_comments_of_other_writers(tmp_path, comment, expected, nested):
    exif = Image.Exif()
    tags = {ExifTags.Base.UserComment: comment}
    exif.update({ExifTags.IFD.Exif: tags} if nested else tags)
    to_pil(IMAGE).save(tmp_path / "p.jpg", exif=exif)
    assert read_metadata(tmp_path / "p.jpg").parameters == expected


def test_comment_stored_as_a_string_and_a_foreign_note(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.UserComment] = "Steps: 1"
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.MakerNote: b"Camera\0\1\2"}
    to_pil(IMAGE).save(tmp_path / "p.webp", exif=exif)
    found = read_metadata(tmp_path / "p.webp")
    assert (found.parameters, found.record) == ("Steps: 1", None)


def test_text_behind_the_pixels_is_found(tmp_path):
    save_picture(tmp_path / "p.png", IMAGE)
    data = (tmp_path / "p.png").read_bytes()
    chunk = _chunk(b"tEXt", b"parameters\0Steps: 1")
    (tmp_path / "p.png").write_bytes(data[:-12] + chunk + data[-12:])
    assert read_metadata(tmp_path / "p.png").parameters == "Steps: 1"


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png(width: int, height: int, *chunks: bytes) -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = _chunk(b"IDAT", zlib.compress(bytes((3 * width + 1) * height)) if width * height < 1000 else b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join([header, *chunks, pixels, _chunk(b"IEND", b"")])


def _encoded(kind: str) -> bytes:
    data = io.BytesIO()
    to_pil(IMAGE).save(data, kind)
    return data.getvalue()


MALFORMED = {
    "empty": b"",
    "text": b"not a picture",
    "GIF": _encoded("GIF"),
    "TIFF": _encoded("TIFF"),
    "truncated PNG": _encoded("PNG")[:900],
    "truncated JPEG": _encoded("JPEG")[:900],
    "truncated WebP": _encoded("WEBP")[:200],
    "68 megapixels": _png(8200, 8200),
    "100 megapixels": _png(10_000, 10_000),
    "4 gigapixels": _png(65_000, 65_000),
    "compressed text bomb": _png(2, 2, _chunk(b"zTXt", b"parameters\0\0" + zlib.compress(bytes(10**8)))),
    "record is no JSON": _png(2, 2, _chunk(b"tEXt", b"latentrt\0{")),
    "record is no object": _png(2, 2, _chunk(b"tEXt", b"latentrt\0[1]")),
    "record nests too deep": _png(2, 2, _chunk(b"tEXt", b"latentrt\0" + b"[" * 200_000)),
    "bad checksum": _png(2, 2).replace(b"IHDR", b"IHDR")[:-20] + b"\0" * 20,
}


@pytest.mark.parametrize("case", MALFORMED)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_malformed_file(tmp_path, case):
    path = tmp_path / "p.png"
    path.write_bytes(MALFORMED[case])
    with pytest.raises(UsageError, match=r"p.png: .*expected a whole PNG, JPEG or WebP"):
        read_metadata(path)


def test_pixel_limit_is_checked_before_the_pixels(tmp_path, monkeypatch):
    (tmp_path / "p.png").write_bytes(_png(8200, 8200))
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(UsageError, match="8200 x 8200 pixels"):
        read_metadata(tmp_path / "p.png")


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_bomb_warning_as_an_error_is_ours(tmp_path):
    (tmp_path / "p.png").write_bytes(_png(10_000, 10_000))
    with pytest.raises(UsageError, match=r"p.png: Image size"):
        read_metadata(tmp_path / "p.png")


@pytest.mark.parametrize("name", ["missing.png", "."])
def test_no_file(tmp_path, name):
    with pytest.raises(UsageError, match="expected a whole PNG"):
        read_metadata(tmp_path / name)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("saved")
    for name in NAMES:
        save_picture(folder / name, IMAGE, infotext=INFOTEXT, record=RECORD)
    return {name: (folder / name).read_bytes() for name in NAMES}


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(NAMES))
def test_damaged_file_never_crashes(tmp_path, saved, data, name):
    content = bytearray(saved[name])
    for _ in range(data.draw(st.integers(1, 4))):
        # most of the structure is in front
        where = data.draw(st.integers(0, 400) | st.integers(0, len(content) - 1))
        content[min(where, len(content) - 1)] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    (tmp_path / name).write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of damaged EXIF
        try:
            read_metadata(tmp_path / name)
        except UsageError:
            pass


@pytest.mark.parametrize(
    "image", [IMAGE[:, :, :2], IMAGE[None], IMAGE.astype(np.float32), IMAGE[:0], IMAGE[0]]
)
def test_arrays_that_are_no_picture(tmp_path, image):
    with pytest.raises(UsageError, match="a picture of shape"):
        to_pil(image)
    with pytest.raises(UsageError, match="a picture of shape"):
        save_picture(tmp_path / "p.png", image)


def test_array_that_is_not_contiguous():
    flipped = IMAGE[:, ::-1]
    np.testing.assert_array_equal(np.asarray(to_pil(flipped)), flipped)


@pytest.mark.parametrize("name", ["p.gif", "p", "p.png.exe"])
def test_other_file_name(tmp_path, name):
    with pytest.raises(UsageError, match=r"expected one that ends in \.png"):
        save_picture(tmp_path / name, IMAGE)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("p.jpg", {"infotext": "x" * 40_000}),
        ("p.png", {"infotext": "half a pair \ud83d"}),
        ("p.webp", {"infotext": "half a pair \ud83d"}),
        ("p.png", {"record": {"a": float("nan")}}),
        ("p.png", {"record": {"a": object()}}),
    ],
)
def test_metadata_that_the_format_cannot_hold(tmp_path, name, options):
    with pytest.raises(UsageError, match="a picture cannot be written as"):
        save_picture(tmp_path / name, IMAGE, **options)
    assert not os.listdir(tmp_path)


def test_mode_that_the_format_cannot_hold(tmp_path):
    with pytest.raises(UsageError, match="cannot be written as JPEG"):
        save_picture(tmp_path / "p.jpg", Image.new("RGBA", (2, 2)))


def _fails_and_keeps(path: Path, before: bytes, message: str) -> None:
    with pytest.raises(StorageError, match=message):
        save_picture(path, IMAGE, infotext=INFOTEXT)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_file_size_limit_leaves_the_old_file(tmp_path):
    path = tmp_path / "p.png"
    path.write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        _fails_and_keeps(path, b"old", "could not be written")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch, step):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "p.png"
    path.write_bytes(b"old")
    monkeypatch.setattr(picture.os, step, full)
    _fails_and_keeps(path, b"old", "No space left on device")


def test_interrupt_leaves_the_old_file(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    path = tmp_path / "p.png"
    path.write_bytes(b"old")
    monkeypatch.setattr(picture.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_picture(path, IMAGE)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["p.png"]


@pytest.mark.parametrize("where", ["missing/p.png", "file/p.png", "folder.png", "n" * 300 + ".png"])
def test_folder_that_cannot_be_written(tmp_path, where):
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(StorageError, match=r"could not be written|does not exist"):
        save_picture(tmp_path / where, IMAGE)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.png"]


def test_a_link_stays_a_link(tmp_path):
    """As with Pillow's own `save`: what the link leads to is written."""
    link, target = tmp_path / "latest.png", tmp_path / "kept" / "p.png"
    target.parent.mkdir()
    link.symlink_to(target)
    to_pil(IMAGE).save(link)
    assert link.is_symlink()
    pixels = np.array(Image.open(target))
    target.unlink()
    for _ in range(2):  # to nothing, then to a picture
        save_picture(link, IMAGE)
        assert link.is_symlink()
        np.testing.assert_array_equal(np.array(Image.open(target)), pixels)
    assert sorted(os.listdir(tmp_path)) == ["kept", "latest.png"]


def test_file_has_the_usual_permissions(tmp_path):
    (tmp_path / "usual").touch()
    save_picture(tmp_path / "p.png", IMAGE)
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("usual", "p.png")}
    assert len(modes) == 1


@pytest.mark.parametrize(
    ("count", "layout"),
    [
        (1, (1, 1)),
        (3, (2, 2)),
        (5, (2, 3)),
        (9, (3, 3)),
    ],
)
def test_grid(count, layout):
    images = [IMAGE + np.uint8(index) for index in range(count)]
    sheet = grid(images)
    assert sheet.shape == (24 * layout[0], 40 * layout[1], 3)
    for index in range(layout[0] * layout[1]):
        row, column = divmod(index, layout[1])
        cell = sheet[24 * row : 24 * row + 24, 40 * column : 40 * column + 40]
        np.testing.assert_array_equal(cell, images[index] if index < count else 0)


def test_constant_pictures_are_named():
    batch = np.stack([IMAGE, np.full_like(IMAGE, (1, 2, 3)), IMAGE, np.zeros_like(IMAGE)])
    named = r"picture 1, 3 of a batch of 4 .* single colour, \(1, 2, 3\).*--dtype fp32"
    with pytest.raises(NumericError, match=named):
        check_pictures(batch, "fp16")
    with pytest.raises(NumericError, match="picture 0 of a batch of 1"):
        check_pictures(batch[3], "fp32")
    check_pictures(batch[::2], "fp16")
    almost = np.zeros_like(IMAGE)
    almost[-1, -1, 2] = 1
    check_pictures(almost, "fp16")


def test_exif_text_of_a_png(tmp_path):
    """Some programs write AUTOMATIC1111's text into a PNG as EXIF, and leave the text chunk out."""
    exif = Image.Exif()
    comment = b"UNICODE\0" + "a fox\nSteps: 1".encode("utf-16-be")
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.UserComment: comment}
    Image.fromarray(IMAGE).save(tmp_path / "p.png", exif=exif)
    assert read_metadata(tmp_path / "p.png").parameters == "a fox\nSteps: 1"


@pytest.mark.parametrize(("kind", "name"), [("PNG", "p.png"), ("JPEG", "p.jpg"), ("WEBP", "p.webp")])
def test_bytes_are_the_files(tmp_path, kind, name):
    save_picture(tmp_path / name, IMAGE, infotext="x", record={"a": 1})
    assert encode_picture(IMAGE, kind, infotext="x", record={"a": 1}) == (tmp_path / name).read_bytes()


def test_quality():
    shades = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for kind in ("JPEG", "WEBP"):
        sizes = [len(encode_picture(shades, kind, quality=quality)) for quality in (10, 60, 95, 100)]
        assert sizes == sorted(sizes)
        assert len(encode_picture(shades, kind)) == sizes[2]
    for kind, quality in (("JPEG", 0), ("WEBP", 101), ("JPEG", True), ("JPEG", 2.5), ("PNG", 90)):
        with pytest.raises(UsageError, match="quality"):
            encode_picture(shades, kind, quality=quality)
    with pytest.raises(UsageError, match="format 'TIFF'"):
        encode_picture(shades, "TIFF")


def test_folder_that_this_user_may_not_write(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(StorageError, match="cannot be written"):
        save_picture(tmp_path / "p.png", IMAGE)
