"""The pure model of the circuit: its promises hold for every order of events."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from pointcall_executor.core.breaker import (
    TIME_MASK,
    Circuit,
    Close,
    Connect,
    Effect,
    Event,
    Failed,
    Force,
    Params,
    ProbeReady,
    State,
    Succeeded,
    Word,
    age_us,
    cooldown_us,
    step,
)

SMALL = Params(threshold=3, window_us=100, cooldown_us=50, probe_us=200)


def play(circuit: Circuit, events: list[Event], params: Params = SMALL) -> tuple[Circuit, list[Effect]]:
    said: list[Effect] = []
    for event in events:
        circuit, effects = step(circuit, event, params)
        said += effects
    return circuit, said


def test_the_whole_story() -> None:
    circuit, said = play(
        Circuit(),
        [Failed(10), Failed(20), Failed(30), Connect(31), Connect(85), Connect(86), Failed(90, probe=True),
         Connect(139), Connect(140), Succeeded(150, probe=True), Connect(151)],
    )  # fmt: skip
    assert said == [
        Effect.OPENED, Effect.REFUSED, Effect.PROBE, Effect.REFUSED, Effect.REOPENED, Effect.REFUSED, Effect.PROBE,
        Effect.CLOSED, Effect.PASSED,
    ]  # fmt: skip
    assert circuit.word == Word()


def test_forced_expires_into_closed() -> None:
    _, said = play(Circuit(), [Force(100), Connect(99), Connect(100), Connect(101)])
    assert said == [Effect.REFUSED, Effect.EXPIRED, Effect.PASSED, Effect.PASSED]


def test_open_time_grows_and_stops_growing() -> None:
    params = Params(cooldown_us=10, cooldown_max_us=45)
    assert [cooldown_us(params, streak) for streak in range(6)] == [10, 10, 20, 40, 45, 45]
    assert cooldown_us(Params(cooldown_us=10), 9) == 10


def test_error_rate_mode_forgets_an_old_window() -> None:
    params = Params(threshold=2, percent=50, min_attempts=4, window_us=100)
    start = Circuit(Word(State.CLOSED, 0, 0), 0)
    circuit, said = play(start, [Succeeded(1000), Failed(1001), Failed(1002), Failed(1003)], params)
    assert said == [Effect.OPENED]
    circuit, said = play(start, [Succeeded(1000), Failed(1001), Failed(1002), Failed(1200), Failed(1201)], params)
    assert (said, circuit.attempts, circuit.word.count) == ([], 2, 2)


times = st.integers(0, 2000)
moves = st.one_of(
    st.builds(Connect, times), st.builds(Failed, times, st.booleans()), st.builds(Succeeded, times, st.booleans()),
    st.builds(Force, times), st.builds(ProbeReady, times), st.just(Close()),
)  # fmt: skip
params = st.builds(
    Params, threshold=st.integers(1, 5), window_us=st.integers(1, 300), cooldown_us=st.integers(1, 200),
    cooldown_max_us=st.sampled_from([0, 1000]), probe_us=st.integers(1, 200), probe_budget=st.integers(1, 8),
    percent=st.sampled_from([0, 50]), min_attempts=st.integers(1, 5),
)  # fmt: skip


@given(st.lists(moves, max_size=60), params)
@settings(max_examples=150, deadline=None)
def test_a_word_always_packs_into_itself(events: list[Event], params: Params) -> None:
    circuit, _ = play(Circuit(), events, params)
    assert Word.unpack(circuit.word.pack()) == circuit.word


@given(st.lists(moves, max_size=60), params)
@settings(max_examples=150, deadline=None)
def test_a_connect_gets_exactly_one_answer(events: list[Event], params: Params) -> None:
    circuit = Circuit()
    for event in events:
        circuit, effects = step(circuit, event, params)
        answers = [e for e in effects if e in (Effect.PASSED, Effect.REFUSED, Effect.PROBE)]
        assert len(answers) == isinstance(event, Connect)


@given(st.lists(times, max_size=30), params)
@settings(max_examples=150, deadline=None)
def test_half_open_never_passes_more_than_its_budget(at: list[int], params: Params) -> None:
    circuit = Circuit(Word(State.HALF, 1 << 8 | 1, 1000))
    inside = [1000 + t % params.probe_us for t in at]
    _, said = play(circuit, [Connect(t) for t in inside], params)
    assert said.count(Effect.PROBE) == min(params.probe_budget - 1, len(inside))


@given(st.lists(st.one_of(st.builds(Failed, times), st.builds(Succeeded, times)), max_size=40), params)
@settings(max_examples=150, deadline=None)
def test_only_a_probe_ends_half_open(events: list[Event], params: Params) -> None:
    half = Circuit(Word(State.HALF, 1 << 8 | 1, 5))
    assert play(half, events, params) == (half, [])


@given(st.integers(0, TIME_MASK), st.integers(0, 10**9))
def test_ages_wrap_and_never_run_backwards(then: int, distance: int) -> None:
    assert age_us(then + distance & TIME_MASK, then) == distance
    assert age_us(then, then + distance & TIME_MASK) == 0
