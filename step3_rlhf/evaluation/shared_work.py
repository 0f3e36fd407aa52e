"""Divides measurements over the ranks."""

from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from step3_rlhf.evaluation.resume import FinishedBlocks
from training.runtime import ranks


def over_ranks(
    count: int,
    batch_size: int,
    measure: Callable[[list[int]], list[Any]],
    name: str,
    finished: FinishedBlocks | None = None,
) -> list[Any]:
    """Measure rows 0 … count − 1 in batches, divided over the ranks; every rank gets all results.

    All ranks make equally many calls with equally many rows, so that all reach the collectives
    inside. Results of rows that a rank measures only for that purpose are dropped.

    Args:
        batch_size: rows of one call on one rank.
        measure: from row numbers to one result (JSON) each.
        name: of the work, for the progress bar and the finished blocks.
    """
    processes, results = ranks.world_size(), []
    bar = tqdm(total=count, desc=name, disable=ranks.rank() != 0, leave=False, mininterval=1.0)
    for first in range(0, count, batch_size * processes):
        results_of_block = finished.get(f"{name}:{first}") if finished else None
        if results_of_block is None:
            size = min(batch_size, count - first)
            start = first + ranks.rank() * size
            end = min(count, first + size * processes)
            rows = [row for row in range(start, start + size) if row < end]
            measured = measure(rows + [0] * (size - len(rows)))
            results_of_block = ranks.gather_objects(measured[: len(rows)])
            if finished:
                finished.put(f"{name}:{first}", results_of_block)
        results += results_of_block
        bar.update(len(results_of_block))
    bar.close()
    return results
