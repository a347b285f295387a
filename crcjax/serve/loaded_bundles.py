"""The bundles that a worker has loaded: those that it used last; the others are dropped."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from crcjax.predict.engine import Engine, EngineWork
from crcjax.predict.predictor import Predictor
from crcjax.predict.warm_up import warm_up
from crcjax.runs.bundle import MANIFEST, Bundle, open_bundle
from crcjax.slides.jobs.usable_cores import usable_cores

# Production, canary and shadow; after a rollback the bundle before is still loaded unless two others came since.
_MOST = 4


class LoadedBundle:
    """A bundle with its predictor, and the engine whose threads live from case to case."""

    def __init__(self, bundle: Bundle, threads: int):
        self.bundle, self.predictor = bundle, Predictor(*bundle.models)
        self._engine = Engine(self.predictor, threads)
        self._work: EngineWork | None = None
        warm_up(self.predictor, self.begin(), bundle.models[0].config.data.region_buckets)

    def begin(self) -> EngineWork:
        """The running engine."""
        if self._work is None:
            self._work = self._engine.begin()
        return self._work

    def stop(self) -> None:
        """Stops the engine's threads; the next case starts others."""
        if self._work is not None:
            self._work.stop()
            self._work = None


class LoadedBundles:
    """Bundles that are ready to predict, by folder.

    Args:
      trust: public keys, one of which must have signed each bundle.
      encoder_weights: the file of a published encoder's weights, for bundles that name one.
      threads: threads that decode tiles; by default one per core.
      most: bundles to keep in memory.
    """

    def __init__(
        self,
        trust: Sequence[Path] = (),
        encoder_weights: Path | None = None,
        threads: int | None = None,
        most: int = _MOST,
    ):
        self._trust, self._weights, self._most = trust, encoder_weights, most
        self._threads = threads or usable_cores()
        self._loaded: OrderedDict[Path, LoadedBundle] = OrderedDict()

    def get(self, folder: Path) -> LoadedBundle:
        """A bundle; it is loaded, with every file checked, and its programs compiled if it is not in memory. Raises InputError."""
        if folder not in self._loaded:
            while len(self._loaded) >= self._most:
                self._loaded.popitem(last=False)[1].stop()
            bundle = open_bundle(folder, self._trust, self._weights if _names_encoder(folder) else None)
            self._loaded[folder] = LoadedBundle(bundle, self._threads)
        self._loaded.move_to_end(folder)
        return self._loaded[folder]

    @property
    def folders(self) -> list[Path]:
        """The bundles in memory; the one used last is the last."""
        return list(self._loaded)


def _names_encoder(folder: Path) -> bool:
    """Whether a bundle names a published encoder; True for what is no bundle, which opening it then says."""
    try:
        return bool(json.loads((folder / MANIFEST).read_bytes())["encoder"])
    except (OSError, ValueError, KeyError, TypeError):
        return True
