"""Decision curves: the net benefit of acting on a risk, beside acting on everybody and on nobody (Vickers and Elkin 2006).

A threshold is the risk at which a decision is made; it states how many needless actions one missed patient is worth. Give
thresholds for which clinicians would argue, and name the decision: without one, a net benefit means nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from crcjax.errors import InputError
from crcjax.validation.bootstrap import Resamples, Weights, number_patients
from crcjax.validation.estimate import Estimate
from crcjax.validation.survival import FollowUp


@dataclass(frozen=True)
class DecisionCurve:
    """Net benefits in true positives per patient, for every threshold.

    Attributes:
      threshold: the risks from which a patient is treated.
      net_benefit: of treating patients whose risk is at least the threshold.
      treat_all: of treating everybody; treating nobody has a net benefit of 0.
      advantage: of the risk over the better of everybody and nobody.
    """

    threshold: Float[np.ndarray, " threshold"]
    net_benefit: list[Estimate]
    treat_all: list[Estimate]
    advantage: list[Estimate]


def decision_curve(
    event: Bool[np.ndarray, " unit"],
    risk: Float[np.ndarray, " unit"],
    threshold: Float[np.ndarray, " threshold"],
    seed: int,
    cluster: Int[np.ndarray, " unit"] | None = None,
    *,
    replicates: int = 2000,
) -> DecisionCurve:
    """The decision curve of a risk that is known to come true or not, with intervals by bootstrap over patients.

    Args:
      event: whether each unit has what the decision is about, such as one class.
      risk: its probability.
      threshold: between 0 and 1.
      seed: the seed of the bootstrap.
      cluster: the patient of each unit; None if each unit is a patient of its own.
      replicates: the number of resamples.

    Raises:
      InputError: a threshold or a risk is not a probability.
    """
    _check(risk, threshold)
    resamples = Resamples.sample(number_patients(cluster, event, risk), seed, replicates)
    is_treated = risk[:, None] >= threshold
    true, false = event[:, None] & is_treated, ~event[:, None] & is_treated
    totals = resamples.totals(np.column_stack([np.ones(len(event)), event, true, false]))
    events, count = totals[1] / totals[0], len(threshold)
    true_share, false_share = totals[2 : 2 + count] / totals[0], totals[2 + count :] / totals[0]
    return _curve(resamples, threshold, true_share, false_share, events)


def survival_decision_curve(
    follow_up: FollowUp,
    risk: Float[np.ndarray, " patient"],
    threshold: Float[np.ndarray, " threshold"],
    horizon: float,
    seed: int,
    *,
    replicates: int = 2000,
) -> DecisionCurve:
    """The decision curve of a risk of an event by `horizon`, where some patients are censored (Vickers et al. 2008).

    The share with an event, among patients at or above a threshold, is one minus their Kaplan-Meier curve at the horizon.

    Args:
      follow_up: the times, in the unit of the horizon.
      risk: the predicted probability of an event by the horizon.
      threshold: between 0 and 1.
      horizon: the time that the risk is about.
      seed: the seed of the bootstrap.
      replicates: the number of resamples.

    Raises:
      InputError: a threshold or a risk is not a probability, or the horizon is not above 0.
    """
    _check(risk, threshold)
    if not horizon > 0:
        raise InputError(f"the horizon must be above 0, got {horizon}")
    resamples = Resamples.sample(number_patients(None, follow_up.time, follow_up.is_event, risk), seed, replicates)
    # By time; events come before censoring at the same time.
    order = np.lexsort((~follow_up.is_event, follow_up.time))
    time, is_event = follow_up.time[order], follow_up.is_event[order]
    ends, reaches, patient = is_event & (time <= horizon), time >= horizon, resamples.patient[order]

    def shares(is_treated: Bool[np.ndarray, " patient"]) -> Float[np.ndarray, "share column"]:
        """The shares of patients who are treated, and of those who are and have an event by the horizon."""

        def statistic(weights: Weights) -> Float[np.ndarray, "share replicate"]:
            weight = weights[patient] * is_treated[order][:, None]
            at_risk = weight[::-1].cumsum(axis=0)[::-1]
            # One patient at a time gives the product-limit curve, also for simultaneous events.
            leaving = np.where(weight > 0, weight / at_risk, 0.0)[ends]
            survival = np.prod(1 - leaving, axis=0)
            treated = at_risk[0] / weights.sum(axis=0)
            is_known = (weight[reaches].sum(axis=0) > 0) | (survival < 1e-12) | (treated == 0)
            return np.stack([treated, np.where(is_known, treated * (1 - survival), np.nan)])

        return resamples.evaluate(statistic)

    treated = [shares(risk >= level) for level in threshold]
    events = shares(np.ones(len(risk), bool))[1]
    true_share = np.stack([share[1] for share in treated])
    return _curve(resamples, threshold, true_share, np.stack([share[0] for share in treated]) - true_share, events)


def _check(risk: np.ndarray, threshold: np.ndarray) -> None:
    if not ((threshold > 0) & (threshold < 1)).all():
        raise InputError(f"thresholds must be between 0 and 1, got {threshold.tolist()}")
    if not ((risk >= 0) & (risk <= 1)).all():
        raise InputError("risks must be probabilities from 0 to 1; a score of another scale has no decision curve")


def _curve(
    resamples: Resamples,
    threshold: np.ndarray,
    true_share: Float[np.ndarray, "threshold column"],
    false_share: Float[np.ndarray, "threshold column"],
    events: Float[np.ndarray, " column"],
) -> DecisionCurve:
    odds = (threshold / (1 - threshold))[:, None]
    of_risk, of_all = true_share - odds * false_share, events - odds * (1 - events)
    advantage = of_risk - np.maximum(of_all, 0)
    of_risk, of_all, advantage = (
        [resamples.estimate(values) for values in rows] for rows in (of_risk, of_all, advantage)
    )
    return DecisionCurve(threshold, of_risk, of_all, advantage)
