"""`qbert bench`: packed models beside the engines of others, on the same weights, in one process, round by round.

No speed is kept when the answers disagree. Results go to one JSON file that grows cell by cell (network, threads,
shape), so that a long measurement can be made in pieces.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel, pipeline
from transformers.modeling_outputs import SequenceClassifierOutput

from modeling_qbert import (
    BinaryBertConfig,
    BinaryBertForSequenceClassification,
    TernaryBertConfig,
    TernaryBertForSequenceClassification,
)

from .machine import cpu_name
from .results import environment, write_atomic
from .rivals import INPUTS, RIVALS, TO_BEAT, Answer, NotInstalledError, example, onnxruntime_file, prepare, similarity


NETWORKS: dict[str, dict[str, int]] = {
    "base": {},  # BERT-base
    "minilm-l6": {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
}
SHAPES = ((1, 8), (1, 32), (1, 128), (8, 128), (1, 384))  # batch, tokens
LABELS = 16  # of the random networks: more of them make an agreement mean more
ROUNDS = 7
BLOCK_SECONDS = 0.05
PAUSE_SECONDS = 0.01  # between blocks: threads of the one before stop spinning
SAME_LABELS = 0.98  # least share of sentences that get the same label from two pipelines
SAME_PATH = 1e-4  # largest difference of logits between the native engine and plain torch
SIMILAR = 0.98  # least correlation of logits with those of the full-precision model of the same weights


def _ternary(bits: str) -> Callable[[dict[str, int]], PreTrainedModel]:
    return lambda sizes: TernaryBertForSequenceClassification(TernaryBertConfig(**sizes, bits=bits, num_labels=LABELS))


def _binary(**fields: Any) -> Callable[[dict[str, int]], PreTrainedModel]:
    return lambda sizes: BinaryBertForSequenceClassification(BinaryBertConfig(**sizes, **fields, num_labels=LABELS))


def _split(bits: str, **fields: Any) -> Callable[[dict[str, int]], PreTrainedModel]:
    """BinaryBERT's network: half the heads and half the neurons, each weight in two planes."""

    def half(sizes: dict[str, int]) -> PreTrainedModel:
        whole = BinaryBertConfig(**sizes)
        heads = whole.num_attention_heads
        narrow = {
            "num_attention_heads": heads // 2,
            "head_dim": whole.hidden_size // heads,
            "intermediate_size": whole.intermediate_size // 2,
        }
        return _binary(bits=bits, planes=2, **fields)({**sizes, **narrow})

    return half


# Our settings: bits of weights and activations -> latent network of random weights.
OURS: dict[str, Callable[[dict[str, int]], PreTrainedModel]] = {
    "W8A8": _ternary("8-8-8"),
    "W2A8": _ternary("2-2-8"),
    "W1A8": _binary(bits="1-1-8"),
    "W1A8 two planes": _binary(bits="1-1-8", planes=2),
    "W1A8 split": _split("1-1-8"),
    "W1A4": _binary(bits="1-1-4", activation_quantizer="lsq"),
    "W1A4 split": _split("1-1-4", activation_quantizer="lsq"),
    "W1A1": _binary(bits="1-1-1", activation_quantizer="lsq"),
}
SHARED_WEIGHTS = "W2A8"  # rivals get this network's weights, dequantized


class DisagreementError(RuntimeError):
    """Two candidates answer differently: no speed is worth anything."""


def timed(call: Callable[[], object], seconds: float = BLOCK_SECONDS) -> float:
    """Seconds a call, over a block of at least `seconds`."""
    calls, start = 0, time.perf_counter()
    while True:
        call()
        calls += 1
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return elapsed / calls


def interleaved(
    candidates: Mapping[str, Callable[[], object]], rounds: int = ROUNDS, seconds: float = BLOCK_SECONDS
) -> dict[str, list[float]]:
    """Seconds a call of every candidate in every round, one after another, after two calls that do not count."""
    for call in candidates.values():
        call(), call()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            time.sleep(PAUSE_SECONDS)
            if times[name] and times[name][-1] < seconds:
                call()  # its weights come back to the caches
            times[name].append(timed(call, seconds))
    return times


