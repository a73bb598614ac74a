"""How long a packed checkpoint takes on this machine's CPU, beside the same network in fp32: `latency.json`."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

import modeling_qbert

from .machine import cpu_name
from .results import write_atomic


LATENCY_NAME = "latency.json"


@torch.inference_mode()
def measure_latency(
    folder: str | Path, lengths: Sequence[int] = (32, 128), batch: int = 1, rounds: int = 30
) -> dict[str, Any]:
    """Median milliseconds of a forward pass, packed and in fp32 (`dequantize()`), over interleaved rounds.

    Args:
        lengths: tokens of a sentence; no padding.
        batch: sentences at a time.
        rounds: timed passes of each model and length, after three that are not counted.

    Raises:
        ValueError: the checkpoint is not packed.
        RuntimeError: a packed answer changed between passes; then no time is worth anything.
    """
    config = AutoConfig.from_pretrained(folder)
    architecture = (config.architectures or ["none"])[0]
    if not hasattr(modeling_qbert, architecture) or not hasattr(config, "quantization_config"):
        raise ValueError(
            f"{folder}/config.json: expected the architecture of a packed low-bit model, found {architecture}"
        )
    packed = getattr(modeling_qbert, architecture).from_pretrained(folder).eval()
    models = {"packed_ms": packed, "fp32_ms": packed.dequantize()}
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in lengths:
        ids = torch.randint(3, config.vocab_size, (batch, length), generator=generator)
        times: dict[str, list[float]] = {name: [] for name in models}
        expected = packed(ids)[0]
        for turn in range(rounds + 3):
            for name, model in models.items():
                started = time.perf_counter()
                answer = model(ids)[0]
                if turn >= 3:
                    times[name].append(1000 * (time.perf_counter() - started))
                if model is packed and not torch.equal(answer, expected):
                    raise RuntimeError(f"{folder}: two passes over the same input answered differently")
        rows.append({"tokens": length, **{name: statistics.median(values) for name, values in times.items()}})
    threads, version = torch.get_num_threads(), torch.__version__
    return {"cpu": cpu_name(), "threads": threads, "batch": batch, "rounds": rounds, "torch": version, "rows": rows}


def write_latency(folder: str | Path, **options: Any) -> dict[str, Any]:
    """`measure_latency` (same arguments), written to `latency.json` in the folder, from where the card takes it."""
    found = measure_latency(folder, **options)
    write_atomic(Path(folder) / LATENCY_NAME, (json.dumps(found, indent=1) + "\n").encode())
    return found
