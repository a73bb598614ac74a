"""A checkpoint as a packed model in torch and as an ONNX file in ONNX Runtime: bytes and milliseconds, in one process.

    python benchmarks/onnx_runtime.py [--checkpoint FOLDER] [--threads N] [--output benchmarks/results]

Candidates are interleaved round by round, medians are over rounds, and `ratio` is how many times as long as `packed`
the ONNX file takes. `onnx` is the file of `qbert export`;
`onnx_level_4` the same file with MatMulNBits at accuracy level 4, 8-bit blocks of activations: what that costs in
answers stands beside its time. `fp32` is the dequantized network in torch. No speed is printed when answers of `onnx`
are not those of `packed`.
"""

import argparse
import json
import statistics
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from transformers import AutoConfig

import modeling_qbert
from modeling_qbert import export_onnx, ops
from trainers.bench import interleaved, ratio
from trainers.machine import cpu_name
from trainers.results import environment


ROOT = Path(__file__).resolve().parents[1]
SHAPES = ((1, 8), (1, 32), (1, 128), (8, 128))  # batch, tokens


def with_level(file: Path, level: int) -> bytes:
    """The file with another accuracy level."""
    model = onnx.load(file)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = level
    return model.SerializeToString()


def session(model: bytes, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=str(ROOT / "model_cards" / "ternarybert-minilm-sst2"))
    parser.add_argument("--file", help="an ONNX file that was exported from it before")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", default=str(ROOT / "benchmarks" / "results"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = Path(arguments.checkpoint)
    config = AutoConfig.from_pretrained(folder)
    packed = getattr(modeling_qbert, config.architectures[0]).from_pretrained(folder).eval()
    fp32 = packed.dequantize()
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(arguments.file or Path(temporary) / "model.onnx")
        if arguments.file is None:
            export_onnx(packed, file)
        size, exact, level_4 = file.stat().st_size, file.read_bytes(), with_level(file, 4)
    sessions = {"onnx": session(exact, arguments.threads), "onnx_level_4": session(level_4, arguments.threads)}
    rows = []
    for batch, tokens in SHAPES:
        ids = torch.randint(1000, config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(0))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        calls = {name: partial(run.run, None, arrays) for name, run in sessions.items()}
        calls |= {"packed": partial(packed, **inputs), "fp32": partial(fp32, **inputs)}
        answers = {name: np.asarray(call()[0]) for name, call in calls.items()}
        differences = {name: float(np.abs(answer - answers["packed"]).max()) for name, answer in answers.items()}
        if differences["onnx"] > 1e-4:
            raise SystemExit(f"{batch} x {tokens}: answers differ by {differences['onnx']}; no speed printed")
        times = interleaved(calls)
        medians = {name: 1000 * statistics.median(seconds) for name, seconds in times.items()}
        row = {"batch": batch, "tokens": tokens, "milliseconds": medians, "ratio": ratio(times, "onnx", "packed")}
        rows.append(row | {"largest_difference": {k: differences[k] for k in sessions}})
        print(row["milliseconds"], rows[-1]["largest_difference"], flush=True)
    found = {
        **environment(),
        "onnxruntime": onnxruntime.__version__,
        "cpu": cpu_name(),
        "threads": arguments.threads,
        "native_engine": not ops.WHY_NOT_NATIVE,
        "checkpoint": folder.name,
        "bytes": {"packed": (folder / "model.safetensors").stat().st_size, "onnx": size},
        "rows": rows,
    }
    (Path(arguments.output) / "onnx_runtime.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
