"""Metrics of the tasks on scikit-learn and scipy, as an `evaluate.Metric` without a network. Scores are fractions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from scipy.stats import ConstantInputWarning, NearConstantInputWarning, pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import EvalPrediction

from .tasks import Task, get_task


def main_metric(task: str | Task) -> str:
    """Name of the metric that judges a run of `task`; higher is better."""
    return _task(task).main_metric


def mean_squared_difference(logits: np.ndarray, others: np.ndarray) -> float:
    """Mean squared difference of two models' logits (rows, ...) of the same rows; where both are 0 (padding of logits
    per token) does not count. How far a student is from its teacher: a steadier measure than a score of few rows."""
    counted = (logits != 0) | (others != 0)
    return float(np.square(logits.astype(np.float64) - others)[counted].mean()) if counted.any() else 0.0


def score(task: str | Task, predictions: Sequence | np.ndarray, references: Sequence | np.ndarray) -> dict[str, float]:
    """All metrics of `task`.

    Args:
        task: a key of `TASKS`, or a `Task` of own data.
        predictions: (B,) class indices, or scores for regression.
        references: (B,) of the same kind.

    Raises:
        ValueError: empty, different lengths, not one dimension, or not finite.
    """
    task = _task(task)
    predictions, references = np.asarray(predictions), np.asarray(references)
    if predictions.shape != references.shape or predictions.ndim != 1 or len(predictions) == 0:
        raise ValueError(
            "predictions and references: expected the same non-empty shape (B,), "
            f"found {predictions.shape} and {references.shape}"
        )
    for name, values in (("predictions", predictions), ("references", references)):
        if not np.isfinite(values).all():
            raise ValueError(f"{name}: expected finite numbers, found {(~np.isfinite(values)).sum()} that are not")
    if task.label_names is None:
        scores = _correlations(predictions, references)
    else:
        scores = {name: _classification(name, task, predictions, references) for name in task.metrics}
    return {name: float(scores[name]) for name in task.metrics}


class GlueMetric(evaluate.Metric):
    """The metrics of one task: `GlueMetric("mrpc").compute(predictions=..., references=...)`.

    Built without a network, for `evaluate.evaluator("text-classification")` and everything else that takes a metric.
    """

    def __init__(self, task: str | Task, **kwargs: Any):
        self.task = _task(task)
        config_name = task if isinstance(task, str) else "own_data"
        super().__init__(**({"config_name": config_name, "keep_in_memory": True} | kwargs))

    def _info(self) -> evaluate.MetricInfo:
        dtype = "float32" if self.task.label_names is None else "int64"
        return evaluate.MetricInfo(
            description=f"{', '.join(self.task.metrics)} on scikit-learn and scipy.",
            citation="",
            inputs_description="predictions, references: (B,) class indices, or scores for regression.",
            features=datasets.Features({"predictions": datasets.Value(dtype), "references": datasets.Value(dtype)}),
        )

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        return score(self.task, predictions, references)


def compute_metrics_for(task: str | Task) -> Callable[[EvalPrediction], dict[str, float]]:
    """`compute_metrics` for the Trainer: logits (B, classes), or (B, 1) for regression, to all metrics of `task`."""
    task = _task(task)
    columns = 1 if task.label_names is None else len(task.label_names)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions
        logits = np.asarray(logits[0] if isinstance(logits, tuple) else logits)  # a tuple has further model outputs
        if logits.ndim != 2 or logits.shape[1] != columns:
            raise ValueError(f"logits: expected shape (B, {columns}), found {logits.shape}")
        if not np.isfinite(logits).all():
            # argmax would call a row of NaN class 0
            wrong = (~np.isfinite(logits).all(axis=1)).sum()
            raise ValueError(f"logits: expected finite numbers, found {wrong} of {len(logits)} rows that are not")
        predictions = logits[:, 0] if task.label_names is None else logits.argmax(axis=1)
        return score(task, predictions, prediction.label_ids)

    return compute_metrics


def _task(task: str | Task) -> Task:
    return get_task(task) if isinstance(task, str) else task


def _classification(name: str, task: Task, predictions: np.ndarray, references: np.ndarray) -> float:
    """One metric of class indices. F1 is that of class 1 where there are two (GLUE's definition for MRPC and QQP),
    else the mean over all classes."""
    if name == "accuracy":
        return accuracy_score(references, predictions)
    if name == "matthews_correlation":
        return matthews_corrcoef(references, predictions)
    if name == "f1":
        classes = len(task.label_names)
        average = {"average": "binary"} if classes == 2 else {"average": "macro", "labels": range(classes)}
        return f1_score(references, predictions, zero_division=0.0, **average)
    raise ValueError(f"metric: expected accuracy, matthews_correlation or f1, found {name!r}")


def _correlations(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """Pearson, Spearman and their mean, GLUE's score for STS-B. Constant predictions count as 0, as in Matthews'
    correlation, where the formula has no value."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        warnings.simplefilter("ignore", NearConstantInputWarning)
        pearson = pearsonr(predictions, references).statistic if len(predictions) > 1 else np.nan
        spearman = spearmanr(predictions, references).statistic if len(predictions) > 1 else np.nan
    pearson, spearman = np.nan_to_num(pearson), np.nan_to_num(spearman)
    return {"pearson": pearson, "spearmanr": spearman, "pearson_spearman": (pearson + spearman) / 2}
