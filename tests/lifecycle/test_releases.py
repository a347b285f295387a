"""Which bundle predicts a case, and what a rollback does to requests that wait."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from crcjax.errors import InputError
from crcjax.lifecycle.registry import adopt_policy, roll_back
from crcjax.lifecycle.registry_state import CANARY_KEY, LOG, read_registry
from crcjax.lifecycle.releases import Releases, choose
from crcjax.serve.queue import Priority, Status
from crcjax.serve.release_watch import ReleaseWatch
from crcjax.serve.service import Service, open_service
from crcjax.serve.slide_records import SlideRecord

CASES = [f"A-{number:03}" for number in range(400)]


@pytest.fixture
def open_state(tmp_path: Path) -> Callable[..., Service]:
    """open_state(registry): a service over this test's state folder."""
    return lambda made: open_service(tmp_path / "state", None, {}, models=made.path)


def _slide(case_id: str, content: str) -> SlideRecord:
    return SlideRecord(
        *(content, "leeds", "frost", case_id, "a.svs"),
        path=Path("a.svs"),
        bytes=1000,
        content=content,
        mpp=0.25,
        added_s=0.0,
    )


def _ask(service: Service, case_id: str, content: str):
    return service.predictions.request("frost", [_slide(case_id, content)], Priority.ROUTINE, None)


def _answer(service: Service) -> str:
    """Answers the next job as a worker does, and returns the bundle that it names."""
    lease = service.queue.claim("w")
    assert lease is not None
    bundle_id = Path(lease.payload["bundle"]).name
    service.queue.commit(lease, {"bundle_id": bundle_id, "token": lease.token, "slides": []})
    return bundle_id


def test_a_canary_answers_the_policys_share_of_the_cases_and_always_the_same_ones(
    registry: Callable, write_policy: Callable
) -> None:
    made = registry(3, share=0.25)
    made.promote("2", "canary")
    releases = Releases(made.path)
    first, second = (read_registry(made.path).version(name).bundle_id for name in "12")
    of_canary = {case for case in CASES if releases.choose("leeds", case).bundle_id == second}
    assert 60 <= len(of_canary) <= 140, "100 expected of 400; 60 and 140 are beyond four standard deviations"
    assert of_canary == {case for case in CASES if releases.choose("leeds", case).bundle_id == second}
    assert of_canary != {case for case in CASES if releases.choose("york", case).bundle_id == second}
    # A larger share keeps the cases that there are; another canary has others.
    for name, key in made.keys.items():
        adopt_policy(made.path, write_policy(share=0.5), name, key)
    assert of_canary < {case for case in CASES if releases.choose("leeds", case).bundle_id == second}
    made.promote("3", "canary")
    others = {case for case in CASES if releases.choose("leeds", case).bundle_id != first}
    assert not of_canary <= others
    # Without the key nobody can tell the cases.
    state = read_registry(made.path)
    assert {case for case in CASES if choose(state, b"guess", "leeds", case).bundle_id != first} != others
    assert (made.path / CANARY_KEY).stat().st_mode & 0o077 == 0


def test_a_canary_may_be_for_some_sites_alone(registry: Callable, made, write_policy: Callable) -> None:
    registry(2)
    policy = write_policy(share=1.0)
    policy.write_text(policy.read_text().replace("share = 1.0", 'share = 1.0\nsites = ["york"]'))
    for name, key in made.keys.items():
        adopt_policy(made.path, policy, name, key)
    made.promote("2", "canary")
    releases = Releases(made.path)
    assert {releases.choose("york", case).bundle_id for case in CASES} == {releases.state.aliases["canary"]}
    assert {releases.choose("leeds", case).bundle_id for case in CASES} == {releases.state.aliases["production"]}


def test_a_registry_that_becomes_unreadable_keeps_its_last_state(registry: Callable) -> None:
    made = registry(1)
    releases = Releases(made.path)
    before = releases.choose("leeds", "A-001")
    text = (made.path / LOG).read_text()
    (made.path / LOG).write_text(text.replace("A. Frost", "C. Snow", 1) + text)
    assert releases.choose("leeds", "A-001") == before


def test_a_service_without_a_bundle_in_production_is_refused_at_its_start(made, open_state: Callable) -> None:
    made.add(1, policy=made.policy())
    with pytest.raises(InputError, match="no bundle is in production; promote one"):
        open_state(made)


