"""Schedules of bit-widths, random parts and chains: what the shipped recipes and sweeps say, and tiny runs of them."""

import math
from pathlib import Path

import pytest
import torch
from test_run import make_backbone, make_data
from transformers import AutoConfig, AutoModelForSequenceClassification

from trainers.distillation import DistillationTrainer
from trainers.recipe import Recipe
from trainers.run import run_recipe
from trainers.sweep import load_sweep
from trainers.tasks import TASKS


EXAMPLES = Path(__file__).parents[2] / "examples"
SWEEPS = ("progressive-glue", "progressive-schedules", "random-init", "augmentation")
STEPS_AN_EPOCH = {"mrpc": 115, "rte": 78, "cola": 268, "stsb": 180, "sst2": 2105}  # rows / 32, rounded up


def steps(recipe: Recipe) -> int:
    """Optimizer steps of all stages, as the Trainer counts them."""
    epoch = STEPS_AN_EPOCH[recipe.data.task]
    assert all(stage.training["per_device_train_batch_size"] == 32 for stage in recipe.stages)
    return sum(
        stage.training.get("max_steps") or math.ceil(stage.training["num_train_epochs"] * epoch)
        for stage in recipe.stages
    )


def runs_of(name: str) -> dict[str, Recipe]:
    return {run.name: run.recipe for run in load_sweep(EXAMPLES / "sweeps" / f"{name}.yaml").runs}


