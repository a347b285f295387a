"""Small slides with known pixels, written with tifffile as a scanner would."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile

GLASS = 240


def _tissue_picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    picture = np.full((height, width, 3), GLASS, np.uint8)
    inner = picture[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4]
    inner[:] = (225, 150, 190)
    for x, y, size in rng.integers(0, (inner.shape[1], inner.shape[0], 6), (inner.size // 800, 3)).tolist():
        cv2.circle(inner, (x, y), 2 + size, (100 + 5 * size, 60, 140), -1)
    noisy = picture.astype(np.int16) + rng.integers(-4, 5, picture.shape, np.int16)
    return np.clip(noisy, 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def tissue_picture() -> Callable[..., np.ndarray]:
    """tissue_picture(width, height, seed=0): pink tissue with nuclei in the middle half of white glass."""
    return _tissue_picture


@pytest.fixture(scope="session")
def write_slide() -> Callable[..., Path]:
    """write_slide(path, picture, mpp=0.5, levels=1, **tifffile options) writes an Aperio slide; mpp None omits it.

    Without mpp the objective's `power` is stated only if given.
    """

    def write(
        path: Path,
        picture: np.ndarray,
        mpp: float | None = 0.5,
        levels: int = 1,
        aperio: bool = True,
        power: int | None = None,
        **options,
    ) -> Path:
        power = power or (20 if mpp else None)
        description = "Aperio test slide" + (f"|AppMag = {power}" if power else "") + (f"|MPP = {mpp}" if mpp else "")
        options = {"compression": "jpeg", "photometric": "ycbcr", "subsampling": (2, 2)} | options
        if not aperio:
            description = ""
            if mpp:
                options |= {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
        with tifffile.TiffWriter(path) as tiff:
            for level in range(levels):
                side = (picture.shape[1] >> 2 * level, picture.shape[0] >> 2 * level)
                shown = cv2.resize(picture, side, interpolation=cv2.INTER_AREA)
                if options["photometric"] == "ycbcr":  # tifffile takes them as they are to be stored
                    shown = cv2.cvtColor(shown, cv2.COLOR_RGB2YCrCb)[..., [0, 2, 1]]
                reduced = 0 if aperio or level == 0 else 1
                layout = {"tile": (240, 240), "subfiletype": reduced, "metadata": None}
                tiff.write(shown, description=description, **layout, **options)
        return path

    return write


@pytest.fixture(scope="session")
def small_slide(write_slide: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1500 x 1300 px at 0.5 um, of which 750 x 650 px are tissue; two levels."""
    path = tmp_path_factory.mktemp("slides") / "small.svs"
    return write_slide(path, _tissue_picture(1500, 1300), levels=2)