def test_a_rollback_moves_what_waits_and_its_results_are_of_the_bundle_before(
    registry: Callable, open_state: Callable
) -> None:
    made = registry(2)
    first, second = (version.bundle_id for version in read_registry(made.path).versions)
    made.promote(second, "production")
    service = open_state(made)
    watch = ReleaseWatch(service)
    done = _ask(service, "A", "aaaa")
    assert _answer(service) == second
    waiting, running = _ask(service, "B", "bbbb"), _ask(service, "C", "cccc")
    service.queue.claim("w")
    roll_back(made.path, "production", "A. Frost", "a test")
    watch.look()
    # The result that there is stays and names its bundle; what waited or ran is predicted by the bundle before.
    assert service.predictions.prediction(done.id).bundle_id == second
    for record in (waiting, running):
        assert service.predictions.prediction(record.id).bundle_id == first
        assert service.queue.job(record.job_id).status == Status.CANCELLED
    assert [_answer(service), _answer(service)] == [first, first]
    # Asked once more, the case is predicted again: the cache has no result of this bundle.
    again = _ask(service, "A", "aaaa")
    assert again.job_id != done.job_id
    assert _answer(service) == first


def test_a_case_that_a_broken_bundle_quarantined_is_predicted_after_the_rollback(
    registry: Callable, open_state: Callable
) -> None:
    made = registry(2)
    made.promote("2", "production")
    service = open_state(made)
    watch, record = ReleaseWatch(service), _ask(service, "A", "aaaa")
    for _ in range(3):
        service.queue.abandon(service.queue.claim("w"), "InputError: weights-0.safetensors is changed")
    assert service.queue.job(record.job_id).status == Status.QUARANTINED
    roll_back(made.path, "production", "guard rails", "cases fail")
    watch.look()
    assert _answer(service) == read_registry(made.path).version("1").bundle_id
    assert service.queue.job(service.predictions.prediction(record.id).job_id).status == Status.DONE


def test_a_shadow_predicts_the_same_slides_when_nobody_waits_and_its_results_are_kept_apart(
    registry: Callable, open_state: Callable
) -> None:
    made = registry(2)
    first, second = (version.bundle_id for version in read_registry(made.path).versions)
    made.promote(second, "shadow")
    service = open_state(made)
    watch, record = ReleaseWatch(service), _ask(service, "A", "aaaa")
    watch.look()
    assert service.queue.stats().counts == {Status.QUEUED: 1}, "a case waits: no shadow is queued"
    assert _answer(service) == first
    watch.look()
    assert _answer(service) == second
    [(of, shadow_job)] = service.predictions.shadow_jobs(second)
    assert (of.id, of.bundle_id) == (record.id, first)
    assert service.queue.job(shadow_job).payload["slides"] == service.queue.job(record.job_id).payload["slides"]
    # The user's request still has the result of production, and a withdrawn shadow leaves nothing in the queue.
    assert service.queue.job(service.predictions.prediction(record.id).job_id).result["bundle_id"] == first
    _ask(service, "B", "bbbb")
    _answer(service)
    watch.look()
    roll_back(made.path, "shadow", "A. Frost", "a test")
    watch.look()
    assert Status.QUEUED not in service.queue.stats().counts


def test_a_state_folder_of_the_release_before_still_opens(
    registry: Callable, open_state: Callable, tmp_path: Path
) -> None:
    from crcjax.serve import prediction_records, service
    from crcjax.serve.database import Database

    made = registry(1)
    old = Database(tmp_path / "state" / "state.db", service._MIGRATIONS[:1])
    with old.transaction() as connection:
        connection.execute(
            "INSERT INTO predictions (id, site, owner, case_id, slides, job_id, request_sha256, requested_s)"
            " VALUES ('p', 'leeds', 'frost', 'A', '[]', 'j', 'r', 0)"
        )
    assert open_state(made).predictions.prediction("p").bundle_id == ""
    assert len(prediction_records.MIGRATIONS) == 2


@pytest.mark.slow
def test_under_load_every_result_names_its_bundle_and_a_rollback_takes_two_seconds_at_most(
    campaign: ModuleType, tmp_path: Path
) -> None:
    outcome = campaign.run_campaign(tmp_path, operations=120, seed=1)
    assert outcome.errors == []
    assert outcome.faults == []
    assert len(outcome.answers) == 72
    assert sum(outcome.operations.values()) == 48
    assert outcome.latest_s <= 2.0
