"""Measurements divided among the ranks."""

from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from step3_rlhf.evaluation.resume import Blocks
from training.runtime import ranks


def over_ranks(
    count: int,
    batch_size: int,
    measure: Callable[[list[int]], list[Any]],
    name: str,
    blocks: Blocks | None = None,
) -> list[Any]:
    """`measure` of 0 … count − 1 in batches, divided over the ranks; all ranks get all results.

    Every rank makes the same calls with the same number of rows, so that collectives inside are
    reached by all; what a rank measures only to keep step is left out. Results are JSON.
    """
    processes, results = ranks.world_size(), []
    bar = tqdm(total=count, desc=name, disable=ranks.rank() != 0, leave=False, mininterval=1.0)
    for first in range(0, count, batch_size * processes):
        done = blocks.get(f"{name}:{first}") if blocks else None
        if done is None:
            size = min(batch_size, count - first)
            start = first + ranks.rank() * size
            end = min(count, first + size * processes)
            rows = [row for row in range(start, start + size) if row < end]
            measured = measure(rows + [0] * (size - len(rows)))
            done = ranks.gather_objects(measured[: len(rows)])
            if blocks:
                blocks.put(f"{name}:{first}", done)
        results += done
        bar.update(len(done))
    bar.close()
    return results
