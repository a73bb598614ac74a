"""The `qbert` command. Heavy imports wait until a sub-command needs them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qbert",
        description="Make, check and measure low-bit BERTs.",
        formatter_class=argparse.RawTextHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    distill = commands.add_parser("distill", help="run a recipe: teacher, stages, packed checkpoint, results, card")
    distill.add_argument("recipe", help="recipe file (YAML)")
    distill.add_argument("overrides", nargs="*", help="recipe fields, as data.path=FOLDER or --data.path FOLDER")
    distill.add_argument("--output", help="folder of the run (default: runs/NAME); the same call continues there")

    evaluate = commands.add_parser("evaluate", help="score a checkpoint, packed or not, on a task")
    evaluate.add_argument("checkpoint")
    evaluate.add_argument("--task", required=True, help="GLUE task, rotten_tomatoes, squad or squad_v2")
    evaluate.add_argument("--data", help="Hub data set or local folder (default: the task's on the Hub)")
    evaluate.add_argument("--split", default="validation", help="default: validation, for mnli both of them")
    evaluate.add_argument("--max-length", type=int, help="tokens (default: 128, squad 384, or the tokenizer's limit)")
    evaluate.add_argument("--null-threshold", type=float, help="squad_v2: by how much no answer must win (default: 0)")

    augment = commands.add_parser("augment", help="training rows with words replaced, as TinyBERT's augmentation")
    augment.add_argument("--task", required=True, help="GLUE task, rotten_tomatoes, squad or squad_v2")
    augment.add_argument("--data", help="Hub data set or local folder (default: the task's on the Hub)")
    augment.add_argument("--split", default="train")
    augment.add_argument("--model", default="google-bert/bert-base-uncased", help="proposes words")
    augment.add_argument("--candidates", choices=("masked-lm", "neighbours"), default="masked-lm")
    augment.add_argument("--words", type=int, default=15, help="candidates a word (default: 15)")
    augment.add_argument("--copies", type=int, help="draws a sentence (default: TinyBERT's number for the task)")
    augment.add_argument("--probability", type=float, default=0.4, help="of replacing a word (default: 0.4)")
    augment.add_argument("--samples", type=int, help="at most so many rows, as max_train_samples of a recipe")
    augment.add_argument("--seed", type=int, default=0)
    augment.add_argument("--output", default="augmented", help="rows go to OUTPUT/TASK; the same call continues there")

    prune = commands.add_parser("prune", help="keep the most important heads and neurons of a fine-tuned checkpoint")
    prune.add_argument("checkpoint", help="sequence classifier in full precision")
    prune.add_argument("--task", required=True, help="GLUE task or rotten_tomatoes")
    prune.add_argument("--data", help="Hub data set or local folder (default: the task's on the Hub)")
    prune.add_argument("--split", default="train", help="rows that importance is measured on (default: train)")
    prune.add_argument("--samples", type=int, default=2048, help="at most so many of them (default: 2048)")
    prune.add_argument("--max-length", type=int, default=128)
    prune.add_argument("--width", type=float, required=True, help="share of the heads that stays, such as 0.5")
    prune.add_argument("--output", required=True, help="folder of the pruned checkpoint")

    pack = commands.add_parser("pack", help="write a latent or packed checkpoint as a packed one")
    pack.add_argument("checkpoint")
    pack.add_argument("output")
    pack.add_argument("--packing", choices=("2bit", "dense"), default="2bit", help="4 or 5 ternary codes a byte")

    info = commands.add_parser("info", help="bits, bytes per part and ratio to fp32 of a packed checkpoint")
    info.add_argument("checkpoint")

    verify = commands.add_parser("verify", help="check every byte of a packed checkpoint")
    verify.add_argument("checkpoint")

    export = commands.add_parser("export", help="write a checkpoint as one ONNX file whose weights stay packed")
    export.add_argument("checkpoint")
    export.add_argument("--output", required=True, help="the file, such as model.onnx")

    latency = commands.add_parser("latency", help="time a packed checkpoint against fp32 on this CPU, for its card")
    latency.add_argument("checkpoint")
    latency.add_argument("--lengths", type=int, nargs="+", default=(32, 128), help="tokens of a sentence")
    latency.add_argument("--batch", type=int, default=1)

    bench = commands.add_parser("bench", help="speed beside other engines on the same weights, in one process")
    bench.add_argument("checkpoint", nargs="?", help="text classifier: sentences a second through pipeline()")
    bench.add_argument("--sentences", help="parquet file of sentences for the checkpoint")
    bench.add_argument("--memory", action="store_true", help="peak memory and load time instead of speed")
    bench.add_argument("--networks", nargs="+", choices=("base", "minilm-l6"), default=("base", "minilm-l6"))
    bench.add_argument("--threads", type=int, nargs="+", default=(1, 2))
    bench.add_argument(
        "--shapes", nargs="+", default=("1x8", "1x32", "1x128", "8x128", "1x384"), help="batch x tokens"
    )
    bench.add_argument("--rounds", type=int, default=7)
    bench.add_argument("--output", default="benchmarks/results/bench.json", help="cells are added or replaced there")
    bench.add_argument("--cache", default=".cache/bench", help="folder of the rivals' files")
    bench.add_argument("--figure", help="also draw the ratios into this PNG")
    bench.add_argument("--update", nargs="+", metavar="FILE.md", help="only render these texts' tables again")

    push = commands.add_parser(
        "push", help="publish a checkpoint folder on the Hub in one commit, code and card included"
    )
    push.add_argument("checkpoint")
    push.add_argument("repo", help="OWNER/NAME")
    push.add_argument("--private", action="store_true", default=None, help="if the repository is made by this push")
    push.add_argument("--revision", help="branch (default: main)")

    sweep = commands.add_parser("sweep", help="run what a sweep file still lacks: recipes x overrides x seeds")
    sweep.add_argument("sweep", help="sweep file (YAML)")
    sweep.add_argument("--output", default="runs", help="folder for runs in progress (default: runs)")
    sweep.add_argument("--results", default="results", help="folder of committed results (default: results)")
    sweep.add_argument("--data", help="data.path of every run")
    sweep.add_argument("--only", nargs="+", metavar="PATTERN", help="run names, such as 'mrpc/*'")
    sweep.add_argument("--jobs", type=int, default=1, help="runs at a time")

    table = commands.add_parser("table", help="render results as a table and a figure")
    table.add_argument("results", nargs="*", help="result files or folders")
    table.add_argument("--update", nargs="+", metavar="FILE.md", help="only render these texts' tables again")
    table.add_argument("--differences", nargs="+", metavar="A:B", help="also show variant A minus B, run by run")
    table.add_argument("--figure", help="also draw the scores into this PNG")
    table.add_argument("--size-figure", help="also draw mean score against file size into this PNG")
    table.add_argument("--distance-figure", help="also draw distance to the teacher against file size into this PNG")
    table.add_argument("--work-figure", help="also draw mean score against multiply-adds into this PNG")
    table.add_argument("--tasks", nargs="+", metavar="TASK", help="of these three (default: those of every variant)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status. Bad input is one line on stderr and status 2, without a traceback."""
    parser = _parser()
    known, unknown = parser.parse_known_args(arguments)
    if unknown and known.command != "distill":
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    try:
        if known.command == "distill":
            known.overrides = [*known.overrides, *_flags(unknown, parser)]
            _move_flag_values(known)
        return globals()[f"_{known.command}"](known) or 0
    except (ValueError, RuntimeError, OSError) as error:
        print(f"qbert {known.command}: {error}", file=sys.stderr)
        return 2


