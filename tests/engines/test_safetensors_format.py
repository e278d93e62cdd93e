"""The safetensors header's rules, against files that break them and against the library that defines them."""

import json
import random
import re
import shlex
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save

from latentrt.engines.errors import CheckpointError, PackageError
from latentrt.engines.safetensors_format import (
    ITEM_SIZES,
    TensorRange,
    map_tensors,
    read_header,
    write_file,
)

TENSORS = {
    "unet.weight": torch.arange(6.0).reshape(2, 3),
    "bias": torch.tensor([1, 2, 3], dtype=torch.float16),
    "empty": torch.empty(0, 4),
    "scalar": torch.tensor(3, dtype=torch.int64),
}
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.int64: "I64"}
VALID = save(TENSORS, metadata={"format": "pt"})


def entry(dtype: Any = "U8", shape: Any = (1,), offsets: Any = (0, 1), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def file(header: Any, data: bytes = b"\0", length: int | None = None) -> bytes:
    """A file with this header: bytes as they are, anything else as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def raw(fields: bytes) -> bytes:
    return file(b'{"a":{' + fields + b"}}")


GOOD = b'"dtype":"U8","shape":[1],"data_offsets":[0,1]'
MALFORMED: dict[str, bytes] = {
    "empty file": b"",
    "seven bytes": b"\0" * 7,
    "length without header": struct.pack("<Q", 2),
    "length 0": struct.pack("<Q", 0),
    "length 0 and data": struct.pack("<Q", 0) + b"x",
    "length over the limit": file({"a": entry()}, length=100_000_001),
    "length 2**63": file({"a": entry()}, length=2**63),
    "length 2**64 - 1": file({"a": entry()}, length=2**64 - 1),
    "length one too long": file({"a": entry()}, data=b"", length=len(json.dumps({"a": entry()})) + 1),
    "length one too short": file({"a": entry()}, length=len(json.dumps({"a": entry()})) - 1),
    "length of the whole file": VALID.replace(VALID[:8], struct.pack("<Q", len(VALID)), 1),
    "header cut in half": VALID[:60],
    "data cut by one byte": VALID[:-1],
    "a byte too many": VALID + b"\0",
    "not UTF-8": file(b'{"\xff":{' + GOOD + b"}}"),
    "UTF-16": file(json.dumps({"a": entry()}).encode("utf-16")),
    "byte order mark": file(b"\xef\xbb\xbf" + json.dumps({"a": entry()}).encode()),
    "overlong UTF-8": file(b'{"\xc0\x80":{' + GOOD + b"}}"),
    "half a surrogate pair": file(b'{"\\ud800":{' + GOOD + b"}}"),
    "half a pair in the metadata": file({"__metadata__": {"a": "\ud800"}}, data=b""),
    "control character in a name": file(b'{"a\n":{' + GOOD + b"}}"),
    "no JSON": file(b"{safetensors}"),
    "a list": file([], data=b""),
    "a text": file("a", data=b""),
    "null": file(None, data=b""),
    "a number": file(1, data=b""),
    "two objects": file(b"{}{}", data=b""),
    "object left open": file(b'{"a":{' + GOOD + b"}"),
    "comma at the end": file(b'{"a":{' + GOOD + b"},}"),
    "a comment": file(b"{/**/}", data=b""),
    "space in front": file(b' {"a":{' + GOOD + b"}}"),
    "NUL behind": file(b'{"a":{' + GOOD + b"}}\0"),
    "pickle": b"\x80\x02}q\x00.",
    "zip": b"PK\x03\x04" + b"\0" * 100,
    "name twice": file(b'{"a":{' + GOOD + b'},"a":{' + GOOD + b"}}"),
    "field twice": raw(GOOD + b',"dtype":"U8"'),
    "metadata twice": file(b'{"__metadata__":{},"__metadata__":{}}', data=b""),
    "metadata is a list": file({"__metadata__": []}, data=b""),
    "metadata of numbers": file({"__metadata__": {"a": 1}}, data=b""),
    "metadata of objects": file({"__metadata__": {"a": {}}}, data=b""),
    "entry is a list": file({"a": ["U8", [1], [0, 1]]}),
    "entry is null": file({"a": None}),
    "no dtype": raw(b'"shape":[1],"data_offsets":[0,1]'),
    "no shape": raw(b'"dtype":"U8","data_offsets":[0,1]'),
    "no offsets": raw(b'"dtype":"U8","shape":[1]'),
    "another field": file({"a": entry(stride=[1])}),
    "unknown dtype": file({"a": entry("F8")}),
    "dtype in small letters": file({"a": entry("u8")}),
    "dtype is a number": file({"a": entry(1)}),
    "dtype is a list": file({"a": entry(["U8"])}),
    "half a byte": file({"a": entry("F4", (2,))}),
    "shape is a number": file({"a": entry(shape=1)}),
    "shape is a text": file({"a": entry(shape="1")}),
    "negative extent": file({"a": entry(shape=(-1, -1))}),
    "fractional extent": file({"a": entry(shape=(1.0,))}),
    "exponent": raw(GOOD.replace(b"[1]", b"[1e0]")),
    "minus zero": raw(GOOD.replace(b"[0,", b"[-0,")),
    "extent is true": file({"a": entry(shape=(True,))}),
    "extent is null": file({"a": entry(shape=(None,))}),
    "extent is NaN": raw(GOOD.replace(b"[1]", b"[NaN]")),
    "nested shape": file({"a": entry(shape=((1,),))}),
    "product overflows": file({"a": entry(shape=(2**32, 2**32))}),
    "product overflows to the size": file({"a": entry(shape=(2**33, 2**31 + 1, 1))}),
    "overflow before a zero": file({"a": entry(shape=(2**62, 4, 0), offsets=(0, 0))}, data=b""),
    "extent over 64 bits": file({"a": entry(shape=(2**64,))}),
    "number of 5000 digits": raw(GOOD.replace(b"[1]", b"[" + b"9" * 5000 + b"]")),
    "33 axes": file({"a": entry(shape=(1,) * 33)}),
    "one offset": file({"a": entry(offsets=(0,))}),
    "three offsets": file({"a": entry(offsets=(0, 1, 1))}),
    "offsets the wrong way": file({"a": entry(offsets=(1, 0))}),
    "offsets past the end": file({"a": entry(shape=(9,), offsets=(0, 9))}),
    "offsets over 64 bits": file({"a": entry(offsets=(2**64, 2**64 + 1))}),
    "size too small": file({"a": entry("F32", (1,), (0, 1))}),
    "size too large": file({"a": entry("U8", (1,), (0, 2))}, data=b"\0\0"),
    "hole in front": file({"a": entry(offsets=(1, 2))}, data=b"\0\0"),
    "hole between": file({"a": entry(), "b": entry(offsets=(2, 3))}, data=b"\0" * 3),
    "hole behind": file({"a": entry()}, data=b"\0\0"),
    "overlap": file({"a": entry("U8", (2,), (0, 2)), "b": entry("U8", (2,), (1, 3))}, data=b"\0" * 3),
    "the same bytes twice": file({"a": entry(), "b": entry()}),
    "data without tensors": file({}),
    "deep lists": file(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "deep objects": file(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
}  # fmt: skip


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(content: bytes) -> Path:
        (tmp_path / "x.safetensors").write_bytes(content)
        return tmp_path / "x.safetensors"

    return write


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_refused(case: str, write: Any) -> None:
    path = write(MALFORMED[case])
    tracemalloc.start()
    with pytest.raises(CheckpointError) as error:
        read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(path) in error.value.found
    assert len(str(error.value)) < 1000
    assert peak < 2**21 + 20 * len(MALFORMED[case])


def test_there_are_enough_cases() -> None:
    refused = [case for case, content in MALFORMED.items() if theirs(content) is None]
    assert len(MALFORMED) >= 60
    assert len(refused) >= 60, "most of the rules are the library's too"


Meaning = dict[str, tuple[str, tuple[int, ...]]]


def theirs(content: bytes) -> Meaning | None:
    """What the library reads: names, types and shapes; None if it refuses."""
    try:
        return {
            name: (found["dtype"], tuple(found["shape"])) for name, found in safetensors.deserialize(content)
        }
    except safetensors.SafetensorError:
        return None


def ours(path: Path) -> Meaning | None:
    try:
        return {name: (found.dtype, found.shape) for name, found in read_header(path).tensors.items()}
    except CheckpointError:
        return None


def test_mutations_are_read_as_the_library_does_or_refused(write: Any) -> None:
    """20,000 seeded damages; whatever passes means the same to both, and no other error comes out."""
    choose = random.Random(20)
    passed = refused = 0
    path = write(VALID)
    with path.open("r+b", buffering=0) as stream:  # opening a file to write it takes longer than all else
        for _ in range(20_000):
            content = choose.choice(MUTATIONS)(choose, bytearray(VALID))
            stream.seek(0)
            stream.write(content)
            stream.truncate()
            found = ours(path)
            refused += found is None
            if found is not None:
                assert found == theirs(content), content
                passed += 1
    assert min(passed, refused) > 1000, "the damages are neither all fatal nor all harmless"


def flip(choose: random.Random, content: bytearray) -> bytes:
    content[choose.randrange(len(content))] ^= 1 << choose.randrange(8)
    return bytes(content)


def truncate(choose: random.Random, content: bytearray) -> bytes:
    return bytes(content[: choose.randrange(len(content))])


def splice(choose: random.Random, content: bytearray) -> bytes:
    """Insert, delete or repeat a span; in half of the cases the header's length follows."""
    a, b = sorted(choose.randrange(8, len(content)) for _ in range(2))
    span = bytes(content[a : min(b, a + 12)])
    spliced = choose.choice(
        [
            content[:a] + choose.randbytes(3) + content[a:],
            content[:a] + content[a + len(span) :],
            content[:a] + span + content[a:],
        ]
    )
    return relength(bytes(spliced), len(spliced) - len(content)) if choose.random() < 0.5 else bytes(spliced)


def relength(content: bytes, by: int) -> bytes:
    return struct.pack("<Q", (struct.unpack("<Q", content[:8])[0] + by) % 2**64) + content[8:]


def resize(choose: random.Random, content: bytearray) -> bytes:
    return relength(
        bytes(content), choose.choice([-1, 1, 8, -8, 2**31, -(2**63), choose.randrange(-300, 300)])
    )


VALUES = [
    0,
    1,
    -1,
    2,
    3,
    6,
    24,
    2**31,
    2**63,
    2**64,
    1.5,
    True,
    None,
    "",
    "F16",
    "I64",
    "F8_E4M3",
    [],
    [0],
    [2, 3],
    {},
]


def edit(choose: random.Random, content: bytearray) -> bytes:
    """Change the JSON and write it anew: the rules behind the syntax."""
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    name = choose.choice(list(header))
    kind = choose.randrange(5)
    if kind == 0:
        header[choose.choice(["x", "__metadata__", ""])] = header.pop(name)
    elif kind == 1:
        header[choose.choice(["copy", "bias"])] = header[name]
    elif kind == 2:
        header = dict(choose.sample(list(header.items()), len(header)))
    else:
        field = choose.choice(list(header[name]))
        old = header[name][field]
        if isinstance(old, list) and old and kind == 3:
            old[choose.randrange(len(old))] = choose.choice(VALUES)
        else:
            header[name][field] = choose.choice(VALUES)
    return file(header, bytes(content[8 + length :]))


MUTATIONS = [flip, truncate, splice, resize, edit]


@pytest.mark.parametrize(
    "bomb",
    [
        b'{"a":[' + b"[]," * 3_000_000 + b"[]]}",
        b"{" + b'"":"",' * 1_500_000 + b'"":""}',
        b'{"a":"' + b'\\"' * 4_000_000,
    ],
    ids=["lists", "texts", "escapes"],
)
def test_floods_of_values_are_counted_before_they_are_parsed(bomb: bytes, write: Any) -> None:
    path = write(file(bomb))
    tracemalloc.start()
    with pytest.raises(CheckpointError):
        read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20 + 8 * len(bomb)


def test_many_tensors_are_read(write: Any) -> None:
    header = {f"t{i}": entry(offsets=(i, i + 1)) for i in range(30_000)}
    assert len(read_header(write(file(header, b"\0" * 30_000))).tensors) == 30_000


def test_every_type_is_the_librarys() -> None:
    for dtype, size in ITEM_SIZES.items():
        content = file({"a": entry(dtype, (3,), (0, 3 * size))}, b"\0" * 3 * size)
        assert theirs(content) == {"a": (dtype, (3,))}


def test_a_file_that_cannot_be_read(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(VALID)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=r"cannot be read \(.*Permission denied"):
        read_header(path)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a file"):
        read_header(tmp_path)


def test_headers_metadata_and_bytes(write: Any) -> None:
    header, found = map_tensors(write(VALID))
    begin = len(VALID) - sum(tensor.nbytes for tensor in TENSORS.values())
    assert min(place.offset for place in header.tensors.values()) == begin
    assert (header.tensors["bias"].dtype, header.tensors["bias"].shape) == ("F16", (3,))
    assert header.metadata == {"format": "pt"}
    assert header.text == VALID[8:begin]
    assert {name: found[name].tobytes() for name in found} == {
        name: tensor.numpy().tobytes() for name, tensor in TENSORS.items()
    }
    assert not found["bias"].flags.writeable


def test_the_error_is_the_callers(write: Any) -> None:
    with pytest.raises(PackageError, match=r"has 3 bytes.*latentrt export CHECKPOINT"):
        read_header(write(b"abc"), error=PackageError)


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    described = {name: (DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in TENSORS.items()}
    order: list[str] = []

    def content(name: str) -> bytes:
        order.append(name)
        assert not path.exists(), "it appears when it is complete"
        return TENSORS[name].numpy().tobytes()

    places = write_file(path, described, content, durable=True)
    assert order == ["scalar", "unet.weight", "empty", "bias"], "wide types first"
    assert places == dict(read_header(path).tensors)
    assert all(place.offset % ITEM_SIZES[place.dtype] == 0 for place in places.values())
    assert isinstance(places["bias"], TensorRange)
    found = load_file(path)
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


def test_a_file_that_is_not_finished_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text("old")
    with pytest.raises(ValueError, match="'a' has another length than 4"):
        write_file(path, {"a": ("F32", (1,))}, lambda name: b"abc")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_metadata_of_null_are_none(write: Any) -> None:
    content = file({"__metadata__": None, "a": entry()})
    assert theirs(content) == ours(write(content)) == {"a": ("U8", (1,))}
    assert read_header(write(content)).metadata == {}


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"])
def test_quantised_types_that_no_net_has_are_named(dtype: str, write: Any) -> None:
    with pytest.raises(CheckpointError, match=f"stores 'a' as '{dtype}'.*Use the model's fp16 or fp32"):
        read_header(write(file({"a": entry(dtype)})))


@pytest.mark.parametrize("error", [CheckpointError, PackageError])
def test_a_git_lfs_pointer_is_named(error: Any, tmp_path: Path) -> None:
    """As in git-lfs' docs/spec.md."""
    path = tmp_path / "my models" / "x.safetensors"
    (path.parent / ".git").mkdir(parents=True)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n")
    with pytest.raises(error, match="is a git-lfs pointer") as caught:
        read_header(path, error=error)
    assert shlex.split(caught.value.fix.partition(": ")[2])[:3] == ["git", "-C", str(path.parent)]
    (path.parent / ".git").rmdir()
    with pytest.raises(error, match=r"is a git-lfs pointer.* Download the file itself: hf download"):
        read_header(path, error=error)


@pytest.mark.parametrize(
    ("start", "found"),
    [
        (b"<!DOCTYPE html>\n<html>", "begins with the text '<!DOCTYPE html>"),
        (b'{"error":"Invalid username or password."}', 'begins with the text \'{"error"'),
        (b"Entry not found, sorry", "begins with the text 'Entry not found"),
        (b"GGUF\x03\0\0\0\xb2\x02\0\0\0\0\0\0", "is a GGUF file"),
    ],
)
def test_other_formats_are_named(start: bytes, found: str, write: Any) -> None:
    """What a download without permission leaves, and quantised weights."""
    with pytest.raises(CheckpointError, match=re.escape(found)):
        read_header(write(start + b" " * 40))
