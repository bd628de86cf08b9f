"""Work in several processes: results in order, memory bounded, and a lost worker is reported."""

import pytest

from compactgpt.common.errors import BadData, Busy
from compactgpt.common.workers import ordered_map
from tests.support.worker_functions import square


def test_results_come_in_order_and_tasks_are_taken_as_they_are_needed():
    taken = []

    def tasks():
        for number in range(12):
            taken.append(number)
            yield number

    results = ordered_map(square, tasks(), 2)
    assert next(results) == 0
    assert len(taken) <= 4
    assert list(results) == [number * number for number in range(1, 12)]


def test_a_workers_error_and_a_workers_death_are_reported():
    with pytest.raises(BadData, match="thirteen is refused"):
        list(ordered_map(square, [1, 13, 2], 2))
    with pytest.raises(Busy, match=r"a worker process was killed.*runtime\.num_workers"):
        list(ordered_map(square, [1, 99, 2], 2))