def _flags(unknown: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """`--data.path X` and `--data.path=X` as `data.path=X`."""
    overrides, rest = [], list(unknown)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--") and "=" not in flag:
            parser.error(f"unknown argument: {flag}")
        name = flag.removeprefix("--")
        if "=" not in name:
            if not rest or rest[0].startswith("--"):
                name += "="
            else:
                name += f"={rest.pop(0)}"
        overrides.append(name)
    return overrides


def _move_flag_values(known: argparse.Namespace) -> None:
    """argparse takes the X of `--data.path X` for a positional: give it back to its flag."""
    values = [text for text in known.overrides if "=" not in text]
    flags = [index for index, text in enumerate(known.overrides) if text.endswith("=")]
    if len(values) != len(flags):
        raise ValueError(f"overrides: expected key=value or --key value, found {values}")
    for index, value in zip(flags, values):
        known.overrides[index] += value
    known.overrides = [text for text in known.overrides if "=" in text]


def _distill(arguments: argparse.Namespace) -> None:
    from .recipe import Recipe

    recipe = Recipe.from_yaml(arguments.recipe, arguments.overrides)
    from .run import run_recipe
    from .tables import render_table

    output = Path(arguments.output or Path("runs") / recipe.name)
    results = run_recipe(recipe, output)
    print(render_table([results]))
    print(f"packed checkpoint, card and results: {output / 'packed'}")


def _evaluate(arguments: argparse.Namespace) -> None:
    from transformers import AutoTokenizer

    from .recipe import DataSpec
    from .run import evaluate_checkpoint
    from .tasks import get_task

    longest = 384 if get_task(arguments.task).kind == "question-answering" else 128
    limit = AutoTokenizer.from_pretrained(arguments.checkpoint).model_max_length  # what it was trained with
    spec = DataSpec(
        task=arguments.task,
        path=arguments.data or get_task(arguments.task).dataset,
        train_split="validation" if arguments.split == "train" else "train",  # not read
        eval_split=arguments.split,
        max_length=arguments.max_length or min(longest, limit),
        null_threshold=arguments.null_threshold,
    )
    for metric, value in evaluate_checkpoint(arguments.checkpoint, spec).items():
        print(f"{metric:<24}{100 * value:.2f}")


def _augment(arguments: argparse.Namespace) -> None:
    from .augmentation import augment
    from .recipe import DataSpec
    from .tasks import get_task

    path = arguments.data or get_task(arguments.task).dataset
    eval_split = "validation" if arguments.split != "validation" else "train"
    spec = DataSpec(
        task=arguments.task,
        path=path,
        train_split=arguments.split,
        eval_split=eval_split,
        max_train_samples=arguments.samples,
    )
    output = Path(arguments.output) / arguments.task
    made = augment(
        spec,
        output,
        arguments.model,
        mode=arguments.candidates,
        copies=arguments.copies,
        candidates=arguments.words,
        probability=arguments.probability,
        seed=arguments.seed,
    )
    print(f"{made['rows']} rows -> {made['augmented']} in {output}; use it with data.augmented={arguments.output}")


def _prune(arguments: argparse.Namespace) -> None:
    from transformers import AutoTokenizer

    from .data import load_data, tokenize
    from .initialization import resolve_model
    from .pruning import head_and_neuron_importance, labelled_batches, load_full_precision, rewire, subnetwork
    from .recipe import DataSpec
    from .run import evaluate_checkpoint
    from .tasks import get_task

    path = arguments.data or get_task(arguments.task).dataset
    spec = DataSpec(task=arguments.task, path=path, max_length=arguments.max_length)
    checkpoint = resolve_model(arguments.checkpoint)
    model, tokenizer = load_full_precision(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    rows = load_data(spec, [arguments.split])[arguments.split].shuffle(seed=0)  # files may be sorted by class
    rows = tokenize(rows.select(range(min(arguments.samples, len(rows)))), tokenizer, spec, model.config)
    importance = head_and_neuron_importance(model, labelled_batches(rows, tokenizer))
    model.load_state_dict(rewire(model.state_dict(), model.config, importance))
    pruned = subnetwork(model, arguments.width)
    pruned.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    for name, field in (("heads", "num_attention_heads"), ("neurons", "intermediate_size")):
        print(f"{name + ' a layer':<24}{getattr(model.config, field)} -> {getattr(pruned.config, field)}")
    print(f"{'parameters':<24}{model.num_parameters():,} -> {pruned.num_parameters():,}")
    before, after = (evaluate_checkpoint(folder, spec) for folder in (checkpoint, arguments.output))
    for metric, value in after.items():
        print(f"{metric:<24}{100 * before[metric]:.2f} -> {100 * value:.2f}")


def _load_low_bit(checkpoint: str) -> PreTrainedModel:
    """The model of a latent or packed checkpoint, with the head that it was saved with."""
    from transformers import AutoConfig

    import modeling_qbert

    architecture = (AutoConfig.from_pretrained(checkpoint).architectures or ["none"])[0]
    model_class = getattr(modeling_qbert, architecture, None)
    if model_class is None:
        raise ValueError(
            f"{checkpoint}/config.json: expected the architecture of a low-bit model, found {architecture}; "
            "a full-precision model needs a recipe (qbert distill)"
        )
    return model_class.from_pretrained(checkpoint)


def _pack(arguments: argparse.Namespace) -> None:
    from transformers import AutoTokenizer

    from modeling_qbert import verify_checkpoint

    _load_low_bit(arguments.checkpoint).pack(arguments.packing).save_pretrained(arguments.output)
    AutoTokenizer.from_pretrained(arguments.checkpoint).save_pretrained(arguments.output)
    verify_checkpoint(arguments.output)
    _print_report(arguments.output)


def _export(arguments: argparse.Namespace) -> None:
    from modeling_qbert import export_onnx

    made = export_onnx(_load_low_bit(arguments.checkpoint), arguments.output)
    print(
        f"{arguments.output}: {made['bytes'] / 1e6:.2f} MB; ONNX Runtime's answers differ by {made['difference']:.1g}"
    )


def _info(arguments: argparse.Namespace) -> None:
    _print_report(arguments.checkpoint)


def _print_report(folder: str) -> None:
    from modeling_qbert import format_report

    print(format_report(folder))


def _verify(arguments: argparse.Namespace) -> None:
    from modeling_qbert import verify_checkpoint

    verify_checkpoint(arguments.checkpoint)
    print(f"{arguments.checkpoint}: every tensor, digest and config field is as it was saved")


def _latency(arguments: argparse.Namespace) -> None:
    from .latency import write_latency

    found = write_latency(arguments.checkpoint, lengths=arguments.lengths, batch=arguments.batch)
    print(f"{found['cpu']}, {found['threads']} threads, batch {found['batch']}")
    for row in found["rows"]:
        print(f"{row['tokens']:>4} tokens: {row['packed_ms']:8.2f} ms packed, {row['fp32_ms']:8.2f} ms in fp32")


def _bench(arguments: argparse.Namespace) -> None:
    from .bench import run
    from .bench_report import plot, render, update_text
    from .results import write_atomic

    for path in map(Path, arguments.update or ()):
        write_atomic(path, update_text(path.read_text(encoding="utf-8"), Path.cwd()).encode())
    if arguments.update:
        return
    report = run(
        arguments.output,
        arguments.cache,
        arguments.networks,
        arguments.threads,
        arguments.shapes,
        arguments.rounds,
        arguments.checkpoint,
        arguments.sentences,
        arguments.memory,
    )
    print(render(report))
    if arguments.figure:
        plot(report, arguments.figure)


def _push(arguments: argparse.Namespace) -> None:
    from .hub import push_to_hub

    url = push_to_hub(arguments.checkpoint, arguments.repo, private=arguments.private, revision=arguments.revision)
    print(f"published: {url}")


def _sweep(arguments: argparse.Namespace) -> int:
    import functools

    from .run import run_recipe
    from .sweep import collect, load_sweep, run_sweep

    name = load_sweep(arguments.sweep, arguments.data).name
    outcome = run_sweep(
        arguments.sweep,
        arguments.output,
        arguments.data,
        arguments.only,
        arguments.jobs,
        execute=functools.partial(run_recipe, teachers=Path(arguments.output) / "teachers"),
        results=arguments.results,
    )
    folder = Path(arguments.output) / name
    written = collect(folder, arguments.results) if folder.is_dir() else []  # nothing left to run: no folder
    print(f"{len(outcome.finished)} finished, {len(outcome.skipped)} skipped, {len(outcome.failed)} failed")
    print(
        f"{len(written)} new results in {arguments.results}; render them with qbert table {arguments.results}/{name}"
    )
    return outcome.exit_code


def _table(arguments: argparse.Namespace) -> None:
    from .figures import plot_results, plot_sizes
    from .results import load_results, write_atomic
    from .tables import render_differences, render_distances, render_metrics, render_table, update_tables

    if arguments.update:
        others = {key: value for key, value in vars(arguments).items() if value and key not in ("command", "update")}
        if others:
            raise ValueError(f"--update: expected nothing beside it, found {', '.join(others)}")
        for path in map(Path, arguments.update):
            write_atomic(path, update_tables(path.read_text(encoding="utf-8"), path.parent).encode())
        return
    results = load_results(arguments.results)
    print(render_table(results))
    if metrics := render_metrics(results):
        print(metrics)
    if any("teacher_distance" in run["packed"] for run in results):
        print(f"Mean squared difference from the teacher's logits:\n\n{render_distances(results)}")
    if arguments.differences:
        pairs = [tuple(pair.partition(":")[::2]) for pair in arguments.differences]
        print(f"First minus second, runs of one task, seed and teacher:\n\n{render_differences(results, pairs)}")
    if arguments.figure:
        plot_results(results, arguments.figure)
    if arguments.size_figure:
        plot_sizes(results, arguments.size_figure, tasks=arguments.tasks)
    if arguments.distance_figure:
        plot_sizes(results, arguments.distance_figure, tasks=arguments.tasks, distances=True)
    if arguments.work_figure:
        plot_sizes(results, arguments.work_figure, "multiply_adds", arguments.tasks)


if __name__ == "__main__":
    sys.exit(main())
