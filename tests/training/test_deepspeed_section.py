"""DeepSpeed's section of a config: its own keys, and none that the stage's fields own."""

from pathlib import Path

import pytest

from training.deepspeed_section import DEEPSPEED_KEYS, STAGE_OWNED_KEYS, deepspeed_faults


@pytest.mark.parametrize("key", sorted(STAGE_OWNED_KEYS))
def test_deepspeed_may_not_repeat_a_stage_field(key: str) -> None:
    (fault,) = deepspeed_faults({key: 1})
    assert fault.startswith(f"{key}: set by the stage's own ")
    assert fault.endswith("; remove it here")


def test_a_misspelt_deepspeed_key_is_a_fault() -> None:
    assert deepspeed_faults({"zero_optimzation": {"stage": 2}}) == [
        "zero_optimzation: unknown key; did you mean 'zero_optimization'?"
    ]


def test_faults_inside_zero_optimization() -> None:
    (misspelt,) = deepspeed_faults({"zero_optimization": {"stagee": 2}})
    assert misspelt.startswith("zero_optimization.stagee: ")
    assert misspelt.endswith("; did you mean 'stage'?")
    (impossible,) = deepspeed_faults({"zero_optimization": {"stage": 7}})
    assert impossible.startswith("zero_optimization.stage: ")
    (not_an_object,) = deepspeed_faults({"zero_optimization": 2})
    assert not_an_object == "zero_optimization: an object was expected"
    nested = deepspeed_faults({"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}})
    assert nested
    assert nested[0].startswith("zero_optimization.offload_optimizer.devise: ")


@pytest.mark.parametrize(
    "section",
    [
        {"aio": 5},
        {"flops_profiler": 3},
        {"checkpoint": "x"},
        {"sparse_attention": {}},
        {"communication_data_type": "fp17"},
        {"data_types": {"grad_accum_dtype": "x"}},
        {"comms_logger": {"enabled": "maybe"}},
        {"activation_checkpointing": 7},
        {"timers": 1},
        {"steps_per_print": "x"},
        {"wandb": 5},
    ],
    ids=lambda section: next(iter(section)),
)
def test_what_deepspeed_would_trip_over_later(section: dict[str, object]) -> None:
    sound = {"zero_optimization": {"stage": 2}, "gradient_predivide_factor": 2.0}
    (fault,) = deepspeed_faults(sound | section)
    assert fault.startswith(f"{next(iter(section))}: ")


def test_sound_deepspeed_sections() -> None:
    assert deepspeed_faults({"zero_optimization": {"stage": 2, "offload_optimizer": None}}) == []
    assert deepspeed_faults({"data_types": {"grad_accum_dtype": "fp32"}}) == []
    assert deepspeed_faults({}) == []
    assert deepspeed_faults({"zero_optimization": {"stage": 3, "overlap_comm": False}}) == []
    assert not DEEPSPEED_KEYS & STAGE_OWNED_KEYS.keys()


def test_every_allowed_key_is_one_of_deepspeeds() -> None:
    """The list of keys is ours; DeepSpeed's own source must know each."""
    import deepspeed

    root = Path(deepspeed.__file__).parent
    source = "".join(
        path.read_text()
        for folder in ("runtime", "monitor", "profiling", "compile", "comm")
        for path in (root / folder).rglob("*.py")
    )
    source += (root / "__init__.py").read_text()
    assert {
        key for key in DEEPSPEED_KEYS if f'"{key}"' not in source and key not in source
    } == set()
