"""Which cases of a test with several parameters run where not all do: each value of each parameter, in combinations that change daily."""
from __future__ import annotations

import datetime
import random
from collections import defaultdict
from collections.abc import Sequence


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


def of_today(items: Sequence) -> set:
    """Those of pytest's items that run today. What drives a server runs whole."""
    groups = defaultdict(list)
    for item in items:
        if hasattr(item, "callspec") and not item.get_closest_marker("e2e"):
            groups[item.nodeid.partition("[")[0]].append(item)
    left_out = set()
    for name, group in groups.items():
        cases = [dict(zip(item.callspec.params, map(str, item.callspec._idlist))) for item in group]
        chosen = share(cases, f"{datetime.date.today()} {name}")
        left_out.update(item for number, item in enumerate(group) if number not in chosen)
    return set(items) - left_out
