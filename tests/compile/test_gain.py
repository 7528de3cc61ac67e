"""How long steps take, by what ran them, and what is said of it."""
from __future__ import annotations

import time

import pytest
import torch
from int8_compile.compile.gain import BESIDE, COMPILED, EAGER, MOST_KEPT, MOST_SIZES, WITHOUT, CallTimes, Gain, number

CPU = torch.device("cpu")


def timed(times: CallTimes, kind: str, seconds: float, size: str = "64x64") -> None:
    begun = times.begin(CPU)
    times.end(begun - seconds, size, kind)


def test_a_gain_is_known_once_both_are_and_the_last_count_but_for_what_was_disturbed():
    times = CallTimes()
    for seconds in (9.0,) * MOST_KEPT + (1.0, 1.5, 2.0, 2.0, 3.0, 30.0):
        timed(times, EAGER, seconds)
    assert times.gain("64x64") is None and times.count("64x64", EAGER) == MOST_KEPT
    for seconds in (2.0,) * (MOST_KEPT - 6):
        timed(times, EAGER, seconds)
    timed(times, COMPILED, 1.0)
    assert times.gain("64x64").ratio == pytest.approx(2.0, rel=1e-3)
    timed(times, WITHOUT, 4.0)
    assert times.gain("64x64").ratio == pytest.approx(4.0, rel=1e-3)
    assert times.gain("128x128") is None


def test_compiled_calls_are_those_that_came_next_to_the_others():
    """A machine that is slower an hour later says nothing of the compile."""
    times = CallTimes()
    for kind, seconds in [(EAGER, 2.0)] * MOST_KEPT + [(COMPILED, 5.0)] * (MOST_KEPT // 3) + [(COMPILED, 1.0)] * MOST_KEPT + [
            (COMPILED, 9.0)] * 99:
        timed(times, kind, seconds)
    assert times.gain("64x64").ratio == pytest.approx(2.0, rel=1e-3) and times.count("64x64", COMPILED) == MOST_KEPT
    times.of_weights("another LoRA")
    for kind in (EAGER, COMPILED):
        timed(times, kind, 3.0)
    assert times.gain("64x64").ratio == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("busy", [2.0, 0.5])
def test_the_model_as_it_came_is_compared_in_the_minutes_of_the_others(busy):
    """Uncompiled calls of both times tell what a machine's other work has changed. With other weights they do not."""
    times = CallTimes()
    for kind, seconds in ((WITHOUT, 4.0 * busy), (BESIDE, 3.0 * busy)):
        timed(times, kind, seconds)
    times.of_weights(1)
    for kind, seconds in ((COMPILED, 2.0), (EAGER, 3.0)):
        timed(times, kind, seconds)
    assert times.without("64x64") == pytest.approx(4.0, rel=1e-3) and times.gain("64x64").ratio == pytest.approx(2.0, rel=1e-3)
    times.of_weights(2)
    timed(times, EAGER, 5.0)
    assert times.without("64x64") == pytest.approx(4.0 * busy, rel=1e-3)


def test_a_call_that_compiled_something_says_nothing():
    times = CallTimes()
    timed(times, "", 9.0)
    assert not any(times.count("64x64", kind) for kind in (WITHOUT, EAGER, COMPILED))


def test_other_weights_begin_anew_but_for_the_model_as_it_came():
    times = CallTimes()
    times.of_weights(1)
    for kind in (WITHOUT, EAGER, COMPILED):
        timed(times, kind, 1.0)
    times.of_weights(1)
    assert times.count("64x64", EAGER) == 1
    times.of_weights(2)
    assert [times.count("64x64", kind) for kind in (WITHOUT, EAGER, COMPILED)] == [1, 0, 0]


def test_only_the_last_sizes_are_kept():
    times = CallTimes()
    for index in range(MOST_SIZES + 3):
        timed(times, EAGER, 1.0, str(index))
    assert [index for index in range(MOST_SIZES + 3) if times.count(str(index), EAGER)] == list(range(3, MOST_SIZES + 3))


def test_a_call_is_timed_as_long_as_it_takes():
    times = CallTimes()
    begun = times.begin(CPU)
    time.sleep(0.05)
    times.end(begun, "s", EAGER)
    assert 0.05 <= times.seconds("s", EAGER) < 0.5


@pytest.mark.parametrize(("gain", "text", "slower"), [
    (Gain("s", 3.1, 2.18, (3, 3)), "1.42x: 3.10 -> 2.18 s a step", False),
    (Gain("s", 1.0, 1.25, (3, 3)), "0.80x: 1.00 -> 1.25 s a step (slower than without: bypass this node)", True),
    (Gain("s", 0.0131, 0.0132, (2, 3)), "0.99x: 0.0131 -> 0.0132 s a step", False),
    (Gain("s", 0.2, 0.1, (1, 1)), "2.00x: 0.200 -> 0.100 s a step, of one step each", False),
])
def test_a_gain_in_words(gain, text, slower):
    assert gain.text() == text and gain.is_slower == slower


@pytest.mark.parametrize(("seconds", "text"), [
    (1.0, "1.00"), (0.6932, "0.693"), (12.34, "12.3"), (100.2, "100"), (999.9, "1000"), (1234.5, "1234"), (0.00012, "0.000120"),
    (0.00002, "0.00002"),
])
def test_three_digits_whatever_the_number(seconds, text):
    assert number(seconds) == text


def test_one_step_of_each_is_no_reason_to_call_it_slower():
    assert not Gain("s", 1.0, 1.25, (1, 3)).is_slower
