import hashlib
import hmac
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from latentrt.engines.errors import UsageError
from latentrt.serve.door import keys
from latentrt.serve.door.keys import LARGEST_KEY_FILE, Keys, join_keys, keys_of_environment, read_keys

ANNA, BERT = "anna-0123456789abcdef", "bert-0123456789abcdef"


def file_of(folder: Path, content: str | bytes, mode: int = 0o600) -> Path:
    path = folder / "keys.txt"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(mode)
    return path


def key_id(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:8]


def test_a_file_has_a_key_a_line_and_comments(tmp_path: Path) -> None:
    found = read_keys(file_of(tmp_path, f"# the team\r\n{ANNA}\r\n\n  {BERT}  \n{ANNA}\n"))
    assert len(found.digests) == 2
    assert found
    assert found.owner(ANNA.encode()) == key_id(ANNA)
    assert found.owner(BERT.encode()) == key_id(BERT)
    for wrong in (None, b"", ANNA[:-1].encode(), ANNA.upper().encode(), b"# the team", b" " + ANNA.encode()):
        assert found.owner(wrong) is None


def test_without_keys_nobody_has_an_id() -> None:
    assert not Keys()
    assert Keys().owner(b"anything") is None


def test_a_key_is_kept_nowhere(tmp_path: Path) -> None:
    found = read_keys(file_of(tmp_path, ANNA))
    for text in (repr(found), str(found), repr(vars(found)), format(found)):
        assert ANNA not in text


@pytest.mark.parametrize("sent", [ANNA, BERT, "nobody-0123456789abcdef"])
def test_every_key_is_compared_whichever_fits(monkeypatch: pytest.MonkeyPatch, sent: str) -> None:
    """Report 38: the time taken says nothing of the keys."""
    found = keys_of_environment("KEYS", {"KEYS": f"{ANNA},{BERT}"})
    compared: list[tuple[Any, Any]] = []

    def compare(a: Any, b: Any) -> bool:
        compared.append((a, b))
        return hmac_compare(a, b)

    hmac_compare = hmac.compare_digest
    monkeypatch.setattr(keys.hmac, "compare_digest", compare)
    found.owner(sent.encode())
    digest = hashlib.sha256(sent.encode()).digest()
    assert compared == [(digest, one) for one in found.digests]


@pytest.mark.skipif(sys.platform == "win32", reason="modes of POSIX")
@pytest.mark.parametrize("mode", [0o644, 0o604, 0o602, 0o620, 0o666])
def test_a_file_that_is_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    path = file_of(tmp_path, ANNA, mode)
    with pytest.raises(UsageError, match=f"open to other users .mode {mode:o}.") as caught:
        read_keys(path)
    assert caught.value.fix == f"Close it: chmod 600 {path}"
    os.system(caught.value.fix.removeprefix("Close it: "))
    assert read_keys(path)


@pytest.mark.skipif(sys.platform == "win32", reason="modes of POSIX")
def test_its_group_may_read_a_file(tmp_path: Path) -> None:
    assert read_keys(file_of(tmp_path, ANNA, 0o440))


@pytest.mark.parametrize(
    ("content", "place", "text"),
    [
        ("", "the key file", "holds no key"),
        ("# nothing\n\n", "the key file", "holds no key"),
        (f"{ANNA}\nsecret\n", "line 2 of the key file", "has 6 characters"),
        ("x" * 513, "line 1 of the key file", "has 513 characters"),
        ("two words-0123456789abc", "line 1 of the key file", "other ones"),
        ("schlüssel-0123456789abc", "line 1 of the key file", "other ones"),
        (b"\xff\xfe" + ANNA.encode("utf-16-le"), "line 1 of the key file", "other ones"),
        ("#" * (LARGEST_KEY_FILE + 1), "the key file", f"more than {LARGEST_KEY_FILE} bytes"),
    ],
)
def test_what_is_no_key_is_refused_and_not_shown(
    tmp_path: Path, content: str | bytes, place: str, text: str
) -> None:
    with pytest.raises(UsageError, match=text) as caught:
        read_keys(file_of(tmp_path, content))
    assert caught.value.found.startswith(place)
    for secret in ("secret", "two words", "schl", ANNA, "xxx"):
        assert secret not in str(caught.value).replace("import secrets; print(secrets.", "")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_keys(tmp_path / "none.txt")


def test_a_variable_has_several_keys_or_is_not_set() -> None:
    assert keys_of_environment("KEYS", {}) == Keys()
    both = keys_of_environment("KEYS", {"KEYS": f" {ANNA},{BERT} \n"})
    assert both.owner(BERT.encode()) == key_id(BERT)
    assert keys_of_environment("KEYS", {"KEYS": f"{ANNA} {BERT}"}) == both


@pytest.mark.parametrize("value", ["", " ", ",", "\n"])
def test_a_variable_that_is_set_and_empty_does_not_open_the_server(value: str) -> None:
    with pytest.raises(UsageError, match="KEYS holds no key"):
        keys_of_environment("KEYS", {"KEYS": value})


def test_a_weak_key_in_a_variable_is_refused() -> None:
    with pytest.raises(UsageError, match="key 2 in KEYS has 5 characters"):
        keys_of_environment("KEYS", {"KEYS": f"{ANNA},short"})


def test_keys_of_several_places_are_joined() -> None:
    one, two = (keys_of_environment("KEYS", {"KEYS": key}) for key in (ANNA, BERT))
    assert join_keys([one, two, one, Keys()]) == Keys(one.digests + two.digests)
