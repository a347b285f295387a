"""Ed25519 signatures of files, by keys in PEM files as openssl writes them.

openssl genpkey -algorithm ed25519 -out KEY.pem
openssl pkey -in KEY.pem -pubout -out KEY.pub
"""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from crcjax.errors import InputError, writing

_PRIVATE = "openssl genpkey -algorithm ed25519 -out KEY.pem"
_PUBLIC = "openssl pkey -in KEY.pem -pubout -out KEY.pub"
_ERRORS = (ValueError, TypeError, UnsupportedAlgorithm)


def sign(key: Path, content: bytes) -> bytes:
    """The signature (64 bytes) of a content by a private key, a PEM file without a password.

    Raises InputError if the file cannot be read, holds no such key, or can be read by every user.
    """
    return _private_key(key).sign(content)


def make_key_pair(path: Path) -> Path:
    """Makes a private key at `path`, which its owner alone can read, and its public key beside it with the suffix .pub.

    Keeps a key that exists. Returns `path`. Raises OutputError.
    """
    with writing(path, "choose another place for the key"):
        if not path.exists():
            key = Ed25519PrivateKey.generate()
            private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
            path.with_suffix(".pub").write_bytes(public)
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(private)
    return path


def is_signed_by(public_key: Path, content: bytes, signature: bytes) -> bool:
    """Whether a signature of a content is by the private key that belongs to a public key, a PEM file.

    Raises InputError if the file cannot be read or holds no such key.
    """
    return _is_valid(_public_key(public_key), content, signature)


def public_key_of(key: Path) -> str:
    """The public key (32 bytes as hexadecimal digits) of a private key. Raises InputError like `sign`."""
    return _private_key(key).public_key().public_bytes_raw().hex()


def public_key_digits(public_key: Path) -> str:
    """A public key, a PEM file, as hexadecimal digits. Raises InputError like `is_signed_by`."""
    return _public_key(public_key).public_bytes_raw().hex()


def is_signed_by_hex(public_key: str, content: bytes, signature: bytes) -> bool:
    """Like `is_signed_by`, for a public key as hexadecimal digits. Raises ValueError for other text."""
    return _is_valid(Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key)), content, signature)


def _is_valid(key: Ed25519PublicKey, content: bytes, signature: bytes) -> bool:
    try:
        key.verify(signature, content)
    except InvalidSignature:
        return False
    return True


def _private_key(path: Path) -> Ed25519PrivateKey:
    text = _read(path)
    if path.stat().st_mode & 0o007:
        raise InputError(f"{path}: every user can read the key; chmod 600 it, and make a new one if anybody read it")
    try:
        key = load_pem_private_key(text, password=None)
    except _ERRORS as error:
        raise InputError(f"{path}: must be an Ed25519 private key in PEM without a password; try {_PRIVATE}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(f"{path}: must be an Ed25519 private key, got {type(key).__name__}; try {_PRIVATE}")
    return key


def _public_key(path: Path) -> Ed25519PublicKey:
    text = _read(path)
    if b"PRIVATE KEY" in text:
        raise InputError(f"{path}: must be a public key, got a private one, which stays secret; try {_PUBLIC}")
    try:
        key = load_pem_public_key(text)
    except _ERRORS as error:
        raise InputError(f"{path}: must be an Ed25519 public key in PEM; try {_PUBLIC}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise InputError(f"{path}: must be an Ed25519 public key, got {type(key).__name__}; try {_PUBLIC}")
    return key


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give the file of a key") from error
