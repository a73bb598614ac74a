"""Extractive question answering: windows over long contexts, the best answer among them, SQuAD's scores.

N windows, T tokens. A window's first token is the classification token, on which "no answer" is read.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import modeling_qbert  # noqa: F401 (registers the packed families)

from .data import check_length
from .recipe import DataSpec
from .tasks import Task


DOC_STRIDE, MAX_QUERY_LENGTH = 128, 64  # tokens; BERT's code (Devlin et al., 2019), as TernaryBERT's and BinaryBERT's
N_BEST, MAX_ANSWER_LENGTH = 20, 30  # starts and ends that are tried, tokens; BERT's code
_POSITIONS = ("row", "starts", "ends")  # columns of `windows` that no model reads

GOLDEN_CONTEXT = (
    "The lighthouse on the northern cape was built of granite in 1871. Its lamp burned rape oil until 1912, when the "
    "keeper, Anna Holm, had it changed to electric light."
)
GOLDEN_QUESTIONS = (
    "When was the lighthouse built?",
    "What was the lighthouse built of?",
    "Who had the lamp changed?",
    "What colour is the roof of the church?",
)


def windows(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, spec: DataSpec, config: PreTrainedConfig | None = None
) -> Dataset:
    """Questions with windows of their contexts, as many as it takes to cover these.

    Windows begin `spec.doc_stride` tokens after each other; the question is cut to `spec.max_query_length` tokens.

    Args:
        rows: columns of `trainers.data.ANSWER_COLUMNS`.

    Returns:
        N rows: the tokenizer's inputs (T <= `spec.max_length`, unpadded); `start_positions` and `end_positions`, the
        tokens of the first answer, or 0 where it is not in the window; `row`, the index of the question; `starts` and
        `ends` (T), the character span of a token in the context, -1 for tokens that are not of it.

    Raises:
        ValueError: the tokenizer has no offsets, or `spec.max_length` does not fit tokenizer, model or question.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"question answering needs a tokenizer with offsets, found {type(tokenizer).__name__}")
    special = tokenizer.num_special_tokens_to_add(pair=True)
    check_length(tokenizer, spec, config, special + (spec.max_query_length or MAX_QUERY_LENGTH))

    def encode(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        found: dict[str, list] = {}
        for row, question, context, answers in zip(indices, batch["question"], batch["context"], batch["answers"]):
            for window in _windows(question, context, tokenizer, spec, special):
                positions = _answer_tokens(window["starts"], window["ends"], answers)
                window |= {"row": row, "start_positions": positions[0], "end_positions": positions[1]}
                for key, value in window.items():
                    found.setdefault(key, []).append(value)
        return found

    columns = rows.column_names
    return rows.map(
        encode, batched=True, with_indices=True, remove_columns=columns, keep_in_memory=True, desc="windows"
    )


def model_inputs(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, spec: DataSpec, config: PreTrainedConfig | None = None
) -> Dataset:
    """`windows` with only what a model reads."""
    return windows(rows, tokenizer, spec, config).remove_columns(list(_POSITIONS))


def evaluation(
    task: Task,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    spec: DataSpec,
    config: PreTrainedConfig | None = None,
) -> tuple[Dataset, Callable[[np.ndarray], dict[str, float]]]:
    """(model inputs, scores of their logits (N, T, 2) by `score`)."""
    cut = windows(rows, tokenizer, spec, config)

    def scores(logits: np.ndarray) -> dict[str, float]:
        found = best_answers(logits, cut, rows["context"], task.unanswerable, spec.null_threshold or 0.0)
        return score(task, [answer["answer"] for answer in found], [answers["text"] for answers in rows["answers"]])

    return cut.remove_columns(list(_POSITIONS)), scores


def _windows(
    question: str, context: str, tokenizer: PreTrainedTokenizerBase, spec: DataSpec, special: int
) -> list[dict[str, Any]]:
    question, limit = question.strip(), spec.max_query_length or MAX_QUERY_LENGTH
    asked = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)
    length = len(asked["input_ids"])
    if length > limit:
        question = question[: asked["offset_mapping"][limit - 1][1]]
        length = len(tokenizer(question, add_special_tokens=False)["input_ids"])
    room = spec.max_length - special - length
    encoded = tokenizer(
        question,
        context,
        truncation="only_second",
        max_length=spec.max_length,
        stride=max(room - (spec.doc_stride or DOC_STRIDE), 0),  # the tokenizer's stride is the overlap
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        padding=False,
    )
    found = []
    for index, offsets in enumerate(encoded["offset_mapping"]):
        in_context = [segment == 1 for segment in encoded.sequence_ids(index)]
        window = {key: encoded[key][index] for key in tokenizer.model_input_names if key in encoded}
        for key, side in (("starts", 0), ("ends", 1)):
            window[key] = [span[side] if inside else -1 for span, inside in zip(offsets, in_context)]
        found.append(window)
    return found


