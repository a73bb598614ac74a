"""Kill -9 in a stage and the same call again: the same weights as without, and nothing done twice but lost steps."""

import hashlib
import json
import os
import re
import signal
from pathlib import Path

import pytest
import test_question_answering as squad
import torch
from test_checkpointing import start_process
from test_run import TINY, make_backbone, make_data
from transformers import AutoTokenizer, BertConfig, BertForQuestionAnswering, BertForSequenceClassification

from trainers import run
from trainers.checkpointing import AtomicCheckpointMixin
from trainers.recipe import Recipe


RECIPES = Path(__file__).parents[2] / "examples" / "recipes"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """Fine-tuned teachers of random weights, so that the stages under test are all that trains."""
    folder = tmp_path_factory.mktemp("killed")
    make_data(folder / "data")
    for name, model_class in (("classifier", BertForSequenceClassification), ("answerer", BertForQuestionAnswering)):
        torch.manual_seed(2)
        model_class(BertConfig(**TINY | {"vocab_size": 32})).save_pretrained(folder / name)
    AutoTokenizer.from_pretrained(make_backbone(folder / "bert")).save_pretrained(folder / "classifier")
    squad.make_tokenizer(folder / "answerer", 32)
    rows = [json.loads(line) for line in (folder / "data" / "train.jsonl").read_text().splitlines()]
    extra = [row | {"text": f"{word} {row['text']}"} for row in rows for word in ("the", "a")]
    (folder / "augmented.jsonl").write_text("\n".join(map(json.dumps, rows + extra)))
    squad.make_data(folder / "squad", unanswerable=False)
    return folder


SHIPPED = (
    "data.task=rotten_tomatoes", "data.max_length=24", "teacher.fine_tune=null", "training.bf16=false",
    "training.per_device_train_batch_size=8", "training.save_strategy=steps", "training.save_steps=2",
    "training.eval_strategy='no'", "training.logging_steps=1",
)  # fmt: skip


def shipped(folder: Path, name: str, *overrides: str) -> Recipe:
    """A shipped recipe on the tiny classifier, saving every other step."""
    places = (f"data.path={folder / 'data'}", f"teacher.model={folder / 'classifier'}")
    return Recipe.from_yaml(RECIPES / f"{name}.yaml", [*SHIPPED, *places, *overrides])


def progressive(folder: Path) -> Recipe:
    return shipped(folder, "progressive", "schedule=[w2, w1, w1a8]", "total_steps=11")


def random_encoder(folder: Path) -> Recipe:
    """Two epochs of three steps."""
    steps = ("total_steps=6", "training.per_device_train_batch_size=16")
    return shipped(folder, "w1a1", "schedule=[w1a1]", "stages.0.init=random_encoder", *steps)


def chain(folder: Path) -> Recipe:
    return shipped(folder, "w1a1", "total_steps=8")


def augmented(folder: Path) -> Recipe:
    rows = (f"data.augmented={folder / 'augmented.jsonl'}", "stages.0.augmented=true", "stages.3.augmented=true")
    return shipped(folder, "progressive", "schedule=[w1, w1a8]", "total_steps=8", *rows)


def answers(folder: Path) -> Recipe:
    training = {
        "max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "save_strategy": "steps",
        "save_steps": 2, "eval_strategy": "no", "logging_steps": 1,
    }  # fmt: skip
    teacher, stage = {"model": str(folder / "answerer")}, {"name": "ternary", "training": training}
    recipe = squad.make_recipe(folder, "squad", teacher=teacher, stages=[stage]).to_dict()
    return Recipe.from_dict(recipe | {"data": recipe["data"] | {"path": str(folder / "squad")}})


def train(recipe: Recipe, folder: Path) -> dict[str, str]:
    """SHA-256 of the weights of all stages and of the packed file."""
    run.run_recipe(recipe, folder / "run", folder / "teachers")
    return {
        path.parent.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("model.safetensors")
        if path.parent.name in ("model", "packed")
    }


def train_and_die(recipe: Recipe, folder: Path, stage: str, steps: int) -> None:
    """Runs the recipe and kills its process when it has done so many steps of this stage."""
    step = AtomicCheckpointMixin.training_step

    def training_step(self, *arguments, **keywords):
        own = re.search(rf"-{stage}(-[0-9a-f]{{12}})?/training$", self.args.output_dir)
        if own and self.state.global_step == steps:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *arguments, **keywords)

    AtomicCheckpointMixin.training_step = training_step
    train(recipe, folder)


# Recipe, where it is killed (stage, steps done) one after the other, and steps that are then left: all those after the
# last checkpoint, of which there is one for every other step.
@pytest.mark.usefixtures("quick_garbage_collection")
@pytest.mark.parametrize(
    ("make", "kills", "left"),
    [
        (progressive, [("w1", 3)], 2 + 4),  # 3, 4 and 4 steps
        (random_encoder, [("w1a1", 1), ("w1a1", 5)], 2),  # before anything was saved, and in the second epoch
        (chain, [("chained", 3)], 2),  # 4 and 4 steps
        (augmented, [("w1a8", 3)], 2),  # 4 and 4 steps
        (answers, [("ternary", 3)], 4),
    ],
    ids=["progressive", "random encoder", "chain", "augmented", "SQuAD"],
)
def test_killed_and_started_again_ends_in_the_same_weights(workplace, tmp_path, monkeypatch, make, kills, left):
    # What comes after the packed file is read from it.
    monkeypatch.setattr(run._Run, "_finish", lambda *_: {})
    monkeypatch.setattr(run, "plot_training", lambda *_: None)
    recipe = make(workplace)
    expected = train(recipe, tmp_path / "whole")
    assert len(expected) == len(recipe.stages) + 1
    for stage, steps in kills:
        process = start_process(train_and_die, recipe, tmp_path / "killed", stage, steps)
        process.join(300)
        assert process.exitcode == -signal.SIGKILL
    taken = []
    step = AtomicCheckpointMixin.training_step
    monkeypatch.setattr(
        AtomicCheckpointMixin, "training_step", lambda self, *a, **k: taken.append(self) or step(self, *a, **k)
    )
    assert train(recipe, tmp_path / "killed") == expected
    assert len(taken) == left
