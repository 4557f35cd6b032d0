"""A watch that says nothing of what changed is noticed; one that is behind, or had nothing to say, is not."""

from hypothesis import given
from hypothesis import strategies as st

from kvasir_operator.cluster.watchdog import Watchdog


def test_a_silent_watch_is_noticed_at_the_second_look() -> None:
    watchdog: Watchdog[str] = Watchdog()
    watchdog.event("a", "1")
    assert watchdog.compare({"a": "1"}) == set()
    assert watchdog.compare({"a": "2"}) == set(), "the event may be on its way"
    assert watchdog.compare({"a": "2"}) == {"a"}


def test_what_was_never_told_of_is_noticed_too() -> None:
    watchdog: Watchdog[str] = Watchdog()
    assert watchdog.compare({"new": "1"}) == set()
    assert watchdog.compare({"new": "5"}) == {"new"}


def test_a_watch_that_lags_behind_fast_changes_is_alive() -> None:
    watchdog: Watchdog[str] = Watchdog()
    for version in range(1, 20):
        watchdog.event("a", str(version))
        assert watchdog.compare({"a": str(version + 3)}) == set()


def test_an_event_that_arrived_between_looks_is_a_sign_of_life_though_it_says_the_same() -> None:
    watchdog: Watchdog[str] = Watchdog()
    watchdog.event("a", "1")
    watchdog.compare({"a": "2"})
    watchdog.event("a", "1")
    assert watchdog.compare({"a": "2"}) == set()


def test_deletions_nobody_told_of_are_no_proof_and_are_forgotten() -> None:
    watchdog: Watchdog[str] = Watchdog()
    watchdog.event("a", "1")
    assert [watchdog.compare({}) for _ in range(3)] == [set()] * 3
    assert watchdog.compare({"a": "9"}) == set(), "created anew: it may still be told of"
    assert watchdog.compare({"a": "9"}) == {"a"}


def test_an_object_that_a_look_was_too_early_for_is_not_forgotten() -> None:
    watchdog: Watchdog[str] = Watchdog()
    watchdog.event("a", "1")  # created after the list was made, told of before it was compared
    assert watchdog.compare({}) == set()
    assert watchdog.compare({"a": "1"}) == set()
    assert watchdog.compare({"a": "1"}) == set()


STEPS = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from(["change", "delete", "deliver", "compare"])), max_size=60
)


@given(STEPS)
def test_a_watch_that_tells_everything_before_two_looks_have_passed_is_never_blamed(
    steps: list[tuple[str, str]],
) -> None:
    watchdog: Watchdog[str] = Watchdog()
    listed: dict[str, str] = {}
    pending: list[tuple[str, str, bool]] = []

    def deliver() -> None:
        for key, found, deleted in pending:
            watchdog.event(key, found, deleted)
        pending.clear()

    for version, (key, step) in enumerate(steps):
        if step == "change":
            listed[key] = str(version)
            pending.append((key, str(version), False))
        elif step == "delete" and key in listed:
            pending.append((key, listed.pop(key), True))
        elif step == "deliver":
            deliver()
        elif step == "compare":
            assert watchdog.compare(dict(listed)) == set()
            deliver()
