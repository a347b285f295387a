"""Reads an analysis plan; every mistake in it becomes one line that names the field."""

from __future__ import annotations

import difflib
import hashlib
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from crcjax.errors import InputError
from crcjax.validation.study.plan import Data, Plan


@dataclass(frozen=True)
class PlanFile:
    """A plan with the file that it was read from.

    Attributes:
      path: the file.
      text: its content.
      plan: its values; `plan.data` has whole paths.
    """

    path: Path
    text: str
    plan: Plan

    @property
    def sha256(self) -> str:
        """The SHA-256 of the content."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def read_plan(path: Path, **paths: Path | None) -> PlanFile:
    """Reads a plan.

    Args:
      path: the TOML file.
      paths: fields of `data` that replace the plan's, relative to the working directory.

    Raises:
      InputError: the file cannot be read; a line for each mistake.
    """
    try:
        text = path.read_bytes().decode()
        values = tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"{path}: cannot be read ({reason}); give the TOML file of an analysis plan") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: is not TOML ({error}); correct it") from error
    replaced_paths = {name: str(value.absolute()) for name, value in paths.items() if value is not None}
    if replaced_paths and isinstance(values.get("data", {}), dict):
        values["data"] = values.get("data", {}) | replaced_paths
    try:
        plan = Plan.model_validate(values)
    except ValidationError as error:
        raise _input_error(path, [_mistake(details) for details in error.errors()]) from error
    if mistakes := list(_contradictions(plan)):
        raise _input_error(path, mistakes)
    folder = path.absolute().parent
    located = {name: None if value is None else folder / value for name, value in plan.data}
    others = [
        other if other.file is None else other.model_copy(update={"file": folder / other.file})
        for other in plan.reference.others
    ]
    reference = plan.reference.model_copy(update={"others": others})
    return PlanFile(path, text, plan.model_copy(update={"data": Data.model_validate(located), "reference": reference}))


def _input_error(path: Path, mistakes: list[str]) -> InputError:
    if len(mistakes) == 1:
        return InputError(f"{path}: {mistakes[0]}")
    return InputError(f"{path}: has {len(mistakes)} mistakes:\n" + "\n".join(f"  {mistake}" for mistake in mistakes))


def _mistake(details: Any) -> str:
    """One line for a mistake that pydantic reports."""
    place = [str(part) for part in details["loc"]]
    field, kind, value = _dotted(details["loc"]), details["type"], details["input"]
    if kind == "missing":
        return f"{field} is missing; add it"
    if kind == "extra_forbidden":
        known = _fields(details["loc"][:-1])
        near = difflib.get_close_matches(place[-1], known, 1)
        return f"{field} is no field of a plan; " + (
            f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
        )
    message = details["msg"].removeprefix("Input should be ").removeprefix("Value should be ")
    if kind in ("too_short", "too_long"):
        return f"{field} has the wrong number of items: {details['msg'][0].lower()}{details['msg'][1:]}"
    return f"{field} must be {message}, got {value!r}"


def _dotted(place: tuple[str | int, ...]) -> str:
    """A place in the file, with items counted from 1: gates[2].above."""
    parts = [f"[{part + 1}]" if isinstance(part, int) else f".{part}" for part in place]
    return "".join(parts).lstrip(".")


def _fields(place: tuple[str | int, ...]) -> list[str]:
    """The fields of the part of the plan at a place."""
    part: Any = Plan
    for name in place:
        if isinstance(name, str):
            part = _model_of(part.model_fields[name].annotation)
    return [field.alias or name for name, field in part.model_fields.items()]


def _model_of(annotation: Any) -> Any:
    """The part that a field's type holds: the model itself, or that of a list or of an optional one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, (_model_of(argument) for argument in getattr(annotation, "__args__", ()))), None)


def _contradictions(plan: Plan) -> Iterator[str]:
    """Mistakes that no single field shows."""
    for name, ids in (
        ("classes", plan.classes),
        ("gates: id", [gate.id for gate in plan.gates]),
        ("populations: id", [population.id for population in plan.populations]),
        ("survival: id", [outcome.id for outcome in plan.survival]),
        ("decisions: class", [decision.target for decision in plan.decisions]),
        ("precision of", [" ".join(filter(None, (aim.estimate, aim.target))) for aim in plan.precision]),
        ("subgroups: column", plan.subgroups.columns if plan.subgroups else []),
    ):
        for value, count in Counter(ids).items():
            if count > 1:
                yield f"{name} {value!r} occurs {count} times; each must be unique"
    if plan.prevalence and (set(plan.prevalence) != set(plan.classes) or abs(sum(plan.prevalence.values()) - 1) > 1e-6):
        yield "prevalence must state a share for each class, and the shares must sum to 1"
    for number, gate in enumerate(plan.gates, 1):
        if (gate.above is None) == (gate.below is None):
            yield f"gates[{number}] ({gate.id}) must have one bound, above or below"
    for other in plan.reference.others:
        if (other.column is None) == (other.file is None):
            yield f"reference.others ({other.name}) must have one source, column or file"
    stated = [("decisions", decision.target) for decision in plan.decisions]
    stated += [("survival: reference_class", o.reference_class) for o in plan.survival if o.reference_class is not None]
    stated += [("precision", aim.target) for aim in plan.precision if aim.target is not None]
    for name, target in stated:
        if target not in plan.classes:
            yield f"{name} {target!r} must be one of the classes {', '.join(plan.classes)}"
    for decision in plan.decisions:
        if decision.thresholds[0] >= decision.thresholds[1]:
            yield f"decisions ({decision.target}): thresholds must be a lower and a higher one, got {decision.thresholds}"
    for aim in plan.precision:
        if (aim.target is None) != (aim.estimate == "accuracy"):
            yield f"precision ({aim.estimate}): a sensitivity or an AUROC must name its class, and an accuracy has none"
    reliability, chance = plan.reference.reliability, 1 / len(plan.classes)
    if reliability is not None and reliability <= chance:
        yield f"reference.reliability must be above 1/{len(plan.classes)}, which is chance, got {reliability:g}"
    primary = [gate.id for gate in plan.gates if gate.role in ("primary", "co_primary")]
    if len(primary) > 1 and plan.multiplicity.method == "none":
        yield (
            f"multiplicity.method must be fixed_sequence or holm for the {len(primary)} primary gates {', '.join(primary)}; "
            "or make all but one secondary"
        )
    if plan.comparison and plan.data.comparator is None:
        yield "comparison needs data.comparator; name the comparator's predictions, or leave comparison out"
