"""A recipe from beginning to end: teacher, stages, pack, proof in a fresh process, results and card. Resumable."""

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save, save_file
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments, set_seed

from modeling_qbert import ghost_parameters, multiply_adds

from .card import write_card
from .checkpointing import AtomicCheckpointMixin, folder_lock, newest_complete_checkpoint
from .data import check_label_order, data_identity, eval_splits, label_config, load_augmented, load_data, task_of
from .distillation import DistillationArguments, DistillationTrainer
from .figures import plot_training
from .heads import HEADS, evaluations, predict_splits, scores
from .initialization import (
    BUNDLED,
    change_architecture,
    choose_ternary_modules,
    initial_student,
    load_teacher,
    resolve_model,
    student_config,
    weights_digest,
)
from .machine import bfloat16_is_fast
from .metrics import mean_squared_difference
from .pruning import WidthAdaptiveTrainer, labelled_batches
from .recipe import DataSpec, Recipe, Stage
from .results import RESULTS_NAME, environment, read_results, write_atomic, write_results


DONE = "DONE.json"  # written last into a finished teacher or stage folder
LOGITS = "logits.safetensors"  # there, on the evaluation splits
RANKING_ROWS = 512  # training rows that rank what is pruned and what is split


class FineTuningTrainer(AtomicCheckpointMixin, Trainer):
    """The plain Trainer on labels, with checkpoints that survive a kill."""


def evaluate_checkpoint(folder: str, spec: DataSpec, logits_file: str | None = None) -> dict[str, float]:
    """Scores of a saved checkpoint, latent or packed, on the evaluation splits; optionally keeps its logits."""
    config, own_labels = AutoConfig.from_pretrained(folder), None
    if spec.task is None and config.problem_type is not None:  # of own data the checkpoint knows the classes
        own_labels = [] if config.problem_type == "regression" else list(config.id2label.values())
    data = load_data(spec, eval_splits(spec), own_labels)
    task = task_of(spec, data)
    head = HEADS[task.kind]
    check_label_order(config, task, folder)
    model, tokenizer = head.auto_class.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    splits = evaluations(task, data, tokenizer, spec, model.config)
    logits = predict_splits(model, tokenizer, head, splits)
    if logits_file:
        save_file(logits, logits_file)
    return scores(logits, splits)


def run_recipe(recipe: Recipe, output: str | Path, teachers: str | Path | None = None) -> dict:
    """Run a recipe in the folder `output` and return its results (`trainers.results`).

    What is finished is not done again: the same call continues after an interruption, and ends in the same weights.

    Args:
        teachers: folder in which fine-tuned teachers are kept and shared between runs; default `output`/teachers.

    Raises:
        ValueError: recipe, data or models do not fit each other, or `output` holds a run of another recipe, of other
            rows or of another teacher.
    """
    output = Path(output)
    with folder_lock(output):
        finished = output / RESULTS_NAME
        _check_recipe(recipe, output)
        run = _Run(recipe, output, Path(teachers or output / "teachers"))
        _check_inputs(run.inputs, output)
        return read_results(finished) if finished.exists() else run.execute()


def _check_recipe(recipe: Recipe, output: Path) -> None:
    """The folder's own copy of the recipe must be this recipe; a new folder gets it."""
    path = output / "recipe.yaml"
    if path.exists():
        found = Recipe.from_yaml(path)
        if found.fingerprint() != recipe.fingerprint():
            raise ValueError(f"{path}: holds another recipe than the one given; choose another output folder")
    else:
        write_atomic(path, recipe.to_yaml().encode())


def _check_inputs(inputs: dict, output: Path) -> None:
    """The rows and the teacher, of which a recipe has only names, must be those that the folder was begun with."""
    path = output / "inputs.json"
    if not path.exists():
        _write_json(path, inputs)
        return
    found = json.loads(path.read_text())
    for name in {**inputs, **found}:
        if inputs.get(name) != found.get(name):
            raise ValueError(
                f"{path}: this folder holds a run with other {name}: {found.get(name)}, now {inputs.get(name)}; "
                "choose another output folder"
            )


