"""How usual a bag is among those that a model knows, and how much of its evidence it can have by that."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from zipfile import BadZipFile

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float32, Int
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA

from crcjax.errors import InputError, writing
from crcjax.models.heads import BY_DENSITY, dirichlet
from crcjax.models.mil import Prediction

Summaries = Float[np.ndarray, "bag moment feature"]
_FILE = "density.npz"
_FEWEST = 8  # bags that quartiles can be told of
_KEPT = 0.8  # of the variance of log deviations, in their first components


def summary(
    features: Float32[np.ndarray, "region slot feature"], mask: Bool[np.ndarray, "region slot"]
) -> Float[np.ndarray, "moment feature"]:
    """What a bag's density is of: the mean of its instances' features, and the logarithm of their standard deviation.

    A stain moves the mean; tissue that lacks a kind, or blur, makes instances more alike. An empty bag is like none.
    """
    valid = features[mask].astype(np.float64) if mask.any() else np.zeros((1, features.shape[-1]))
    return np.stack([valid.mean(axis=0), np.log(valid.std(axis=0) + 1e-6)])


@dataclass(frozen=True)
class Density:
    """Gaussians of the classes' training bags with one covariance, of both moments: Mahalanobis distances (Lee et al. 2018).

    `usual` and `spread` are the upper quartile and the interquartile range of the validation bags' squared distances:
    a model knows its training bags too well to say how far from them others usually are.
    """

    centres: Float[np.ndarray, "moment class feature"]
    precision: Float[np.ndarray, "moment feature feature"]
    usual: Float[np.ndarray, " moment"]
    spread: Float[np.ndarray, " moment"]

    def excess(self, summaries: Summaries) -> Float[np.ndarray, " bag"]:
        """How far beyond the usual bags are: squared distances to the nearest class, less `usual`, in `spread`; 0 within."""
        distances = _squared(self.centres, self.precision, summaries)
        return (np.maximum(distances - self.usual, 0.0) / self.spread).sum(axis=1)

    def tempered(self, prediction: Prediction, summaries: Summaries) -> Prediction:
        """Predictions of an evidential head, with exp(-excess) of their evidence; the class that is called stays.

        So evidence is scaled by density in prediction, as Yoon and Kim (2024) do.
        """
        assert prediction.alpha is not None
        alpha = 1.0 + np.exp(-self.excess(summaries))[:, None] * (np.asarray(prediction.alpha, np.float64) - 1.0)
        head = dirichlet(jnp.asarray(alpha, jnp.float32))
        names = ("probs", "expected_entropy", "alpha", "vacuity")
        return replace(prediction, **{name: np.asarray(getattr(head, name)) for name in names})

    def save(self, run: Path) -> None:
        """Into a run directory, whole or not at all: a run that has one is finished. Raises OutputError."""
        partial = run / f"partial-{_FILE}"
        with writing(run, "choose another --workdir"):
            np.savez(partial, **asdict(self))
            partial.replace(run / _FILE)


def fit_density(
    known: Summaries, label: Int[np.ndarray, " bag"], others: Float[np.ndarray, "other moment feature"]
) -> Density:
    """The density of training bags, `known`, that are of these classes, and how far `others`, of validation, are from them.

    The mean's covariance is shrunk as Ledoit and Wolf (2004) have it; of the deviations, which vary together, the first
    components are judged alone. Raises InputError if they are too few.
    """
    check_bags(len(known), len(others))
    classes, at = np.unique(label, return_inverse=True)
    centres = np.stack([known[at == number].mean(axis=0) for number in range(len(classes))], axis=1)
    around = known - centres[:, at].swapaxes(0, 1)
    mean = LedoitWolf(assume_centered=True).fit(around[:, 0]).precision_
    precision = np.stack([mean, _of_components(around[:, 1])])
    low, high = np.quantile(_squared(centres, precision, others), [0.25, 0.75], axis=0)
    return Density(centres, precision, high, np.maximum(high - low, 1e-9))


def check_bags(known: int, others: int) -> None:
    """Raises InputError if there are too few training or validation bags to fit a feature density."""
    if min(known, others) < _FEWEST:
        raise InputError(
            f"config.model.head {BY_DENSITY}: {known} training and {others} validation slides or cases are too few to tell "
            f"what is usual; give {_FEWEST} or more of each, or choose evidential"
        )


def is_fitted(run: Path) -> bool:
    """Whether a run has its density."""
    return (run / _FILE).exists()


def load_density(run: Path) -> Density:
    """A run's density. Raises InputError."""
    try:
        with open(run / _FILE, "rb") as file, np.load(file) as saved:
            return Density(**{part.name: saved[part.name] for part in fields(Density)})
    except FileNotFoundError as error:
        raise InputError(
            f"{run}: has no {_FILE}, which is written at the end of training; give the training command again"
        ) from error
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise InputError(
            f"{run / _FILE}: is damaged ({error}); delete it and give the training command again"
        ) from error


def _of_components(around: Float[np.ndarray, "bag feature"]) -> Float[np.ndarray, "feature feature"]:
    """The inverse of the covariance in the first principal components of standardised features, zero across them."""
    scale = around.std(axis=0)
    varying = scale > 0
    precision = np.zeros((len(scale), len(scale)))
    if varying.any():
        scale = scale[varying]
        components = PCA(_KEPT).fit(around[:, varying] / scale)
        axes = components.components_ / scale
        precision[np.ix_(varying, varying)] = (axes.T / components.explained_variance_) @ axes
    return precision


def _squared(
    centres: Float[np.ndarray, "moment class feature"],
    precision: Float[np.ndarray, "moment feature feature"],
    summaries: Summaries,
) -> Float[np.ndarray, "bag moment"]:
    """Squared distances to the nearest class."""
    offsets = summaries[:, :, None] - centres
    return np.einsum("bmcf,mfg,bmcg->bmc", offsets, precision, offsets, optimize=True).min(axis=2)
