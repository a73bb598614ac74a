import pytest
import torch
from torch.nn import functional as F

from trainers.losses import attention_scores_loss, hidden_states_loss, logits_loss, span_logits_loss


LENGTHS = (5, 2, 3)
TOKENS = 5
MASK = (torch.arange(TOKENS) < torch.tensor(LENGTHS)[:, None]).long()  # (B, T)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def additive(mask, dtype=torch.float32):
    """(B, 1, 1, T) with finfo.min on padded keys, as Transformers adds it to scores."""
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(mask == 0, torch.finfo(dtype).min)[:, None, None, :]


def test_logits_is_soft_cross_entropy_over_batch_and_classes():
    student, teacher = randn(3, 4), randn(3, 4, seed=1)
    probabilities = teacher.softmax(-1)
    expected = torch.stack([-(probabilities[b] * student[b].log_softmax(-1)).mean() for b in range(3)]).mean()
    torch.testing.assert_close(logits_loss(student, teacher), expected)


def test_temperature_keeps_the_size_of_the_gradient():
    student, teacher = randn(3, 4).requires_grad_(), randn(3, 4, seed=1)
    norms = []
    for temperature in (1.0, 100.0):
        (gradient,) = torch.autograd.grad(logits_loss(student, teacher, temperature=temperature), student)
        norms.append(gradient.norm())
    assert 0.3 < norms[1] / norms[0] < 3
    hot = logits_loss(student, teacher, temperature=2.0)
    torch.testing.assert_close(hot, 4 * logits_loss(student / 2, teacher / 2))


def test_logits_regression_is_mean_squared_error():
    student, teacher = randn(3, 1), randn(3, 1, seed=1)
    torch.testing.assert_close(logits_loss(student, teacher, regression=True), F.mse_loss(student, teacher))
    with pytest.raises(ValueError, match="one class"):
        logits_loss(student, teacher)


def test_token_logits_skip_padding():
    student, teacher = randn(3, TOKENS, 4), randn(3, TOKENS, 4, seed=1)
    real = MASK.bool()
    expected = logits_loss(student[real], teacher[real])
    torch.testing.assert_close(logits_loss(student, teacher, MASK), expected)


def test_span_logits_ignore_padding():
    student = randn(3, TOKENS), randn(3, TOKENS, seed=1)
    teacher = randn(3, TOKENS, seed=2), randn(3, TOKENS, seed=3)
    expected = 0.0
    for s, t in zip(student, teacher, strict=True):
        for b, length in enumerate(LENGTHS):
            expected -= (t[b, :length].softmax(-1) * s[b, :length].log_softmax(-1)).sum() / sum(LENGTHS)
    torch.testing.assert_close(span_logits_loss(student, teacher, MASK), expected)


def test_hidden_states_sum_layers_and_skip_padding():
    student = [randn(3, TOKENS, 8, seed=layer) for layer in range(3)]
    teacher = [randn(3, TOKENS, 8, seed=10 + layer) for layer in range(3)]
    real = MASK.bool()
    expected = sum(F.mse_loss(s[real], t[real]) for s, t in zip(student, teacher, strict=True))
    torch.testing.assert_close(hidden_states_loss(student, teacher, MASK), expected)
    unmasked = sum(F.mse_loss(s, t) for s, t in zip(student, teacher, strict=True))
    torch.testing.assert_close(hidden_states_loss(student, teacher), unmasked)


def test_attention_scores_sum_layers_and_keep_only_real_pairs():
    student = [randn(3, 2, TOKENS, TOKENS, seed=layer) + additive(MASK) for layer in range(2)]
    teacher = [randn(3, 2, TOKENS, TOKENS, seed=10 + layer) + additive(MASK) for layer in range(2)]
    pairs = sum(length**2 for length in LENGTHS)
    expected = 0.0
    for s, t in zip(student, teacher, strict=True):
        for b, length in enumerate(LENGTHS):
            expected += (s[b, :, :length, :length] - t[b, :, :length, :length]).square().sum() / (pairs * 2)
    torch.testing.assert_close(attention_scores_loss(student, teacher, MASK), expected)


