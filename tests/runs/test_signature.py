"""Signatures by keys that openssl makes, verified by openssl too."""

import subprocess
from pathlib import Path

import pytest

from crcjax.errors import InputError
from crcjax.runs.signature import is_signed_by, sign


def _openssl(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True)


def _keys(folder: Path, name: str, algorithm: str = "ed25519") -> tuple[Path, Path]:
    key, public = folder / f"{name}.pem", folder / f"{name}.pub"
    assert _openssl("genpkey", "-algorithm", algorithm, "-out", key).returncode == 0
    assert _openssl("pkey", "-in", key, "-pubout", "-out", public).returncode == 0
    return key, public


def test_a_signature_by_openssl_keys_holds_for_that_content_and_key_alone_and_openssl_verifies_it(
    tmp_path: Path,
) -> None:
    (key, public), (_, other) = _keys(tmp_path, "ours"), _keys(tmp_path, "theirs")
    content = b"every byte counts"
    signature = sign(key, content)
    assert is_signed_by(public, content, signature)
    assert not is_signed_by(other, content, signature)
    assert not is_signed_by(public, content + b".", signature)
    assert not is_signed_by(public, content, signature[:-1] + bytes([signature[-1] ^ 1]))
    assert not is_signed_by(public, content, b"")
    (tmp_path / "file").write_bytes(content)
    (tmp_path / "signature").write_bytes(signature)
    verify = ("pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin", "-in", tmp_path / "file")
    assert _openssl(*verify, "-sigfile", tmp_path / "signature").returncode == 0
    (tmp_path / "file").write_bytes(content + b".")
    assert _openssl(*verify, "-sigfile", tmp_path / "signature").returncode != 0


def test_a_file_that_is_no_usable_key_is_named_with_the_command_that_makes_one(tmp_path: Path) -> None:
    key, public = _keys(tmp_path, "good")
    rsa_key, rsa_public = _keys(tmp_path, "rsa", "rsa")
    text = tmp_path / "text"
    text.write_text("no key")
    text.chmod(0o600)
    locked = tmp_path / "locked.pem"
    assert _openssl("pkey", "-in", key, "-aes256", "-passout", "pass:secret", "-out", locked).returncode == 0
    for path, words in (
        (text, "must be an Ed25519 private key in PEM without a password; try openssl genpkey"),
        (locked, "without a password"),
        (rsa_key, "must be an Ed25519 private key, got _RSAPrivateKey|RSAPrivateKey"),
        (tmp_path / "absent", "absent: cannot be read"),
    ):
        with pytest.raises(InputError, match=words):
            sign(path, b"")
    for path, words in (
        (text, "must be an Ed25519 public key in PEM; try openssl pkey"),
        (rsa_public, "must be an Ed25519 public key, got"),
        (key, "got a private one, which stays secret"),
    ):
        with pytest.raises(InputError, match=words):
            is_signed_by(path, b"", b"")
    key.chmod(0o644)
    with pytest.raises(InputError, match=r"every user can read the key; chmod 600"):
        sign(key, b"")
    assert public.exists()