@pytest.mark.parametrize("path", sorted((EXAMPLES / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_run_has_the_data_of_its_task(path):
    for run in load_sweep(path).runs:
        assert run.recipe.data.path == TASKS[run.recipe.data.task].dataset, run.name


@pytest.mark.parametrize("name", SWEEPS)
def test_all_runs_of_a_task_have_the_same_steps_and_teacher(name):
    """Those of plain BinaryBERT as well, so that sweeps compare; split networks get no fewer."""
    plain = {run.split("/")[0]: r for run, r in runs_of("binarybert-glue").items() if "/plain-w1a8/seed42" in run}
    runs = runs_of(name)
    assert {recipe.data.task for recipe in runs.values()} <= STEPS_AN_EPOCH.keys()
    for recipe in runs.values():
        model = plain[recipe.data.task]
        assert steps(recipe) == steps(model)
        assert recipe.teacher == model.teacher
        assert (recipe.data.max_length, recipe.data.train_split) == (model.data.max_length, model.data.train_split)
    split = {run.split("/")[0]: r for run, r in runs_of("binarybert-glue").items() if "/split-w1a8/seed42" in run}
    assert all(steps(split[task]) >= steps(plain[task]) for task in plain)


def test_bits_go_down_and_activations_come_last():
    """Stage one quantizes weights only, ever fewer bits; stage two starts from it at its last bits. One plane."""
    for run, recipe in {**runs_of("progressive-glue"), **runs_of("progressive-schedules")}.items():
        widths = [[int(bits) for bits in stage.quantization.bits.split("-")] for stage in recipe.stages]
        inits = [stage.init for stage in recipe.stages]
        assert inits == ["teacher"] + ["previous"] * (len(inits) - 1)
        assert all(stage.quantization.planes == 1 for stage in recipe.stages)
        for (weight, *_), stage in zip(widths, recipe.stages, strict=True):
            rows = weight > 2 or "per-row" in run
            assert stage.quantization.weight_granularity == ("per_row" if rows else "per_tensor")
        if "direct" in run or len(recipe.stages) == 1 or "w2a8-w1a8" in run:
            continue
        weights = [weight for weight, _, _ in widths]
        assert weights[:-1] == sorted(set(weights), reverse=True) and weights[-1] == weights[-2]
        assert [activation for _, _, activation in widths[:-1]] == [32] * (len(widths) - 1) != widths[-1][2:]


def test_a_direct_run_differs_from_its_progressive_one_by_the_schedule_alone():
    runs = runs_of("progressive-glue")
    for name, recipe in runs.items():
        if "progressive" in name:
            last, (direct,) = recipe.stages[-1], runs[name.replace("progressive", "direct")].stages
            training = direct.training | {"max_steps": last.training["max_steps"]}
            assert training == last.training and direct.quantization == last.quantization
            assert (direct.targets, direct.teacher_dropout) == (last.targets, last.teacher_dropout)


def test_random_initialization_has_every_part_both_ways():
    runs = runs_of("random-init")
    parts = {"encoder": (), "embeddings": ("embeddings",), "both": ("embeddings", "encoder")}
    parts |= {"lower": ("lower",), "upper": ("upper",)}
    starts = {"pretrained": ("teacher", ())} | {f"random-{key}": ("random_encoder", parts[key]) for key in parts}
    for bits in ("w1a1", "w1a2"):
        for variant, start in starts.items():
            (stage,) = runs[f"mrpc/{variant}-{bits}/seed42"].stages
            assert stage.quantization.bits == f"1-1-{bits[-1]}" and stage.teacher is None
            assert (stage.init, stage.random_parts) == start
    first, second = runs["mrpc/chain-w1a1/seed42"].stages
    assert [first.quantization.bits, second.quantization.bits] == ["1-1-2", "1-1-1"]
    assert (first.init, second.init, second.teacher) == ("teacher", "previous", "w1a2")


def test_activation_bits_go_down_under_one_bit_weights():
    """For the same number of steps as at once, and the last stage is trained as there."""
    runs = runs_of("activation-bits")
    totals = {}
    for run, recipe in runs.items():
        totals.setdefault(recipe.data.task, set()).add(sum(stage.training["max_steps"] for stage in recipe.stages))
        bits = [stage.quantization.bits for stage in recipe.stages]
        assert bits == sorted(bits, reverse=True) and all(name.startswith("1-1-") for name in bits)
        assert [stage.init for stage in recipe.stages] == ["teacher"] + ["previous"] * (len(bits) - 1)
        (direct,) = runs["/".join((recipe.data.task, f"w1a{bits[-1][-1]}", run.split("/")[2]))].stages
        last = recipe.stages[-1]
        assert direct.training | {"max_steps": last.training["max_steps"]} == last.training
        assert (direct.quantization, direct.targets) == (last.quantization, last.targets)
    assert all(len(steps) == 1 for steps in totals.values())


# Tiny runs


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("progressive")
    make_backbone(folder / "bert")
    make_data(folder / "data")
    return folder


def tiny(workplace: Path, name: str, *overrides: str) -> Recipe:
    """A shipped recipe on the tiny backbone and its data."""
    return Recipe.from_yaml(
        EXAMPLES / "recipes" / f"{name}.yaml",
        [
            "data.task=rotten_tomatoes",
            f"data.path={workplace / 'data'}",
            "data.max_length=24",
            f"teacher.model={workplace / 'bert'}",
            "training.bf16=false",
            "training.logging_steps=1",
            *overrides,
        ],
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForSequenceClassification.from_pretrained(folder).state_dict()


@pytest.mark.parametrize(
    ("overrides", "bits"),
    [
        (["total_steps=10"], ["4-4-32", "2-2-32", "1-1-32", "1-1-8"]),
        (["family=ternary", "schedule=[w8, w3, w2, w2a8]", "total_steps=8"], ["8-8-32", "3-3-32", "2-2-32", "2-2-8"]),
        (["schedule=[w1, w1a4]", "quantization.hidden_act=relu", "total_steps=6"], ["1-1-32", "1-1-4"]),
    ],
)
def test_progressive_by_its_recipe(workplace, tmp_path, overrides, bits):
    recipe = tiny(workplace, "progressive", *overrides)
    assert [stage.quantization.bits for stage in recipe.stages] == bits
    results = run_recipe(recipe, tmp_path / "run", teachers=workplace / "teachers")
    assert results["packed"]["max_logit_difference"] == 0.0
    assert [stage["steps"] for stage in results["stages"]] == [s.training["max_steps"] for s in recipe.stages]
    assert all(math.isfinite(value) for stage in results["stages"] for value in stage["final_losses"].values())
    config = AutoConfig.from_pretrained(tmp_path / "run" / "packed")
    assert (config.bits, config.planes, config.head_dim) == (bits[-1], 1, None)
    assert config.hidden_act == ("relu" if "1-1-4" in bits else "gelu")


def test_a_stage_starts_from_the_stage_it_names(workplace, tmp_path):
    """A rate of nothing leaves weights where they began: at those of the first stage, not of the second."""
    training = {"max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-3}
    still = training | {"learning_rate": 1e-30, "weight_decay": 0.0}
    bits = {"quantization": {"bits": "8-8-32"}}
    values = tiny(workplace, "progressive").to_dict() | {
        "family": "ternary",
        "stages": [
            {"name": "first", "training": training, **bits},
            {"name": "second", "init": "previous", "training": training, **bits},
            {"name": "third", "init": "previous", "start": "first", "training": still, **bits},
            {"name": "last", "init": "previous", "training": training},
        ],
    }
    run_recipe(Recipe.from_dict(values), tmp_path / "run", teachers=tmp_path / "teachers")
    first, second, third = (
        weights(next((tmp_path / "teachers").glob(f"*-{name}-*/model"))) for name in ("first", "second", "third")
    )
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert torch.equal(first[name], third[name]) and not torch.equal(second[name], third[name])


def test_a_run_that_ends_with_a_stage_of_another_finds_it(workplace, tmp_path, monkeypatch):
    values = tiny(workplace, "w1a1", "total_steps=4").to_dict()
    longer = run_recipe(Recipe.from_dict(values), tmp_path / "longer", teachers=tmp_path / "teachers")
    shorter = Recipe.from_dict(values | {"name": "shorter", "stages": values["stages"][:1]})
    monkeypatch.setattr(DistillationTrainer, "train", None)
    results = run_recipe(shorter, tmp_path / "shorter", teachers=tmp_path / "teachers")
    assert results["stages"] == longer["stages"][:1]
    assert results["student"]["metrics"] == results["stages"][0]["metrics"]


@pytest.mark.parametrize("init", ["teacher", "random_encoder"])
def test_a_chain_of_teachers_by_its_recipe(workplace, tmp_path, init):
    """W32A32 -> W1A2 -> W1A1; the steps of W1A1 are positive and of its own."""
    recipe = tiny(workplace, "w1a1", f"stages.1.init={init}", "total_steps=8")
    results = run_recipe(recipe, tmp_path / "run", teachers=tmp_path / "teachers")
    assert results["packed"]["max_logit_difference"] == 0.0
    assert all(math.isfinite(value) for stage in results["stages"] for value in stage["final_losses"].values())
    before = weights(next((tmp_path / "teachers").glob("*-w1a2-*/model")))
    after = weights(tmp_path / "run" / "stage-1-chained" / "model")
    learned = [name for name in after if name.endswith("_quantizer.step")]
    assert learned and all(float(after[name]) > 0 for name in learned)
    assert any(abs(float(after[name]) / float(before[name]) - 1) > 0.5 for name in learned)
    config = AutoConfig.from_pretrained(tmp_path / "run" / "packed")
    assert (config.bits, config.binary_quantizer, config.hidden_act) == ("1-1-1", "centered", "relu")
