"""Damage to any file of a checkpoint is named, and a damaged checkpoint is never restored."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crcjax.errors import InputError
from crcjax.runs.checkpoint import Checkpointer, newest_step
from crcjax.runs.integrity import verify_checkpoint, verify_run, write_manifest
from crcjax.runs.train_state import TrainState

DAMAGES = ("truncated", "emptied", "first bit", "middle bit", "last bit", "removed", "swapped")


def _state(step: int) -> TrainState:
    params = {"kernel": jax.random.normal(jax.random.key(step), (40, 30)), "bias": jnp.arange(7.0) * step}
    return TrainState(jnp.int32(step), params, ({"mean": jnp.ones(5) * step},))


def _bytes(state: TrainState) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A private key and its public key."""
    key, public = (tmp_path_factory.mktemp("keys") / name for name in ("key.pem", "key.pub"))
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", key], check=True)
    subprocess.run(["openssl", "pkey", "-in", key, "-pubout", "-out", public], check=True)
    return key, public


@pytest.fixture(scope="module")
def signed(keys: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the signed checkpoints of steps 2 and 4, to be copied."""
    run = tmp_path_factory.mktemp("signed")
    checkpoints = Checkpointer(run, signing_key=keys[0])
    for step in (2, 4):
        checkpoints.save(_state(step), {"balanced_accuracy": 0.5, "loss": 1.0}, is_last=True)
    checkpoints.close()
    return run


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _damage(path: Path, kind: str, other: Path) -> None:
    content = bytearray(path.read_bytes())
    if kind == "removed":
        path.unlink()
    elif kind == "swapped":
        shutil.copy(other, path)
    elif kind == "emptied":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        position = {"first bit": 0, "middle bit": len(content) // 2, "last bit": len(content) - 1}[kind]
        content[position] ^= 1 << (position % 8)
        path.write_bytes(content)


def _damaged_runs(run: Path, folder: Path) -> Iterator[tuple[Path, str, str]]:
    """Every file of the checkpoint of step 4, damaged in every way, each in a copy of the run."""
    newest, older = run / "checkpoints" / "4", run / "checkpoints" / "2"
    for file in _files(newest):
        others = [path for path in _files(older) if Path(path).parent == Path(file).parent]
        other = older / (file if file in others else others[-1])
        for kind in DAMAGES:
            copy = folder / f"{file.replace('/', '_')}-{kind}"
            shutil.copytree(run, copy)
            damaged = copy / "checkpoints" / "4" / file
            before = damaged.read_bytes()
            _damage(damaged, kind, other)
            if not damaged.exists() or damaged.read_bytes() != before:
                yield copy, file, kind
            shutil.rmtree(copy)


def test_every_damage_to_every_file_is_named_and_the_checkpoint_before_it_is_restored(
    signed: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    key, public = keys
    assert [verdict.damaged for verdict in verify_run(signed, public)] == [(), ()]
    expected, cases = _bytes(_state(2)), 0
    for run, file, kind in _damaged_runs(signed, tmp_path):
        listing = _files(run)
        whole, damaged = verify_run(run, public)
        assert (whole.step, whole.damaged) == (2, ())
        assert [entry.path for entry in damaged.damaged] == [file], kind
        assert _files(run) == listing, "verifying changed the run"
        checkpoints = Checkpointer(run, signing_key=key)
        assert _bytes(checkpoints.restore(_state(0))) == expected, (file, kind)
        checkpoints.close()
        names = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert names[0] == "2"
        assert names[1].startswith("damaged-4-"), names
        cases += 1
    assert cases > 12 * 6


def test_damage_is_named_without_a_key_too_and_a_run_without_a_whole_checkpoint_starts_again(
    signed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for run, file, kind in _damaged_runs(signed, tmp_path):
        damaged = verify_run(run)[1]
        assert [entry.path for entry in damaged.damaged] == [file], kind
        if kind in ("emptied", "first bit", "last bit"):
            continue
        shutil.rmtree(run / "checkpoints" / "2")
        checkpoints = Checkpointer(run)
        assert int(checkpoints.restore(_state(0)).step) == 0, (file, kind)
        checkpoints.close()
        assert newest_step(run) == 0
    assert "no whole checkpoint is left" in caplog.text


def test_an_edited_manifest_with_matching_hashes_is_noticed_by_its_signature_alone(
    signed: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(signed, run)
    newest = run / "checkpoints" / "4"
    signature = (newest / "manifest.sig").read_bytes()
    for name in ("manifest.json", "manifest.sig"):
        (newest / name).unlink()
    array = max((newest / "default").rglob("d/*"), key=lambda path: path.stat().st_size)
    _damage(array, "middle bit", array)
    write_manifest(newest, 4, {"balanced_accuracy": 1.0, "loss": 0.0})
    (newest / "manifest.sig").write_bytes(signature)
    assert verify_run(run)[1].damaged == ()
    (damage,) = verify_run(run, keys[1])[1].damaged
    assert damage.path == "manifest.json"
    assert damage.reason.startswith("edited")
    # Arrays are compared with their hashes, which that edit did not reach.
    checkpoints = Checkpointer(run)
    assert int(checkpoints.restore(_state(0)).step) == 2
    checkpoints.close()
    (newest.parent / "damaged-4-differs").rename(newest)
    checkpoints = Checkpointer(run, signing_key=keys[0])
    assert int(checkpoints.restore(_state(0)).step) == 2
    checkpoints.close()
    assert (newest.parent / "damaged-4-edited").is_dir()


def test_a_flipped_bit_in_any_byte_of_a_manifest_and_any_truncation_is_noticed(signed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(signed, run)
    path = run / "checkpoints" / "4" / "manifest.json"
    content = path.read_bytes()
    flipped = (content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :] for at in range(len(content)))
    for changed in (*flipped, *(content[:size] for size in range(0, len(content), 7)), content[:-1], content + b" "):
        path.write_bytes(changed)
        assert [entry.path for entry in verify_checkpoint(path.parent).damaged] == ["manifest.json"], changed


def test_a_signature_by_another_key_is_damage_to_who_has_the_key(
    signed: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    run, other = tmp_path / "run", tmp_path / "other.pem"
    shutil.copytree(signed, run)
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", other], check=True)
    newest = run / "checkpoints" / "4"
    for name in ("manifest.json", "manifest.sig"):
        (newest / name).unlink()
    write_manifest(newest, 4, None, other)
    assert verify_checkpoint(newest).damaged == ()
    for held in ({"public_key": keys[1]}, {"private_key": keys[0]}):
        (damage,) = verify_checkpoint(newest, **held).damaged
        assert (damage.path, damage.reason) == ("manifest.json", "edited, or signed by another key")


def test_a_checkpoint_under_another_step_or_with_an_extra_file_is_damaged(signed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(signed, run)
    (run / "checkpoints" / "4").rename(run / "checkpoints" / "5")
    (run / "checkpoints" / "2" / "default" / "d" / "more").write_text("x")
    (run / "checkpoints" / "2" / ".nfs0001").write_text("x")
    extra, renamed = verify_run(run)
    assert [(entry.path, entry.reason) for entry in renamed.damaged] == [
        ("manifest.json", "swapped: it is the manifest of step 4")
    ]
    assert [entry.path for entry in extra.damaged] == ["default/d/more"]


def test_an_older_checkpoint_without_a_manifest_is_restored_and_reported(
    signed: Path, keys: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    shutil.copytree(signed, run)
    for path in (run / "checkpoints" / "4" / name for name in ("manifest.json", "manifest.sig", "checkpoint.json")):
        path.unlink()
    shutil.rmtree(run / "checkpoints" / "4" / "hashes")
    verdict = verify_run(run)[1]
    assert (verdict.has_manifest, verdict.damaged) == (False, ())
    checkpoints = Checkpointer(run)
    with caplog.at_level("INFO", logger="crcjax"):
        assert _bytes(checkpoints.restore(_state(0))) == _bytes(_state(4))
    checkpoints.close()
    assert "4: an older checkpoint without a manifest" in caplog.text
    assert verify_run(run, keys[1])[1].damaged[0].path == "manifest.json"


def test_a_manifest_of_a_later_format_is_refused(signed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(signed, run)
    path = run / "checkpoints" / "4" / "manifest.json"
    manifest = json.loads(path.read_text()) | {"format": 2}
    path.write_text(json.dumps(manifest))
    assert verify_run(run)[1].damaged[0].reason.startswith("changed")
    with pytest.raises(InputError, match="has no checkpoints"):
        verify_run(tmp_path)
