"""The house: every module in its layer, and every import goes down.

LAYERS is the whole table, from the ground up; blank lines divide the layers. A module may import
modules of lower layers only, so a circle cannot pass. A new module needs a place in the table.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("training", "step1_sft", "step2_reward", "step3_rlhf")

LAYERS = """
step1_sft step2_reward step2_reward.calibrate step3_rlhf step3_rlhf.benchmark
step3_rlhf.benchmark.shapes step3_rlhf.benchmark.table step3_rlhf.benchmark.trl_ppo
step3_rlhf.chat step3_rlhf.chat.settings step3_rlhf.classes step3_rlhf.direct
step3_rlhf.evaluation step3_rlhf.evaluation.metrics step3_rlhf.generation step3_rlhf.gpu_check
step3_rlhf.gpu_check.rows step3_rlhf.paper step3_rlhf.paper.grid
step3_rlhf.paper.grid.paper_models step3_rlhf.paper.pages step3_rlhf.paper.people
step3_rlhf.paper.people.boards step3_rlhf.paper.people.data step3_rlhf.paper.people.data.phrasing
step3_rlhf.paper.people.report step3_rlhf.paper.people.report.word_list
step3_rlhf.paper.quickstart step3_rlhf.paper.quickstart.machine
step3_rlhf.paper.quickstart.metrics step3_rlhf.reference step3_rlhf.rewards training
training.data.batches training.data.tally training.deferred training.errors training.launch
training.launch.process training.models training.models.decoding training.models.decoding.cache
training.models.decoding.few_rows training.models.families training.models.families.float32_logits
training.models.families.generation training.models.families.own_head training.models.logprobs
training.preferences training.preferences.davidson_luce training.preferences.plackett_luce
training.runtime training.runtime.averaging training.runtime.disk training.runtime.extensions
training.runtime.json_text training.runtime.random_states training.runtime.weights
training.statistics training.world training.world.topics

step2_reward.calibrate.temperature step2_reward.losses step3_rlhf.benchmark.measure
step3_rlhf.chat.shares step3_rlhf.direct.loss step3_rlhf.paper.people.data.questions
step3_rlhf.paper.people.measure step3_rlhf.ppo training.config training.data.chat_template
training.data.fields training.data.json_lines training.deepspeed_section training.launch.gpus
training.launch.launcher training.launch.lock training.memory training.models.families.noise
training.models.packing training.plotting training.plugins training.preferences.links
training.runtime.ranks training.world.population training.world.prompts

step2_reward.btl_fit step2_reward.calibrate.linked step2_reward.calibration
step3_rlhf.benchmark.floor step3_rlhf.benchmark.scaling step3_rlhf.chat.arguments
step3_rlhf.chat.bars step3_rlhf.gpu_check.measurements step3_rlhf.paper.bars
step3_rlhf.paper.people.alpha step3_rlhf.paper.people.data.records
step3_rlhf.paper.people.reward_model step3_rlhf.paper.quickstart.calibration
step3_rlhf.regularizers.classes step3_rlhf.response_sets step3_rlhf.rewards.calibration
step3_rlhf.rewards.mixture training.data.messages training.data.settings
training.models.hidden_states training.models.pretrained training.runtime.faults
training.runtime.signals training.runtime.tracking training.settings_reference
training.world.base_model

step3_rlhf.evaluation.responses step3_rlhf.paper.grid.launcher step3_rlhf.paper.quickstart.shares
step3_rlhf.regularizers.base training.data.cutting training.data.files training.data.formats
training.data.split training.models.families.score_head training.models.scalar
training.stage_config training.world.files

step3_rlhf.chat.sources step3_rlhf.evaluation.pairs step3_rlhf.gpu_check.stages
step3_rlhf.paper.people.data.convert step3_rlhf.paper.quickstart.findings
step3_rlhf.regularizers.log_linear step3_rlhf.regularizers.none step3_rlhf.regularizers.optimality
step3_rlhf.regularizers.optimum step3_rlhf.regularizers.solvers step3_rlhf.rewards.links
training.data.records training.data.templates training.models.checks training.models.lora
training.models.options training.runtime.engine training.runtime.model_card
training.runtime.resume training.world.__main__

step3_rlhf.paper.people.report.findings step3_rlhf.paper.quickstart.groups
step3_rlhf.paper.quickstart.methods step3_rlhf.regularizers.divergences
step3_rlhf.regularizers.links step3_rlhf.regularizers.truncation training.data.tokens
training.models.partitioned training.runtime.checkpoint

step3_rlhf.paper.people.report.pictures step3_rlhf.paper.people.report.targets
step3_rlhf.paper.quickstart.table1 step3_rlhf.regularizers.f_divergence
step3_rlhf.regularizers.generalized_pl training.data training.models.export training.models.policy

step2_reward.ties step3_rlhf.classes.answer_key step3_rlhf.direct.comparisons
step3_rlhf.paper.quickstart.page step3_rlhf.regularizers.registry training.fitting
training.models.decoding.decoder training.models.families.vocabulary

