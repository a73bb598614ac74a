"""Adaptive splitting (BinaryBERT section 3.2): which modules a size budget should split into two binary planes.

A unit is what is split together: query and key of a layer, its value, its attention output, its first and its second
feed-forward matrix, the word embedding, the pooler. Its name is that of its modules, joined by "+". A 0/1 knapsack
over gains and costs chooses units; a network with these modules ternary (config field `ternary_modules`) is trained
and then split (`split_modules`).
"""

import dataclasses
import os
import random
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .losses import hidden_states_loss, logits_loss
from .pruning import evaluating


KIB = 1024
# Most that a split module adds to a file's header: its quoted name in `split_modules`, a dimension in two shapes.
HEADER_BYTES = 96


@torch.no_grad()
def measure_gains(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    start: Literal["ternary", "binary"] = "ternary",
) -> dict[str, float]:
    """What a third value is worth to every unit, as a distance to the teacher, with no training in between.

    The distance is that of distillation, logits and hidden states with weight 1 each, as a mean over batches.

    With `start="ternary"` the gain of a unit is the distance that is added when it alone becomes binary in an
    otherwise ternary network; with "binary", the distance that is removed when it alone becomes ternary in an
    otherwise binary one, which is how we read the paper (its code has no adaptive splitting). A network that was
    trained ternary and is made binary at once is far from its teacher, and what one unit then changes is mostly noise:
    for MiniLM-L6 trained at 2-2-8 on STS-B, the gains on two sets of 32 training rows have a rank correlation of 0.94
    with "ternary", and with "binary" of 0.48, three in four of them negative.

    Args:
        model: latent binary model with one plane and a head that gives `logits`, holding the weights of the trained
            ternary network (`from_pretrained(folder, bits="1-1-8")`). It is left as it was, but for learned step sizes
            that had no value yet.
        teacher: model with the same head, layers and hidden size.
        batches: inputs (labels are ignored), of training rows that the result is not judged by.

    Raises:
        ValueError: the model is not plain binary, there is no batch, or a distance is not finite.
    """
    if start not in ("ternary", "binary"):
        raise ValueError(f"start: expected 'ternary' or 'binary', found {start!r}")
    units = _units(model)
    everything = [layer for layers in units.values() for layer in layers]
    sums = dict.fromkeys(units, 0.0)
    seen = 0
    with evaluating(model, teacher):
        for batch in batches:
            inputs = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
            if not seen:
                model.calibrate(**inputs)
            wanted = teacher(**inputs, output_hidden_states=True)
            for unit, layers in [(None, []), *units.items()]:
                ternary = layers if start == "binary" else [layer for layer in everything if layer not in layers]
                with _ternary(ternary):
                    distance = _distance(model, wanted, inputs)
                if unit is None:
                    reference = distance
                else:
                    sums[unit] += reference - distance if start == "binary" else distance - reference
            seen += 1
    if not seen:
        raise ValueError("gains need at least one batch, found none")
    if not np.isfinite(list(sums.values())).all():
        raise ValueError(f"gains are not finite: {sums}")
    return {unit: total / seen for unit, total in sums.items()}


