"""Embedding models: one vector a sentence, compared by cosine. No labels are needed to distil one.

Shapes: N sentences, C hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from .data import check_length
from .losses import mean_pool
from .metrics import score
from .recipe import DataSpec
from .tasks import Task


GOLDEN_PAIRS = (
    ("a gripping, funny film", "two hours that feel like four"),
    ("The committee approved the plan on Monday.", "On Monday the plan was turned down by the committee."),
)


def _sentences(rows: Dataset) -> list[str]:
    """Every first sentence, then every second one."""
    return [text for column in ("text", "text_pair") if column in rows.column_names for text in rows[column]]


def _encode(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, spec: DataSpec, config: PreTrainedConfig | None
) -> Dataset:
    check_length(tokenizer, spec, config, tokenizer.num_special_tokens_to_add())
    encoded = tokenizer(texts, truncation=True, max_length=spec.max_length, padding=False)
    return Dataset.from_dict({key: encoded[key] for key in tokenizer.model_input_names if key in encoded})


def model_inputs(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, spec: DataSpec, config: PreTrainedConfig | None = None
) -> Dataset:
    """Every different sentence of the rows as a model input, in their order; labels play no part."""
    return _encode(list(dict.fromkeys(_sentences(rows))), tokenizer, spec, config)


def evaluation(
    task: Task,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    spec: DataSpec,
    config: PreTrainedConfig | None = None,
) -> tuple[Dataset, Callable[[np.ndarray], dict[str, float]]]:
    """Inputs of all first and then all second sentences, and the correlation of the cosines of their vectors (2N, C)
    with the labels (N,)."""

    def correlate(vectors: np.ndarray) -> dict[str, float]:
        first, second = np.split(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), 2)
        return score(task, (first * second).sum(1), rows["label"][:])

    return _encode(_sentences(rows), tokenizer, spec, config), correlate


@torch.no_grad()
def golden(folder: Path, rows: Dataset) -> list:  # noqa: ARG001
    """Fixed pairs of sentences with the cosine of the vectors that a checkpoint gives them."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    recorded = []
    for pair in GOLDEN_PAIRS:
        batch = tokenizer(list(pair), padding=True, return_tensors="pt")
        first, second = mean_pool(model(**batch).last_hidden_state, batch["attention_mask"])
        recorded.append(
            [{"text": pair[0], "text_pair": pair[1]}, "cosine", float(first @ second / first.norm() / second.norm())]
        )
    return recorded