def ratio(times: Mapping[str, Sequence[float]], numerator: str, denominator: str) -> float:
    """Median over rounds of how many times as long the numerator took."""
    return statistics.median(a / b for a, b in zip(times[numerator], times[denominator]))


@torch.no_grad()
def prepare_ours(names: Iterable[str], network: str, cache: Path) -> dict[str, PreTrainedModel]:
    """Packed networks of random weights, always the same; checkpoints of them stay in `cache`."""
    models = {}
    for name in names:
        folder = cache / network / name.replace(" ", "-")
        if not folder.is_dir():
            torch.manual_seed(0)
            model = OURS[name](NETWORKS[network]).eval()
            model.calibrate(**example(model.config.vocab_size, 4, 64, seed=1))
            model.pack().save_pretrained(f"{folder}.partial")
            os.rename(f"{folder}.partial", folder)
        models[name] = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    return models


@torch.no_grad()
def check_own_path(name: str, model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> float:
    """Largest difference of logits between the fused forward and layer by layer in plain torch.

    Raises:
        DisagreementError: it is above `SAME_PATH`.
    """
    fast = model(**inputs).logits
    slow = model(**inputs, output_hidden_states=True).logits  # hidden states come from the layers one by one
    difference = float((fast - slow).abs().max())
    if not difference <= SAME_PATH:
        raise DisagreementError(f"{name}: fused and layer-by-layer logits differ by {difference}; no speed is kept")
    return difference


def prepare_rivals(
    names: Iterable[str], model: PreTrainedModel, folder: Path, threads: int
) -> tuple[dict[str, Answer], dict[str, str]]:
    """Rivals of a full-precision model that can run here, and of the others why they cannot."""
    ready, missing = {}, {}
    for name in names:
        try:
            ready[name] = prepare(name, model, folder, threads)
        except NotInstalledError as error:
            missing[name] = str(error)
    return ready, missing


def check_rival(name: str, answer: object, expected: object) -> float:
    """Correlation of a candidate's logits with the full-precision model's.

    Raises:
        DisagreementError: it is below `SIMILAR`.
    """
    found = similarity(answer, expected)
    if not found >= SIMILAR:
        raise DisagreementError(
            f"{name}: logits correlate with the full-precision model's by {found:.4f}, expected at least {SIMILAR}; "
            "no speed is kept"
        )
    return found


def measure(
    network: str,
    threads: int,
    shapes: Sequence[tuple[int, int]],
    cache: Path,
    ours: Iterable[str] = tuple(OURS),
    rivals: Iterable[str] = tuple(RIVALS),
    rounds: int = ROUNDS,
) -> dict[str, dict[str, Any]]:
    """One cell for every shape: agreement and times of every candidate, rivals that are missing, ratios.

    Args:
        threads: of every candidate.
        cache: folder where the rivals' files stay.
    """
    torch.set_num_threads(threads)
    models = prepare_ours(ours, network, cache)
    shared = models.get(SHARED_WEIGHTS) or prepare_ours([SHARED_WEIGHTS], network, cache)[SHARED_WEIGHTS]
    answers, missing = prepare_rivals(rivals, shared.dequantize(), cache / network, threads)
    answers |= {name: lambda inputs, model=model: model(**inputs).logits for name, model in models.items()}
    reference = prepare("PyTorch fp32", shared.dequantize(), cache / network, threads)
    return {
        f"{batch}x{tokens}": measure_shape(
            answers, models, reference, example(shared.config.vocab_size, batch, tokens), rounds
        )
        | {"missing": missing, "threads": threads, **_parent()}
        for batch, tokens in shapes
    }


@torch.no_grad()
def measure_shape(
    answers: Mapping[str, Answer],
    models: Mapping[str, PreTrainedModel],
    reference: Answer,
    inputs: Mapping[str, torch.Tensor],
    rounds: int,
) -> dict[str, Any]:
    """Agreement first, then times and ratios, for one input."""
    expected = reference(inputs)
    agreement = {name: check_own_path(name, model, inputs) for name, model in models.items()}
    correlation = {
        name: check_rival(name, answer(inputs), expected)
        for name, answer in answers.items()
        if name not in models or name == SHARED_WEIGHTS
    }
    times = interleaved({name: lambda answer=answer: answer(inputs) for name, answer in answers.items()}, rounds)
    best = min(
        (name for name in TO_BEAT if name in times), key=lambda name: statistics.median(times[name]), default=None
    )
    return {
        "ms": {name: 1000 * statistics.median(values) for name, values in times.items()},
        "least_ms": {name: 1000 * min(values) for name, values in times.items()},
        "rounds_ms": {name: [1000 * value for value in values] for name, values in times.items()},
        "best_rival": best,
        "ratio": {} if best is None else {name: ratio(times, best, name) for name in models},
        "difference_from_torch": agreement,
        "correlation_with_fp32": correlation,
    }


def _parent() -> dict[str, Any]:
    return {**environment(), "cpu": cpu_name()}


def merge(path: Path, kind: str, network: str, threads: int, cells: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON file with these cells added or replaced."""
    report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    place = report.setdefault(kind, {}).setdefault(network, {}).setdefault(thread_name(threads), {})
    if kind == "memory":
        place.clear()  # one measurement: what was not measured now is of another time or machine
    place.update(cells)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(report, indent=1, sort_keys=True) + "\n").encode())
    return report


def thread_name(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"


def _digest(model: PreTrainedModel) -> str:
    """Name in the cache for rivals made of these very weights: folders of one name hold many a model."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def measure_pipeline(
    checkpoint: str, sentences: Sequence[str], threads: int, cache: Path, batches: Sequence[int] = (1, 32)
) -> dict[str, Any]:
    """Sentences a second of a text classifier through Transformers' `pipeline`, of mixed lengths as they come.

    The rival is ONNX Runtime int8 of the same weights behind the same pipeline: tokenizer, padding and post-processing
    are the same calls. Batches are padded to their longest sentence.

    Raises:
        DisagreementError: fewer than `SAME_LABELS` of the sentences get the same label.
        NotInstalledError: ONNX Runtime is missing.
    """
    torch.set_num_threads(threads)
    own, other = (pipeline("text-classification", model=checkpoint) for _ in range(2))
    session = prepare("ONNX Runtime int8", other.model.dequantize(), cache / _digest(other.model), threads)

    def forward(inputs: Mapping[str, torch.Tensor], **_: Any) -> SequenceClassifierOutput:
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        types = inputs.get("token_type_ids", torch.zeros_like(given["input_ids"]))
        return SequenceClassifierOutput(logits=torch.from_numpy(session({**given, "token_type_ids": types})))

    other._forward = forward
    result = {}
    for batch in batches:
        labels = [[row["label"] for row in pipe(list(sentences), batch_size=batch)] for pipe in (own, other)]
        same = sum(a == b for a, b in zip(*labels)) / len(sentences)
        if same < SAME_LABELS:
            raise DisagreementError(
                f"{checkpoint}: only {same:.1%} of the labels are ONNX Runtime's; no speed is kept"
            )
        calls = {
            name: lambda pipe=pipe, batch=batch: pipe(list(sentences), batch_size=batch)
            for name, pipe in (("packed", own), ("ONNX Runtime int8", other))
        }
        times = interleaved(calls)
        result[f"batches of {batch}"] = {
            "sentences_per_second": {name: len(sentences) / statistics.median(t) for name, t in times.items()},
            "ratio": ratio(times, "ONNX Runtime int8", "packed"),
            "same_labels": same,
            "sentences": len(sentences),
            **_parent(),
        }
    return result


_MEMORY = """
import sys, time
def memory(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) * 1024 / 1e6
{imports}
imported, start = memory("VmRSS"), time.perf_counter()
{load}
loaded = time.perf_counter()
{answer}
print(memory("VmHWM") - imported, loaded - start, time.perf_counter() - loaded)
"""
_TORCH_IMPORTS = """import torch, transformers
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification"""
_FEED = "ids = numpy.ones((1, 128), numpy.int64); feed = {name: ids for name in %r}"
PROCESSES = {  # (imports that do not count, load, one answer of 128 tokens)
    "packed": (
        _TORCH_IMPORTS,
        "import modeling_qbert; m = AutoModelForSequenceClassification.from_pretrained({path!r}).eval()",
        "with torch.no_grad(): m(torch.ones(1, 128, dtype=torch.int64))",
    ),
    "packed, package imported": (
        _TORCH_IMPORTS + "; import modeling_qbert",
        "m = AutoModelForSequenceClassification.from_pretrained({path!r}).eval()",
        "with torch.no_grad(): m(torch.ones(1, 128, dtype=torch.int64))",
    ),
    "PyTorch fp32": (
        _TORCH_IMPORTS,
        "m = AutoModelForSequenceClassification.from_pretrained({path!r}).eval()",
        "with torch.no_grad(): m(torch.ones(1, 128, dtype=torch.int64))",
    ),
    "ONNX Runtime int8": (
        "import numpy, onnxruntime",
        "s = onnxruntime.InferenceSession({path!r}, providers=['CPUExecutionProvider'])",
        _FEED % (INPUTS,) + "; s.run(None, feed)",
    ),
    "OpenVINO int8": (
        "import numpy, openvino",
        "m = openvino.Core().compile_model({path!r}, 'CPU')",
        _FEED % (INPUTS,) + "; m(feed)",
    ),
}


def measure_memory(network: str, threads: int, cache: Path) -> dict[str, Any]:
    """MB (10^6 bytes) of peak resident memory over the imports, and seconds to load and to answer once, the median of
    three fresh processes each; `missing` names the rivals that are not installed."""
    folder, shared = cache / network, prepare_ours([SHARED_WEIGHTS], network, cache)[SHARED_WEIGHTS]
    fp32 = folder / "fp32"
    if not fp32.is_dir():
        shared.dequantize().save_pretrained(fp32)
    _, missing = prepare_rivals(TO_BEAT, shared.dequantize(), folder, threads)
    paths = {
        "packed": folder / SHARED_WEIGHTS,
        "packed, package imported": folder / SHARED_WEIGHTS,
        "PyTorch fp32": fp32,
        "ONNX Runtime int8": onnxruntime_file(folder),
        "OpenVINO int8": folder / "openvino-int8.xml",
    }
    found: dict[str, Any] = {"missing": missing, **_parent()}
    for name, (imports, load, answer) in PROCESSES.items():
        if name in missing:
            continue
        code = _MEMORY.format(imports=imports, load=load.format(path=str(paths[name])), answer=answer)
        runs = [_numbers_of(code, threads) for _ in range(3)]
        values = [statistics.median(run[index] for run in runs) for index in range(3)]
        found[name] = dict(zip(("peak_mb", "load_seconds", "first_answer_seconds"), values))
    return found


def _numbers_of(code: str, threads: int) -> list[float]:
    environment_of = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment_of)
    return [float(number) for number in run.stdout.split()[-3:]]


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def run(
    output: str | Path,
    cache: str | Path,
    networks: Sequence[str],
    threads: Sequence[int],
    shapes: Sequence[str],
    rounds: int = ROUNDS,
    checkpoint: str | None = None,
    sentences: str | Path | None = None,
    memory: bool = False,
) -> dict[str, Any]:
    """Measure and merge into the JSON file: a checkpoint's pipeline over the sentences of a parquet file, peak memory,
    or the speed of every candidate. Returns the whole report."""
    output, cache = Path(output), Path(cache)
    report: dict[str, Any] = {}
    for count in threads:
        if checkpoint is not None:
            found = measure_pipeline(checkpoint, read_sentences(sentences), count, cache)
            report = merge(output, "pipeline", Path(checkpoint).name, count, found)
            continue
        for network in networks:
            if memory:
                report = merge(output, "memory", network, count, measure_memory(network, count, cache))
                continue
            for shape in shapes:
                cells = measure(network, count, [tuple(numbers(shape))], cache, rounds=rounds)
                report = merge(output, "speed", network, count, cells)
    return report


def read_sentences(path: str | Path | None, most: int = 256) -> list[str]:
    """The first sentences of a parquet file with a column `sentence` or `text`."""
    import pyarrow.parquet

    if path is None:
        raise ValueError("name a parquet file of sentences for the pipeline (--sentences)")
    table = pyarrow.parquet.read_table(path)
    names = [name for name in ("sentence", "text") if name in table.column_names]
    if not names:
        raise ValueError(f"{path}: expected a column 'sentence' or 'text', found {table.column_names}")
    return table[names[0]].to_pylist()[:most]
