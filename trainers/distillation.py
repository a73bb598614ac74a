"""One distillation stage: a frozen teacher, a low-bit student and the targets of TernaryBERT, on the Trainer."""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from modeling_qbert import FastDropout  # the package registers the attention that returns scores

from .checkpointing import AtomicCheckpointMixin
from .losses import (
    attention_scores_loss,
    embeddings_loss,
    hidden_states_loss,
    labels_loss,
    logits_loss,
    span_logits_loss,
)


LEARNED_STEP = ("_quantizer.step", "_quantizer.shift")
"""Ends of the names of what `calibrate` gives its first value, and of what is learned with it."""
LEARNED_STATE = (*LEARNED_STEP, "_quantizer.clip")
"""Ends of the names of what learned activation quantizers learn."""
GHOST_STATE = (".ghost_kernel", ".ghost_scale")
"""Ends of the names of the parameters of ghost features."""
SCORES_ATTENTION = "qbert_scores"
"""Attention of `modeling_qbert` that returns pre-softmax scores, for its own models and for plain ones."""


@dataclass
class DistillationArguments(TrainingArguments):
    """`TrainingArguments` plus the weights of the distillation terms; a weight of 0 switches a target off.

    Args:
        logits_weight: weight of the soft cross-entropy (regression: squared error) on the logits.
        hidden_states_weight: weight of the squared error on the embedding output and every layer's output.
        attention_scores_weight: weight of the squared error on every layer's pre-softmax attention scores.
        embeddings_weight: weight of one minus the cosine between the mean-pooled last hidden states.
        labels_weight: weight of the task's loss on the labels. It needs no teacher: final fine-tuning.
        temperature: divides the logits of both models before the softmax.
        teacher_dropout: run the teacher in training mode. BinaryBERT and BiT do so on GLUE, TernaryBERT does not.
        without_dropout: the student learns without dropout; TernaryBERT, BinaryBERT and BiT keep it.
        scale_refresh_steps: optimizer steps between two `update_scales` of a student with weight quantizer "lat".
        quantizer_learning_rate: learning rate of learned step sizes and clips, which have no weight decay; default
            that of the weights. BinaryBERT's code: 1e-4 on GLUE, 1e-3 on SQuAD.
        step_learning_rate: learning rate of each learned step size in units of its first value, instead of the one
            above: they differ by factors of a thousand, and Adam moves all by as much.
        ghost_learning_rate: learning rate of ghost features, without weight decay; default that of the weights.
    """

    logits_weight: float = field(default=1.0, metadata={"help": "Weight of the loss on the logits."})
    hidden_states_weight: float = field(default=1.0, metadata={"help": "Weight of the loss on the hidden states."})
    attention_scores_weight: float = field(default=1.0, metadata={"help": "Weight of the loss on attention scores."})
    embeddings_weight: float = field(default=0.0, metadata={"help": "Weight of the loss on sentence embeddings."})
    labels_weight: float = field(default=0.0, metadata={"help": "Weight of the loss on the labels."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the softmax over the logits."})
    teacher_dropout: bool = field(default=False, metadata={"help": "Keep the teacher's dropout active."})
    without_dropout: bool = field(default=False, metadata={"help": "Train the student without dropout."})
    scale_refresh_steps: int = field(default=1, metadata={"help": "Steps between updates of loss-aware scales."})
    quantizer_learning_rate: float | None = field(default=None, metadata={"help": "Rate of step sizes and clips."})
    step_learning_rate: float | None = field(default=None, metadata={"help": "Relative rate of step sizes."})
    ghost_learning_rate: float | None = field(default=None, metadata={"help": "Rate of ghost features."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Log non-finite losses as they are."})

    def __post_init__(self):
        super().__post_init__()
        weights = {f"{target}_weight": weight for target, weight in self.target_weights.items()}
        for name, weight in weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"{name} must be finite and at least 0, got {weight}")
        if not any(weights.values()):
            raise ValueError(f"nothing to distil: {', '.join(weights)} are all 0")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature must be finite and above 0, got {self.temperature}")
        if self.scale_refresh_steps < 1:
            raise ValueError(f"scale_refresh_steps must be at least 1, got {self.scale_refresh_steps}")

    @property
    def target_weights(self) -> dict[str, float]:
        """Weight of each target by its name."""
        return {
            "logits": self.logits_weight,
            "hidden_states": self.hidden_states_weight,
            "attention_scores": self.attention_scores_weight,
            "embeddings": self.embeddings_weight,
            "labels": self.labels_weight,
        }


class DistillationTrainer(AtomicCheckpointMixin, Trainer):
    """Trains a student to give the same logits, hidden states and attention scores as a frozen teacher.

    Labels are a target only if asked for (TernaryBERT has none on them); evaluation is the plain task loss and metrics
    of the student, without the teacher. Every term is a mean over the sequences, real tokens or real
    (query, key) pairs of the whole optimizer step, over all micro-batches and processes: gradient accumulation and
    distributed data parallel runs give the gradients of one big batch, however it is padded.

    Logs, beside the Trainer's `loss`, each term without its weight: `loss_logits`, `loss_hidden_states`,
    `loss_attention_scores`, `loss_embeddings`, `loss_labels`. A non-finite term or gradient norm raises
    `FloatingPointError` before the optimizer step.

    Args:
        model: the student. A `transformers.PreTrainedModel` with a task head.
        teacher: a model of the same head, vocabulary and, for the targets that need it, shape. It is moved to the
            student's device, frozen, and belongs to the trainer from then on.
        args: see `DistillationArguments`.
        kwargs: `identity` of `AtomicCheckpointMixin`, and any further argument of `transformers.Trainer`.

    Raises:
        ValueError: teacher and student do not fit each other, naming the field.
    """

    # Terms are normalised over the whole optimizer step, the Trainer must not divide them again.
    loss_is_scaled_for_ga = True

    def __init__(self, model: PreTrainedModel, teacher: PreTrainedModel, args: DistillationArguments, **kwargs):
        self._targets = {target: weight for target, weight in args.target_weights.items() if weight}
        _check_fit(model, teacher, self._targets)
        super().__init__(model=model, args=args, **kwargs)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError("distillation runs in one process or distributed data parallel, not DeepSpeed or FSDP")
        # Transformers before `loss_is_scaled_for_ga` decides by this flag.
        self.model_accepts_loss_kwargs = True

        # A teacher prepared by an earlier trainer would keep that trainer's mixed precision. `unwrap_model` would also
        # strip the decorators of Transformers' own forward.
        if "_original_forward" in vars(teacher):
            teacher.forward = vars(teacher).pop("_original_forward")
        teacher._is_accelerate_prepared = False
        for name, module in list(teacher.named_modules()) if args.teacher_dropout else ():
            if type(module) is nn.Dropout:
                teacher.set_submodule(name, FastDropout(module.p))
        self.teacher = teacher.requires_grad_(False).train(args.teacher_dropout)
        self._teacher_forward = self.accelerator.prepare_model(teacher, evaluation_mode=True)

        self._window_terms = dict.fromkeys(self._targets, 0.0)
        self._window_steps = 0
        self._own_attention = model.config._attn_implementation
        if getattr(model.config, "weight_quantizer", None) == "lat":
            self.add_callback(_ScaleRefresh(self))
        if hasattr(model, "hold_steps"):
            self.add_callback(_HoldSteps(model))

    def create_optimizer(self, *args: Any, **kwargs: Any):
        """As `Trainer.create_optimizer`; learned step sizes and clips, and ghost features, get groups of their own."""
        created = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        rates = {LEARNED_STATE: self.args.quantizer_learning_rate, GHOST_STATE: self.args.ghost_learning_rate}
        for suffixes, rate in rates.items() if created else ():
            learned = {id(p) for name, p in self.model.named_parameters() if name.endswith(suffixes)}
            own = [p for group in optimizer.param_groups for p in group["params"] if id(p) in learned]
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in learned]
            if own:
                rate = rate or self.args.learning_rate
                optimizer.add_param_group({"params": own, "lr": rate, "weight_decay": 0.0})
        if created and self.args.step_learning_rate is not None:
            for step in (p for name, p in self.model.named_parameters() if name.endswith("_quantizer.step")):
                for group in optimizer.param_groups:
                    group["params"] = [p for p in group["params"] if p is not step]
                rate = self.args.step_learning_rate * step.item()
                optimizer.add_param_group({"params": [step], "lr": rate, "weight_decay": 0.0})
        return optimizer

    def _calibrate(self) -> None:
        """First values of the student's learned step sizes, from the first rows of the training data: the same on
        every process and in a resumed run."""
        if not any(name.endswith(".step") and not p for name, p in self.model.named_parameters()):
            return
        rows = range(min(self.args.per_device_train_batch_size, len(self.train_dataset)))
        columns = [name for name in self.train_dataset[0] if name in self._signature_columns]
        batch = self.data_collator([{name: self.train_dataset[row][name] for name in columns} for row in rows])
        batch = self._prepare_inputs({name: value for name, value in batch.items() if name not in self.label_names})
        self.model.calibrate(**batch)

    def train(self, *args: Any, **kwargs: Any):
        """As `AtomicCheckpointMixin.train`; meanwhile both models return attention scores, if those are a target."""
        self._set_signature_columns_if_needed()
        self._calibrate()
        with ExitStack() as stack:
            if "attention_scores" in self._targets:
                stack.enter_context(_attention(self.model, SCORES_ATTENTION))
                stack.enter_context(_attention(self.teacher, SCORES_ATTENTION))
            if self.args.without_dropout:
                stack.enter_context(_without_dropout(self.model))
            return super().train(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any):
        """As `Trainer.evaluation_loop`, with the student's own attention implementation also during training."""
        with _attention(self.model, self._own_attention) if self.is_in_train else nullcontext():
            return super().evaluation_loop(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """The micro-batches of one optimizer step, and the counts its terms are divided by (see `_count_items`)."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        counts = torch.stack([_count_items(batch) for batch in batches]).sum(0).to(device)
        return batches, self._per_process(self.accelerator.reduce(counts, reduction="sum"))

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> None:  # noqa: ARG002
        """None: evaluation reports the model's own mean, and training counts in `get_batch_samples`."""
        return None

    def _per_process(self, counts: Tensor) -> Tensor:
        # Distributed data parallel averages gradients over processes where the sum is wanted.
        return counts.clamp(min=1).float() / self.accelerator.num_processes

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ):
        """Weighted sum of the requested terms in training, the student's own task loss in evaluation.

        Args:
            num_items_in_batch: (3,) sequences, real tokens and real pairs of the optimizer step, divided by the number
                of processes; taken from `inputs` when None.
        """
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs=return_outputs)
        features = {name: value for name, value in inputs.items() if name not in self.label_names}
        counts = self._per_process(_count_items(inputs)) if num_items_in_batch is None else num_items_in_batch
        capture = {
            "output_hidden_states": bool({"hidden_states", "embeddings"} & set(self._targets)),
            "output_attentions": "attention_scores" in self._targets,
            "return_dict": True,
        }
        teacher = None
        if set(self._targets) != {"labels"}:
            with torch.no_grad():
                teacher = self._teacher_forward(**features, **capture)
        students = self._student_outputs(model, features | capture)
        mask, counts = _real_tokens(features), counts.unbind()
        labels = {name: inputs[name] for name in self.label_names if name in inputs}
        parts = [self._terms(student, teacher, mask, counts, labels) for student in students]
        terms = {target: sum(part[target] for part in parts) for target in self._targets}
        loss = sum(weight * terms[target] for target, weight in self._targets.items())
        self._add_step_losses(**{f"loss_{target}": term.detach() for target, term in terms.items()})
        return (loss, students[0]) if return_outputs else loss

    def _student_outputs(self, model: torch.nn.Module, inputs: dict[str, Any]) -> list[Any]:
        """Outputs of every network whose losses are summed; here the student's only."""
        return [model(**inputs)]

    def _terms(
        self, student: Any, teacher: Any, mask: Tensor, counts: tuple[Tensor, ...], labels: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        sequences, tokens, pairs = counts
        terms = {}
        config, logits = self.model.config, student.get("logits")
        regression = logits is not None and (logits.shape[-1] == 1 or config.problem_type == "regression")
        per_token = logits is not None and logits.dim() == 3
        if "logits" in self._targets:
            temperature = self.args.temperature
            if "start_logits" in student:
                terms["logits"] = span_logits_loss(
                    (student.start_logits, student.end_logits),
                    (teacher.start_logits, teacher.end_logits),
                    mask,
                    temperature=temperature,
                    count=tokens,
                )
            else:
                count = tokens if per_token else sequences
                terms["logits"] = logits_loss(
                    logits, teacher.logits, mask, regression=regression, temperature=temperature, count=count
                )
        layers = config.num_hidden_layers
        if "hidden_states" in self._targets:
            _check_captured("hidden_states", layers + 1, student.hidden_states, teacher.hidden_states)
            terms["hidden_states"] = hidden_states_loss(
                student.hidden_states, teacher.hidden_states, mask, count=tokens
            )
        if "attention_scores" in self._targets:
            _check_captured("attention_scores", layers, student.attentions, teacher.attentions)
            terms["attention_scores"] = attention_scores_loss(
                student.attentions, teacher.attentions, mask, count=pairs
            )
        if "embeddings" in self._targets:
            terms["embeddings"] = embeddings_loss(
                student.hidden_states[-1], teacher.hidden_states[-1], mask, count=sequences
            )
        if "labels" in self._targets:
            count = tokens if per_token else sequences
            terms["labels"] = labels_loss(student, labels, regression=regression, count=count)
        return terms

    def _on_step_losses(self, losses: dict[str, float]) -> None:
        for target in self._targets:
            self._window_terms[target] += losses[f"loss_{target}"]
        self._window_steps += 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`; adds each term's mean over the steps since the last training log and over processes."""
        if "loss" in logs and self._window_steps:
            means = torch.tensor(list(self._window_terms.values()), device=self.args.device) / self._window_steps
            means = self.accelerator.reduce(means, reduction="mean").tolist()
            logs.update({f"loss_{target}": mean for target, mean in zip(self._targets, means, strict=True)})
            self._window_terms = dict.fromkeys(self._targets, 0.0)
            self._window_steps = 0
        super().log(logs, start_time)

    def refresh_scales(self) -> None:
        """Gives the student's loss-aware quantizers Adam's second moments as curvature (Hou and Kwok, 2018).

        The scales are buffers of the student: a resumed run finds them in its checkpoint, and must not refresh them
        once more than an uninterrupted one.
        """
        state = self.optimizer.state
        moments = {
            name: state[parameter]["exp_avg_sq"]
            for name, parameter in self.model.named_parameters()
            if "exp_avg_sq" in state.get(parameter, {})
        }
        self.model.update_scales(moments)


class _ScaleRefresh(TrainerCallback):
    def __init__(self, trainer: DistillationTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):  # noqa: ARG002
        if state.global_step % args.scale_refresh_steps == 0:
            self.trainer.refresh_scales()


class _HoldSteps(TrainerCallback):
    def __init__(self, model: PreTrainedModel):
        self.model = model

    def on_optimizer_step(self, args, state, control, **kwargs):  # noqa: ARG002
        self.model.hold_steps()


@contextmanager
def _attention(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Switches a model's attention implementation for the time of a `with` block."""
    previous = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(previous)


@contextmanager
def _without_dropout(model: PreTrainedModel) -> Iterator[None]:
    """Sets a model's shares of dropout to 0 for the time of a `with` block; its config keeps them."""
    shares = {module: module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    try:
        for module in shares:
            module.p = 0.0
        yield
    finally:
        for module, share in shares.items():
            module.p = share


def _real_tokens(inputs: Mapping[str, Any]) -> Tensor:
    """Boolean mask (B, T) of real tokens; choices of a multiple choice batch (B, choices, T) become sequences."""
    mask = inputs.get("attention_mask")
    if mask is None:
        tokens = inputs["input_ids"]
        mask = torch.ones_like(tokens, dtype=torch.bool)
    return mask.reshape(-1, mask.shape[-1]).bool()


def _count_items(batch: Mapping[str, Any]) -> Tensor:
    """(3,) int64: rows (sequences, or questions of a multiple choice batch), real tokens, real (query, key) pairs."""
    lengths = _real_tokens(batch).sum(-1)
    rows = lengths.new_tensor(batch["input_ids"].shape[0])
    return torch.stack([rows, lengths.sum(), lengths.square().sum()])


def _check_captured(target: str, expected: int, student: Any, teacher: Any) -> None:
    for who, layers in (("student", student), ("teacher", teacher)):
        found = 0 if layers is None else len(layers)
        if found != expected:
            raise ValueError(f"{target}: the {who} returned {found} layers to distil, expected {expected}")


def _check_fit(student: PreTrainedModel, teacher: PreTrainedModel, targets: Mapping[str, float]) -> None:
    if teacher is student:
        raise ValueError("teacher and student are the same object: the student would learn from itself")
    fields = ["vocab_size"]
    if "logits" in targets:
        if student.base_model is student:
            raise ValueError("logits: the student is a backbone without a head; set logits_weight to 0")
        fields.append("num_labels")
        if "multi_label_classification" in (student.config.problem_type, teacher.config.problem_type):
            raise ValueError('logits: problem_type "multi_label_classification" has no single softmax to distil')
    if "labels" in targets and student.base_model is student:
        raise ValueError("labels: the student is a backbone without a head; set labels_weight to 0")
    if "hidden_states" in targets:
        fields += ["num_hidden_layers", "hidden_size"]
    if "embeddings" in targets:
        fields.append("hidden_size")
    if "attention_scores" in targets:
        fields += ["num_hidden_layers", "num_attention_heads"]
    for name in dict.fromkeys(fields):
        ours, theirs = getattr(student.config, name), getattr(teacher.config, name)
        if ours != theirs:
            raise ValueError(f"{name} differs: student {ours}, teacher {theirs}")
