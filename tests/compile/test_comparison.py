"""Uncompiled calls beside compiled ones: in what order, and what they tell."""
from __future__ import annotations

from collections.abc import Callable

import pytest
from int8_compile.compile.comparison import KEPT, MOST_KEPT, MOST_PARTS, Comparison
from int8_compile.compile.gain import COMPILED, EAGER, Call


class Images:
    """Calls of a model, whose kind a comparison chooses. seconds: of (kind, image, call)."""

    def __init__(self, seconds: Callable[[str, int, int], float]):
        self.comparison = Comparison()
        self._seconds = seconds
        self.image = 0
        self.kinds: list[str] = []

    def sample(self, calls: int, size: str = "64x64", weights: str = "", blocks: Callable[[int], int] = lambda call: 57, lag: bool = False):
        """An image. lag: its seconds are known at its end."""
        late = []
        for index in range(calls):
            is_eager = self.comparison.is_uncompiled_turn(self.image, size, weights)
            self.kinds.append(EAGER if is_eager else COMPILED)
            if not blocks(index):
                continue
            self.comparison.count(self.image, size, weights, self.kinds[-1])
            late.append(Call(self.image, size, weights, self.kinds[-1], blocks(index), self._seconds(self.kinds[-1], self.image, index)))
            if not lag:
                self.comparison.add([late.pop()])
        self.comparison.add(late)
        self.image += 1

    def until_enough(self, calls: int, most: int = 2 * MOST_KEPT + 2, **more) -> float:
        """The ratio then."""
        while not self.comparison.is_enough:
            assert self.image < most
            self.sample(calls, **more)
        return self.comparison.ratio


@pytest.mark.parametrize("calls", range(1, 9))
def test_of_each_two_calls_and_of_the_first_of_each_two_images_one_is_uncompiled(calls):
    images = Images(lambda *_: 1.0)
    for _ in range(40):
        images.sample(calls)
    by_image = [images.kinds[begin:begin + calls] for begin in range(0, 40 * calls, calls)]
    assert by_image[0][0] == COMPILED
    for kinds in by_image:
        assert all(set(kinds[begin:begin + 2]) == {EAGER, COMPILED} for begin in range(0, calls - 1, 2))
    assert all(by_image[even][0] != by_image[even + 1][0] for even in range(0, 40, 2))
    assert images.kinds.count(EAGER) == images.kinds.count(COMPILED)


def test_turns_are_of_each_size_and_weights_and_do_not_grow():
    comparison = Comparison()
    comparison.count(0, "64x64", "", COMPILED)
    turn = comparison.is_uncompiled_turn
    assert turn(0, "64x64", "") and not turn(0, "32x32", "") and not turn(0, "64x64", "a LoRA")
    for number in range(3 * MOST_PARTS):
        comparison.count(0, "64x64", str(number), COMPILED)
        comparison.add([Call(0, "64x64", str(number), EAGER, 57, 1.0)])
    assert len(comparison._turns) <= MOST_PARTS + 1 and len(comparison._parts) <= MOST_PARTS


def test_no_turns_are_uncompiled_for_ever_where_compiled_ones_do_not_count():
    """They are checked, with each new LoRA."""
    comparison, turns = Comparison(), 0
    for image in range(10 * MOST_KEPT):
        if comparison.is_uncompiled_turn(image, "64x64", str(image)):
            comparison.count(image, "64x64", str(image), EAGER)
            turns += 1
    assert turns == MOST_KEPT


@pytest.mark.parametrize(("seconds", "enough"), [(0.01, MOST_KEPT), (0.1, 5), (0.2, KEPT), (9.0, KEPT)])
def test_few_calls_are_enough_where_they_take_long(seconds, enough):
    comparison = Comparison()
    for count in range(1, MOST_KEPT + 1):
        comparison.add([Call(0, "64x64", "", kind, 57, seconds) for kind in (COMPILED, EAGER)])
        assert comparison.is_enough == (count >= enough)