def split_costs(model: PreTrainedModel) -> tuple[int, dict[str, int]]:
    """(bytes of the packed file of a plain binary model, KiB that splitting each unit adds, rounded up).

    Raises:
        ValueError: the model is not plain binary, or a learned step size has no value yet.
    """
    units, packed = _units(model), model.pack()
    with tempfile.TemporaryDirectory() as folder:
        packed.save_pretrained(folder)
        plain = os.path.getsize(os.path.join(folder, "model.safetensors"))
    prefix = _prefix(model)
    costs = {}
    for unit in units:
        found = [_module(packed, prefix, name) for name in unit.split("+")]
        size = sum(layer.weight.nbytes + _split_scales(layer) + HEADER_BYTES for layer in found)
        costs[unit] = -(-size // KIB)
    return plain, costs


def _split_scales(layer: nn.Module) -> int:
    """Bytes that the scales of a plain binary packed layer grow by when it is split: planes have float32 ones."""
    return 2 * layer.weight_scale.numel() * torch.float32.itemsize - layer.weight_scale.nbytes


def split_multiply_adds(model: PreTrainedModel, tokens: int = 128) -> dict[str, int]:
    """Thousands of multiply-adds of a sentence of so many tokens that splitting each unit adds, rounded up.

    An embedding is looked up, and a pooler reads one token.
    """
    costs = {}
    for unit, layers in _units(model).items():
        count = sum(layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear))
        costs[unit] = -(-count * (tokens if unit.startswith("encoder.") else 1) // 1000)
    return costs


def budget_in_kib(megabytes: float, plain: int, costs: Mapping[str, int]) -> int:
    """KiB to be spent on splitting so that a file has at most so many MB (10^6 bytes), given `split_costs`.

    Raises:
        ValueError: plain binary is larger.
    """
    budget = int(megabytes * 1e6 - plain) // KIB
    if budget < 0:
        full = plain + KIB * sum(costs.values())
        raise ValueError(
            f"megabytes: expected at least {plain / 1e6:.3f}, plain binary (all split: {full / 1e6:.3f}), "
            f"found {megabytes}"
        )
    return min(budget, sum(costs.values()))


def choose_modules(
    gains: Mapping[str, float],
    costs: Mapping[str, int],
    budget: int,
    selection: Literal["gain", "random", "smallest_gain"] = "gain",
    seed: int = 0,
) -> list[str]:
    """Modules to split, for the config's `ternary_modules` and then `split_modules`.

    Args:
        gains, costs: by unit; costs are whole numbers of any unit of measure.
        budget: most that the chosen units may cost together, in that unit of measure.
        selection: "gain" gives the largest sum of gains there is (a unit without gain stays binary). The paper's
            controls fill the same budget, as far as whole units do, in random order or from the smallest gain up.
        seed: of the random order.

    Raises:
        ValueError: gains and costs are not of the same units, a number is out of range, or `selection` is unknown.
    """
    if gains.keys() != costs.keys():
        raise ValueError(f"gains and costs are of different units: {sorted(gains.keys() ^ costs.keys())[:3]}")
    for name, value in [*costs.items(), ("budget", budget)]:
        if not isinstance(value, int) or value < 0:
            raise ValueError(f"{name}: expected a cost that is a whole number of at least 0, found {value!r}")
    if selection == "gain":
        chosen = _knapsack(gains, costs, budget)
    else:
        orders = {"random": sorted(gains), "smallest_gain": sorted(gains, key=gains.__getitem__)}
        if selection not in orders:
            raise ValueError(f"selection: expected one of gain, {', '.join(orders)}, found {selection!r}")
        random.Random(seed).shuffle(orders["random"])
        chosen = set()
        for unit in orders[selection]:
            if costs[unit] <= budget:
                chosen.add(unit)
                budget -= costs[unit]
    return [name for unit in gains if unit in chosen for name in unit.split("+")]


def _knapsack(gains: Mapping[str, float], costs: Mapping[str, int], budget: int) -> set[str]:
    """Units with the largest sum of gains among those that cost at most `budget`: dynamic programming over costs."""
    best = np.zeros(min(budget, sum(costs.values())) + 1)  # largest sum of gains by what may be spent
    taken = {}
    for unit, gain in gains.items():
        rest = len(best) - costs[unit]
        taken[unit] = np.zeros(len(best), dtype=bool)
        if rest > 0:
            candidate = best[:rest] + gain
            taken[unit][costs[unit] :] = candidate > best[costs[unit] :]
            best[costs[unit] :] = np.maximum(candidate, best[costs[unit] :])
    chosen, left = set(), len(best) - 1
    for unit in reversed(taken):
        if taken[unit][left]:
            chosen.add(unit)
            left -= costs[unit]
    return chosen


def _prefix(model: PreTrainedModel) -> str:
    return "" if model.base_model is model else model.base_model_prefix + "."


def _module(model: PreTrainedModel, prefix: str, name: str) -> nn.Module:
    """Module by its name in the config, which leaves out the backbone's prefix."""
    modules = dict(model.named_modules())
    return modules[prefix + name] if prefix + name in modules else modules[name]


def _units(model: PreTrainedModel) -> dict[str, list[nn.Module]]:
    """Unit -> its binary layers, in the order of the model."""
    config, prefix = model.config, _prefix(model)
    if getattr(config, "planes", 2) != 1 or config.ternary_modules or getattr(model, "is_packed", True):
        raise ValueError(f"expected a latent binary model with one plane, found {type(model).__name__} that is not")
    layers = {
        name.removeprefix(prefix): module
        for name, module in model.named_modules()
        if getattr(getattr(module, "spec", None), "bits", None) == 1 and not getattr(module, "source", ())
    }
    if not layers:
        raise ValueError(f"config field `bits` is {config.bits!r}: expected binary weights to split")
    units = {}
    for name in layers:
        key = name.removesuffix("query") + "key"
        if name.endswith(".query"):
            units[f"{name}+{key}"] = [layers[name], layers[key]]
        elif not name.endswith(".key"):
            units[name] = [layers[name]]
    return units


@contextmanager
def _ternary(layers: list[nn.Module]) -> Iterator[None]:
    """Layers quantize to three values (TWN, what splitting starts from) for a `with` block."""
    specs = [layer.spec for layer in layers]
    try:
        for layer, spec in zip(layers, specs):
            layer.spec = dataclasses.replace(spec, quantizer="twn", short_scale=False)
        yield
    finally:
        for layer, spec in zip(layers, specs):
            layer.spec = spec


def _distance(model: PreTrainedModel, wanted: Any, inputs: Mapping[str, Tensor]) -> float:
    """Distillation loss of the model's logits and hidden states against the teacher's output `wanted`."""
    found, mask = model(**inputs, output_hidden_states=True), inputs.get("attention_mask")
    regression = found.logits.shape[-1] == 1 or model.config.problem_type == "regression"
    logits = logits_loss(found.logits, wanted.logits, mask, regression=regression)
    return (logits + hidden_states_loss(found.hidden_states, wanted.hidden_states, mask)).item()
