"""The tasks: columns, labels, metrics, and where their data lies on the Hub."""

from __future__ import annotations

from dataclasses import dataclass


GLUE = "nyu-mll/glue"


@dataclass(frozen=True)
class Task:
    """Columns, labels and metrics of a task. `label_names` in index order; None means regression, or question
    answering, where `unanswerable` says whether there are questions without an answer, or `embedding`: the label is
    compared with the cosine of two sentences' vectors.

    `dataset` and `name` are its Hub data set and configuration. A run is judged by `main_metric`; higher is better in
    every metric. `eval_splits` are those that the split "validation" stands for, the first of them judges. `copies` is
    how many variants of a sentence TinyBERT's augmentation draws.
    """

    text: str
    text_pair: str | None = None
    label: str = "label"
    label_names: tuple[str, ...] | None = None
    metrics: tuple[str, ...] = ("accuracy",)
    main_metric: str = "accuracy"
    dataset: str | None = GLUE
    name: str | None = None
    unanswerable: bool | None = None
    embedding: bool = False
    eval_splits: tuple[str, ...] = ("validation",)
    copies: int | None = None

    @property
    def kind(self) -> str:
        """`classification`, `regression`, `question-answering` or `embedding`."""
        if self.embedding:
            return "embedding"
        if self.unanswerable is not None:
            return "question-answering"
        return "regression" if self.label_names is None else "classification"


ENTAILMENT = ("entailment", "not_entailment")
CORRELATIONS = ("pearson", "spearmanr", "pearson_spearman")

# Columns and label order: the Hub's nyu-mll/glue and cornell-movie-review-data/rotten_tomatoes.
# Metrics: the GLUE benchmark (Wang et al. 2019, table 1); MRPC and QQP are judged by accuracy, by which TernaryBERT's
# code selects its checkpoints. Copies: TinyBERT's code; MNLI and QQP, for which it has 10, are not augmented in the
# papers' tables.
TASKS: dict[str, Task] = {
    "cola": Task(
        text="sentence",
        label_names=("unacceptable", "acceptable"),
        metrics=("matthews_correlation", "accuracy"),
        main_metric="matthews_correlation",
        name="cola",
        copies=30,
    ),
    "mnli": Task(
        text="premise",
        text_pair="hypothesis",
        label_names=("entailment", "neutral", "contradiction"),
        name="mnli",
        eval_splits=("validation_matched", "validation_mismatched"),
    ),
    "mrpc": Task(
        text="sentence1",
        text_pair="sentence2",
        label_names=("not_equivalent", "equivalent"),
        metrics=("accuracy", "f1"),
        name="mrpc",
        copies=30,
    ),
    "qnli": Task(text="question", text_pair="sentence", label_names=ENTAILMENT, name="qnli", copies=20),
    "qqp": Task(
        text="question1",
        text_pair="question2",
        label_names=("not_duplicate", "duplicate"),
        metrics=("accuracy", "f1"),
        name="qqp",
    ),
    "rte": Task(text="sentence1", text_pair="sentence2", label_names=ENTAILMENT, name="rte", copies=30),
    "sst2": Task(text="sentence", label_names=("negative", "positive"), name="sst2", copies=20),
    "stsb": Task(
        text="sentence1",
        text_pair="sentence2",
        metrics=CORRELATIONS,
        main_metric="pearson_spearman",
        name="stsb",
        copies=30,
    ),
    "stsb_embedding": Task(
        text="sentence1",
        text_pair="sentence2",
        metrics=("spearmanr", "pearson"),
        main_metric="spearmanr",
        name="stsb",
        embedding=True,
    ),
    "wnli": Task(text="sentence1", text_pair="sentence2", label_names=ENTAILMENT[::-1], name="wnli"),
    "rotten_tomatoes": Task(
        text="text", label_names=("neg", "pos"), dataset="cornell-movie-review-data/rotten_tomatoes"
    ),
    **{
        name: Task(
            text="question",
            text_pair="context",
            label="answers",
            metrics=("exact_match", "f1"),
            main_metric="f1",
            dataset=f"rajpurkar/{name}",
            unanswerable=unanswerable,
        )
        for name, unanswerable in (("squad", False), ("squad_v2", True))
    },
}


def get_task(name: str) -> Task:
    """The task of that name. Raises `ValueError` listing the known ones."""
    if name not in TASKS:
        raise ValueError(f"data.task: expected one of {', '.join(sorted(TASKS))}, found {name!r}")
    return TASKS[name]
