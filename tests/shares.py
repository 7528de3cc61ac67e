"""What runs where not every combination does: of tests with several parameters each value of each, and each test that is marked rotating
every DAYS days, or every n days where it is marked rotating(n). With together=True all of a file, which share a costly set-up, run on one
day."""
from __future__ import annotations

import datetime
import random
import zlib
from collections import defaultdict
from collections.abc import Sequence

DAYS = 14


def share(cases: Sequence[dict[str, str]], seed: str) -> set[int]:
    """Numbers of the cases that are enough for each value of each parameter (each-choice coverage), those first that have most values
    which no chosen one has. cases: {parameter: name of its value} of each."""
    order = list(range(len(cases)))
    random.Random(seed).shuffle(order)
    missing = {value for case in cases for value in case.items()}
    chosen = set()
    for new in range(max(map(len, cases), default=0), 0, -1):
        for number in order:
            if len(found := missing.intersection(cases[number].items())) >= new:
                chosen.add(number)
                missing -= found
    return chosen


def is_turn(number: int, day: datetime.date, days: int = DAYS) -> bool:
    """Whether the test of a number is one of day's: each is in any so many days."""
    return (number + day.toordinal()) % days == 0


def of_day(items: Sequence, day: datetime.date) -> set:
    """Those of pytest's items that run on day. Of what drives a server every combination."""
    markers = {item: marker for item in items if (marker := item.get_closest_marker("rotating"))}
    days = {item: (*marker.args, DAYS)[0] for item, marker in markers.items()}
    numbers = {item: zlib.crc32(item.nodeid.partition("::")[0].encode()) if marker.kwargs.get("together") else number
               for number, (item, marker) in enumerate(markers.items())}
    left_out = {item for item, every in days.items() if not is_turn(numbers[item], day, every)}
    groups = defaultdict(list)
    for item in items:
        if hasattr(item, "callspec") and not item.get_closest_marker("e2e") and days.get(item, 0) < DAYS:
            groups[item.nodeid.partition("[")[0]].append(item)
    for name, group in groups.items():
        cases = [dict(zip(item.callspec.params, map(str, item.callspec._idlist))) for item in group]
        chosen = share(cases, f"{day} {name}")
        left_out.update(item for number, item in enumerate(group) if number not in chosen)
    return set(items) - left_out
