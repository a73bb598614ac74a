"""A distillation step on the CPU: with the native engine, in plain torch, and of a student that is not quantized; of a
pruned student with ghost features with the engine, in plain torch, and without the features.

    python benchmarks/training_step.py [--threads N] [--output benchmarks/results]

Teacher and student have MiniLM-L6's shape and random weights: speed only. One step is teacher and student forward, all
three losses, backward and AdamW, with products in bfloat16 where `qbert distill` uses it. Candidates are interleaved
round by round; a ratio is the median over rounds. No speed is printed where the engine changes a student's answer.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification

from modeling_qbert import (
    GhostBertConfig,
    GhostBertForSequenceClassification,
    TernaryBertConfig,
    TernaryBertForSequenceClassification,
    ops,
)
from trainers.bench import interleaved, ratio
from trainers.losses import attention_scores_loss, hidden_states_loss, logits_loss
from trainers.machine import bfloat16_is_fast, cpu_name, freed_memory_kept
from trainers.results import environment


SHAPES = ((32, 16), (32, 64), (16, 128), (16, 256))  # batch, tokens
MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
PRUNED = MINILM | {"num_attention_heads": 3, "head_dim": 32, "intermediate_size": 384, "bits": "32-32-32"}
ROUNDS = 5
DROP = ops.drop  # None where there is no engine


def students_of(kind: str) -> dict[str, torch.nn.Module]:
    """A student without what the engine speeds up, and the one that has it."""
    if kind == "ternary":
        plain = BertForSequenceClassification(BertConfig(**MINILM))
        return {"without": plain, "torch": TernaryBertForSequenceClassification(TernaryBertConfig(**MINILM))}
    fields = ({"ghost_placement": "none"}, {"ghost_features": 9, "ghost_normalization": "none"})
    models = [GhostBertForSequenceClassification(GhostBertConfig(**PRUNED, **each)) for each in fields]
    return dict(zip(("without", "torch"), models))


def measure(kind: str, shape: tuple[int, int]) -> dict:
    """Milliseconds of a step (batch, tokens); plain torch and the student without, as ratios to the engine."""
    torch.manual_seed(0)
    teacher = BertForSequenceClassification(BertConfig(**MINILM)).eval()
    ids = torch.randint(1000, 20000, shape)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    students = students_of(kind)
    students["engine"] = students["torch"]
    for model in (teacher, *students.values()):
        model.set_attn_implementation("qbert_scores")

    def outputs(model: torch.nn.Module):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16_is_fast()):
            return model(**inputs, output_hidden_states=True, output_attentions=True)

    def step(name: str, optimizer: torch.optim.Optimizer) -> None:
        ops.drop = DROP if name == "engine" else None
        with torch.no_grad():
            target = outputs(teacher)
        output = outputs(students[name])
        loss = logits_loss(output.logits.float(), target.logits.float())
        loss = loss + hidden_states_loss(output.hidden_states, target.hidden_states, inputs["attention_mask"])
        if kind == "ternary":  # a pruned student has fewer heads
            loss = loss + attention_scores_loss(output.attentions, target.attentions, inputs["attention_mask"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    student = students["engine"].eval()
    answers = []
    for drop in (DROP, None):
        ops.drop = drop
        answers.append(outputs(student).logits)  # with gradients, as in training
    if not torch.equal(*answers):
        raise SystemExit(f"{shape}: the engine changes the student's logits; no speed printed")
    candidates = {}
    for name, student in students.items():
        optimizer = torch.optim.AdamW(student.train().parameters(), lr=1e-5)
        candidates[name] = lambda name=name, optimizer=optimizer: step(name, optimizer)
    times = interleaved(candidates, rounds=ROUNDS)
    row = {name: 1000 * statistics.median(values) for name, values in times.items()}
    ratios = {f"{name} / engine": ratio(times, name, "engine") for name in ("torch", "without")}
    print(
        f"{kind} {shape[0]:>3} x {shape[1]:<4} engine {row['engine']:7.0f} ms  torch {row['torch']:7.0f} ms "
        f"({ratios['torch / engine']:.2f})  without {row['without']:7.0f} ms ({ratios['without / engine']:.2f})",
        flush=True,
    )
    return {"student": kind, "batch": shape[0], "tokens": shape[1], **row, **ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", default="benchmarks/results")
    arguments = parser.parse_args()
    if DROP is None:
        raise SystemExit(f"the native engine is not there: {ops.WHY_NOT_NATIVE}")
    torch.set_num_threads(arguments.threads)
    report = {**environment(), "cpu": cpu_name(), "threads": arguments.threads, "bfloat16": bfloat16_is_fast()}
    with freed_memory_kept():  # as while training
        report["rows"] = [measure(kind, shape) for kind in ("ternary", "ghosts") for shape in SHAPES]
    path = Path(arguments.output) / "training_step.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