step3_rlhf.paper.length_figure step3_rlhf.paper.people.report.page step3_rlhf.regularizers
training.dry_run training.models.comparison

step3_rlhf.paper.people.report.files training.dry_run_text training.models.loading

training.cli

step1_sft.config step2_reward.calibrate.settings step2_reward.config step3_rlhf.config
step3_rlhf.paper.analytic_figures step3_rlhf.paper.quickstart.seeds

step1_sft.main step2_reward.main step3_rlhf.direct.config step3_rlhf.evaluation.settings
step3_rlhf.generation.drawing step3_rlhf.loading step3_rlhf.paper.grid.cells step3_rlhf.prompts
step3_rlhf.ptx step3_rlhf.roles

step2_reward.calibrate.__main__ step3_rlhf.benchmark.result step3_rlhf.direct.reference
step3_rlhf.direct.task step3_rlhf.evaluation.held_out step3_rlhf.generation.with_generate
step3_rlhf.gpu_check.decoding step3_rlhf.paper.grid.jobs step3_rlhf.paper.grid.results

step3_rlhf.benchmark.__main__ step3_rlhf.evaluation.resume step3_rlhf.generation.generator
step3_rlhf.generation.streaming step3_rlhf.paper.grid.figures step3_rlhf.paper.grid.run
step3_rlhf.paper.grid.tables

step3_rlhf.evaluation.shared_work step3_rlhf.paper.grid.page step3_rlhf.paper.people.runs
step3_rlhf.rollout

step3_rlhf.chat.speakers step3_rlhf.classes.labels step3_rlhf.experience
step3_rlhf.paper.grid.report step3_rlhf.paper.people.__main__ step3_rlhf.reference.centering
step3_rlhf.reference.cuts step3_rlhf.rewards.answers step3_rlhf.rewards.prompt_centers
step3_rlhf.rewards.readings

step3_rlhf.chat.session step3_rlhf.classes.shares step3_rlhf.iteration_metrics
step3_rlhf.paper.grid.__main__ step3_rlhf.rewards.functions step3_rlhf.rewards.model
step3_rlhf.rewards.server

step3_rlhf.chat.plain step3_rlhf.chat.screen step3_rlhf.rewards.sources

step3_rlhf.chat.__main__ step3_rlhf.checks step3_rlhf.evaluation.scoring step3_rlhf.trainer

step3_rlhf.direct.dry_run step3_rlhf.dry_run step3_rlhf.evaluation.exact
step3_rlhf.evaluation.sampled

step3_rlhf.evaluation.measure step3_rlhf.gpu_check.iteration
step3_rlhf.paper.quickstart.report_json

step3_rlhf.evaluation.card step3_rlhf.evaluation.run step3_rlhf.gpu_check.plan
step3_rlhf.paper.quickstart.__main__

step3_rlhf.direct.main step3_rlhf.evaluation.__main__ step3_rlhf.gpu_check.__main__
step3_rlhf.main

step3_rlhf.gpu_check.waiting
"""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
LAYER = {name: place for place, line in enumerate(LAYERS.split("\n\n")) for name in line.split()}


def imports(source: str, module: str) -> set[str]:
    """Modules of this repository that `source` imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in FILES else str(node.module))
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name in FILES}


def faults(module: str, imported: set[str]) -> list[str]:
    """Imports that the table does not allow."""
    own = module.split(".")[0]
    found = []
    for other in sorted(imported):
        if LAYER[other] >= LAYER[module]:
            found.append(f"{module} imports {other}, which is not in a lower layer")
        if other.split(".")[0] not in ("training", own):
            found.append(f"{module} imports {other}: stages meet on disk, and training knows none")
        if ".paper" in other and ".paper" not in module:
            found.append(f"{module} imports {other}: nothing depends on the reproduction")
    return found


def test_every_module_is_in_the_table_once() -> None:
    named = LAYERS.split()
    assert sorted(named) == sorted(set(named))
    assert set(named) == set(FILES)


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_go_down(module: str) -> None:
    imported = imports(FILES[module].read_text(encoding="utf-8"), module)
    assert not faults(module, imported)


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("training.config", "training.cli"),
        ("training.runtime.engine", "training.runtime.engine"),
        ("training.cli", "step3_rlhf.ppo"),
        ("step3_rlhf.main", "step1_sft.config"),
        ("step3_rlhf.main", "step3_rlhf.paper.analytic_figures"),
        ("step3_rlhf.regularizers.base", "step3_rlhf.regularizers.optimum"),
    ],
)
def test_a_wrong_import_is_found(module: str, imported: str) -> None:
    assert faults(module, {imported})


def test_no_folder_is_crowded() -> None:
    """About a dozen modules: what a newcomer takes in at a glance."""
    folders = {path.parent for path in FILES.values()}
    sizes = {
        folder: sum(path.stem != "__init__" for path in folder.glob("*.py")) for folder in folders
    }
    assert max(sizes.values()) <= 14, sizes
