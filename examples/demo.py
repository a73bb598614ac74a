"""`make demo`: a packed checkpoint answers, then one is made: fine-tune, distil, pack, reload, compare.

    python examples/demo.py [RECIPE_FIELD=VALUE ...] [--output FOLDER]

Interrupt it whenever you like: the same command goes on after the last finished part (teacher, distillation), and once
all is finished it only answers and measures again.
Paths are relative to the repository.
"""

import argparse
import logging
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, pipeline

import modeling_qbert  # noqa: F401 (registers the packed families)
from trainers.initialization import resolve_model
from trainers.recipe import Recipe
from trainers.run import run_recipe
from trainers.tables import main_score, metric_label


ROOT = Path(__file__).resolve().parent.parent
RECIPE = Path("examples/recipes/demo.yaml")
READY_MADE = Path("model_cards/ternarybert-minilm-sst2")
SENTENCES = (
    "a gripping, funny film",
    "two hours that feel like four",
    "the actors do their best, but the script never wakes up",
)
LENGTHS = (32, 128)  # tokens of the timed sentence
WARM_UP, ROUNDS = 5, 31


def answer(checkpoint: Path) -> None:
    """Classify the three sentences with a packed checkpoint."""
    classify = pipeline("text-classification", model=str(checkpoint))
    for sentence, found in zip(SENTENCES, classify(list(SENTENCES)), strict=True):
        print(f"  {found['label']:<9}{found['score']:.3f}   {sentence}")


@torch.no_grad()
def latencies(models: dict[str, PreTrainedModel], inputs: dict[str, torch.Tensor]) -> dict[str, float]:
    """Median milliseconds of a forward pass by model; the models take turns, so that a disturbance meets them all."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(WARM_UP + ROUNDS):
        for name, model in models.items():
            start = time.perf_counter()
            model(**inputs)
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(measured[WARM_UP:]) for name, measured in times.items()}


def compare(teacher: str, packed: Path, results: dict) -> None:
    """Print bytes and score of the run beside latencies measured here and now."""
    tokenizer = AutoTokenizer.from_pretrained(packed)
    models = {
        name: AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
        for name, folder in (("fp32", teacher), ("packed", packed))
    }
    before, after = results["teacher"]["bytes"], results["packed"]["bytes"]
    score_before, score_after = main_score(results, "teacher"), main_score(results, "packed")
    rows = [
        ("weights file, MB (10^6 bytes)", before / 1e6, after / 1e6, f"{before / after:.1f} times smaller"),
        (
            f"{metric_label(results['main_metric'])} x 100, {results['split']}, {results['rows']} rows",
            score_before,
            score_after,
            f"{score_after - score_before:+.2f} points",
        ),
    ]
    for length in LENGTHS:
        text = " ".join(SENTENCES * length)
        inputs = tokenizer(text, truncation=True, max_length=length, return_tensors="pt")
        times = latencies(models, inputs)
        fp32, low_bit = times["fp32"], times["packed"]
        rows.append((f"ms, 1 sentence of {length} tokens", fp32, low_bit, f"{fp32 / low_bit:.2f} times the speed"))
    width = max(len(row[0]) for row in rows) + 2
    bits = results["recipe"]["stages"][-1]["quantization"]["bits"]
    print(f"\n{'':<{width}}{'fp32 teacher':>14}{f'packed {bits}':>16}")
    for label, fp32, low_bit, change in rows:
        print(f"{label:<{width}}{fp32:>14.2f}{low_bit:>16.2f}   {change}")
    print(
        f"Times: CPU, {torch.get_num_threads()} threads, torch {torch.__version__}, medians of {ROUNDS} rounds in "
        "which the two models take turns."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer with a packed checkpoint, then make one and compare.")
    parser.add_argument("overrides", nargs="*", help="recipe fields, such as training.num_train_epochs=2")
    parser.add_argument("--output", type=Path, default="runs/demo", help="folder of the run (default: runs/demo)")
    arguments = parser.parse_args()
    output = arguments.output
    os.chdir(ROOT)  # data.path of the recipe, and every path above, is relative to the repository
    transformers.utils.logging.disable_progress_bar()  # bars of weight loading; training and evaluation keep theirs
    # A backbone that gets a new head is reported at length. A higher level of this logger would start other reports.
    logging.getLogger("transformers.modeling_utils").addFilter(lambda record: "LOAD REPORT" not in record.getMessage())

    if (READY_MADE / "model.safetensors").is_file():
        print(f"Answers of {READY_MADE}:")
        answer(READY_MADE)
    else:
        print(f"{READY_MADE}: no packed checkpoint there; going on to make one.")

    try:
        recipe = Recipe.from_yaml(RECIPE, arguments.overrides)
        bits = recipe.stages[-1].quantization.bits
        print(f"\n{RECIPE}: fine-tune {recipe.teacher.model}, distil it to {bits}, pack.")
        results = run_recipe(recipe, output)
    except ValueError as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit("demo: interrupted; the same command goes on after the last finished part")
    packed = output / "packed"
    teacher = next((output / "teachers").glob("*/model"), None) or resolve_model(recipe.teacher.model)
    print(f"\nAnswers of {packed}, loaded again:")
    answer(packed)
    compare(str(teacher), packed, results)
    training = output / f"stage-0-{recipe.stages[0].name}" / "training"
    print(f"Losses and scores of the distillation: {training / 'training.png'}")
    print(f"Model card: {packed / 'README.md'}")


if __name__ == "__main__":
    main()
