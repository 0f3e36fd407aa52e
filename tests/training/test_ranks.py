"""What the processes tell one another; of one process here, of two in test_sharding.py."""

import pytest
import torch

from training import ranks

pytestmark = pytest.mark.usefixtures("process_group")


def test_sums_and_lists_of_one_rank() -> None:
    assert ranks.world_size() == 1
    assert ranks.sum_over_ranks(torch.tensor([1, 2])).tolist() == [1.0, 2.0]
    assert ranks.sum_over_ranks(torch.tensor([1, 2])).dtype == torch.float64
    assert ranks.gather_objects(["a", 1]) == ["a", 1]
    with ranks.rank_zero_first():
        pass
