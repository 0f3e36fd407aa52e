"""Compared sets, batches in which each response stands once, and the reference's cache."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn

from step3_rlhf.direct import reference
from step3_rlhf.direct.comparisons import Comparisons, RefLogps, without_ties
from step3_rlhf.direct.config import DirectConfig
from training.config import check_config
from training.data import FILLER
from training.errors import UserError
from training.models.pretrained import Pretrained

A, B, C, D = [7, 2], [8, 9, 2], [5, 2], [4, 4, 4, 2]
PAD = 0


@pytest.fixture
def comparisons() -> Comparisons:
    """Two prompts; for [5, 6] A ≻ B, C ≻ A and A ≻ B ≻ C; for [3] D ≻ A."""
    return Comparisons(
        Dataset.from_dict(
            {
                "prompt_ids": [[5, 6], [5, 6], [3], [5, 6]],
                "responses_ids": [[A, B], [C, A], [D, A], [A, B, C]],
            }
        )
    )


def numbered_logps(comparisons: Comparisons) -> RefLogps:
    """−1, −2, … in the order of the sets, their responses and the tokens."""
    tokens = sum(len(ids) for found in comparisons.sets for ids in found.responses)
    return RefLogps(comparisons, -torch.arange(1.0, tokens + 1))


def test_each_response_of_a_prompt_is_known_once(comparisons: Comparisons) -> None:
    found = [[ids.tolist() for ids in entry.responses] for entry in comparisons.sets]
    assert found == [[A, B, C], [D, A]]
    assert [(row.set, row.ranking) for row in comparisons.rows] == [
        (0, (0, 1)), (0, (2, 0)), (1, (0, 1)), (0, (0, 1, 2)),
    ]  # fmt: skip
    assert comparisons.by_set() == [0, 1, 3, 2]


def test_a_batch_has_each_response_once(comparisons: Comparisons) -> None:
    batch = comparisons.batch([0, 1, FILLER], numbered_logps(comparisons), PAD, whole_sets=False)
    assert batch.sequences.input_ids.tolist() == [
        [5, 6, 7, 2, 0], [5, 6, 8, 9, 2], [5, 6, 5, 2, 0],
    ]  # fmt: skip
    assert batch.ref_logp.tolist() == [
        [0, 0, -1, -2, 0], [0, 0, -3, -4, -5], [0, 0, -6, -7, 0],
    ]  # fmt: skip
    assert batch.ranking[:2].tolist() == [[0, 1], [2, 0]]
    assert batch.is_real.tolist() == [True, True, False]
    assert torch.equal(batch.members, batch.ranking)


def test_a_whole_set_holds_what_the_record_does_not_rank(comparisons: Comparisons) -> None:
    batch = comparisons.batch([0, 2], numbered_logps(comparisons), PAD, whole_sets=True)
    assert batch.members.tolist() == [[0, 1, 2], [3, 4, 0]]
    assert batch.is_member.tolist() == [[True, True, True], [True, True, False]]
    assert batch.ranking.tolist() == [[0, 1], [3, 4]]
    # The same text after another prompt is another response.
    assert batch.ref_logp[4].tolist() == [0, -12, -13, 0, 0]


def test_filler_alone_still_has_a_sequence(comparisons: Comparisons) -> None:
    for whole_sets in (False, True):
        batch = comparisons.batch([FILLER] * 2, numbered_logps(comparisons), PAD, whole_sets)
        assert len(batch.sequences.input_ids) == 1
        assert not batch.is_real.any()


def test_parts_without_a_comparison_between_them_are_counted(comparisons: Comparisons) -> None:
    assert comparisons.divided_sets == 0
    apart = {"prompt_ids": [[5], [5], [6]], "responses_ids": [[A, B], [C, D], [A, B]]}
    assert Comparisons(Dataset.from_dict(apart)).divided_sets == 1
    apart = {name: [*rows, rows[0]] for name, rows in apart.items()}
    apart["responses_ids"][-1] = [B, C]
    assert Comparisons(Dataset.from_dict(apart)).divided_sets == 0


def test_a_wrong_number_of_logps_is_refused(comparisons: Comparisons) -> None:
    with pytest.raises(ValueError, match="3 log-probabilities for 13 tokens"):
        RefLogps(comparisons, torch.zeros(3))


class IdsAsLogps(nn.Module):
    """A policy whose log π of a token is minus its id."""

    def forward(self, ids: Tensor, attention: Tensor, scored: Tensor) -> tuple[Tensor, None]:
        return torch.where(scored, -ids.float(), 0.0), None


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_scores_come_back_in_order(comparisons: Comparisons, batch_size: int) -> None:
    found = reference.score(IdsAsLogps(), comparisons, batch_size, PAD)
    assert (-found).tolist() == [*A, *B, *C, *D, *A]


def test_the_cache_is_read_by_its_own_reference_and_data_alone(
    comparisons: Comparisons,
    stage_settings: Callable[[str], dict[str, Any]],
    tmp_path: Path,
) -> None:
    settings = stage_settings("direct") | {"output_dir": str(tmp_path)}
    config, in_bf16 = (
        check_config(DirectConfig, settings | {"bf16": wanted}, "test:") for wanted in (False, True)
    )
    splits, model = {"train": comparisons}, Pretrained("owner/model")
    wanted = reference.fingerprint(config, model, splits)
    assert reference.read(tmp_path / reference.FILE, wanted) is None
    logps = {"train": numbered_logps(comparisons)}
    reference.keep(logps, config, model, splits)
    found = reference.read(tmp_path / reference.FILE, wanted)
    assert found is not None
    assert torch.equal(found["train"], logps["train"].values)
    fewer = Comparisons(Dataset.from_dict({"prompt_ids": [[5]], "responses_ids": [[A, B]]}))
    for other in (
        reference.fingerprint(config, Pretrained("owner/other"), splits),
        reference.fingerprint(in_bf16, model, splits),
        reference.fingerprint(config, model, {"train": fewer}),
    ):
        with pytest.raises(UserError, match="of another reference, precision or data"):
            reference.read(tmp_path / reference.FILE, other)


def test_ties_are_left_out() -> None:
    """The first of each tie and of those of unknown order stays; a tie alone is no comparison."""
    rows = {
        "prompt_ids": [[5], [5], [6], [6]],
        "responses_ids": [[A, B], [C, A, B], [A, B, C], [A, C]],
        "levels": [[0, 0], [0, 0, 1], [0, 1, 2], [0, 1]],
        "unranked": [0, 0, 2, 0],
        "largest_tie": [2, 2, 1, 1],
    }
    found = without_ties(Dataset.from_dict(rows))
    assert found["responses_ids"][:] == [[C, B], [A, B], [A, C]]
    assert found["prompt_ids"][:] == [[5], [6], [6]]
    untied = Dataset.from_dict({name: values[3:] for name, values in rows.items()})
    assert without_ties(untied) is untied


def test_a_gguf_file_is_known_by_its_content(
    comparisons: Comparisons, stage_settings: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    config = check_config(DirectConfig, stage_settings("direct"), "test:")
    file, found = tmp_path / "model.gguf", []
    for content in (b"one", b"two", b"one"):
        file.write_bytes(content)
        found.append(reference.fingerprint(config, Pretrained(str(file)), {"train": comparisons}))
    assert found[0] == found[2] != found[1]
