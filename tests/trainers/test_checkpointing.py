import errno
import json
import logging
import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from trainers.checkpointing import (
    MANIFEST,
    AtomicCheckpointMixin,
    folder_lock,
    newest_complete_checkpoint,
    verify_checkpoint_files,
)
from trainers.distillation import DistillationArguments, DistillationTrainer


STEPS, SAVE_STEPS = 8, 2
SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
    "max_position_embeddings": 16,
}


pytestmark = pytest.mark.usefixtures("quick_garbage_collection")


def make_rows(count=24):
    ids = torch.randint(0, 50, (count, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": i % 2} for i, row in enumerate(ids)]


def settings(folder, **args):
    """Shuffled data, dropout and an epoch that ends between two saves: a resume must restore the random state."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": SAVE_STEPS,
        "save_total_limit": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **args,
    }


def make_model(seed=0, **config):
    set_seed(seed)
    return BertForSequenceClassification(BertConfig(**SHAPE, **config))


class FineTuning(AtomicCheckpointMixin, Trainer):
    pass


def make_trainer(folder, identity=None, model=None, callbacks=None, rows=None, **args):
    rows = make_rows() if rows is None else rows
    return FineTuning(
        model=model or make_model(),
        args=TrainingArguments(**settings(folder, **args)),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=default_data_collator,
        callbacks=callbacks,
        identity=identity,
    )


def make_distillation(folder, student=None, **args):
    return DistillationTrainer(
        student or make_model(),
        make_model(1),
        DistillationArguments(**settings(folder, **args)),
        train_dataset=make_rows(),
        data_collator=default_data_collator,
    )


def run(folder, make=make_trainer, **args):
    """Trains to the end from the newest complete checkpoint; the final weights."""
    trainer = make(folder, **args)
    trainer.train(resume_from_checkpoint=newest_complete_checkpoint(folder))
    assert trainer.state.global_step == STEPS
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_same(weights, expected):
    assert weights.keys() == expected.keys()
    different = [name for name, value in weights.items() if not torch.equal(value, expected[name])]
    assert not different


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, run(folder)


class FileOperations:
    """Calls `action(n)` before the n-th operation on a file below `folder`, through a hook of the interpreter."""

    EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.listdir", "os.scandir", "shutil.rmtree"}
    active = None
    installed = False

    def __init__(self, folder, action):
        self.folder, self.action, self.count = str(folder), action, 0

    @classmethod
    def hook(cls, event, args):
        watch = cls.active
        if watch and event in cls.EVENTS and isinstance(args[0], str | Path) and str(args[0]).startswith(watch.folder):
            watch.count += 1
            watch.action(watch.count)

    def __enter__(self):
        if not FileOperations.installed:  # a hook cannot be removed
            sys.addaudithook(FileOperations.hook)
            FileOperations.installed = True
        FileOperations.active = self
        return self

    def __exit__(self, *_):
        FileOperations.active = None


def start_process(target, *arguments):
    """`target` in a process of its own: not a fork of this one, whose threads of OpenMP and autograd it would miss."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trainers.run"])
    process = context.Process(target=on_one_thread, args=(target, *arguments))
    process.start()
    return process


def on_one_thread(target, *arguments):
    torch.set_num_threads(1)  # as all tests: sums may depend on it
    target(*arguments)


def run_and_die(folder, die_at):
    """A run that kills its process right before its `die_at`-th file operation."""
    with FileOperations(folder, lambda n: os.kill(os.getpid(), signal.SIGKILL) if n == die_at else None):
        run(folder)


def assert_every_checkpoint_is_complete(folder):
    for checkpoint in folder.glob("checkpoint-*"):
        assert verify_checkpoint_files(checkpoint)["step"] == int(checkpoint.name.removeprefix("checkpoint-"))


def test_killed_at_any_file_operation_resumes_bit_equal(tmp_path, uninterrupted):
    _, expected = uninterrupted
    with FileOperations(tmp_path / "count", lambda n: None) as operations:  # noqa: ARG005
        run(tmp_path / "count")
    assert operations.count > 100
    points = random.Random(0).sample(range(1, operations.count + 1), 6)
    for point in points:
        folder = tmp_path / str(point)
        process = start_process(run_and_die, folder, point)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        assert_every_checkpoint_is_complete(folder)
        assert_same(run(folder), expected)
        assert not list(folder.glob("tmp-*"))