class _Run:
    def __init__(self, recipe: Recipe, output: Path, teachers: Path):
        self.recipe, self.output, self.started = recipe, output, time.time()
        self.stage_seconds = 0.0  # of training, in this process
        self.environment = environment()  # the commit that trains, whatever is checked out meanwhile
        trainings = [recipe.teacher.fine_tune or {}, *(stage.training for stage in recipe.stages)]
        # The recipes ask for bfloat16 for speed alone.
        self.fp32_for_bf16 = any(training.get("bf16") for training in trainings) and not bfloat16_is_fast()
        if self.fp32_for_bf16:
            print("bf16: this machine has no fast bfloat16, training in fp32 instead", file=sys.stderr)
            self.environment["device"] += ", fp32 instead of bf16"
        spec = recipe.data
        self.data = load_data(spec)
        self.task = task_of(spec, self.data)
        self.head = HEADS[self.task.kind]
        self.labels = {} if self.task.kind == "embedding" else label_config(self.data)
        if recipe.teacher.fine_tune is None:
            check_label_order(AutoConfig.from_pretrained(resolve_model(recipe.teacher.model)), self.task)
        # What the teacher's name stands for; weights of a bundled model are pinned.
        self.teacher_identity = recipe.portable()["teacher"]
        if recipe.teacher.model not in BUNDLED:
            self.teacher_identity["sha256"] = weights_digest(recipe.teacher.model, self.labels, self.head.auto_class)
        self.backbone = self._backbone(teachers)
        for stage in recipe.stages:  # fail before anything is trained
            student_config(recipe, stage, self.backbone, self.labels, self.head.name)
        self.tokenizer = AutoTokenizer.from_pretrained(self.backbone)
        # Some checkpoints lack it, and an unbounded tokenizer then overflows the position table.
        self.tokenizer.model_max_length = min(self.tokenizer.model_max_length, spec.max_length)
        self.train = self.head.encode(self.data[spec.train_split], self.tokenizer, spec)
        self.evaluations = evaluations(self.task, self.data, self.tokenizer, spec)
        self.split = eval_splits(spec)[0]
        self.original = {name: data_identity(rows) for name, rows in self.data.items()}
        self.identity = self.original
        if any(stage.augmented for stage in recipe.stages):
            rows = load_augmented(spec, self.data[spec.train_split])
            self.augmented = self.head.encode(rows, self.tokenizer, spec)
            self.identity = self.original | {"augmented": data_identity(rows)}
        self.inputs = {"rows": self.identity, "teacher": self.teacher_identity.get("sha256")}
        key = {"teacher": self.teacher_identity, "data": recipe.portable()["data"], "rows": self.original}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
        self.teacher_folder = teachers / f"{spec.task or 'own'}-{digest}"

    def execute(self) -> dict:
        self._make_teacher()
        stages, folders = [], {None: self.teacher_path}
        previous = self.teacher_path
        for index, stage in enumerate(self.recipe.stages):
            # Loaded anew: a trainer leaves its own precision on the teacher that it had.
            teacher = load_teacher(folders[stage.teacher], auto_class=self.head.auto_class)
            start = previous if stage.start is None else folders[stage.start]
            previous, record = self._stage(index, stage, start, teacher)
            folders[stage.name] = previous
            stages.append(record)
        metrics, logits = self._evaluate(previous, Path(previous).parent)
        student = self.head.auto_class.from_pretrained(previous)
        packed_folder = self.output / "packed"
        if self.recipe.stages[-1].quantization.bits != "32-32-32":
            student = student.pack(self.recipe.packing)
        student.save_pretrained(packed_folder)
        self.tokenizer.save_pretrained(packed_folder)
        return self._finish(stages, student, metrics, logits, packed_folder)

    def _backbone(self, teachers: Path) -> str:
        """Where the teacher starts; in another architecture a checkpoint beside the teachers, shared between runs."""
        spec = self.recipe.teacher
        source = resolve_model(spec.model)
        if spec.architecture is None:
            return source
        digest = self.teacher_identity.get("sha256", "")[:12]
        folder = teachers / "-".join(
            [self.teacher_identity["model"], *([digest] if digest else []), "as", spec.architecture]
        )
        with _wait_for_lock(folder):
            if not (folder / DONE).exists():
                change_architecture(source, spec.architecture, folder / "model")
                _write_json(folder / DONE, {"source": spec.model})
        return str(folder / "model")

    @property
    def teacher_path(self) -> str:
        if self.recipe.teacher.fine_tune is None:
            return self.backbone
        return str(self.teacher_folder / "model")

    def _make_teacher(self) -> None:
        spec = self.recipe.teacher
        training_folder = self.teacher_folder / "training"
        with _wait_for_lock(self.teacher_folder):
            if spec.fine_tune is not None and not (self.teacher_folder / DONE).exists():
                set_seed(spec.seed)
                model = load_teacher(self.backbone, self.labels, self.head.auto_class)
                trainer = FineTuningTrainer(
                    model=model,
                    args=TrainingArguments(**self._arguments(training_folder, spec.fine_tune, spec.seed)),
                    **self._common({"teacher": self.teacher_identity, "data": self.original}),
                )
                self._train(trainer, training_folder, "teacher")
                trainer.model.save_pretrained(self.teacher_path)
                self.tokenizer.save_pretrained(self.teacher_path)
            if not (self.teacher_folder / DONE).exists():
                metrics, _ = self._evaluate(self.teacher_path, self.teacher_folder)
                _write_json(self.teacher_folder / DONE, {"metrics": metrics})

    def _stage(self, index: int, stage: Stage, previous: str, teacher: PreTrainedModel) -> tuple[str, dict]:
        """(folder of the stage's model, its record). All stages but the last are kept beside the teachers, where runs
        that begin alike find them, and one that ends with such a stage."""
        begun = self.recipe.stages[: index + 1]
        rows = self.identity if any(earlier.augmented for earlier in begun) else self.original
        identity = {
            "teacher": self.teacher_identity,
            "data": rows,
            "family": self.recipe.family,
            "stages": self.recipe.portable()["stages"][: index + 1],
            "seed": self.recipe.seed,
        }
        key = {**identity, "data": self.recipe.portable()["data"], "rows": rows}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
        folder = self.teacher_folder.parent / f"{self.recipe.data.task or 'own'}-{stage.name}-{digest}"
        if index == len(self.recipe.stages) - 1 and not (folder / DONE).exists():
            folder = self.output / f"stage-{index}-{stage.name}"
        model_folder = folder / "model"
        started = time.time()
        with _wait_for_lock(folder):
            self.stage_seconds += time.time() - started  # while another run trained it
            if not (folder / DONE).exists():
                set_seed(self.recipe.seed)
                training = folder / "training"
                trainer = self._trainer(stage, training, previous, teacher, identity)
                started = time.time()
                record = self._train(trainer, training, stage.name)
                self.stage_seconds += time.time() - started
                trainer.model.save_pretrained(model_folder)
                self.tokenizer.save_pretrained(model_folder)
                record["metrics"], _ = self._evaluate(model_folder, folder)
                _write_json(folder / DONE, record)
        return str(model_folder), json.loads((folder / DONE).read_text())

    def _trainer(
        self, stage: Stage, folder: Path, previous: str, teacher: PreTrainedModel, identity: dict
    ) -> DistillationTrainer:
        start = self.teacher_path if stage.init in ("teacher", "random_encoder") else previous
        training = self._arguments(folder, stage.training, self.recipe.seed)
        args = DistillationArguments(
            logits_weight=stage.targets.logits,
            hidden_states_weight=stage.targets.hidden_states,
            attention_scores_weight=stage.targets.attention_scores,
            embeddings_weight=stage.targets.embeddings,
            labels_weight=stage.targets.labels,
            temperature=stage.temperature,
            teacher_dropout=stage.teacher_dropout,
            without_dropout=stage.without_dropout,
            quantizer_learning_rate=stage.quantizer_learning_rate,
            step_learning_rate=stage.step_learning_rate,
            ghost_learning_rate=stage.ghost.learning_rate,
            **training,
        )
        args.learning_rate *= stage.learning_rate_ratio
        # Training rows rank heads, neurons and modules; in DynaBERT's code the rows that the score is measured on do.
        count = min(RANKING_ROWS, len(self.train))  # from all over the file, which may be sorted by class
        rows = self.train.select([index * len(self.train) // count for index in range(count)])
        batches = list(labelled_batches(rows, self.tokenizer))
        student = initial_student(self.recipe, stage, start, self.labels, batches, self.head)
        if stage.chooses_modules:
            modules = choose_ternary_modules(stage, student, teacher, batches, self.recipe.seed)
            fields = {**student.config.to_dict(), "ternary_modules": modules}
            mixed = type(student)(type(student.config).from_dict(fields))
            mixed.load_state_dict(student.state_dict())
            student = mixed
        common = self._common(identity) | ({"train_dataset": self.augmented} if stage.augmented else {})
        if stage.widths:
            return WidthAdaptiveTrainer(model=student, teacher=teacher, args=args, widths=stage.widths, **common)
        return DistillationTrainer(model=student, teacher=teacher, args=args, **common)

    def _arguments(self, folder: Path, training: dict, seed: int) -> dict:
        defaults = {
            "report_to": "none",
            "save_total_limit": 2,
            "save_strategy": "steps",
            "save_steps": 0.1,  # share of all steps: an epoch may take hours
            "eval_strategy": "no" if self.task.kind == "embedding" else "epoch",  # the former has no labels
            "use_cpu": not torch.cuda.is_available(),  # bf16 on a CPU must be asked for by name
        }
        precision = {"bf16": False} if self.fp32_for_bf16 else {}
        return defaults | training | precision | {"output_dir": str(folder), "seed": seed}

    def _common(self, identity: dict) -> dict:
        return {
            "train_dataset": self.train,
            "eval_dataset": self.evaluations[self.split].inputs,
            "processing_class": self.tokenizer,
            "compute_metrics": self.head.compute_metrics(self.task),
            "identity": identity,
        }

    def _train(self, trainer: Trainer, folder: Path, name: str) -> dict:
        resume = newest_complete_checkpoint(folder) is not None
        (folder.parent / LOGITS).unlink(missing_ok=True)  # of what lay there before
        trainer.train(resume_from_checkpoint=True if resume else None)
        history = trainer.state.log_history
        write_atomic(folder / "log.json", json.dumps(history, indent=1).encode())
        if any("loss" in entry or "eval_loss" in entry for entry in history):  # a short run may have logged nothing
            plot_training(history, folder / "training.png")
        losses = next((entry for entry in reversed(history) if "loss" in entry), {})
        return {
            "name": name,
            "steps": trainer.state.global_step,
            "seconds": trainer.training_seconds,
            "final_losses": {key: value for key, value in losses.items() if key.startswith("loss")},
        }

    def _evaluate(self, model: str | Path, folder: Path) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Scores and logits by split of a trained model, which is asked once: `folder`, its own, keeps the logits."""
        kept = folder / LOGITS
        if not kept.exists():
            loaded = load_teacher(str(model), auto_class=self.head.auto_class)
            write_atomic(kept, save(predict_splits(loaded, self.tokenizer, self.head, self.evaluations)))
        logits = load_file(kept)
        return scores(logits, self.evaluations), logits

    def _finish(
        self,
        stages: list[dict],
        student: PreTrainedModel,
        metrics: dict[str, float],
        logits: dict[str, np.ndarray],
        packed_folder: Path,
    ) -> dict:
        recipe = self.recipe
        weights = packed_folder / "model.safetensors"
        packed_metrics, packed_logits = _evaluate_in_fresh_process(packed_folder, recipe.data)
        difference = max(float(np.abs(packed_logits[split] - logits[split]).max()) for split in logits)
        if difference > 1e-4:
            raise RuntimeError(f"{weights}: packed logits differ from the fake-quant student's by {difference:.2e}")
        teacher_logits = self._evaluate(self.teacher_path, self.teacher_folder)[1][self.split]
        architecture, teacher_name = recipe.teacher.architecture, recipe.portable()["teacher"]["model"]
        teacher_weights = Path(self.teacher_path) / "model.safetensors"
        *_, limitations = BUNDLED.get(recipe.teacher.model, ("",))
        if architecture is not None:
            limitations += (
                f" Its weights are those of a BERT in the {architecture} architecture, where they compute the same: "
                f"there was no {architecture} pre-training."
            )
        results = {
            "schema": 1,
            "run": recipe.name,
            "recipe": recipe.portable(),
            "fingerprint": recipe.fingerprint(),
            "seed": recipe.seed,
            "task": recipe.data.task,
            "split": self.split,
            "rows": len(self.data[self.split]),
            "main_metric": self.task.main_metric,
            "teacher": {
                "model": teacher_name if architecture is None else f"{teacher_name} as {architecture}",
                "metrics": json.loads((self.teacher_folder / DONE).read_text())["metrics"],
                "seed": recipe.teacher.seed,
                "bytes": teacher_weights.stat().st_size,
                **({"sha256": self.teacher_identity["sha256"]} if "sha256" in self.teacher_identity else {}),
            },
            "student": {"metrics": metrics},
            "ghost_parameters": ghost_parameters(student.config),
            "multiply_adds": multiply_adds(student.config),
            "packed": {
                "metrics": packed_metrics,
                "bytes": weights.stat().st_size,
                "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
                "max_logit_difference": difference,
                "teacher_distance": mean_squared_difference(packed_logits[self.split], teacher_logits),
            },
            "data": self.identity,
            "base_model": None if Path(recipe.teacher.model).is_dir() else recipe.teacher.model,  # its id on the Hub
            "limitations": limitations,
            "stages": stages,
            # Stages that an earlier process or another run trained, in part or whole, count as well.
            "seconds": time.time() - self.started - self.stage_seconds + sum(stage["seconds"] for stage in stages),
            **self.environment,
        }
        write_results(packed_folder / RESULTS_NAME, results)
        _write_json(packed_folder / "golden.json", self.head.golden(packed_folder, self.data[self.split]))
        write_card(packed_folder, results, model_id=recipe.name)
        write_results(self.output / RESULTS_NAME, results)
        return results


def _evaluate_in_fresh_process(folder: Path, spec: DataSpec) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Scores and logits by split of a packed checkpoint as another process, which never saw the training, loads it."""
    logits_file = folder.parent / "packed-logits.safetensors"
    spec_json = json.dumps(vars(spec))
    command = [sys.executable, "-m", "trainers.run", str(folder), spec_json, str(logits_file)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{folder}: evaluation in a fresh process failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1]), load_file(logits_file)


@contextmanager
def _wait_for_lock(folder: Path) -> Iterator[None]:
    """`folder_lock`, waiting while another run of a sweep makes the same teacher."""
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(folder_lock(folder))
                break
            except RuntimeError as error:
                print(f"waiting: {error}", file=sys.stderr)
                time.sleep(10)
        yield


def _write_json(path: Path, value: dict | list) -> None:
    write_atomic(path, json.dumps(value, indent=1).encode())


def main(arguments: Sequence[str]) -> None:
    folder, spec_json, logits_file = arguments
    print(json.dumps(evaluate_checkpoint(folder, DataSpec(**json.loads(spec_json)), logits_file)))


if __name__ == "__main__":
    main(sys.argv[1:])
