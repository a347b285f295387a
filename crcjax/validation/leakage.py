"""The leakage certificate: what was compared between the cases that a model was made from and those that it is evaluated on.

A check that found something is a leak until someone explains it. A check whose data are absent is `not checked`, never clear.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int, UInt64
from scipy import fft

from crcjax.errors import InputError

Role = Literal["development", "calibration", "evaluation"]
Verdict = Literal["clear", "leak", "not checked"]
ROLES = ("development", "calibration", "evaluation")
# Centred cosine similarity of embeddings, and differing bits of 63, from which two slides count as near-duplicates. Judgements:
# look at the pairs that a certificate names, and at its most similar pair.
SIMILARITY, BITS = 0.98, 6
# If more pairs are that similar, the embeddings do not tell slides apart.
_MOST_ALIKE = 0.01
_EXAMPLES = 5
_ROWS = 1024


@dataclass(frozen=True)
class StudySlide:
    """A slide of the study; what is not known is empty.

    Attributes:
      slide_id, case_id: the scan and the patient.
      role: `development`: trained on or chosen by; `calibration`: temperature, thresholds and conformal sets; `evaluation`.
      block_id: the block or specimen, by an id that scans of the same tissue share.
      sha256: the hash of the file.
      file_name: the name that the model's pipeline saw.
      label: the reference class.
      date: when the slide was scanned or the patient enrolled, as YYYY-MM-DD.
    """

    slide_id: str
    case_id: str
    role: Role
    block_id: str = ""
    sha256: str = ""
    file_name: str = ""
    label: str = ""
    date: str = ""


@dataclass(frozen=True)
class LeakageCheck:
    """One check.

    Attributes:
      name: what was compared.
      verdict: `leak` if anything was found.
      compared: slides that state what the check needs.
      findings: the number of patients, blocks, files, pairs or slides that should not be there.
      examples: the first of them, in words.
      remark: why nothing was checked, or what a reader must know.
    """

    name: str
    verdict: Verdict
    compared: int
    findings: int = 0
    examples: tuple[str, ...] = ()
    remark: str = ""


@dataclass(frozen=True)
class LeakageCertificate:
    """All checks, and the slides and patients of each role."""

    slides: dict[str, int]
    patients: dict[str, int]
    checks: tuple[LeakageCheck, ...]

    @property
    def leaks(self) -> tuple[LeakageCheck, ...]:
        """The checks that found something."""
        return tuple(check for check in self.checks if check.verdict == "leak")

    @property
    def sentence(self) -> str:
        """The result in one sentence."""
        counts = Counter(check.verdict for check in self.checks)
        unchecked = [check.name for check in self.checks if check.verdict == "not checked"]
        rest = f"; not checked: {', '.join(unchecked)}" if unchecked else ""
        if counts["leak"]:
            return f"{counts['leak']} of {len(self.checks)} checks found a leak: {_join(self.leaks)}{rest}"
        return f"{counts['clear']} of {len(self.checks)} checks found no leak{rest}"


def leakage_certificate(
    slides: Sequence[StudySlide],
    *,
    embedding: Float[np.ndarray, "slide feature"] | None = None,
    picture_hash: UInt64[np.ndarray, "slide orientation"] | None = None,
    fitted_on: Mapping[str, Collection[str]] | None = None,
    pretraining: str = "",
    similarity: float = SIMILARITY,
    bits: int = BITS,
) -> LeakageCertificate:
    """Compares the slides of a study across their roles.

    Args:
      slides: all slides, also those that the model was developed on.
      embedding: of every slide, for near-duplicates; NaN where there is none.
      picture_hash: `picture_hashes` of every slide's thumbnail, for near-duplicates.
      fitted_on: the case ids that anything was fitted on, by its name: temperature, threshold, scaler, stain reference.
      pretraining: what is known of the overlap with the encoder's pre-training data; empty if nothing was declared.
      similarity: of embeddings, centred over all slides, from which a pair counts as near-duplicate.
      bits: by which the hashes of near-duplicates differ at most.

    Raises:
      InputError: a role is unknown, or no slide is evaluated.
    """
    unknown = next((slide for slide in slides if slide.role not in ROLES), None)
    if unknown is not None:
        raise InputError(
            f"the role of slide {unknown.slide_id} must be one of {', '.join(ROLES)}, got {unknown.role!r}"
        )
    roles = np.array([slide.role for slide in slides])
    if not (roles == "evaluation").any():
        raise InputError("a leakage certificate needs slides with the role evaluation, got none")
    checks = (
        _shared("patients", slides, "case_id"),
        _shared("slides", slides, "slide_id"),
        _shared("blocks or specimens", slides, "block_id"),
        _repeated_files(slides),
        _alike_embeddings(slides, roles, embedding, similarity),
        _alike_pictures(slides, roles, picture_hash, bits),
        _fitted_on_evaluation(slides, fitted_on),
        _labels_in_names(slides),
        _order_in_time(slides),
        LeakageCheck(
            "pre-training data", "clear" if pretraining else "not checked", 0, remark=pretraining or _UNDECLARED
        ),
    )
    numbers = {role: int((roles == role).sum()) for role in ROLES}
    patients = {role: len({slide.case_id for slide in slides if slide.role == role}) for role in ROLES}
    return LeakageCertificate(numbers, patients, checks)


_UNDECLARED = "nobody declared whether the encoder was pre-trained on slides of the evaluation, such as TCGA's"


def picture_hashes(thumbnail: Float[np.ndarray, "y x"]) -> UInt64[np.ndarray, " orientation"]:
    """The perceptual hashes of a grey thumbnail in its eight orientations: 63 signs of its lowest frequencies.

    A slide that was scanned again, also upside down, differs in a few bits; another one in about half of them.
    """
    # Low frequencies do not depend on the size of the thumbnail. A mirrored picture has the odd ones negated.
    lowest = fft.dctn(thumbnail, norm="ortho")[:8, :8]
    sign = np.where(np.arange(8) % 2, -1.0, 1.0)
    mirrored = [lowest * down[:, None] * across for down in (1 + 0 * sign, sign) for across in (1 + 0 * sign, sign)]
    return np.array([_bits_of(turned) for picture in mirrored for turned in (picture, picture.T)], np.uint64)


def _bits_of(frequencies: Float[np.ndarray, "y x"]) -> int:
    # The first coefficient is the mean brightness, which scanners differ in.
    values = frequencies.ravel()[1:]
    return sum(1 << place for place, above in enumerate((values > np.median(values)).tolist()) if above)


def _shared(name: str, slides: Sequence[StudySlide], field: str) -> LeakageCheck:
    """Values of a field that occur in two roles."""
    roles: dict[str, set[str]] = {}
    for slide in slides:
        if value := getattr(slide, field):
            roles.setdefault(value, set()).add(slide.role)
    compared = sum(bool(getattr(slide, field)) for slide in slides)
    if not compared:
        return LeakageCheck(f"{name} in two roles", "not checked", 0, remark=f"no slide states its {field}")
    both = sorted(value for value, of_value in roles.items() if len(of_value) > 1)
    examples = [f"{value}: {' and '.join(role for role in ROLES if role in roles[value])}" for value in both]
    return _result(f"{name} in two roles", compared, examples, _without(len(slides) - compared, field))


def _repeated_files(slides: Sequence[StudySlide]) -> LeakageCheck:
    """Files with the same bytes under two slide ids, in any roles: in one role they count a slide twice."""
    by_hash: dict[str, dict[str, str]] = {}
    for slide in slides:
        if slide.sha256:
            by_hash.setdefault(slide.sha256, {})[slide.slide_id] = slide.role
    compared = sum(bool(slide.sha256) for slide in slides)
    if not compared:
        return LeakageCheck("identical files", "not checked", 0, remark="no slide states its sha256")
    examples = [
        " = ".join(f"{slide_id} ({role})" for slide_id, role in sorted(same.items()))
        for same in by_hash.values()
        if len(same) > 1
    ]
    return _result("identical files", compared, sorted(examples), _without(len(slides) - compared, "sha256"))


def _alike_embeddings(
    slides: Sequence[StudySlide], roles: np.ndarray, embedding: np.ndarray | None, similarity: float
) -> LeakageCheck:
    name = "near-duplicates by embedding"
    known = np.zeros(len(slides), bool) if embedding is None else np.isfinite(embedding).all(axis=1)
    if embedding is None or known.sum() < 3:
        return LeakageCheck(name, "not checked", int(known.sum()), remark="fewer than three slides have an embedding")
    centred = embedding[known] - embedding[known].mean(axis=0)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    unit, place = centred / np.where(length > 0, length, 1), np.flatnonzero(known)
    pairs, total, alike, nearest = [], 0, 0, -1.0
    for rows in _chunks(len(unit)):
        cosine = unit[rows] @ unit.T
        is_pair = _across_patients(slides, roles, place[rows], place)
        total += int(is_pair.sum())
        nearest = max(nearest, float(cosine[is_pair].max(initial=-1)))
        first, second = np.nonzero(is_pair & (cosine >= similarity))
        alike += len(first)
        order = np.argsort(-cosine[first, second])[:_EXAMPLES]
        pairs += [
            (float(cosine[i, j]), int(place[rows][i]), int(place[j]))
            for i, j in zip(first[order], second[order], strict=True)
        ]
    remark = f"the most similar pair has {nearest:.4f}; near-duplicates from {similarity:g}"
    if alike > max(1, _MOST_ALIKE * total) and total > 100:
        remark = f"{alike} of {total} pairs reach {similarity:g}: the embeddings do not tell slides apart"
        return LeakageCheck(name, "not checked", int(known.sum()), remark=remark)
    pairs.sort(reverse=True)
    examples = tuple(f"{_pair(slides, i, j)}: {cosine:.4f}" for cosine, i, j in pairs[:_EXAMPLES])
    return LeakageCheck(name, "leak" if alike else "clear", int(known.sum()), alike, examples, remark)


def _alike_pictures(
    slides: Sequence[StudySlide], roles: np.ndarray, hashes: np.ndarray | None, bits: int
) -> LeakageCheck:
    name = "near-duplicates by thumbnail"
    if hashes is None:
        return LeakageCheck(name, "not checked", 0, remark="no thumbnails were given")
    everyone, examples, nearest = np.arange(len(slides)), [], 64
    for rows in _chunks(len(slides)):
        # One slide's first orientation against every orientation of the other.
        distance = np.bitwise_count(hashes[rows, 0][:, None, None] ^ hashes[None]).min(axis=2)
        is_pair = _across_patients(slides, roles, everyone[rows], everyone)
        nearest = min(nearest, int(distance[is_pair].min(initial=64)))
        first, second = np.nonzero(is_pair & (distance <= bits))
        examples += [
            f"{_pair(slides, rows.start + int(i), int(j))}: {distance[i, j]} of 63 bits"
            for i, j in zip(first, second, strict=True)
        ]
    remark = f"the most similar pair differs in {nearest} of 63 bits; near-duplicates up to {bits}"
    return _result(name, len(slides), examples, remark)


def _across_patients(
    slides: Sequence[StudySlide], roles: np.ndarray, first: Int[np.ndarray, " row"], second: Int[np.ndarray, " column"]
) -> np.ndarray:
    """Pairs, each once, of different patients of whom one or both are evaluated: across roles, or one patient under two ids."""
    case = np.array([slide.case_id for slide in slides])
    evaluated = roles == "evaluation"
    return (
        (first[:, None] < second)
        & (case[first][:, None] != case[second])
        & (evaluated[first][:, None] | evaluated[second])
    )


def _fitted_on_evaluation(
    slides: Sequence[StudySlide], fitted_on: Mapping[str, Collection[str]] | None
) -> LeakageCheck:
    name = "fitted on evaluation cases"
    if not fitted_on:
        return LeakageCheck(name, "not checked", 0, remark="nothing states the cases that it was fitted on")
    evaluated = {slide.case_id for slide in slides if slide.role == "evaluation"}
    examples = [f"{what}: {case}" for what, cases in fitted_on.items() for case in sorted(set(cases) & evaluated)]
    return _result(name, len(set().union(*fitted_on.values())), examples, f"fitted: {', '.join(fitted_on)}")


def _labels_in_names(slides: Sequence[StudySlide]) -> LeakageCheck:
    """Names of slides and files that contain the slide's own class, which a pipeline could read."""
    name = "label in a name"
    labelled = [slide for slide in slides if slide.label]
    if not labelled:
        return LeakageCheck(name, "not checked", 0, remark="no slide states its label")
    # The name of a site or project that contains a class occurs with every class alike and tells nothing.
    classes = {slide.label.casefold() for slide in labelled}
    labelled_names = [(slide, (slide.slide_id + " " + slide.file_name).casefold()) for slide in labelled]
    of_class = {
        label: [label in text for slide, text in labelled_names if slide.label.casefold() == label] for label in classes
    }
    others = {
        label: [label in text for slide, text in labelled_names if slide.label.casefold() != label] for label in classes
    }
    telling = {
        label
        for label in classes
        if len(label) > 1 and np.mean(of_class[label]) > (np.mean(others[label]) if others[label] else 0.0)
    }
    examples = [
        f"{slide.slide_id}: {slide.label}"
        for slide, text in labelled_names
        if (label := slide.label.casefold()) in telling and label in text
    ]
    return _result(name, len(labelled), examples, "")