def test_killed_at_random_times_around_saves_resumes_bit_equal(tmp_path, uninterrupted):
    _, expected = uninterrupted
    chance = random.Random(1)
    for _ in range(3):
        process = start_process(run, tmp_path)
        deadline = time.monotonic() + 60
        while process.is_alive() and not list(tmp_path.glob("tmp-checkpoint-*")):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(chance.random() * 0.05)
        process.kill()
        process.join(60)
        assert process.exitcode in (-signal.SIGKILL, 0)  # or it was done before
        assert_every_checkpoint_is_complete(tmp_path)
    assert_same(run(tmp_path), expected)


def test_distillation_resumes_bit_equal(tmp_path):
    expected = run(tmp_path / "whole", make_distillation)
    stopped = make_distillation(tmp_path / "parts")
    stopped.add_callback(StopAt(5))
    stopped.train()
    assert_same(run(tmp_path / "parts", make_distillation), expected)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):  # noqa: ARG002
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize("evaluation", ["no", "epoch"])
@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_every_checkpoint_resumes_bit_equal(tmp_path, strategy, evaluation):
    """Three steps an epoch, of which the third has none: from within each, from its end and after the last step.

    The rate stays constant: a step too many would show. An evaluation draws random numbers, so does a new epoch.
    """
    args = {"lr_scheduler_type": "constant", "save_steps": 1, "save_total_limit": None}
    args |= {"train_sampling_strategy": strategy, "eval_strategy": evaluation}
    expected = run(tmp_path / "whole", **args)
    plain = Trainer(
        make_model(),
        TrainingArguments(**settings(tmp_path / "plain", **args)),
        train_dataset=make_rows(),
        eval_dataset=make_rows(),
        data_collator=default_data_collator,
    )
    plain.train()
    assert_same(plain.model.state_dict(), expected)
    for step in range(1, STEPS + 1):
        resumed = make_trainer(tmp_path / str(step), **args)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert resumed.state.global_step == STEPS, step
        assert_same(resumed.model.state_dict(), expected)
        # and from a checkpoint of that run, within the same epoch or a later one
        if step < STEPS - 1:
            again = make_trainer(tmp_path / f"{step} again", **args)
            again.train(resume_from_checkpoint=str(tmp_path / str(step) / f"checkpoint-{step + 1}"))
            assert_same(again.model.state_dict(), expected)


def test_time_counts_from_the_first_process_on(tmp_path):
    make_trainer(tmp_path, max_steps=2).train()
    earlier = verify_checkpoint_files(tmp_path / "checkpoint-2")["seconds"]
    assert earlier > 0
    resumed = make_trainer(tmp_path)
    started = time.time()
    resumed.train(resume_from_checkpoint=True)
    assert earlier < resumed.training_seconds <= earlier + time.time() - started + 0.1
    assert verify_checkpoint_files(tmp_path / f"checkpoint-{STEPS}")["seconds"] > earlier


def test_loss_aware_student_resumes_bit_equal(tmp_path):
    """Saves fall between two refreshes of the scales."""
    modeling = pytest.importorskip("modeling_qbert")

    def make(folder):
        set_seed(0)
        config = modeling.TernaryBertConfig(**SHAPE, weight_quantizer="lat")
        student = modeling.TernaryBertForSequenceClassification(config)
        return make_distillation(folder, student, scale_refresh_steps=3)

    expected = run(tmp_path / "whole", make)
    stopped = make(tmp_path / "parts")
    stopped.add_callback(StopAt(5))
    stopped.train()
    assert newest_complete_checkpoint(tmp_path / "parts").endswith("checkpoint-4")
    assert_same(run(tmp_path / "parts", make), expected)


def remove(path):
    path.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [remove, truncate, flip_a_bit])
def test_a_damaged_checkpoint_is_skipped_by_name(tmp_path, uninterrupted, caplog, damage):
    folder, _ = uninterrupted
    names = [path.name for path in (folder / "checkpoint-8").iterdir()]
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", MANIFEST} <= set(names)
    for name in names:
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        damage(copy / "checkpoint-8" / name)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert newest_complete_checkpoint(copy) == str(copy / "checkpoint-6")
        assert str(copy / "checkpoint-8" / name) in caplog.text
        shutil.rmtree(copy)