def _answer_tokens(starts: Sequence[int], ends: Sequence[int], answers: Mapping[str, list]) -> tuple[int, int]:
    """(first, last token) of the first answer, or (0, 0)."""
    if not answers["text"]:
        return 0, 0
    begin = answers["answer_start"][0]
    end = begin + len(answers["text"][0])
    tokens = [token for token, last in enumerate(ends) if last > begin and 0 <= starts[token] < end]
    if not tokens or starts[tokens[0]] > begin or ends[tokens[-1]] < end:
        return 0, 0
    return tokens[0], tokens[-1]


def best_answers(
    logits: np.ndarray,
    cut: Dataset,
    contexts: Sequence[str],
    unanswerable: bool = False,
    null_threshold: float = 0.0,
) -> list[dict[str, Any]]:
    """The best answer to each question over all its windows.

    Among the `N_BEST` best starts and ends of a window, the pair with the largest sum of logits whose end does not
    precede its start and that has at most `MAX_ANSWER_LENGTH` tokens. Unlike BERT's code a token may be answered from
    any window that has it, not only from that with the most context around it.

    Args:
        logits: (N, T, 2) of starts and ends, whatever stands at padded positions.
        cut: `windows` in the same order.
        unanswerable: the answer may be "": where both logits of the first token, in the window in which their sum is
            smallest, beat the best answer by more than `null_threshold`.

    Returns:
        For each context `answer`, `start` and `end` (characters; 0 and 0 for no answer) and `logit`, its sum.
    """
    if len(logits) != len(cut) or logits.ndim != 3 or logits.shape[-1] != 2:
        raise ValueError(f"logits: expected shape ({len(cut)}, T, 2), found {logits.shape}")
    best = [{"answer": "", "start": 0, "end": 0, "logit": -np.inf} for _ in contexts]
    nothing = np.full(len(best), np.inf)
    for row, starts, ends, values in zip(cut["row"], cut["starts"], cut["ends"], logits, strict=True):
        if not np.isfinite(values[: len(starts)]).all():
            raise ValueError(f"logits: expected finite numbers, found others for question {row}")
        nothing[row] = min(nothing[row], float(values[0].sum()))
        first, last, logit = _best_span(values, np.flatnonzero(np.asarray(starts) >= 0))
        if logit > best[row]["logit"]:
            best[row] = {"start": starts[first], "end": ends[last], "logit": logit}
    for row, context in enumerate(contexts):
        found = best[row]
        if unanswerable and nothing[row] - found["logit"] > null_threshold:
            best[row] = {"answer": "", "start": 0, "end": 0, "logit": float(nothing[row])}
        elif "answer" not in found:
            found["answer"] = context[found["start"] : found["end"]]
    return best


def _best_span(values: np.ndarray, tokens: np.ndarray) -> tuple[int, int, float]:
    """(first, last token, sum of logits) of the best span of `tokens`; minus infinity where there is none."""
    first, last = (tokens[np.argsort(-values[tokens, side], kind="stable")[:N_BEST]] for side in (0, 1))
    length = last[None] - first[:, None] + 1
    sums = values[first, 0][:, None] + values[last, 1][None]
    sums = np.where((length > 0) & (length <= MAX_ANSWER_LENGTH), sums, -np.inf)
    if not np.isfinite(sums).any():
        return 0, 0, -np.inf
    i, j = np.unravel_index(sums.argmax(), sums.shape)
    return int(first[i]), int(last[j]), float(sums[i, j])


