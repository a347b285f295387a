import shutil
from importlib import resources
from pathlib import Path

import pytest
from pydantic import BaseModel

from crcjax.errors import InputError
from crcjax.validation.study.plan import Plan
from crcjax.validation.study.read_plan import read_plan

MINIMAL = """title = "t"
version = "1"
classes = ["a", "b"]
seed = 0
[data]
predictions = "p.csv"
cohort = "../c.csv"
"""
GATE = '[[gates]]\nid = "g{n}"\ntitle = "t"\nestimate = "decisions.accuracy"\nabove = 0.5\n'


def _plan(folder: Path, text: str) -> Path:
    path = folder / "plan.toml"
    path.write_text(text)
    return path


def test_paths_are_relative_to_the_plan_and_flags_to_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    plan = read_plan(_plan(tmp_path, MINIMAL)).plan
    assert plan.data.predictions == tmp_path / "p.csv"
    assert plan.data.cohort == tmp_path / ".." / "c.csv"
    assert plan.data.readers is None
    other = read_plan(_plan(tmp_path, MINIMAL), cohort=Path("etc/other.csv"), predictions=None).plan
    assert (other.data.cohort, other.data.predictions) == (Path("/etc/other.csv"), tmp_path / "p.csv")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("seed = 0", ""), r"plan\.toml: seed is missing; add it"),
        (lambda text: text.replace("seed = 0", "seed = -1"), r"seed must be greater than or equal to 0, got -1"),
        (lambda text: text.replace("seed = 0", 'seed = "x"'), r"seed must be a valid integer.*, got 'x'"),
        (
            lambda text: text.replace("title", "titel"),
            r"has 2 mistakes:\n  title is missing; add it\n  titel is no field",
        ),
        (lambda text: text + 'reader = "r.csv"\n', r"data\.reader is no field of a plan; did you mean 'readers'\?"),
        (
            lambda text: text.replace('["a", "b"]', '["a"]'),
            r"classes has the wrong number of items: list should have at",
        ),
        (lambda text: text.replace('["a", "b"]', '["a", "a"]'), r"classes 'a' occurs 2 times; each must be unique"),
        (
            lambda text: text + GATE.format(n=1) + "below = 1.0\n",
            r"gates\[1\] \(g1\) must have one bound, above or below",
        ),
        (
            lambda text: text + GATE.format(n=1) + 'limit = "ci"\n',
            r"gates\[1\]\.limit must be 'ci_low', 'ci_high', .*got 'ci'",
        ),
        (lambda text: text + 2 * (GATE.format(n=1) + 'role = "primary"\n'), r"gates: id 'g1' occurs 2 times"),
        (
            lambda text: text + "".join(GATE.format(n=n) + 'role = "primary"\n' for n in (1, 2)),
            r"multiplicity\.method must be fixed_sequence or holm for the 2 primary gates g1, g2",
        ),
        (
            lambda text: text + "[prevalence]\na = 0.5\nb = 0.4\n",
            r"prevalence must state a share for each class, and the",
        ),
        (
            lambda text: text + "[comparison]\nmargin = 0.05\n",
            r"comparison needs data\.comparator; name the comparator's",
        ),
        (
            lambda text: (
                text + '[[survival]]\nid = "os"\ntitle = "t"\ntime = "t"\nevent = "e"\ntime_zero = "z"\nhorizon = 9\n'
                'reference_class = "c"\n'
            ),
            r"survival: reference_class 'c' must be one of the classes a, b",
        ),
        (
            lambda text: (
                text + '[[decisions]]\nclass = "c"\ndecision = "d"\nthresholds = [0.1, 0.2]\nrationale = "r"\n'
            ),
            r"decisions 'c' must be one of the classes a, b",
        ),
        (
            lambda text: (
                text + '[[decisions]]\nclass = "a"\ndecision = "d"\nthresholds = [0.2, 0.1]\nrationale = "r"\n'
            ),
            r"decisions \(a\): thresholds must be a lower and a higher one, got \[0\.2, 0\.1\]",
        ),
        (
            lambda text: text + '[[precision]]\nestimate = "sensitivity"\nexpected = 0.8\nhalf_width = 0.1\n',
            r"precision \(sensitivity\): a sensitivity or an AUROC must name its class",
        ),
        (lambda text: text + "[reference]\nreliability = 0.5\n", r"reference\.reliability must be above 1/2, which is"),
        (lambda text: text + "[data_manifest]\n", r"data_manifest is no field of a plan; there are title, "),
        (lambda text: text + "x = ", r"is not TOML \(Invalid value"),
        (lambda text: text.replace("[data]", "data = 1\n[other]"), r"data must be a valid dictionary.*, got 1"),
    ],
)
def test_every_mistake_is_one_line_that_names_the_field(change, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read_plan(_plan(tmp_path, change(MINIMAL)))
    with pytest.raises(InputError, match=r"absent\.toml: cannot be read \(No such file or directory\)"):
        read_plan(tmp_path / "absent.toml")


@pytest.mark.parametrize("name", ["epoc.toml", "simulation/plan.toml"])
def test_the_shipped_plans_are_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    shutil.copy(str(resources.files("crcjax.validation.study").joinpath(name)), path)
    plan = read_plan(path).plan
    assert plan.classes == ["canonical", "immune", "stromal"]
    assert [gate.role for gate in plan.gates[:2]] == ["primary", "co_primary"]


def test_the_reference_design_is_a_hypothesis_in_the_shipped_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    shutil.copy(str(resources.files("crcjax.validation.study").joinpath("epoc.toml")), path)
    plan = read_plan(path).plan
    expected = {hypothesis.estimate: hypothesis.expected for hypothesis in plan.hypotheses}
    assert expected == {
        "decisions.accuracy": 0.892,
        "decisions.f1.canonical": 0.91,
        "decisions.f1.immune": 0.88,
        "decisions.f1.stromal": 0.89,
        "agreement.overall": 0.875,
        "calibration.ece": 0.043,
    }
    # An expected calibration error decides nothing by its size.
    assert not any(gate.estimate == "calibration.ece" for gate in plan.gates)


def _part_of(annotation):
    """The part of the plan that a field holds, alone, optional or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_part_of, getattr(annotation, "__args__", ()))), None)


def test_every_part_of_the_plan_says_what_its_fields_mean() -> None:
    parts, waiting = set(), [Plan]
    while waiting:
        part = waiting.pop()
        parts.add(part)
        held = [_part_of(field.annotation) for field in part.model_fields.values()]
        waiting += [other for other in held if other and other not in parts]
    assert len(parts) > 12
    for part in parts:
        own = [field.alias or name for name, field in part.model_fields.items() if not _part_of(field.annotation)]
        assert [name for name in own if len(own) > 1 and name not in part.__doc__] == [], part