def _order_in_time(slides: Sequence[StudySlide]) -> LeakageCheck:
    name = "evaluation before development"
    dated = [slide for slide in slides if slide.date]
    latest = max((slide.date for slide in dated if slide.role == "development"), default="")
    evaluated = [slide for slide in dated if slide.role == "evaluation"]
    if not latest or not evaluated:
        return LeakageCheck(name, "not checked", len(dated), remark="development or evaluation states no dates")
    examples = [f"{slide.slide_id}: {slide.date}" for slide in evaluated if slide.date <= latest]
    return _result(name, len(dated), examples, f"the last slide of the development is of {latest}")


def _result(name: str, compared: int, examples: Sequence[str], remark: str) -> LeakageCheck:
    verdict: Verdict = "leak" if examples else "clear"
    return LeakageCheck(name, verdict, compared, len(examples), tuple(examples[:_EXAMPLES]), remark)


def _without(count: int, field: str) -> str:
    return f"{count} slides do not state their {field}" if count else ""


def _pair(slides: Sequence[StudySlide], first: int, second: int) -> str:
    return " and ".join(f"{slides[place].slide_id} ({slides[place].role})" for place in (first, second))


def _chunks(count: int) -> Iterator[slice]:
    return (slice(start, min(start + _ROWS, count)) for start in range(0, count, _ROWS))


def _join(checks: Sequence[LeakageCheck]) -> str:
    return ", ".join(f"{check.name} ({check.findings})" for check in checks)