def score(task: Task, answers: Sequence[str], gold: Sequence[Sequence[str]]) -> dict[str, float]:
    """SQuAD's exact match and F1, fractions: the mean over questions of the best value over their gold answers.

    Args:
        answers: one for each question, "" for none.
        gold: the accepted answers of each, none of them for a question without an answer.

    Raises:
        ValueError: different or no questions.
    """
    if len(answers) != len(gold) or not answers:
        raise ValueError(f"answers: expected one for each of {len(gold)} questions, found {len(answers)}")
    values: dict[str, list[float]] = {"exact_match": [], "f1": []}
    for answer, accepted in zip(answers, gold):
        if task.unanswerable:
            # Version 2 ignores gold answers of which nothing is left, and asks for nothing where none remains.
            accepted = [text for text in accepted if normalized(text)] or [""]
        values["exact_match"].append(max(float(normalized(answer) == normalized(text)) for text in accepted))
        values["f1"].append(max(_f1(answer, text, task.unanswerable) for text in accepted))
    return {name: float(np.mean(values[name])) for name in task.metrics}


def normalized(answer: str) -> str:
    """Lower case, without ASCII punctuation, the articles a, an and the, and superfluous white space."""
    bare = "".join(char for char in answer.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def _f1(answer: str, gold: str, unanswerable: bool) -> float:
    """Harmonic mean of precision and recall over words. Two empty answers are equal in version 2, and 0 in 1.1."""
    found, wanted = normalized(answer).split(), normalized(gold).split()
    if not found or not wanted:
        return float(unanswerable and found == wanted)
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted))


def span_metrics(task: Task) -> Callable[[EvalPrediction], dict[str, float]]:  # noqa: ARG001
    """`compute_metrics` for the Trainer: the share of windows whose start and end are both those of the first answer.
    It evaluates windows in an order of its own, and F1 needs to know whose they are: that comes after training."""

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        right = [
            np.asarray(logits).argmax(-1) == np.asarray(positions)
            for logits, positions in zip(prediction.predictions[:2], prediction.label_ids)
        ]
        return {"span_accuracy": float((right[0] & right[1]).mean())}

    return compute_metrics


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    context: str,
    *,
    max_length: int = 384,
    unanswerable: bool = False,
) -> dict[str, Any]:
    """The model's answer to one question: `answer`, `start`, `end`, and `score`, the product of the probabilities of
    its start and its end in their window, or of no answer."""
    limit = min(max_length, tokenizer.model_max_length, model.config.max_position_embeddings)
    spec = DataSpec(task="squad", max_length=limit, max_query_length=min(MAX_QUERY_LENGTH, limit // 2))
    answers = {"text": [], "answer_start": []}
    rows = Dataset.from_dict({"question": [question], "context": [context], "answers": [answers]})
    cut = windows(rows, tokenizer, spec)
    model.eval()
    logits, shares = np.zeros((len(cut), limit, 2)), []
    for index, inputs in enumerate(cut.remove_columns([*_POSITIONS, "start_positions", "end_positions"])):
        output = model(**{key: torch.tensor([value], device=model.device) for key, value in inputs.items()})
        both = torch.stack((output.start_logits[0], output.end_logits[0]), -1).double()  # (T, 2)
        logits[index, : len(both)] = both.cpu().numpy()
        shares.append(both.softmax(0).cpu().numpy())
    (found,) = best_answers(logits, cut, [context], unanswerable)
    candidates = [0.0]
    for starts, ends, share in zip(cut["starts"], cut["ends"], shares):
        if not found["answer"]:
            candidates.append(share[0, 0] * share[0, 1])
        elif found["start"] in starts and found["end"] in ends:
            candidates.append(share[starts.index(found["start"]), 0] * share[ends.index(found["end"]), 1])
    return {key: found[key] for key in ("answer", "start", "end")} | {"score": float(max(candidates))}


def golden(folder: Path, rows: Dataset) -> list:
    """Fixed questions with the answer and score that a checkpoint gives them. "" is one if `rows` have such."""
    unanswerable = any(not answers["text"] for answers in rows["answers"])
    model, tokenizer = AutoModelForQuestionAnswering.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    recorded = []
    for question in GOLDEN_QUESTIONS:
        found = answer(model, tokenizer, question, GOLDEN_CONTEXT, unanswerable=unanswerable)
        recorded.append([{"question": question, "context": GOLDEN_CONTEXT}, found["answer"], found["score"]])
    return recorded
