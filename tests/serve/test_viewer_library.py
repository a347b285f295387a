"""The installation of the zooming viewer: only the pinned release is installed and served."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from crcjax.serve import viewer_library
from crcjax.serve.viewer_library import VERSION, default_file, read_script


@pytest.fixture
def archive(tmp_path: Path) -> Callable[[bytes], Path]:
    """archive(script): a package's archive with this script."""

    def write(script: bytes) -> Path:
        path = tmp_path / "package.tgz"
        with tarfile.open(path, "w:gz") as tar:
            for name, content in ((viewer_library._SCRIPT, script), (viewer_library._LICENSE, b"BSD")):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
        return path

    return write


def test_an_archive_from_another_machine_is_installed_if_it_is_the_pinned_release(
    crcjax: Callable, archive: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert read_script() is None
    script = b"script"
    monkeypatch.setattr(viewer_library, "_SHA256", viewer_library.hashlib.sha256(script).hexdigest())
    done = crcjax("install-viewer", "--package", archive(script))
    assert done.returncode == 0
    assert VERSION in done.stderr
    assert read_script() == script
    assert sorted(path.name for path in default_file().parent.iterdir()) == ["LICENSE.txt", "openseadragon.min.js"]
    done = crcjax("install-viewer", "--package", archive(script), "--to", tmp_path / "viewer.js")
    assert read_script(tmp_path / "viewer.js") == script


def test_what_is_not_the_pinned_release_is_refused(
    crcjax: Callable, archive: Callable, tmp_path: Path, bundle_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = tmp_path / "viewer.js"
    (tmp_path / "empty.tgz").write_bytes(b"")
    monkeypatch.setenv("PATH", "")
    for package, words in (
        (("--package", archive(b"another release")), f"must be openseadragon {VERSION}"),
        (("--package", tmp_path / "empty.tgz"), "is not the archive"),
        ((), "npm is not installed"),
    ):
        done = crcjax("install-viewer", "--to", to, *package)
        assert done.returncode == 2
        assert words in done.stderr.replace("\n", " ")
        assert not to.exists()
    to.write_bytes(b"changed")
    done = crcjax("serve", "--bundle", bundle_folder, "--state", tmp_path / "state", "--viewer", to)
    assert done.returncode == 2
    assert "SHA-256" in done.stderr