def test_resume_over_a_damaged_checkpoint_replaces_it(tmp_path, uninterrupted):
    """Until then it counts as none: the save of step 7 must not remove step 6 on account of a damaged step 8."""
    folder, expected = uninterrupted
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    flip_a_bit(tmp_path / "checkpoint-8" / "optimizer.pt")
    kept = []

    class SaveAlsoAt7(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):  # noqa: ARG002
            control.should_save = control.should_save or state.global_step == 7

        def on_save(self, args, state, control, **kwargs):  # noqa: ARG002
            kept.append(sorted(path.name for path in tmp_path.glob("checkpoint-*")))

    assert_same(run(tmp_path, callbacks=[SaveAlsoAt7()]), expected)
    assert kept == [["checkpoint-6", "checkpoint-7", "checkpoint-8"], ["checkpoint-7", "checkpoint-8"]]
    assert_every_checkpoint_is_complete(tmp_path)


def test_no_complete_checkpoint(tmp_path, caplog):
    assert newest_complete_checkpoint(tmp_path) is None
    assert newest_complete_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "tmp-checkpoint-4.17").mkdir()
    assert newest_complete_checkpoint(tmp_path) is None
    assert "checkpoint-3/MANIFEST.json is missing" in caplog.text
    with pytest.raises(ValueError, match="no complete checkpoint in"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_a_failed_save_leaves_the_older_checkpoints(tmp_path):
    """Every single file operation of a save fails once; whatever is visible afterwards is complete."""
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.train()
    trainer.state.global_step = 4
    failures, operation = 0, 0

    def fail(n):
        if n == operation:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    while True:
        operation += 1
        with FileOperations(tmp_path, fail) as operations:
            try:
                trainer._save_checkpoint(trainer.model, None)
            except OSError:
                failures += 1
        assert_every_checkpoint_is_complete(tmp_path)
        assert verify_checkpoint_files(tmp_path / "checkpoint-2")
        if operations.count < operation:
            break
        shutil.rmtree(tmp_path / "checkpoint-4", ignore_errors=True)
    assert failures > 20
    assert verify_checkpoint_files(tmp_path / "checkpoint-4")


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.train()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    trainer.state.global_step = 4
    with pytest.raises(OSError, match="No space left"):
        trainer._save_checkpoint(trainer.model, None)
    assert sorted(path.name for path in tmp_path.glob("*checkpoint-*")) == ["checkpoint-2"]


def test_rotation_goes_by_step_not_by_time(tmp_path):
    class Backwards(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):  # noqa: ARG002
            long_ago = 1e9 - state.global_step
            os.utime(Path(args.output_dir, f"checkpoint-{state.global_step}"), (long_ago, long_ago))

    make_trainer(tmp_path, save_steps=1, max_steps=12, callbacks=[Backwards()]).train()
    assert sorted(path.name for path in tmp_path.glob("*checkpoint-*")) == ["checkpoint-11", "checkpoint-12"]


def test_rotation_keeps_two_complete_and_the_best(tmp_path):
    damaged = []

    class Damage(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):  # noqa: ARG002
            if state.global_step in (3, 5):
                truncate(Path(args.output_dir, f"checkpoint-{state.global_step}", "optimizer.pt"))
                damaged.append(state.global_step)

    make_trainer(tmp_path / "damaged", save_steps=1, max_steps=6, callbacks=[Damage()]).train()
    kept = {path.name for path in (tmp_path / "damaged").glob("checkpoint-*")}
    assert damaged == [3, 5]
    assert kept - {"checkpoint-3", "checkpoint-5"} == {"checkpoint-4", "checkpoint-6"}

    scores = iter([0.1, 0.9, 0.3, 0.2, 0.1, 0.0])
    trainer = make_trainer(
        tmp_path / "best",
        save_steps=1,
        max_steps=6,
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    trainer.compute_metrics = lambda _: {"score": next(scores)}
    trainer.train()
    assert {path.name for path in (tmp_path / "best").glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (2, 5, 6)}
    assert trainer.state.best_model_checkpoint == str(tmp_path / "best" / "checkpoint-2")
    state = json.loads((tmp_path / "best" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "best" / "checkpoint-2")


IDENTITY = {"recipe": "abc", "stage": 1, "data": {"train": {"rows": 24}}, "targets": ("logits",)}


def test_resume_refuses_another_run(tmp_path):
    make_trainer(tmp_path, IDENTITY, max_steps=4).train()
    manifest = json.loads((tmp_path / "checkpoint-4" / MANIFEST).read_text())
    assert manifest["step"] == 4
    assert manifest["versions"]["torch"] == metadata.version("torch")
    assert manifest["identity"]["data"] == {"train": {"rows": 24}}
    other = {**IDENTITY, "stage": 2, "data": {"train": {"rows": 25}}, "seed": 3}
    with pytest.raises(ValueError, match="belongs to another run") as error:
        make_trainer(tmp_path, other).train(resume_from_checkpoint=True)
    lines = str(error.value).splitlines()[1:]
    assert [line.strip() for line in lines] == [
        "data.train.rows: checkpoint 24, this run 25",
        "seed: checkpoint None, this run 3",
        "stage: checkpoint 1, this run 2",
    ]
    trainer = make_trainer(tmp_path, IDENTITY, max_steps=6)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6


def test_resume_refuses_what_would_restart_silently(tmp_path):
    make_trainer(tmp_path / "model", max_steps=2, save_only_model=True).train()
    with pytest.raises(ValueError, match="saved without optimizer.pt"):
        make_trainer(tmp_path / "model").train(resume_from_checkpoint=True)

    make_trainer(tmp_path / "full", max_steps=2).train()
    with pytest.raises(ValueError, match="checkpoint-2 exists: resume from it"):
        make_trainer(tmp_path / "full").train()
    grouped = make_trainer(tmp_path / "grouped", train_sampling_strategy="group_by_length", max_steps=2)
    grouped.train()
    resumed = make_trainer(tmp_path / "grouped", train_sampling_strategy="group_by_length", max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    shutil.rmtree(tmp_path / "grouped" / "checkpoint-2")
    assert len(list(resumed.get_train_dataloader())) == 6  # the resume is over
    with pytest.raises(ValueError, match="checkpoint-2 cannot be resumed from: it was saved without order_0"):
        make_trainer(tmp_path / "full", train_sampling_strategy="group_by_length").train(resume_from_checkpoint=True)
    wider = make_model(num_labels=2, type_vocab_size=2)
    wider.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="missing .*extra.weight"):
        make_trainer(tmp_path / "full", model=wider).train(resume_from_checkpoint=True)
    flip_a_bit(tmp_path / "full" / "checkpoint-2" / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors: expected SHA-256"):
        make_trainer(tmp_path / "full").train(resume_from_checkpoint=str(tmp_path / "full" / "checkpoint-2"))


def test_non_finite_values_reach_no_weight_and_no_checkpoint(tmp_path):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):  # noqa: ARG002
            if state.global_step == 3:
                model.bert.embeddings.LayerNorm.register_forward_hook(lambda *args: args[-1] * math.nan)

    trainer = make_trainer(tmp_path, callbacks=[Poison()], save_steps=1)
    with pytest.raises(FloatingPointError, match="step 4: loss is nan; stopped before the optimizer step"):
        trainer.train()
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())
    assert newest_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")

    trainer.model.classifier.weight.data[0, 0] = math.inf
    with pytest.raises(FloatingPointError, match="step 3: classifier.weight is not finite"):
        trainer._save_checkpoint(trainer.model, None)
    assert newest_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")


def test_checkpoints_hold_no_pickled_arguments(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    assert (tmp_path / "final" / "model.safetensors").exists()
    assert not list(tmp_path.rglob("training_args.bin"))


def test_arguments_that_break_the_promise(tmp_path):
    with pytest.raises(ValueError, match="save_total_limit=1"):
        make_trainer(tmp_path, save_total_limit=1)


def test_second_run_is_refused(tmp_path):
    class TrainAgain(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):  # noqa: ARG002
            with pytest.raises(RuntimeError, match="already in use by this process"):
                make_trainer(tmp_path).train()

    make_trainer(tmp_path, max_steps=1, callbacks=[TrainAgain()]).train()

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def hold():
        with folder_lock(tmp_path):
            theirs.send("locked")
            theirs.recv()

    process = context.Process(target=hold, daemon=True)
    process.start()
    assert ours.recv() == "locked"
    with pytest.raises(RuntimeError, match=f"in use by another run: process {process.pid} on"):
        make_trainer(tmp_path).train()
    process.kill()
    process.join(60)
    with folder_lock(tmp_path):
        pass
