"""Tables and a plot of what `trainers.bench` measured."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .bench import NETWORKS, OURS, PROCESSES, numbers
from .figures import save_figure
from .rivals import RIVALS


# Multiply-adds and bytes a second of one and of two cores, by the CPU that results name: our own probes.
PEAKS = {
    "AMD EPYC": {
        1: {"bytes": 233e9, "counts": 1221e9, "L3": 75e9, "DRAM": 21e9},
        2: {"bytes": 458e9, "counts": 2440e9, "L3": 127e9, "DRAM": 32e9},
    }
}
PEAKS["AMD EPYC (family 25, model 17)"] = PEAKS["AMD EPYC"]  # as later results name it
L3_BYTES = 32 << 20


def floor_ms(cpu: str, network: str, name: str, batch: int, tokens: int, threads: int) -> float | None:
    """Least milliseconds that the CPU's arithmetic or memory allows: matrix products by 8-bit dot products, of 1-bit
    activations by counting, attention in 8 bits, weights read once. None where nothing was probed (byte tables)."""
    peak = PEAKS.get(cpu, {}).get(threads)
    if peak is None or name.startswith(("W1A8", "W1A4")):
        return None
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072} | NETWORKS[network]
    hidden, layers, wide = (sizes[name] for name in ("hidden_size", "num_hidden_layers", "intermediate_size"))
    weights = layers * (4 * hidden * hidden + 2 * hidden * wide)
    stored = weights * int(name[1]) / 8
    products = weights * batch * tokens / peak["counts" if name == "W1A1" else "bytes"]
    attention = layers * batch * tokens * tokens * 2 * hidden / peak["bytes"]
    return 1000 * max(products + attention, stored / peak["L3" if stored < L3_BYTES else "DRAM"])


def render(report: Mapping[str, Any], kinds: Iterable[str] = ("speed", "memory", "pipeline")) -> str:
    """Markdown tables of a report: our settings as ratios to the best rival, floors beside them, rivals in ms."""
    return "\n\n".join(part for kind in kinds for part in _RENDER[kind](report.get(kind, {})))


def _render_speed(speed: Mapping[str, Any]) -> Iterable[str]:
    for network, by_threads in speed.items():
        for threads, cells in by_threads.items():
            shapes = sorted(cells, key=lambda shape: [int(n) for n in shape.split("x")])
            names = [name for name in OURS if any(name in cells[shape]["ms"] for shape in shapes)]
            others = [name for name in RIVALS if any(name in cells[shape]["ms"] for shape in shapes)]
            lines = [f"| {network}, {threads} | " + " | ".join(shapes) + " |", "| --- |" + " --- |" * len(shapes)]
            for name in names:
                row = []
                for shape in shapes:
                    ms, floor = (
                        cells[shape]["ms"][name],
                        floor_ms(cells[shape].get("cpu", ""), network, name, *numbers(shape), numbers(threads)[0]),
                    )
                    ratio_text = f"**{cells[shape]['ratio'][name]:.2f}**" if name in cells[shape]["ratio"] else "–"
                    row.append(f"{ratio_text}, {ms:.2f} ms" + (f" ({ms / floor:.1f} x floor)" if floor else ""))
                lines.append(f"| {name} | " + " | ".join(row) + " |")
            for name in others:
                row = [f"{cells[shape]['ms'][name]:.2f} ms" if name in cells[shape]["ms"] else "–" for shape in shapes]
                lines.append(f"| {name} | " + " | ".join(row) + " |")
            missing = sorted({text for shape in shapes for text in cells[shape]["missing"].values()})
            yield "\n".join([*lines, *(f"- {text}" for text in missing)])


def _render_memory(memory: Mapping[str, Any]) -> Iterable[str]:
    for network, by_threads in memory.items():
        for threads, cell in by_threads.items():
            rows = {name: values for name, values in cell.items() if name in PROCESSES}
            yield "\n".join(
                [
                    f"| {network}, {threads} | peak memory over the imports | load | first answer |",
                    "| --- | --- | --- | --- |",
                    *(
                        f"| {name} | {row['peak_mb']:.0f} MB | {row['load_seconds']:.2f} s "
                        f"| {row['first_answer_seconds']:.2f} s |"
                        for name, row in rows.items()
                    ),
                ]
            )


def _render_pipeline(results: Mapping[str, Any]) -> Iterable[str]:
    for checkpoint, by_threads in results.items():
        lines = [
            f"| {checkpoint}, sentences a second | packed | ONNX Runtime int8 | ratio |",
            "| --- | --- | --- | --- |",
        ]
        for threads, cells in by_threads.items():
            for batches, cell in cells.items():
                speeds = cell["sentences_per_second"]
                lines.append(
                    f"| {threads}, {batches} | {speeds['packed']:.0f} | {speeds['ONNX Runtime int8']:.0f} "
                    f"| **{cell['ratio']:.2f}** |"
                )
        yield "\n".join(lines)


_RENDER = {"speed": _render_speed, "memory": _render_memory, "pipeline": _render_pipeline}
_BLOCK = re.compile(r"(<!-- qbert bench (\S+)((?: \w+)*) -->\n)((?:(?!<!-- qbert ).)*?)(<!-- end -->)", re.DOTALL)


def update_text(text: str, root: Path) -> str:
    """Text with every block `<!-- qbert bench FILE.json [kinds] --> ... <!-- end -->` rendered again."""

    def rendered(block: re.Match) -> str:
        report = json.loads((root / block[2]).read_text(encoding="utf-8"))
        return f"{block[1]}{render(report, block[3].split() or _RENDER)}\n{block[5]}"

    return _BLOCK.sub(rendered, text)


def plot(report: Mapping[str, Any], path: str | Path) -> None:
    """PNG of the ratios to the best rival: a row of panels for each network, a panel for each number of threads."""
    speed = report["speed"]
    columns = max(map(len, speed.values()))

    def draw(figure: Any) -> None:
        rows = figure.subplots(len(speed), columns, squeeze=False, sharey="row")
        for row, (network, by_threads) in zip(rows, speed.items()):
            for axis in row[len(by_threads) :]:
                axis.remove()
            row[0].set_ylabel("times as fast as the best int8 rival")
            for axis, (threads, cells) in zip(row, by_threads.items()):
                shapes = sorted(cells, key=numbers)
                for name in OURS:
                    ratios = [cells[shape]["ratio"].get(name, float("nan")) for shape in shapes]
                    # Dashed: as many multiply-adds as two networks, or BinaryBERT's narrower network.
                    line = "o--" if name.endswith(("planes", "split")) else "o-"
                    axis.plot(shapes, ratios, line, markersize=4, linewidth=1.4, label=name)
                axis.axhline(1, color="black", linewidth=0.8)
                axis.grid(alpha=0.3)
                axis.set_title(f"{network}, {threads}")
            row[0].set_ylim(bottom=0)  # last: shared axes no longer grow then
        for axis in rows[-1]:
            axis.set_xlabel("batch x tokens")
        handles, labels = rows[0][0].get_legend_handles_labels()
        figure.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False)

    save_figure(draw, (4.6 * columns + 1.4, 3.4 * len(speed)), path)
