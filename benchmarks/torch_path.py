"""Packed inference in plain torch, without the native engine, against full precision, as ratios.

    python benchmarks/torch_path.py [--model base|minilm] [--output benchmarks/results]

Weights are random: speed only. Candidates are interleaved round by round; a ratio is the median over rounds of
fp32 time / packed time. No speed is printed when the packed logits are not those of the fake-quant model. Peak memory
is that of a fresh process that loads and answers once.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


os.environ["QBERT_CPU"] = "off"  # before the package is imported: plain torch is what is measured

import torch
from transformers import BertConfig, BertForSequenceClassification

import modeling_qbert
from modeling_qbert import TernaryBertConfig, TernaryBertForSequenceClassification
from trainers.bench import interleaved, ratio
from trainers.machine import cpu_name
from trainers.results import environment


SIZES = {
    "base": {},
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
}
SHAPES = ((1, 8), (1, 32), (1, 128), (8, 128))  # batch, tokens


def batch(shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    ids = torch.randint(1000, 20000, shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def inference(size: str) -> list[dict]:
    """Milliseconds and ratio for every shape, W2A8 packed against fp32 with Transformers' default attention."""
    latent = TernaryBertForSequenceClassification(TernaryBertConfig(**SIZES[size])).eval()
    fp32 = BertForSequenceClassification(BertConfig(**SIZES[size])).eval()
    packed = latent.pack()
    rows = []
    for shape in SHAPES:
        inputs = batch(shape)
        difference = float((packed(**inputs).logits - latent(**inputs).logits).abs().max())
        if difference > 1e-4:
            raise SystemExit(f"{size} {shape}: packed logits differ from fake-quant by {difference}; no speed printed")
        times = interleaved({"fp32": lambda: fp32(**inputs), "packed": lambda: packed(**inputs)})  # noqa: B023
        row = {name: 1000 * statistics.median(values) for name, values in times.items()}
        rows.append({"batch": shape[0], "tokens": shape[1], **row, "ratio": ratio(times, "fp32", "packed")})
        print(f"{size:>7} {shape[0]}x{shape[1]:<4} fp32 {row['fp32']:8.1f} ms  packed {row['packed']:8.1f} ms  "
              f"{rows[-1]['ratio']:.2f} times as fast", flush=True)  # fmt: skip
    return rows


def peak_memory(size: str) -> dict[str, float]:
    """MB of resident memory that loading and one answer of 128 tokens add to the imports, fp32 against packed."""
    with tempfile.TemporaryDirectory() as folder:
        latent = TernaryBertForSequenceClassification(TernaryBertConfig(**SIZES[size]))
        latent.pack().save_pretrained(f"{folder}/packed")
        BertForSequenceClassification(BertConfig(**SIZES[size])).save_pretrained(f"{folder}/fp32")
        del latent
        result = {}
        for name in ("fp32", "packed"):
            command = [sys.executable, __file__, "--answer-once", f"{folder}/{name}"]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            result[name] = float(output.splitlines()[-1])
    print(f"{size:>7} peak memory over the imports: fp32 {result['fp32']:.0f} MB, packed {result['packed']:.0f} MB")
    return result


def answer_once(folder: str) -> None:
    from transformers import AutoModelForSequenceClassification

    assert modeling_qbert.__name__
    before = _memory_kb("VmRSS")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model(**batch((1, 128)))
    print((_memory_kb("VmHWM") - before) * 1024 / 1e6)


def _memory_kb(field: str) -> int:
    """Resident memory (VmRSS) or its peak (VmHWM) of this process; getrusage would count the parent's before exec."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=(*SIZES, "all"), default="all")
    parser.add_argument("--output", default="benchmarks/results")
    parser.add_argument("--answer-once", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.answer_once:
        return answer_once(arguments.answer_once)
    report = {**environment(), "cpu": cpu_name(), "models": {}}
    for size in SIZES if arguments.model == "all" else [arguments.model]:
        report["models"][size] = {
            "peak_memory_mb": peak_memory(size),
            "inference": inference(size),
        }
    path = Path(arguments.output) / "torch_path.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {path}")
    return None


if __name__ == "__main__":
    main()
