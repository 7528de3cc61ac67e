"""What runs of large matrices, where not all does."""
from __future__ import annotations

import datetime
import itertools

import pytest
from shares import DAYS, is_turn, of_day, share

MATRIX = [{"kind": f"kind {kind}", "size": str(size), "way": way} for kind, size, way in itertools.product(range(7), range(5), "ab")]


@pytest.mark.parametrize("seed", ["2026-11-27", "2026-11-28"])
def test_each_value_of_each_parameter_runs(seed):
    chosen = [MATRIX[number] for number in share(MATRIX, seed)]
    assert {pair for case in chosen for pair in case.items()} == {pair for case in MATRIX for pair in case.items()}
    assert len(chosen) <= 10 and share(MATRIX, seed) == share(MATRIX, seed)


def test_another_day_has_other_combinations():
    assert set.union(*(share(MATRIX, str(day)) for day in range(60))) == set(range(len(MATRIX)))


def test_cases_with_one_parameter_all_run():
    assert share([{"only": str(number)} for number in range(9)], "any") == set(range(9)) and share([], "any") == set()


@pytest.mark.parametrize("every", [3, DAYS])
def test_what_rotates_runs_once_in_so_many_days(every):
    start = datetime.date(2026, 12, 30)
    days = [start + datetime.timedelta(days=number) for number in range(every)]
    assert all(sum(is_turn(number, day, every) for day in days) == 1 for number in range(20))
    assert all(sum(is_turn(number, day, every) for number in range(3 * every)) == 3 for day in days)


class Item:
    def __init__(self, nodeid, *markers):
        self.nodeid, self.markers = nodeid, {marker.name: marker for marker in markers}

    def get_closest_marker(self, name):
        return self.markers.get(name)


def test_each_runs_as_often_as_its_mark_says():
    items = [Item(f"{name}{number}", *markers) for number in range(9) for name, markers in {
        "daily": [], "third": [pytest.mark.rotating(3).mark], "rare": [pytest.mark.rotating.mark]}.items()]
    start = datetime.date(2026, 12, 30)
    runs = [of_day(items, start + datetime.timedelta(days=number)) for number in range(3 * DAYS)]
    counts = {item.nodeid: sum(item in run for run in runs) for item in items}
    assert all(count == {"daily": 3 * DAYS, "third": DAYS, "rare": 3}[nodeid[:-1]] for nodeid, count in counts.items())


def test_those_of_a_file_that_run_together_run_on_one_day():
    together = pytest.mark.rotating(3, together=True).mark
    items = [Item(f"{file}.py::test_{number}", together) for file in "ab" for number in range(5)]
    start = datetime.date(2026, 12, 30)
    runs = [{item.nodeid for item in of_day(items, start + datetime.timedelta(days=number))} for number in range(3)]
    assert sorted(item for run in runs for item in run) == sorted(item.nodeid for item in items)
    for file in "ab":
        assert sorted(len([item for item in run if item.startswith(file)]) for run in runs) == [0, 0, 5]
