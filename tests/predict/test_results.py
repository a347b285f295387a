"""A prediction that was stopped goes on where it was, and files in the folder never contradict the table."""

import csv
import errno
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from crcjax.data.cohort import load_cohort
from crcjax.errors import InputError, OutputError
from crcjax.predict.predict_slides import PredictJob, predict_slides
from crcjax.predict.predict_store import predict_stored
from crcjax.predict.predictor import Predictor
from crcjax.predict.results import PendingBag, Results
from crcjax.validation.predictions_table import PredictionRow, write_predictions


class Killed(Exception):
    """In place of a signal, after some rows."""


def _killer(rows: int):
    written: list[PredictionRow] = []

    def on_row(row: PredictionRow) -> None:
        written.append(row)
        if len(written) == rows:
            raise Killed

    return on_row


def _table(out: Path) -> list[str]:
    """The lines without the seconds, which differ from run to run."""
    lines = [line.split(",") for line in (out / "predictions.csv").read_text().splitlines()]
    kept = [index for index, name in enumerate(lines[0]) if not name.startswith("seconds_")]
    return [",".join(line[index] for index in kept) for line in lines]


def _files(out: Path) -> set[str]:
    return {path.stem for folder in ("attention", "heatmaps") for path in (out / folder).iterdir()}


@pytest.fixture(scope="module")
def predictor(run: Path) -> Predictor:
    return Predictor(run)


@pytest.fixture
def jobs(painted: Path, tmp_path: Path) -> list[PredictJob]:
    rows = load_cohort(painted / "cohort.csv", None).rows[-4:]
    jobs = [PredictJob(row.slide_id, row.case_id, tmp_path / f"{row.slide_id}.svs") for row in rows]
    for row, job in zip(rows, jobs, strict=True):
        shutil.copy(str(row.path), job.path)
    return jobs


