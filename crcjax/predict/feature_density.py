"""Feature density: how probable a bag is under the training bags, and the scaling of its evidence by that."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float32, Int

from crcjax.errors import InputError, writing
from crcjax.models.heads import BY_DENSITY, dirichlet
from crcjax.models.prediction import Prediction
from crcjax.runs.trained_model import DENSITY_FILE, Arrays, read_density

Summaries = Float[np.ndarray, "bag moment feature"]
# Fewer bags do not determine quartiles.
_FEWEST_BAGS = 8
# The share of the variance of log deviations that the retained principal components explain.
_EXPLAINED_VARIANCE = 0.8


def summary(
    features: Float32[np.ndarray, "region slot feature"], mask: Bool[np.ndarray, "region slot"]
) -> Float[np.ndarray, "moment feature"]:
    """Summarises a bag by two moments: the mean of its instances' features and the logarithm of their standard deviation.

    A different stain shifts the mean. Blur, or tissue that lacks one of its usual components, reduces the deviation. An empty
    bag is far from every class.
    """
    valid = features[mask].astype(np.float64) if mask.any() else np.zeros((1, features.shape[-1]))
    return np.stack([valid.mean(axis=0), np.log(valid.std(axis=0) + 1e-6)])


@dataclass(frozen=True)
class Density:
    """Class-conditional Gaussians of the training bags with a shared covariance, for each moment (Lee et al. 2018).

    Distances are squared Mahalanobis distances. `usual` is the upper quartile and `spread` the interquartile range of the
    validation bags' distances. Training bags would not do: the encoder was fitted on them, so they lie closer together than
    new bags.
    """

    centres: Float[np.ndarray, "moment class feature"]
    precision: Float[np.ndarray, "moment feature feature"]
    usual: Float[np.ndarray, " moment"]
    spread: Float[np.ndarray, " moment"]

    def excess(self, summaries: Summaries) -> Float[np.ndarray, " bag"]:
        """The distance to the nearest class beyond `usual`, in units of `spread`, summed over moments; 0 in-distribution."""
        distances = _squared_distances(self.centres, self.precision, summaries)
        return (np.maximum(distances - self.usual, 0.0) / self.spread).sum(axis=1)

    def scale_evidence(self, prediction: Prediction, summaries: Summaries) -> Prediction:
        """Multiplies the evidence of an evidential head's predictions by exp(-excess); the predicted class does not change.

        Yoon and Kim (2024) also scale evidence by a density of features.
        """
        assert prediction.alpha is not None
        excess = self.excess(summaries)
        alpha = 1.0 + np.exp(-excess)[:, None] * (np.asarray(prediction.alpha, np.float64) - 1.0)
        head = dirichlet(jnp.asarray(alpha, jnp.float32))
        names = ("probs", "expected_entropy", "alpha", "vacuity")
        scaled = replace(prediction, **{name: np.asarray(getattr(head, name)) for name in names})
        return replace(scaled, density_excess=excess.astype(np.float32))

    def save(self, run: Path) -> None:
        """Writes the density into a run directory, whole or not at all: its presence marks a finished run. Raises OutputError."""
        partial = run / f"partial-{DENSITY_FILE}"
        with writing(run, "choose another --workdir"):
            np.savez(partial, **asdict(self))
            partial.replace(run / DENSITY_FILE)


def fit_density(
    training: Summaries, label: Int[np.ndarray, " bag"], validation: Float[np.ndarray, "other moment feature"]
) -> Density:
    """Fits the density of the training bags and the usual distance of validation bags from them.

    The covariance of the means is shrunk (Ledoit and Wolf 2004). Log deviations are highly correlated, so that only their
    first principal components count.

    Args:
      training: summaries of the training bags.
      label: the classes of the training bags.
      validation: summaries of the validation bags.

    Raises:
      InputError: there are too few training or validation bags.
    """
    # Importing scikit-learn takes a second, and only this end of a training uses it.
    from sklearn.covariance import LedoitWolf

    check_bags(len(training), len(validation))
    classes, class_index = np.unique(label, return_inverse=True)
    centres = np.stack([training[class_index == number].mean(axis=0) for number in range(len(classes))], axis=1)
    centred = training - centres[:, class_index].swapaxes(0, 1)
    mean_precision = LedoitWolf(assume_centered=True).fit(centred[:, 0]).precision_
    precision = np.stack([mean_precision, _principal_precision(centred[:, 1])])
    low, high = np.quantile(_squared_distances(centres, precision, validation), [0.25, 0.75], axis=0)
    return Density(centres, precision, high, np.maximum(high - low, 1e-9))


def check_bags(training: int, validation: int) -> None:
    """Raises InputError if there are too few training or validation bags to fit a feature density."""
    if min(training, validation) < _FEWEST_BAGS:
        raise InputError(
            f"config.model.head {BY_DENSITY}: {training} training and {validation} validation slides or cases are too few; give "
            f"{_FEWEST_BAGS} or more of each, or choose evidential"
        )


def is_fitted(run: Path) -> bool:
    """Whether a run directory has a density."""
    return (run / DENSITY_FILE).exists()


def load_density(run: Path) -> Density:
    """Reads the density of a run. Raises InputError if it is missing or damaged."""
    return density_of(read_density(run), run / DENSITY_FILE)


def density_of(arrays: Arrays, file: Path) -> Density:
    """The density with these arrays, which were read from `file`. Raises InputError if one is missing."""
    names = [field.name for field in fields(Density)]
    if missing := set(names) - set(arrays):
        raise InputError(f"{file}: is damaged (has no {', '.join(sorted(missing))}); delete it and make it again")
    return Density(**{name: arrays[name] for name in names})


def _principal_precision(centred: Float[np.ndarray, "bag feature"]) -> Float[np.ndarray, "feature feature"]:
    """The inverse covariance within the first principal components of standardised features; other directions count zero."""
    scale = centred.std(axis=0)
    varying = scale > 0
    from sklearn.decomposition import PCA

    precision = np.zeros((len(scale), len(scale)))
    if varying.any():
        scale = scale[varying]
        components = PCA(_EXPLAINED_VARIANCE).fit(centred[:, varying] / scale)
        axes = components.components_ / scale
        precision[np.ix_(varying, varying)] = (axes.T / components.explained_variance_) @ axes
    return precision


def _squared_distances(
    centres: Float[np.ndarray, "moment class feature"],
    precision: Float[np.ndarray, "moment feature feature"],
    summaries: Summaries,
) -> Float[np.ndarray, "bag moment"]:
    """Squared Mahalanobis distances to the nearest class."""
    offsets = summaries[:, :, None] - centres
    return np.einsum("bmcf,mfg,bmcg->bmc", offsets, precision, offsets, optimize=True).min(axis=2)
