"""A config.json that lies about its weights: the same logits or one clear error, at once."""

import json
import shutil
import time

import pytest
from damage import CONFIG, SETTINGS, check
from transformers import AutoModelForSequenceClassification

from modeling_qbert import CheckpointError, TernaryBertForSequenceClassification, verify_checkpoint


ABSENT = object()
NUMBERS = [0, -1, 1, 37, 2**31, 2**63, 36.0, 35.5, "36", None, True, [36]]
SIZES = [
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "type_vocab_size",
    "group_size",
]
LIES = {
    **{name: NUMBERS for name in SIZES},
    "bits": [
        *("2-8-4", "8-2-8", "1-1-8", "3-2-8", "0-2-8", "-7-2-8", "2", "2-2", "", "2-2-16", "32-32-8", "32-32-32"),
        *(2, None, [2, 2, 8]),
    ],
    "weight_quantizer": ["lat", "twn", "bwn", 1, None],
    "weight_granularity": ["per_tensor", "per_group", "per_row", "per_column", None],
    "embedding_granularity": ["per_tensor", "per_group", "per_row", ""],
    "activation_quantizer": ["symmetric", "none", None],
    "activation_granularity": ["per_tensor", "per_batch", None],
    "weight_bits": [2, 7, -7],
    "quantizer": ["twn"],
    "ghost_ratio": [0.5],
    "hidden_act": ["relu", "gelu_new", "not_an_activation", 3, None],
    "layer_norm_eps": [1.0, 0.0, -1e-12, float("nan"), float("inf"), "1e-12", None],
    "pad_token_id": [1, 5],
    "is_decoder": [True],
    "add_cross_attention": [True],
    "num_labels": [3, 0, -1],
    "id2label": [{"0": "a", "1": "b", "2": "c"}, {"0": "a"}, {}],
    "dtype": ["bfloat16", "float16", "float64", "int8", "nonsense"],
    "torch_dtype": ["bfloat16"],
    "model_type": ["bert", "roberta", "ternary_roberta", "ternary_electra", "ternary", "", 3],
    "architectures": [["TernaryBertForTokenClassification"], ["TernaryBertModel"]],
    "transformers_weights": ["../elsewhere/model.safetensors", "config.json"],
    "quantization_config": [
        ABSENT,
        None,
        {},
        [],
        "qbert",
        {"quant_method": "qbert"},
        {"quant_method": "qbert", "packing": "3bit", "format_version": 2},
        {"quant_method": "qbert", "packing": "2bit", "format_version": 1},
        {"quant_method": "qbert", "packing": "2bit", "format_version": "2"},
        {"quant_method": "qbert", "packing": "dense", "format_version": 2},
        {"quant_method": "qbert", "packing": "2bit", "format_version": 2, "bits": 2},
        {"quant_method": "other", "packing": "2bit", "format_version": 2},
        {"quant_method": "bitnet"},
    ],
    "chunk_size_feed_forward": [2],
    "tie_word_embeddings": [False],
    "attn_implementation": ["eager", "flash_attention_2", "someone/kernel"],
    "_attn_implementation": ["eager", "someone/kernel"],
    "_attn_implementation_internal": ["someone/kernel"],
    "auto_map": [{"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model"}],
    "trust_remote_code": [True],
    "problem_type": ["multi_label_classification"],
    "return_dict": [False],
}
BOMBS = [
    {"num_hidden_layers": 20_000},
    {"num_hidden_layers": 10**9},
    {"vocab_size": 20_000_000},
    {"max_position_embeddings": 3 * 10**9},
    {"hidden_size": 2**20, "num_attention_heads": 2},
    {"hidden_size": 16_384, "num_attention_heads": 16, "num_hidden_layers": 128, "intermediate_size": 65_536},
]


def lie(folder, fields):
    config = json.loads((folder / CONFIG).read_text())
    for name, value in fields.items():
        config[name] = value
        if value is ABSENT:
            del config[name]
    (folder / CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize("number", range(len(SETTINGS)))
@pytest.mark.parametrize("field", LIES)
def test_config_lies(good, field, number, tmp_path):
    source, logits = good[number]
    (tmp_path / "evil.py").write_text("raise SystemExit")
    found = []
    for trial, value in enumerate(LIES[field]):
        folder = tmp_path / str(trial)
        shutil.copytree(source, folder)
        shutil.copy(tmp_path / "evil.py", folder)
        lie(folder, {field: value})
        ours = field != "model_type"  # AutoConfig answers for a type that nobody has registered
        found.append(check(folder, logits, (), f"{field} = {value!r}", wrapped=ours, named=ours))
    if field in SIZES:
        assert set(found) == {"error"} or field == "group_size" or found.count("same") <= 1, found


@pytest.mark.parametrize("fields", BOMBS, ids=str)
def test_config_bombs_are_refused_at_once(good, fields, tmp_path):
    source, logits = good[0]
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    lie(tmp_path, fields)
    start = time.perf_counter()
    check(tmp_path, logits, ["config"])
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"{}", b"[]", b"null", b"3", b'"x"', b"\xef\xbb\xbf{}", b"\xff\xfe", b"[" * 99_999, b'{"a":' * 99_999],
    ids=lambda text: repr(text[:8]),
)
def test_config_that_is_none(good, text, tmp_path):
    shutil.copytree(good[0][0], tmp_path, dirs_exist_ok=True)
    (tmp_path / CONFIG).write_bytes(text)
    for load in (TernaryBertForSequenceClassification.from_pretrained, verify_checkpoint):
        with pytest.raises(CheckpointError, match=str(tmp_path / CONFIG)):
            load(tmp_path)
    with pytest.raises((ValueError, OSError, TypeError, RecursionError)):  # Transformers' own, for the Auto classes
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_a_key_twice_in_the_config(good, tmp_path):
    source, logits = good[0]
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    text = (tmp_path / CONFIG).read_text()
    (tmp_path / CONFIG).write_text(text.replace("{", '{"num_attention_heads": 2,', 1))  # the last one counts
    check(tmp_path, logits, None)
    (tmp_path / CONFIG).write_text(text.rstrip()[:-1] + ', "num_attention_heads": 2}')
    check(tmp_path, logits, ["num_attention_heads"])
