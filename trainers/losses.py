"""Losses on logits, hidden states, attention scores, embeddings and labels: pure functions of model outputs.

Follow TernaryBERT (Zhang et al., EMNLP 2020): mean squared errors on every hidden state and on every layer's
pre-softmax attention scores, soft cross-entropy on the logits, each layer's mean summed over layers.

Padding is left out of the numerator and of the denominator of every mean. That is our reading: the released code sets
masked scores to zero and keeps them, and padded hidden states, in the denominator, so there a sentence's loss depends
on the padding of its batch.

`count` is the denominator's number of items (sequences, tokens or pairs, see each function). By default it is taken
from the given batch; a trainer that accumulates gradients passes the count of the whole accumulated batch, so that the
sum of the micro-batches' losses is the loss of one big batch.

Half precision inputs are computed in float32.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


Count = Tensor | float | None
IGNORED = -100  # a label that torch's and Transformers' losses leave out


def logits_loss(
    student: Tensor,
    teacher: Tensor,
    attention_mask: Tensor | None = None,
    *,
    regression: bool = False,
    temperature: float = 1.0,
    count: Count = None,
) -> Tensor:
    """Soft cross-entropy of the teacher's class distribution, or the squared error for regression.

    The mean runs over sequences (or real tokens) and over classes, as in TernaryBERT's code. With a temperature the
    loss is multiplied by its square, which keeps the size of the gradient (Hinton et al., 2015).

    Args:
        student, teacher: logits (B, K), or (B, T, K) for heads that answer per token.
        attention_mask: (B, T), non-zero for real tokens; only used with logits (B, T, K).
        regression: mean squared error of the raw outputs; `temperature` has no meaning there.
        temperature: divides the logits of both models before the softmax.
        count: sequences for (B, K), real tokens for (B, T, K).

    Raises:
        ValueError: the shapes differ, or a softmax over a single class was asked for, whose loss is constant.
    """
    student, teacher = _pair("logits", student, teacher)
    classes = student.shape[-1]
    if regression:
        losses = (student - teacher).square().sum(-1)
    elif classes == 1:
        raise ValueError("logits: the softmax over one class is constant and teaches nothing; use regression=True")
    else:
        probabilities = F.softmax(teacher / temperature, dim=-1)
        losses = -(probabilities * F.log_softmax(student / temperature, dim=-1)).sum(-1) * temperature**2
    if student.dim() == 2 or attention_mask is None:
        return losses.sum() / (_count(count, losses.numel()) * classes)
    real = attention_mask.bool()
    return losses.masked_fill(~real, 0).sum() / (_count(count, real) * classes)


def span_logits_loss(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    count: Count = None,
) -> Tensor:
    """Soft cross-entropy over positions for question answering: start plus end.

    Padded positions take no part in the softmax, and the mean runs over real positions (released code: over all T).

    Args:
        student, teacher: (start logits, end logits), each (B, T).
        attention_mask: (B, T), non-zero for real tokens.
        temperature: as in `logits_loss`.
        count: real tokens.

    Raises:
        ValueError: the shapes differ.
    """
    total = 0.0
    for student_logits, teacher_logits in zip(student, teacher, strict=True):
        s, t = _pair("logits", student_logits, teacher_logits)
        padding = torch.zeros_like(s, dtype=torch.bool) if attention_mask is None else ~attention_mask.bool()
        lowest = torch.finfo(s.dtype).min
        probabilities = F.softmax((t / temperature).masked_fill(padding, lowest), dim=-1)
        log_probabilities = F.log_softmax((s / temperature).masked_fill(padding, lowest), dim=-1)
        # 0 * -inf at a padded position would be NaN
        total = total - (probabilities * log_probabilities.masked_fill(padding, 0)).sum() * temperature**2
    return total / _count(count, ~padding)


def labels_loss(output: Any, labels: Mapping[str, Tensor], *, regression: bool = False, count: Count = None) -> Tensor:
    """Cross-entropy of the true answers, no distillation: final fine-tuning.

    The squared error for regression; start plus end, halved, for question answering, where a position past the end
    (the answer lies elsewhere) adds nothing; a label of -100 adds nothing either.

    Args:
        output: with `logits` (B, K) or (B, T, K), or `start_logits` and `end_logits` (B, T).
        labels: `labels` (B,) or (B, T), or `start_positions` and `end_positions` (B,).
        count: sequences, or real tokens for logits (B, T, K).

    Raises:
        ValueError: the batch has no labels.
    """
    if "start_logits" in output:
        pairs = [
            (output.start_logits, labels.get("start_positions")),
            (output.end_logits, labels.get("end_positions")),
        ]
    else:
        pairs = [(output.logits, labels.get("labels"))]
    total = 0.0
    for logits, target in pairs:
        if target is None:
            raise ValueError(f"labels: the batch holds none of this head, only {sorted(labels)}")
        logits = _at_least_float32(logits)
        if regression:
            total = total + (logits.flatten() - target.flatten().to(logits.dtype)).square().sum()
            continue
        target = target.masked_fill((target < 0) | (target >= logits.shape[-1]), IGNORED) if len(pairs) > 1 else target
        total = total + F.cross_entropy(logits.flatten(0, -2), target.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (_count(count, pairs[0][1].numel()) * len(pairs))


def hidden_states_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], attention_mask: Tensor | None = None, *, count: Count = None
) -> Tensor:
    """Mean squared error over real tokens and features, summed over layers.

    Args:
        student, teacher: the embedding output and every layer's output, each (B, T, C).
        attention_mask: (B, T), non-zero for real tokens.
        count: real tokens.

    Raises:
        ValueError: nothing was captured, or numbers of layers or shapes differ.
    """
    _check_layers("hidden_states", student, teacher)
    padding = None if attention_mask is None else ~attention_mask.bool()[..., None]
    total = sum(_squared_error("hidden_states", s, t, padding) for s, t in zip(student, teacher, strict=True))
    batch, tokens, features = student[0].shape
    items = batch * tokens if attention_mask is None else attention_mask.bool()
    return total / (_count(count, items) * features)


def mean_pool(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean over the real tokens of hidden states (B, T, C): (B, C), how sentence-transformers pools by default."""
    real = attention_mask.bool()[..., None]
    return hidden.masked_fill(~real, 0).sum(1) / real.sum(1).clamp(min=1)