@pytest.fixture
def encoded(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the slides that were encoded; their order is that of the threads that open them."""
    names: list[str] = []
    begin = predictor.begin

    def counted(slide):
        names.append(Path(slide.info.path).stem)
        return begin(slide)

    monkeypatch.setattr(predictor, "begin", counted)
    return names


def test_a_killed_prediction_resumes_without_predicting_a_slide_twice(
    predictor: Predictor, jobs: list[PredictJob], encoded: list[str], tmp_path: Path
) -> None:
    whole = predict_slides(predictor, jobs, tmp_path / "whole")
    encoded.clear()
    out = tmp_path / "out"
    with pytest.raises(Killed):
        predict_slides(predictor, jobs, out, on_row=_killer(2))
    encoded.clear()  # slides that had been begun were not finished
    table = out / "predictions.csv"
    table.write_bytes(table.read_bytes() + b"synthetic-00")  # a line that was being written
    shown: list[str] = []
    rows = predict_slides(predictor, jobs, out, on_row=lambda row: shown.append(row.slide_id))
    assert sorted(shown) == [job.slide_id for job in jobs]
    assert sorted(encoded) == sorted(shown[2:])
    assert [row.probs for row in rows] == [row.probs for row in whole]
    assert _table(out) == _table(tmp_path / "whole")
    assert _files(out) == set(shown)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_command_that_is_killed_three_times_loses_no_row_and_writes_none_twice(
    run: Path, painted: Path, tmp_path: Path
) -> None:
    def start(name: str) -> subprocess.Popen:
        arguments = ["predict", "--run", run, "--cohort", painted / "cohort.csv", "--out", tmp_path / name]
        return subprocess.Popen([sys.executable, "-m", "crcjax.cli", *map(str, arguments)])

    table = tmp_path / "killed" / "predictions.csv"
    seconds_of: dict[str, str] = {}
    for rows in (4, 9, 14):
        process = start("killed")
        while not table.exists() or table.read_bytes().count(b"\n") <= rows:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
        content = table.read_text()
        for row in csv.DictReader(content[: content.rfind("\n") + 1].splitlines()):
            assert seconds_of.setdefault(row["slide_id"], row["seconds_total"]) == row["seconds_total"]
    assert start("killed").wait() == start("whole").wait() == 0
    assert _table(tmp_path / "killed") == _table(tmp_path / "whole")
    with open(table, newline="") as file:
        finished = {row["slide_id"]: row["seconds_total"] for row in csv.DictReader(file)}
    assert len(finished) == 21
    # Rows that were on disk at a kill are kept as they are.
    assert len(seconds_of) >= 14
    assert seconds_of.items() <= finished.items()


def test_failed_slides_are_tried_again_and_changed_slides_models_and_files_predicted_anew(
    predictor: Predictor, jobs: list[PredictJob], encoded: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    names = [job.slide_id for job in jobs]
    content = jobs[1].path.read_bytes()
    jobs[1].path.write_bytes(b"")
    assert [row.status for row in predict_slides(predictor, jobs, out)] == ["ok", "not_evaluable", "ok", "ok"]
    jobs[1].path.write_bytes(content)
    encoded.clear()
    assert [row.status for row in predict_slides(predictor, jobs, out)] == ["ok"] * 4
    assert encoded == [names[1]]
    assert [line.split(",")[0] for line in _table(out)[1:]] == names
    # Another content, a lost heatmap, and another µm per px.
    shutil.copy(jobs[3].path, jobs[0].path)
    (out / "heatmaps" / f"{names[1]}.png").unlink()
    changed = [*jobs[:2], replace(jobs[2], mpp=0.9), jobs[3]]
    encoded.clear()
    rows = predict_slides(predictor, changed, out)
    assert sorted(encoded) == names[:3]
    assert rows[0].probs == rows[3].probs
    # A slide that is not asked for leaves no row and no picture; the others keep theirs.
    encoded.clear()
    predict_slides(predictor, changed[1:], out)
    assert encoded == []
    assert _files(out) == set(names[1:])
    assert len(_table(out)) == 4
    # Rows of another model are not kept, and neither are its pictures.
    earlier, predictor.model_id = predictor.model_id, "another"
    try:
        with pytest.raises(Killed):
            predict_slides(predictor, changed[1:], out, on_row=_killer(1))
        (line,) = _table(out)[1:]
        assert _files(out) == {line.split(",")[0]}
    finally:
        predictor.model_id = earlier


def test_shards_predict_every_slide_once_and_the_last_one_writes_the_whole_table(
    predictor: Predictor, jobs: list[PredictJob], encoded: list[str], tmp_path: Path
) -> None:
    names = [job.slide_id for job in jobs]
    predict_slides(predictor, jobs, tmp_path / "whole")
    out = tmp_path / "out"
    encoded.clear()
    starts: list[int] = []
    first = predict_slides(predictor, jobs, out, shard="1/2", on_start=starts.append)
    assert not (out / "predictions.csv").exists()
    assert _files(out) == {row.slide_id for row in first}
    with pytest.raises(Killed):
        predict_slides(predictor, jobs, out, shard="2/2", on_row=_killer(1))
    encoded.clear()
    second = predict_slides(predictor, jobs, out, shard="2/2", on_start=starts.append)
    assert starts == [len(first), len(second)]
    assert sorted(row.slide_id for row in first + second) == names
    assert len(encoded) == len(second) - 1
    assert _table(out) == _table(tmp_path / "whole")
    # A slide that is not asked for any more leaves neither a row nor a picture.
    for number in (1, 2):
        predict_slides(predictor, jobs[1:], out, shard=f"{number}/2")
    assert [line.split(",")[0] for line in _table(out)[1:]] == names[1:]
    assert _files(out) == set(names[1:])
    with pytest.raises(InputError, match="write I/N"):
        predict_slides(predictor, jobs, out, shard="3/2")


def test_a_killed_prediction_of_a_store_resumes(
    run: Path, painted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from crcjax.predict import predict_store

    cohort = load_cohort(painted / "cohort.csv", ("canonical", "immune", "stromal")).split("test")
    whole = predict_stored([run], painted / "store", cohort, out=tmp_path / "whole")
    indices: list[int] = []
    opened: list[str] = []
    predict, open_store = predict_store._predict_stored_bag, predict_store.open_store

    def counted(members, evaluations, index, *others):
        indices.append(index)
        return predict(members, evaluations, index, *others)

    def counted_open(store, slide_id):
        opened.append(slide_id)
        return open_store(store, slide_id)

    monkeypatch.setattr(predict_store, "_predict_stored_bag", counted)
    monkeypatch.setattr(predict_store, "open_store", counted_open)
    out = tmp_path / "out"
    with pytest.raises(Killed):
        predict_stored([run], painted / "store", cohort, out=out, on_row=_killer(4))
    assert opened == [row.slide_id for row in cohort.rows]
    assert len(_table(out)) == 5
    rows = predict_stored([run], painted / "store", cohort, out=out)
    assert indices == list(range(6))
    assert [row.probs for row in rows] == [row.probs for row in whole]
    assert (out / "predictions.csv").read_bytes() == (tmp_path / "whole" / "predictions.csv").read_bytes()


def test_a_read_error_of_a_slide_is_not_reported_as_a_write_error_of_the_folder(tmp_path: Path) -> None:
    row = PredictionRow("a", "a", "ok", model="m", call="x", probs=(0.75, 0.25))
    write_predictions(tmp_path / "predictions.csv", [row], ("x", "y"))
    (tmp_path / "attention").mkdir()
    np.savez(tmp_path / "attention" / "a.npz", made_from="digest", has_heatmap=False)

    def unreadable() -> str:
        raise OSError(errno.EIO, "Input/output error", "a.svs")

    with pytest.raises(OSError, match=r"a\.svs"):
        Results(tmp_path, ("x", "y"), [PendingBag([row], unreadable)]).__enter__()
    with Results(tmp_path, ("x", "y"), [PendingBag([row], lambda: "digest")]) as results:
        assert list(results.rows) == ["a"]
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file: cannot be written"):
        Results(tmp_path / "file", ("x", "y"), [PendingBag([row], unreadable)]).__enter__()
