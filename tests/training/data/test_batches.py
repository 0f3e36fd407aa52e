"""Padding and masks against literal arrays; the order of the data on any number of ranks."""

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from training.data import (
    FILLER,
    GlobalBatches,
    collate_groups,
    collate_texts,
    pad_prompts,
    pad_sequences,
    response_labels,
    shard,
)

PAD, EOS = 0, 2


def test_sequences_are_padded_on_the_right_and_eos_is_a_response_token():
    batch = pad_sequences([[5, 6], [8], [9, 9, 9]], [[7, EOS], [EOS], [4]], PAD)
    assert batch.input_ids.tolist() == [[5, 6, 7, EOS], [8, EOS, PAD, PAD], [9, 9, 9, 4]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch.response_mask.tolist() == [
        [False, False, True, True],
        [False, True, False, False],
        [False, False, False, True],
    ]
    assert response_labels(batch).tolist() == [
        [-100, -100, 7, EOS],
        [-100, EOS, -100, -100],
        [-100, -100, -100, 4],
    ]
    assert batch.last_positions.tolist() == [3, 1, 3]
    assert batch.input_ids.dtype == batch.attention_mask.dtype == torch.long
    assert batch.response_mask.dtype == torch.bool
    assert batch.to("meta").response_mask.device.type == "meta"


def test_prompts_are_padded_on_the_left():
    input_ids, attention_mask = pad_prompts([[5, 6, 7], [8]], PAD)
    assert input_ids.tolist() == [[5, 6, 7], [PAD, PAD, 8]]
    assert attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_a_pad_id_inside_the_text_is_a_token():
    batch = pad_sequences([[PAD, 5]], [[PAD, EOS]], PAD)
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1]]
    assert batch.response_mask.tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("rows", [([], []), ([[1]], [])])
def test_nothing_to_pad(rows):
    with pytest.raises(ValueError, match="prompts with"):
        pad_sequences(*rows, PAD)


def test_filler_texts_carry_no_loss():
    dataset = Dataset.from_dict(
        {"prompt_ids": [[5], [6, 6]], "response_ids": [[7, 7, EOS], [8, EOS]]}
    )
    batch = collate_texts(dataset, [1, FILLER], PAD)
    assert batch.input_ids.tolist() == [[6, 6, 8, EOS], [6, 6, 8, EOS]]
    assert batch.response_mask.tolist() == [[False, False, True, True], [False] * 4]
    assert (response_labels(batch)[1] == -100).all()
    only_fillers = collate_texts(dataset, [FILLER, FILLER], PAD)
    assert only_fillers.input_ids.tolist() == [[5, 7, 7, EOS]] * 2
    assert not only_fillers.response_mask.any()
    # Attention still has something to attend to: a row without any key gives NaN.
    assert only_fillers.attention_mask.all()


def test_groups_of_different_sizes():
    dataset = Dataset.from_dict(
        {
            "prompt_ids": [[5], [6, 6]],
            "responses_ids": [[[7, EOS], [8, 8, EOS]], [[1, EOS], [3, EOS], [4, EOS]]],
            "levels": [[0, 1], [0, 0, 1]],
            "unranked": [0, 1],
            "largest_tie": [1, 2],
        }
    )
    batch = collate_groups(dataset, [1, 0, FILLER], PAD)
    assert batch.sequences.input_ids.tolist() == [
        [6, 6, 1, EOS], [6, 6, 3, EOS], [6, 6, 4, EOS], [5, 7, EOS, PAD], [5, 8, 8, EOS],
        [6, 6, 1, EOS], [6, 6, 3, EOS], [6, 6, 4, EOS],
    ]  # fmt: skip
    assert batch.group_index.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert batch.group_sizes.tolist() == [3, 2, 3]
    assert batch.group_mask.tolist() == [True, True, False]
    assert batch.levels.tolist() == [[0, 0, 1], [0, 1, -1], [0, 0, 1]]
    assert (batch.unranked.tolist(), batch.largest_tie.tolist()) == ([1, 0, 1], [2, 1, 2])
    assert batch.sequences.response_mask.sum(dim=1).tolist() == [2, 2, 2, 2, 3, 0, 0, 0]
    assert batch.to("meta").sequences.input_ids.device.type == "meta"


def test_literal_shards():
    rows = list(range(10, 17))
    assert shard(rows, 0, 1, 4, 2) == [[10, 11, 12, 13], [14, 15, 16, FILLER]]
    assert shard(rows, 0, 2, 2, 2) == [[10, 12], [14, 16]]
    assert shard(rows, 1, 2, 2, 2) == [[11, 13], [15, FILLER]]
    assert shard([5], 1, 2, 1, 2) == [[FILLER], [FILLER]]
    with pytest.raises(ValueError, match="9 rows do not fit into a global batch of 8"):
        shard(range(9), 0, 2, 2, 2)
    with pytest.raises(ValueError, match="no rank 2 among 2"):
        shard(rows, 2, 2, 2, 2)


@given(
    world_size=st.integers(1, 5),
    micro=st.integers(1, 4),
    accumulation=st.integers(1, 4),
    data=st.data(),
)
def test_every_row_is_on_one_rank_and_all_ranks_do_the_same_steps(
    world_size, micro, accumulation, data
):
    capacity = world_size * micro * accumulation
    rows = list(range(data.draw(st.integers(0, capacity))))
    shards = [shard(rows, rank, world_size, micro, accumulation) for rank in range(world_size)]
    assert {len(batches) for batches in shards} == {accumulation}
    assert {len(batch) for batches in shards for batch in batches} == {micro}
    seen = [i for batches in shards for batch in batches for i in batch if i != FILLER]
    assert sorted(seen) == rows
    loads = [sum(i != FILLER for batch in batches for i in batch) for batches in shards]
    assert max(loads) - min(loads) <= 1


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 3), st.booleans())
def test_every_epoch_sees_every_row_once(size, global_batch_size, seed, shuffle):
    batches = GlobalBatches(size, global_batch_size, seed, shuffle)
    steps = batches.steps_per_epoch
    assert steps == -(-size // global_batch_size)
    for epoch in range(2):
        parts = [batches.indices(epoch * steps + step) for step in range(steps)]
        assert sorted(row for part in parts for row in part) == list(range(size))
        assert all(len(part) == global_batch_size for part in parts[:-1])
        assert len(parts[-1]) == size - (steps - 1) * global_batch_size


def test_the_order_is_a_function_of_seed_and_step_alone():
    one, two = GlobalBatches(50, 8, seed=3), GlobalBatches(50, 8, seed=3)
    forwards = [one.indices(step) for step in range(21)]
    assert [two.indices(step) for step in reversed(range(21))] == forwards[::-1]
    assert forwards[0] != forwards[7]
    assert GlobalBatches(50, 8, seed=4).indices(0) != forwards[0]
    assert GlobalBatches(5, 2, seed=3, shuffle=False).indices(5) == [4]
    assert GlobalBatches(5, 2, seed=3, shuffle=False).indices(3) == [0, 1]


@pytest.mark.parametrize("arguments", [(0, 1), (1, 0)])
def test_impossible_batches(arguments):
    with pytest.raises(ValueError, match="rows in batches of"):
        GlobalBatches(*arguments, seed=0)
    with pytest.raises(ValueError, match="negative"):
        GlobalBatches(1, 1, seed=0).indices(-1)