@pytest.mark.parametrize("calls", [2, 3, 4, 5, 7, 20])
@pytest.mark.parametrize("ratio", [0.55, 0.9, 1.1, 1.8])
@pytest.mark.parametrize("scale", [1.0, 0.01])
@pytest.mark.parametrize("cost", [
    lambda image, call: (1.0, 2.0, 0.5)[image % 3],  # of a machine that has other work at times
    lambda image, call: 3.0 if image == 0 else 1.0,
    lambda image, call: 1.5 if call == 0 else 1.0,  # what only a first step does
], ids=["machine", "first image", "first call"])
@pytest.mark.parametrize("lag", [False, True])
def test_what_differs_from_image_to_image_or_from_the_first_call_to_the_next_changes_nothing(calls, ratio, scale, cost, lag):
    images = Images(lambda kind, image, call: scale * cost(image, call) * (ratio if kind == COMPILED else 1.0))
    assert images.until_enough(calls, lag=lag) == pytest.approx(ratio, rel=0.01)


@pytest.mark.parametrize("ratio", [0.7, 1.4])
@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_images_of_two_calls_of_which_one_does_more(ratio, scale):
    """With guidance, or without blocks that guidance skips."""
    images = Images(lambda kind, image, call: scale * (1.0 if call else 0.25) * (ratio if kind == COMPILED else 1.0))
    assert images.until_enough(2) == pytest.approx(ratio, rel=0.01)


@pytest.mark.parametrize("ratio", [0.55, 1.8])
@pytest.mark.parametrize("weights", ["the same", "another LoRA"])
def test_an_image_of_one_call_is_compared_with_the_next(ratio, weights):
    images = Images(lambda kind, image, call: ratio if kind == COMPILED else 1.0)
    while not images.comparison.is_enough:
        images.sample(1, weights=weights if weights == "the same" else str(images.image))
        assert images.image < 2 * MOST_KEPT
    assert images.comparison.ratio == pytest.approx(ratio)


def test_images_of_one_call_say_nothing_beside_longer_ones():
    images = Images(lambda kind, image, call: (5.0 if image % 2 else 1.0) * (0.7 if kind == COMPILED else 1.0))
    while not images.comparison.is_enough:
        images.sample(1)
        images.sample(3)
    assert images.comparison.ratio == pytest.approx(0.7)


@pytest.mark.parametrize("calls", [2, 4, 20])
@pytest.mark.parametrize("left", [0, 1, 40])
def test_calls_that_leave_blocks_out_say_nothing(calls, left):
    """As cache nodes do, of any call."""
    def blocks(call):
        return left if call % 3 == 1 else 57

    def seconds(kind, image, call):
        return 0.001 if blocks(call) == left else 0.5 if kind == COMPILED else 1.0
    assert Images(seconds).until_enough(calls, blocks=blocks) == pytest.approx(0.5)


@pytest.mark.parametrize("before", [1, 2, 3])
def test_one_image_is_enough_whatever_was_before(before):
    """Whose steps were disturbed."""
    images = Images(lambda kind, image, call: (9.0 if image < before and call == 0 else 1.0) * (0.7 if kind == COMPILED else 1.0))
    for _ in range(before):
        images.sample(2)
    images.sample(2 * KEPT)
    assert images.comparison.is_enough and images.comparison.ratio == pytest.approx(0.7)


def test_a_comparison_takes_calls_of_many_sizes_together():
    """One of them, with a call that was disturbed, decides nothing."""
    images = Images(lambda kind, image, call: 2.0 if kind == EAGER else 100.0 if image == 1 else 1.0)
    sizes = iter(range(1000))
    while not images.comparison.is_enough:
        images.sample(2, str(next(sizes)))
    assert images.image >= 2 * KEPT and images.comparison.ratio == pytest.approx(0.5) and images.comparison.eager("3") == ("3", 2.0)
    assert images.comparison.eager("another")[0] == str(images.image - 1) and images.comparison.steps == images.image
    images.comparison.clear()
    assert not images.comparison.is_enough
