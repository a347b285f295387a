"""Slides that are predicted together get the predictions that they get alone, and every thread ends."""

import threading
import time
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
import pytest

from crcjax.data.cohort import load_cohort
from crcjax.errors import SlideError
from crcjax.predict.engine import Engine, SlideSource, _Memory, _Stopped
from crcjax.predict.predictor import Predictor
from crcjax.slides.jobs.urgent_work import urgent_work
from crcjax.slides.wsi.slide import open_slide


@pytest.fixture(scope="module")
def predictor(run: Path) -> Predictor:
    return Predictor(run)


@pytest.fixture(scope="module")
def sources(painted: Path) -> list[SlideSource]:
    return [SlideSource(Path(str(row.path))) for row in load_cohort(painted / "cohort.csv", None).rows[-5:]]


def _threads() -> set[str]:
    names = {thread.name.split("-")[0].split("_")[0] for thread in threading.enumerate()}
    return names & {"decode", "encoder", "slide"}


@pytest.mark.parametrize(("threads", "memory_bytes"), [(1, None), (4, None), (3, 1)])
def test_neither_other_slides_nor_threads_nor_the_memory_limit_change_a_bit(
    threads: int, memory_bytes: int | None, predictor: Predictor, sources: list[SlideSource], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.svs"
    broken.write_bytes(b"II*\0")
    bags = [[sources[0]], sources[1:3], [SlideSource(broken)], [sources[3], SlideSource(tmp_path / "absent.svs")]]
    with closing(Engine(predictor, threads, memory_bytes).bags(bags)) as encoded:
        for number, slides in encoded:
            assert [slide.source for slide in slides] == bags[number]
            for slide in slides:
                if slide.source not in sources:
                    assert isinstance(slide.error, SlideError)
                    assert slide.encoded is None
                    continue
                assert slide.error is None
                assert slide.encoded is not None
                assert slide.thumbnail is not None
                with open_slide(slide.source.path) as opened:
                    alone = predictor.encode(opened, 1)
                np.testing.assert_array_equal(slide.encoded.features[0], alone.features[0])
                np.testing.assert_array_equal(slide.encoded.mask, alone.mask)
                assert slide.encoded.seconds.keys() == {"plan", "stain", "read", "encode"}
            bags[number] = []
    assert bags == [[]] * 4
    assert not _threads()


def test_a_consumer_that_leaves_early_and_an_error_that_is_not_a_slides_end_all_threads(
    predictor: Predictor, sources: list[SlideSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    bags = [[source] for source in sources]
    encoded = Engine(predictor, 2).bags(bags)
    next(encoded)
    encoded.close()
    assert not _threads()

    def fail(*_args: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(predictor, "begin", fail)
    with pytest.raises(RuntimeError, match="a bug"), closing(Engine(predictor, 2).bags(bags)) as encoded:
        next(encoded)
    assert not _threads()


def test_slides_beyond_the_memory_limit_wait_and_those_of_the_earliest_bag_never_do() -> None:
    memory = _Memory(100, threading.Event())
    memory.reserve(0, 0, 60, 30)
    memory.reserve(0, 1, 60, 30)  # more than the limit, and of the earliest bag
    begun = threading.Event()

    def later() -> None:
        memory.reserve(1, 2, 50, 10)
        begun.set()

    thread = threading.Thread(target=later)
    thread.start()
    memory.free_decoded(0)
    memory.free_decoded(1)
    assert not begun.wait(timeout=0.5)  # 60 bytes of features are held, and 60 are asked for
    memory.release(0)
    assert begun.wait(timeout=30)
    thread.join()


def test_a_slide_that_waits_for_memory_gives_up_when_the_engine_is_closed() -> None:
    stopped = threading.Event()
    memory = _Memory(10, stopped)
    memory.reserve(0, 0, 10, 0)
    stopped.set()
    with pytest.raises(_Stopped):
        memory.reserve(1, 1, 10, 0)


def test_programs_are_compiled_ahead_and_used(
    run: Path, sources: list[SlideSource], caplog: pytest.LogCaptureFixture
) -> None:
    def compiled() -> set[str]:
        messages = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return {
            name
            for name in ("encode", "<lambda>")
            if any("XLA compilation" in text and name in text for text in messages)
        }

    predictor = Predictor(run)
    with open_slide(sources[0].path) as slide, jax.log_compiles(), caplog.at_level("WARNING", "jax"):
        encoding = predictor.begin(slide)
        compiled()
        predictor.compile_ahead(encoding)
        assert compiled() == {"encode", "<lambda>"}
        predictor.compile_ahead(encoding)
        predictor.predict(slide, threads=1)
        assert compiled() == set()


def test_slides_are_begun_after_urgent_work_ended_and_urgent_ones_at_once(
    predictor: Predictor, sources: list[SlideSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    finished: list[int] = []

    def predict() -> None:
        finished.extend(number for number, _ in Engine(predictor, 1).bags([[sources[0]]]))

    with urgent_work():
        time.sleep(0.3)
        routine = threading.Thread(target=predict)
        routine.start()
        assert [number for number, _ in Engine(predictor, 1, is_urgent=True).bags([[sources[1]]])] == [0]
        assert not finished
    routine.join(timeout=120)
    assert finished == [0]
