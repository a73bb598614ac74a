"""Classifies texts with ONNX Runtime alone: no torch, no Transformers, none of this project's packages.

qbert export model_cards/ternarybert-minilm-sst2 --output model.onnx
python examples/onnx_runtime.py model.onnx model_cards/ternarybert-minilm-sst2/tokenizer.json "a funny film"
"""

import json
import sys

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


def main(model: str, tokenizer_file: str, *texts: str) -> None:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    config = json.loads(session.get_modelmeta().custom_metadata_map["config"])
    tokenizer = Tokenizer.from_file(tokenizer_file)
    skipped = config["pad_token_id"] + 1 if "roberta" in config["model_type"] else 0  # positions start behind padding
    tokenizer.enable_truncation(config["max_position_embeddings"] - skipped)
    tokenizer.enable_padding(pad_id=config["pad_token_id"])
    encoded = tokenizer.encode_batch(list(texts))
    columns = {
        "input_ids": [text.ids for text in encoded],
        "attention_mask": [text.attention_mask for text in encoded],
        "token_type_ids": [text.type_ids for text in encoded],
    }
    names = [found.name for found in session.get_inputs()]
    (logits,) = session.run(None, {name: np.array(columns[name], dtype=np.int64) for name in names})
    scores = np.exp(logits - logits.max(-1, keepdims=True))
    scores /= scores.sum(-1, keepdims=True)
    answers = [
        {"text": text, "label": config["id2label"][str(row.argmax())], "score": float(row.max())}
        for text, row in zip(texts, scores)
    ]
    print(json.dumps(answers, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
