"""Heads: what a run does otherwise for classified sentences and for questions answered from a text. Rows of HEADS."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    pipeline,
)

from . import embeddings, question_answering
from .data import eval_splits, tokenize
from .losses import mean_pool
from .metrics import compute_metrics_for, score
from .recipe import DataSpec
from .tasks import Task


GOLDEN_TEXTS = (
    "a gripping, funny film",
    "two hours that feel like four",
    "The committee approved the plan on Monday.",
    "On Monday the plan was turned down by the committee.",
)


@dataclass(frozen=True)
class Evaluation:
    """A split as model inputs, and the scores of its logits (rows, ...) by metric."""

    inputs: Dataset
    score: Callable[[np.ndarray], dict[str, float]]


@dataclass(frozen=True)
class Head:
    """One kind of task.

    Args:
        name: its name in `modeling_qbert.get_model_class`.
        auto_class: loads its models, plain or packed.
        logits: of a model's output and the attention mask (B, T), (B, K), or (B, T, K) for answers per token; vectors
            (B, C) of an embedding model.
        encode: (rows, tokenizer, spec, config or None) to model inputs with labels.
        evaluation: (task, rows, tokenizer, spec, config or None) to the two fields of `Evaluation`.
        compute_metrics: of a task, for the Trainer; None where it has nothing to compare.
        golden: (folder, rows) to fixed inputs with what the checkpoint answers.
    """

    name: str
    auto_class: type
    logits: Callable[[Any, Tensor], Tensor]
    encode: Callable[..., Dataset]
    evaluation: Callable[..., tuple[Dataset, Callable[[np.ndarray], dict[str, float]]]]
    compute_metrics: Callable[[Task], Callable | None]
    golden: Callable[[Path, Dataset], list]


def predictions(task: Task, logits: np.ndarray) -> np.ndarray:
    """Class indices (rows,), or scores for regression."""
    return logits[:, 0] if task.kind == "regression" else logits.argmax(-1)


def _classified(task: Task, rows: Dataset, tokenizer: PreTrainedTokenizerBase, spec: DataSpec, config=None) -> tuple:
    return (
        tokenize(rows, tokenizer, spec, config),
        lambda logits: score(task, predictions(task, logits), rows["label"][:]),
    )


def _golden_texts(folder: Path, rows: Dataset) -> list:
    """Fixed texts, or pairs of them, with the label and score that a checkpoint gives them."""
    classify = pipeline("text-classification", model=str(folder))
    recorded = []
    for text, other in zip(GOLDEN_TEXTS, GOLDEN_TEXTS[1:] + GOLDEN_TEXTS[:1]):
        question = {"text": text, "text_pair": other} if "text_pair" in rows.column_names else text
        answer = classify(question)
        answer = answer[0] if isinstance(answer, list) else answer
        recorded.append([question, answer["label"], answer["score"]])
    return recorded


SEQUENCE_CLASSIFICATION = Head(
    name="sequence-classification",
    auto_class=AutoModelForSequenceClassification,
    logits=lambda output, mask: output.logits,  # noqa: ARG005
    encode=tokenize,
    evaluation=_classified,
    compute_metrics=compute_metrics_for,
    golden=_golden_texts,
)
QUESTION_ANSWERING = Head(
    name="question-answering",
    auto_class=AutoModelForQuestionAnswering,
    logits=lambda output, mask: torch.stack((output.start_logits, output.end_logits), -1),  # noqa: ARG005
    encode=question_answering.model_inputs,
    evaluation=question_answering.evaluation,
    compute_metrics=question_answering.span_metrics,
    golden=question_answering.golden,
)
EMBEDDING = Head(
    name="base",
    auto_class=AutoModel,
    logits=lambda output, mask: mean_pool(output.last_hidden_state, mask),
    encode=embeddings.model_inputs,
    evaluation=embeddings.evaluation,
    compute_metrics=lambda task: None,  # noqa: ARG005
    golden=embeddings.golden,
)
HEADS = {  # by the kind of task
    "classification": SEQUENCE_CLASSIFICATION,
    "regression": SEQUENCE_CLASSIFICATION,
    "question-answering": QUESTION_ANSWERING,
    "embedding": EMBEDDING,
}


def evaluations(
    task: Task,
    data: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    spec: DataSpec,
    config: PreTrainedConfig | None = None,
) -> dict[str, Evaluation]:
    """The evaluation splits of `spec`, the one that judges a run first."""
    evaluation = HEADS[task.kind].evaluation
    return {split: Evaluation(*evaluation(task, data[split], tokenizer, spec, config)) for split in eval_splits(spec)}


def predict_splits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, head: Head, splits: Mapping[str, Evaluation]
) -> dict[str, np.ndarray]:
    """Logits by split, as `predict` gives them."""
    return {split: predict(model, tokenizer, evaluation.inputs, head) for split, evaluation in splits.items()}


def scores(logits: Mapping[str, np.ndarray], splits: Mapping[str, Evaluation]) -> dict[str, float]:
    """Scores of logits by split. The metrics of a further split have its name at their end: accuracy_mismatched."""
    metrics = {}
    for index, (split, evaluation) in enumerate(splits.items()):
        ending = f"_{split.removeprefix('validation_')}" if index else ""
        metrics |= {f"{name}{ending}": value for name, value in evaluation.score(logits[split]).items()}
    return metrics


@torch.no_grad()
def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Dataset,
    head: Head = SEQUENCE_CLASSIFICATION,
    batch_size: int = 32,
) -> np.ndarray:
    """Logits (rows, ...), float32, in the order of `inputs`; batches are of similar length. Logits per token are 0 at
    padding."""
    collate = DataCollatorWithPadding(tokenizer)
    labels = {"labels", "start_positions", "end_positions"} & set(inputs.column_names)
    rows = inputs.remove_columns(list(labels))
    lengths = [len(ids) for ids in rows["input_ids"]]
    order = np.argsort(lengths, kind="stable")
    model.eval()
    logits = None
    for start in tqdm(range(0, len(order), batch_size), desc="evaluate", leave=False):
        batch_rows = order[start : start + batch_size].tolist()
        batch = collate([rows[row] for row in batch_rows]).to(model.device)
        found = head.logits(model(**batch), batch["attention_mask"]).float().cpu().numpy()
        if logits is None:
            per_token = (max(lengths),) if found.ndim == 3 else ()
            logits = np.zeros((len(order), *per_token, found.shape[-1]), dtype=np.float32)
        for row, values in zip(batch_rows, found):
            if values.ndim == 2:
                logits[row, : lengths[row]] = values[: lengths[row]]
            else:
                logits[row] = values
    return logits
