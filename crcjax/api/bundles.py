"""Bundles in the Python API."""

from __future__ import annotations

import os
from collections.abc import Iterable
from os import PathLike
from pathlib import Path

from crcjax.api.display import Table, heading
from crcjax.api.runs import Run
from crcjax.runs import bundle as bundles
from crcjax.runs.bundle_export import export_bundle as _export_bundle

AnyPath = str | PathLike[str]


def export_bundle(
    run: Run | AnyPath | Iterable[Run | AnyPath],
    out: AnyPath,
    *,
    step: int | None = None,
    calibration: AnyPath | None = None,
    key: AnyPath | None = None,
    encoder_weights: AnyPath | None = None,
) -> Bundle:
    """Writes a bundle: the folder that holds everything that prediction needs, with a hash of every file.

    Args:
      run: a trained run, or several runs that differ by their seed, as an ensemble.
      out: the folder, new.
      step: the step of the checkpoint; by default the best one.
      calibration: the result of `calibrate` for the same runs, or its file.
      key: the file of an Ed25519 private key, which signs the bundle.
      encoder_weights: the file of a published encoder's weights, for runs that do not record its hash.

    Raises:
      InputError: a run, the calibration or the key is not usable, or `out` exists.
      OutputError: the folder cannot be written.
    """
    runs = [run] if isinstance(run, Run | str | PathLike) else list(run)
    files = (None if file is None else Path(file) for file in (calibration, key, encoder_weights))
    fitted, signing_key, weights = files
    exported = _export_bundle(
        [Path(item) for item in runs],
        Path(out),
        step=step,
        calibration=fitted,
        key=signing_key,
        encoder_weights=weights,
    )
    return Bundle(exported)


def open_bundle(
    path: AnyPath, *, trust: AnyPath | Iterable[AnyPath] | None = None, encoder_weights: AnyPath | None = None
) -> Bundle:
    """Opens a bundle and checks every file.

    Args:
      path: the folder.
      trust: files of public keys. With any, the bundle must be signed by one of them.
      encoder_weights: the file of the published encoder's weights that the bundle names; needed to predict from pixels.

    Raises:
      InputError: a file is changed, missing or does not belong; the signature is not by a trusted key.
    """
    keys = [] if trust is None else [trust] if isinstance(trust, str | PathLike) else list(trust)
    weights = None if encoder_weights is None else Path(encoder_weights)
    return Bundle(bundles.open_bundle(Path(path), [Path(key) for key in keys], weights))


class Bundle:
    """A bundle that was opened and checked.

    Attributes:
      path: the folder.
      id: the SHA-256 of bundle.json.
      target: the name, the classes and the cancer type of what it predicts.
      calibration: its calibration; None without one.
      models: its models.
    """

    def __init__(self, opened: bundles.Bundle):
        self.path, self.id, self.target = opened.path, opened.id, opened.target
        self.calibration, self.models = opened.calibration, opened.models
        self._members = opened.members

    @property
    def card(self) -> str:
        """The model card as Markdown."""
        return (self.path / bundles.CARD).read_text()

    @property
    def members(self) -> Table:
        """One row per model: its id, seed, step and validation metrics."""
        return Table(
            {"model": member.model_id, "seed": member.seed, "step": member.step, **(member.metrics or {})}
            for member in self._members
        )

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    def __repr__(self) -> str:
        return f"Bundle({str(self.path)!r}, {self.id[:12]}, {', '.join(self.target.classes)})"

    def _repr_html_(self) -> str:
        return heading(f"Bundle {self.id[:12]}: {self.target.name}; research use only") + self.members._repr_html_()
