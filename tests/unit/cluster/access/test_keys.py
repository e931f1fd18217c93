"""API keys: the file, the comparison, names, hashed lines and options."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from cluster.access.keys import MIN_KEY_CHARS, ApiKeys, key_digest, key_id, load_api_keys
from cluster.common.errors import PreflightError
from cluster.jobs.tenants.tenant import Tenant
from tests.support.fakes.jobs_api import write_secret

KEY = "0123456789abcdef"


def write(tmp_path: Path, content: str | bytes) -> Path:
    return write_secret(tmp_path / "keys", content)


def name_of(keys: ApiKeys, key: str) -> str | None:
    tenant = keys.tenant(key)
    return None if tenant is None else tenant.name


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        (KEY, [KEY]),
        (f"{KEY}\n", [KEY]),
        (f"team a:{KEY}\r\n\r\n# note: {KEY}xx\n  other : {KEY}2  \n", [KEY, KEY + "2"]),
        (f"a:b:{KEY}", [KEY]),
        ("x" * 4096, ["x" * 4096]),
    ],
)
def test_keys_are_read(tmp_path: Path, content: str, keys: list[str]) -> None:
    loaded = load_api_keys(write(tmp_path, content))
    assert len(loaded) == len(keys)
    assert all(name_of(loaded, key) for key in keys)
    wrong = ("", KEY + "x", KEY[1:], KEY.upper(), f"team a:{KEY}", "\udc80")
    assert [name_of(loaded, key) for key in wrong] == [None] * len(wrong)


def test_keys_have_names(tmp_path: Path) -> None:
    loaded = load_api_keys(write(tmp_path, f"{KEY}\nteam a : {KEY}2\nx:y:{KEY}3\nteam a:{KEY}4\n:{KEY}5\n"))
    names = [name_of(loaded, f"{KEY}{end}") for end in ("", *"2345")]
    digests = [hashlib.sha256(f"{KEY}{end}".encode()).hexdigest()[:8] for end in ("", "5")]
    assert names == [f"sha256:{digests[0]}", "team a", "x:y", "team a", f"sha256:{digests[1]}"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "has no key"),
        ("# only a comment\n", "has no key"),
        ("short", ":1: the key has 5 characters: must have at least 16"),
        (f"{KEY}\n\nname:{KEY[:15]}", ":3: the key has 15 characters"),
        ("name:", ":1: the key has 0 characters"),
        (f"{KEY} {KEY}", ":1: a key has no spaces, and what follows it must be of admin, streams=N"),
        (f"{KEY}\x01", ":1: a key must not contain control characters"),
        (f"a:{KEY}\nb:{KEY}", ":2: the key of line 1 again"),
        ("schlüssel:" + KEY, "must be ASCII"),
        (b"\xff\xfe" + KEY.encode(), "must be ASCII"),
        (f"{KEY}\n" * (1 << 17), "must be at most 1048576 bytes"),
        *(
            (f"a:{KEY} {option}", ":1: a key has no spaces, and what follows it must be of")
            for option in ("streams=0", "streams=x", "queued-jobs=-1", "document-bytes=1 GiB", "admin=1", "Admin", "=")
        ),
        (f"a:{KEY}\na:{KEY}2 admin", ":2: other options than in line 1: keys of one name must have the same"),
        ("a:sha256=" + "0" * 63, ":1: sha256=: must be followed by 64 hexadecimal digits"),
        (f"a:sha256={key_digest(KEY).hex()}\n{KEY}", ":2: the key of line 1 again"),
        (f"{'n' * 101}:{KEY}", ":1: a name must have at most 100 characters"),
        (f"a\x1b[31m:{KEY}", ":1: a name must have at most 100 characters, none of control"),
    ],
)
def test_bad_files_are_refused_in_one_line_without_keys(tmp_path: Path, content: str | bytes, said: str) -> None:
    with pytest.raises(PreflightError) as caught:
        load_api_keys(write(tmp_path, content))
    message = str(caught.value)
    assert message.startswith("security.api_keys_file: ")
    assert said in message
    assert KEY[:15] not in message
    assert len(message.splitlines()) == 1


def test_keys_are_not_kept_as_text() -> None:
    keys = ApiKeys({KEY: ""})
    assert KEY not in repr(vars(keys))
    assert KEY not in repr(keys)
    assert len(KEY) == MIN_KEY_CHARS


def test_lines_with_a_hash_and_options(tmp_path: Path) -> None:
    digest = key_digest(KEY).hex()
    content = f"law:sha256={digest} streams=2 queued-jobs=10 document-bytes=1GiB\nroot:{KEY}2 admin\nplain:{KEY}3\n"
    keys = load_api_keys(write(tmp_path, content))
    assert keys.tenant(KEY) == Tenant("law", False, 2, 10, 1 << 30)
    assert keys.tenant(f"{KEY}2") == Tenant("root", is_admin=True)
    assert keys.tenant(f"{KEY}3") == Tenant("plain")
    assert keys.tenant(f"sha256={digest}") is None, "what is in the file is no key"
    assert keys.names == {key_id(KEY): "law", key_id(f"{KEY}2"): "root", key_id(f"{KEY}3"): "plain"}
