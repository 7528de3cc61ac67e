"""Choosing by measurement: the fastest, once, kept on disk, never worse than the heuristic for want of time."""
from __future__ import annotations

import json
import time

import pytest
import torch
from int8_compile.int8.kernels.tuning import BUCKETS, Choices, bucket, wall_seconds

SMALL, LARGE = torch.randn(8, 8), torch.randn(700, 700)
CANDIDATES = {"slow": lambda: LARGE @ LARGE, "fast": lambda: SMALL @ SMALL}


def seconds(candidate):
    return wall_seconds(candidate, lambda: None)


def test_the_fastest_is_chosen_and_the_next_process_knows_it(tmp_path):
    path = tmp_path / "sub" / "choices.json"
    assert Choices(path).choose("a", CANDIDATES, seconds) == "fast"
    assert Choices(path).get("a") == "fast" and Choices(path).get("b") is None

    def never(candidate):
        raise AssertionError("measured again")
    assert Choices(path).choose("a", CANDIDATES, never) == "fast"


def test_a_candidate_that_fails_is_out_and_one_that_is_gone_is_measured_anew(tmp_path):
    path = tmp_path / "choices.json"
    path.write_text(json.dumps({"a": "of another version"}))

    def broken():
        raise RuntimeError("no kernel")
    assert Choices(path).choose("a", {"broken": broken, **CANDIDATES}, seconds) == "fast"
    assert Choices(None).choose("a", {"broken": broken}, seconds) == "broken"  # nothing else there: its error is the caller's to see


def test_without_budget_the_heuristic_choice_runs_and_nothing_is_kept(tmp_path):
    choices = Choices(tmp_path / "choices.json", budget=0.0)
    assert choices.choose("a", CANDIDATES, seconds) == "slow" and choices.get("a") is None


def test_a_gain_within_noise_does_not_move_the_choice():
    times = {"heuristic": 1.0, "other": 0.98}
    assert Choices(None).choose("a", {name: lambda name=name: name for name in times}, lambda c: times[c()]) == "heuristic"
    times["other"] = 0.9
    assert Choices(None).choose("a", {name: lambda name=name: name for name in times}, lambda c: times[c()]) == "other"


def test_a_shipped_choice_is_taken_and_a_measured_one_goes_before_it(tmp_path):
    path = tmp_path / "choices.json"
    assert Choices(path, {"a": "slow"}).choose("a", CANDIDATES, seconds) == "slow"
    path.write_text(json.dumps({"a": "fast"}))
    assert Choices(path, {"a": "slow"}).get("a") == "fast"


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": 3}', "\x00"])
def test_a_damaged_file_is_as_good_as_none(tmp_path, content):
    path = tmp_path / "choices.json"
    path.write_text(content)
    assert Choices(path).choose("a", CANDIDATES, seconds) == "fast"
    assert json.loads(path.read_text()) == {"a": "fast"}


def test_a_folder_that_cannot_be_written_changes_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    assert Choices(tmp_path / "file" / "choices.json").choose("a", CANDIDATES, seconds) == "fast"


def test_rows_fall_into_the_next_bucket():
    assert [bucket(m) for m in (1, 16, 17, 4097, 10**6)] == [16, 16, 32, 6144, BUCKETS[-1]]


def test_a_measurement_that_the_budget_cut_off_is_not_kept(tmp_path):
    choices = Choices(tmp_path / "choices.json", budget=0.05)

    def slow(candidate):
        time.sleep(0.06)
        return 1.0
    assert choices.choose("a", {"first": None, "second": None}, slow) == "first"
    assert choices.get("a") is None and not (tmp_path / "choices.json").exists()
