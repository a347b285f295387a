"""Draws the figures of the report as PNG files; `synthetic` stamps a figure."""

from __future__ import annotations

import io

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from crcjax.validation.calibration_error import reliability_bins


def _png(figure: Figure, synthetic: bool) -> bytes:
    FigureCanvasAgg(figure)
    if synthetic:
        figure.text(0.99, 0.01, "synthetic slides", ha="right", va="bottom", fontsize=7, color="crimson")
    buffer = io.BytesIO()
    # The file states no version and no date, so that the same numbers give the same bytes.
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()


def confusion_figure(confusion: list[list[int]], classes: tuple[str, ...], synthetic: bool) -> bytes:
    """The confusion matrix, coloured by the share of each row."""
    counts = np.array(confusion)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(4.2, 3.8), layout="constrained")
    axis = figure.subplots()
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(counts.shape):
        colour = "white" if shares[row, column] > 0.5 else "black"
        text = f"{counts[row, column]}\n{shares[row, column]:.0%}"
        axis.text(column, row, text, ha="center", va="center", color=colour, fontsize=9)
    axis.set_xticks(range(len(classes)), classes)
    axis.set_yticks(range(len(classes)), classes)
    axis.set_xlabel("predicted")
    axis.set_ylabel("reference")
    return _png(figure, synthetic)


def reliability_figure(label: np.ndarray, probs: np.ndarray, synthetic: bool) -> bytes:
    """Accuracy against confidence in ten bins, with the number of cases in each."""
    confidence, is_correct = probs.max(axis=1), probs.argmax(axis=1) == label
    bins = reliability_bins(confidence, is_correct, seed=0, bins=10)
    figure = Figure(figsize=(4.2, 3.8), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color="grey", lw=1, ls="--")
    axis.plot([b.confidence for b in bins], [b.accuracy.value for b in bins], "o-", color="tab:blue")
    for b in bins:
        axis.annotate(
            f"n={b.cases}", (b.confidence, b.accuracy.value), (4, -10), textcoords="offset points", fontsize=7
        )
    axis.set(xlim=(1 / probs.shape[1] - 0.05, 1.03), ylim=(-0.05, 1.05), xlabel="confidence", ylabel="accuracy")
    return _png(figure, synthetic)


def roc_figure(label: np.ndarray, probs: np.ndarray, classes: tuple[str, ...], synthetic: bool) -> bytes:
    """The ROC curve of every class against the rest."""
    figure = Figure(figsize=(4.2, 3.8), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color="grey", lw=1, ls="--")
    for k, name in enumerate(classes):
        positive, score = label == k, probs[:, k]
        thresholds = np.concatenate([[np.inf], np.unique(score)[::-1]])
        if positive.any() and not positive.all():
            sensitivity = [(score[positive] >= threshold).mean() for threshold in thresholds]
            false_positive_rate = [(score[~positive] >= threshold).mean() for threshold in thresholds]
            axis.plot(false_positive_rate, sensitivity, label=name, drawstyle="steps-post")
    axis.set(xlabel="1 - specificity", ylabel="sensitivity", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    # If all cases are of one class there is no curve, and matplotlib would warn of an empty legend.
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="lower right", fontsize=8, frameon=False)
    return _png(figure, synthetic)
