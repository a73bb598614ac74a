"""Sound checkpoints to damage, and the one question asked of a damaged one: same answer, or a clear error?"""

import time

import pytest
import torch
from tiny import answers, inputs, latent
from transformers import AutoModelForSequenceClassification

from modeling_qbert import CheckpointError, verify_checkpoint


WEIGHTS, CONFIG = "model.safetensors", "config.json"
SETTINGS = [
    ("2bit", {"weight_granularity": "per_row"}),
    ("dense", {"weight_granularity": "per_group", "bits": "2-8-8", "weight_quantizer": "lat"}),
    ("2bit", {"bits": "8-8-8", "embedding_granularity": "per_group"}),  # codes of 8 bits have the shape of weights
    ("2bit", {"family": "binary", "bits": "1-1-4", "planes": 2, "activation_quantizer": "lsq", "position_bits": 8}),
]


def make_good(tmp_path_factory):
    """[(folder, logits)] of sound checkpoints."""
    made = []
    for number, (packing, fields) in enumerate(SETTINGS):
        folder = tmp_path_factory.mktemp(f"good{number}")
        model = latent(seed=number, vocab_size=101, **fields).pack(packing)
        model.save_pretrained(folder)
        made.append((folder, answers(model, inputs())))
    return made


def outcome(folder):
    """Logits, or the error of loading."""
    start = time.perf_counter()
    try:
        model = AutoModelForSequenceClassification.from_pretrained(folder)
    except (ValueError, OSError) as error:  # any other type is a failure of the test
        result = error
    else:
        result = answers(model, inputs())
    assert time.perf_counter() - start < 5
    return result


def check(folder, logits, must_fail=(), about="", wrapped=True, named=True):
    """`must_fail`: texts that the error must hold; None when the answer must not change."""
    result = outcome(folder)
    if isinstance(result, torch.Tensor):
        assert torch.equal(result, logits), f"{about}: silently wrong"
        assert not must_fail, f"{about}: accepted"
        return "same"
    assert must_fail is not None, f"{about}: {result}"
    text = str(result)
    assert not named or str(folder) in text, f"{about}: error does not name the folder: {type(result)} {text}"
    assert not wrapped or isinstance(result, CheckpointError), f"{about}: {type(result)} {text}"
    for part in must_fail:
        assert part in text, f"{about}: expected {part!r} in {text!r}"
    with pytest.raises(CheckpointError):
        verify_checkpoint(folder)
    return "error"