def embeddings_loss(student: Tensor, teacher: Tensor, attention_mask: Tensor, *, count: Count = None) -> Tensor:
    """One minus the cosine between the mean-pooled sentence embeddings, mean over sequences.

    Args:
        student, teacher: the last hidden states (B, T, C).
        attention_mask: (B, T), non-zero for real tokens.
        count: sequences.

    Raises:
        ValueError: the shapes differ.
    """
    student, teacher = (mean_pool(hidden, attention_mask) for hidden in _pair("embeddings", student, teacher))
    return (1 - F.cosine_similarity(student, teacher, dim=-1)).sum() / _count(count, len(student))


def attention_scores_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], attention_mask: Tensor | None = None, *, count: Count = None
) -> Tensor:
    """Mean squared error over heads and real (query, key) pairs, summed over layers.

    Args:
        student, teacher: every layer's pre-softmax scores including the additive mask, each (B, H, T, T). What they
            hold where query or key is padding does not matter, not even when it is infinite.
        attention_mask: (B, T), non-zero for real tokens.
        count: real (query, key) pairs, the sum over sequences of their squared lengths.

    Raises:
        ValueError: nothing was captured, or numbers of layers or shapes differ.
    """
    _check_layers("attention_scores", student, teacher)
    batch, heads, queries, keys = student[0].shape
    padding, items = None, batch * queries * keys
    if attention_mask is not None:
        real = attention_mask.bool()
        padding = ~(real[:, None, :, None] & real[:, None, None, :])  # (B, 1, T, T)
        items = real.sum(-1).square()
    total = sum(_squared_error("attention_scores", s, t, padding) for s, t in zip(student, teacher, strict=True))
    return total / (_count(count, items) * heads)


class _SquaredError(torch.autograd.Function):
    """Sum of squared differences outside the padding; one pass backward, where autograd takes four."""

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, padding: Tensor | None) -> Tensor:
        difference = student - teacher
        if padding is not None:
            # before squaring: finfo.min squared is inf, and its gradient NaN
            difference.masked_fill_(padding, 0)
        ctx.save_for_backward(difference)
        return difference.square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (difference,) = ctx.saved_tensors
        towards = difference * (2 * grad)
        return towards, -towards if ctx.needs_input_grad[1] else None, None


def _squared_error(target: str, student: Tensor, teacher: Tensor, padding: Tensor | None) -> Tensor:
    return _SquaredError.apply(*_pair(target, student, teacher), padding)


def _pair(target: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.shape != teacher.shape:
        raise ValueError(f"{target}: student has shape {tuple(student.shape)}, teacher {tuple(teacher.shape)}")
    return _at_least_float32(student), _at_least_float32(teacher)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _check_layers(target: str, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    if not student or not teacher:
        raise ValueError(f"{target}: the {'teacher' if student else 'student'} returned none to distil")
    if len(student) != len(teacher):
        raise ValueError(f"{target}: the student returned {len(student)} layers, the teacher {len(teacher)}")


def _count(count: Count, items: Tensor | int) -> Tensor | float:
    """`count`, or the sum of `items` when it is None; at least 1, so that a batch of padding only costs 0, not NaN."""
    if count is not None:
        return count
    return items.sum().clamp(min=1) if isinstance(items, Tensor) else max(items, 1)