def masked_losses(student_dtype=torch.float32, fill=None):
    """(name, loss, student leaf) of the losses that meet masks, with `fill` wherever the mask says padding."""
    real = MASK.bool()
    pairs = (real[:, None, :, None] & real[:, None, None, :]).expand(-1, 2, -1, -1)
    cases = (
        ("span", real, lambda s, t: span_logits_loss((s, s), (t, t), MASK)),
        ("hidden", real[..., None].expand(-1, -1, 4), lambda s, t: hidden_states_loss([s], [t], MASK)),
        ("scores", pairs, lambda s, t: attention_scores_loss([s], [t], MASK)),
    )
    for name, keep, loss in cases:
        student, teacher = randn(*keep.shape), randn(*keep.shape, seed=1)
        if fill is not None:
            student, teacher = student.masked_fill(~keep, fill), teacher.masked_fill(~keep, -fill)
        student = student.to(student_dtype).requires_grad_()
        yield name, loss(student, teacher), student


@pytest.mark.parametrize("fill", [torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min, -1e4, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_changes_no_loss_and_no_gradient(fill, dtype):
    plain = {name: (loss, torch.autograd.grad(loss, leaf)[0]) for name, loss, leaf in masked_losses(dtype)}
    for name, loss, leaf in masked_losses(dtype, fill):
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert torch.isfinite(loss) and torch.isfinite(gradient).all()
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, plain[name][0])
        torch.testing.assert_close(gradient, plain[name][1])


def test_counts_of_the_whole_batch_make_parts_add_up():
    student = [randn(3, 2, TOKENS, TOKENS, seed=layer) for layer in range(2)]
    teacher = [randn(3, 2, TOKENS, TOKENS, seed=10 + layer) for layer in range(2)]
    whole = attention_scores_loss(student, teacher, MASK)
    pairs = torch.tensor(float(sum(length**2 for length in LENGTHS)))
    parts = 0.0
    for row in (slice(b, b + 1) for b in range(3)):
        parts += attention_scores_loss([s[row] for s in student], [t[row] for t in teacher], MASK[row], count=pairs)
    torch.testing.assert_close(parts, whole)
    logits = [randn(3, 4), randn(3, 4, seed=1)]
    parts = sum(logits_loss(*(x[b : b + 1] for x in logits), count=3) for b in range(3))
    torch.testing.assert_close(parts, logits_loss(*logits))


def test_a_batch_of_padding_costs_nothing():
    nothing = torch.zeros(2, TOKENS, dtype=torch.long)
    states, scores = randn(2, TOKENS, 8), randn(2, 2, TOKENS, TOKENS)
    assert hidden_states_loss([states], [-states], nothing) == 0
    assert attention_scores_loss([scores], [-scores], nothing) == 0
    assert span_logits_loss((states[..., 0],) * 2, (states[..., 1],) * 2, nothing) == 0


@pytest.mark.parametrize("loss, shape", [(hidden_states_loss, (3, 5, 8)), (attention_scores_loss, (3, 2, 5, 5))])
def test_captured_nothing_or_something_else_is_an_error(loss, shape):
    target, layer = loss.__name__.removesuffix("_loss"), randn(*shape)
    with pytest.raises(ValueError, match=f"{target}: the student returned none"):
        loss((), (layer,), MASK)
    with pytest.raises(ValueError, match=f"{target}: the teacher returned none"):
        loss((layer,), (), MASK)
    with pytest.raises(ValueError, match=f"{target}: the student returned 1 layers, the teacher 2"):
        loss((layer,), (layer, layer), MASK)
    with pytest.raises(ValueError, match=f"{target}: student has shape"):
        loss((layer,), (layer[..., :3],), MASK)


def test_logits_of_other_shape_are_an_error():
    with pytest.raises(ValueError, match=r"logits: student has shape \(3, 4\), teacher \(3, 2\)"):
        logits_loss(randn(3, 4), randn(3, 2))
