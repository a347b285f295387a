from pathlib import Path

import pytest

from crcjax.errors import InputError
from crcjax.validation.study.molecular_calls import read_molecular_calls

CLASSES = ("CMS1", "CMS2", "CMS3", "CMS4")
# write.table of CMScaller's result: the header has no name for the row names.
CMSCALLER = '"prediction"\t"d.CMS1"\t"p.value"\t"FDR"\n"T1"\t"CMS2"\t0.7\t0.001\t0.002\n"T2"\tNA\t0.8\t0.3\t0.4\n'
# write.csv of CMSclassifier's result, which has an empty name there.
CMSCLASSIFIER = (
    '"","RF.CMS1.posteriorProb","RF.nearestCMS","RF.predictedCMS"\n"T1",0.6,"CMS1","CMS1"\n"T2",0.4,"CMS3",NA\n'
)


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (CMSCALLER, {"T1": "CMS2"}),
        (CMSCLASSIFIER, {"T1": "CMS1"}),
        (CMSCLASSIFIER.replace("RF.predictedCMS", "other"), {"T1": "CMS1", "T2": "CMS3"}),
        ("sample,prediction\nT1,CMS4\n", {"T1": "CMS4"}),
    ],
)
def test_tables_are_read_as_r_writes_them(text: str, calls: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "calls.txt"
    path.write_text(text)
    assert read_molecular_calls(path, CLASSES) == calls


def test_other_tables_and_other_classes_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "calls.txt"
    path.write_text("sample,call\nT1,CMS4\n")
    with pytest.raises(
        InputError, match=r"calls\.txt: has none of the columns prediction, .* its columns are sample, call"
    ):
        read_molecular_calls(path, CLASSES)
    path.write_text(CMSCALLER)
    with pytest.raises(
        InputError, match=r"calls\.txt, line 2: prediction must be one of canonical, immune, got 'CMS2'"
    ):
        read_molecular_calls(path, ("canonical", "immune"))
    with pytest.raises(InputError, match=r"none\.txt: cannot be read"):
        read_molecular_calls(tmp_path / "none.txt", CLASSES)


def test_a_study_compares_system_and_reference_with_the_calls_of_a_file(small_trial, tmp_path: Path) -> None:
    from crcjax.validation.study.validator import EPOCValidator

    lines = ["\tprediction", *(f"c{n}\t{'abc'[n % 3] if n else 'NA'}" for n in range(60))]
    (tmp_path / "cms.txt").write_text("\n".join(lines) + "\n")
    plan = small_trial(plan='[reference]\nothers = [{ name = "CMScaller", file = "cms.txt" }]\n')
    estimates = EPOCValidator(plan).run().estimates
    assert (
        estimates["agreement.CMScaller.reference.overall"].value,
        estimates["agreement.CMScaller.reference.overall"].n,
    ) == (1, 59)
    assert estimates["agreement.CMScaller.system.kappa"].n == 59
