"""Model card of a packed checkpoint, generated from its `results.json` and its files.

Every number comes from one of the two. Values are data, not markup: the front matter parses back equal with
`yaml.safe_load`, and the body shows them literally whatever they contain.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .results import validate_results, write_atomic
from .tables import escape_markdown, main_score, metric_label, task_label
from .tasks import TASKS


CARD_NAME = "README.md"

# Class name ending in config.json's `architectures` -> pipeline tag of the Hub.
PIPELINE_TAGS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "Model": "sentence-similarity",
}

QUANTIZATION_FIELDS = (
    "bits",
    "weight_quantizer",
    "binary_quantizer",
    "planes",
    "weight_granularity",
    "embedding_granularity",
    "group_size",
    "activation_quantizer",
    "activation_granularity",
    "quantization_config",
)

_OF_BITS = {"weight_quantizer": "2", "binary_quantizer": "1", "planes": "1"}  # what says nothing of other weights


def _quantization(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config that say how its numbers became codes."""
    bits = str(config.get("bits")).split("-")[:2]
    return {
        name: config[name]
        for name in QUANTIZATION_FIELDS
        if name in config and (name not in _OF_BITS or _OF_BITS[name] in bits)
    }


# Rendered once: values are inserted as they are, so braces inside them are never read as a template.
_TEMPLATE = "---\n{{ card_data }}\n---\n\n{{ body }}"


class _CardData(ModelCardData):
    """`ModelCardData.to_yaml` leaves U+0085, U+2028 and U+2029 bare, which YAML reads as line breaks: other values
    come back. ASCII output escapes them; unlimited width keeps one value on one line."""

    def to_yaml(self, line_break: str | None = None, original_order: list[str] | None = None) -> str:
        super().to_yaml(line_break, original_order)  # puts the keys in the original order
        text = yaml.safe_dump(
            self.to_dict(), sort_keys=False, allow_unicode=False, width=float("inf"), line_break=line_break
        )
        return text.strip()


class _Card(ModelCard):
    card_data_class = _CardData


def _sizes(count: int) -> str:
    return f"{count / 10**6:.2f} MB ({count / 2**20:.2f} MiB)"


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _code(value: object) -> str:
    """A plain identifier as code, anything else as escaped text: a backtick or a bar would end a code span or cell."""
    text = str(value)
    return f"`{text}`" if re.fullmatch(r"[\w./:@+=, -]*[\w./:@+=-]", text) else escape_markdown(text)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def _fenced(text: str, language: str) -> str:
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def _paragraphs(text: str) -> str:
    return "\n\n".join(escape_markdown(part) for part in re.split(r"\n\s*\n", text) if part.strip())


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected the config of a packed checkpoint, found: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected an object, found {type(config).__name__}")
    return config


def _pipeline_tag(config: Mapping[str, Any], folder: Path) -> str:
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    for ending, tag in PIPELINE_TAGS.items():
        if isinstance(name, str) and name.endswith(ending):
            return tag
    raise ValueError(
        f"{folder / 'config.json'}: architectures: expected a class ending in one of "
        f"{', '.join(PIPELINE_TAGS)}, found {architectures!r}"
    )


def _check_weights(folder: Path, results: Mapping[str, Any]) -> None:
    """The card must describe the file that was evaluated."""
    path = folder / "model.safetensors"
    if not path.is_file():
        raise ValueError(f"{path}: expected the packed weights, found no such file")
    for what, expected, found in (
        ("bytes", results["packed"]["bytes"], path.stat().st_size),
        ("sha256", results["packed"]["sha256"], _digest(path)),
    ):
        if found != expected:
            raise ValueError(f"{path}: packed.{what}: the results are of a file with {expected}, found {found}")


def _usage(tag: str, model_id: str, example: Sequence[str]) -> str:
    if tag == "question-answering":  # Transformers 5 has no pipeline for it
        return _fenced(
            "# pip install qbert-zoo\n"
            "import modeling_qbert  # registers the low-bit families with the Auto classes\n"
            "from trainers.question_answering import answer\n"
            "from transformers import AutoModelForQuestionAnswering, AutoTokenizer\n"
            "\n"
            f"model = AutoModelForQuestionAnswering.from_pretrained({model_id!r})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({model_id!r})\n"
            f"print(answer(model, tokenizer, question={example[0]!r}, context={example[-1]!r}))",
            "python",
        )
    if tag == "sentence-similarity":
        return _fenced(
            "# pip install qbert-zoo sentence-transformers\n"
            "import modeling_qbert  # registers the low-bit families with the Auto classes\n"
            "from sentence_transformers import SentenceTransformer\n"
            "\n"
            f"model = SentenceTransformer({model_id!r})  # pools by the mean over tokens\n"
            f"vectors = model.encode({list(example)!r})\n"
            "print(model.similarity(vectors, vectors))",
            "python",
        )
    if len(example) == 2:
        call = repr({"text": example[0], "text_pair": example[1]})
    else:
        call = repr(example[0])
    return _fenced(
        "# pip install qbert-zoo\n"
        "import modeling_qbert  # registers the low-bit families with the Auto classes\n"
        "from transformers import pipeline\n"
        "\n"
        f"model = pipeline({tag!r}, model={model_id!r})\n"
        f"print(model({call}))",
        "python",
    )


def _scores(results: Mapping[str, Any]) -> str:
    teacher, student, packed = results["teacher"], results["student"], results["packed"]
    ratio = teacher["bytes"] / packed["bytes"]
    rows = [
        ["weights file", _sizes(teacher["bytes"]), "–", _sizes(packed["bytes"])],
        ["times smaller than fp32", "1", "–", f"{ratio:.1f}"],
    ]
    for metric in packed["metrics"]:
        parts = (part["metrics"].get(metric) for part in (teacher, student, packed))
        scores = ["–" if value is None else f"{100 * value:.2f}" for value in parts]
        rows.append([escape_markdown(f"{metric_label(metric)} x 100"), *scores])
    return _table(["", "fp32 teacher", "fake-quant student", "packed (this file)"], rows)


def _recipe_text(results: Mapping[str, Any]) -> str:
    text = yaml.safe_dump(results["recipe"], sort_keys=False, allow_unicode=False, width=float("inf"))
    return _fenced(text, "yaml")


def _latency(folder: Path) -> list[str]:
    """Section of `latency.json` (`trainers.latency`), if the folder has one."""
    path = folder / "latency.json"
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_bytes())
        rows = [[str(row["tokens"]), f"{row['fp32_ms']:.1f}", f"{row['packed_ms']:.1f}"] for row in found["rows"]]
        where = f"{found['cpu']}, {found['threads']} threads, batch {found['batch']}, torch {found['torch']}"
        rounds = found["rounds"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected what `qbert latency` writes, found: {error!r}") from error
    return [
        "## Latency",
        _table(["tokens of a sentence", "same network in fp32, ms", "packed, ms"], rows),
        escape_markdown(f"{where}; medians of {rounds} interleaved passes."),
    ]


def _files_table(folder: Path) -> str:
    rows = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != CARD_NAME and not any(part.startswith(".") for part in name.split("/")):
            rows.append([_code(name), f"{path.stat().st_size}", f"`{_digest(path)}`"])
    return _table(["file", "bytes", "SHA-256"], rows)


def _body(
    folder: Path,
    results: Mapping[str, Any],
    config: Mapping[str, Any],
    tag: str,
    model_id: str,
    example: Sequence[str],
    datasets: Sequence[str],
    limitations: str,
) -> str:
    packed, teacher = results["packed"], results["teacher"]
    title = escape_markdown(model_id)
    label = escape_markdown(task_label(results["task"]))
    metric = escape_markdown(metric_label(results["main_metric"]))
    ratio = teacher["bytes"] / packed["bytes"]
    split = f"{escape_markdown(results['split'])} split, {results['rows']} rows, seed {results['seed']}"
    sentence = (
        f"{title} takes {_sizes(packed['bytes'])}, {ratio:.1f} times less than its fp32 teacher, and scores "
        f"{main_score(results, 'packed'):.2f} {metric} x 100 on {label} ({split}; teacher "
        f"{main_score(results, 'teacher'):.2f})."
    )
    quantization = []
    for key, value in _quantization(config).items():
        for name, item in value.items() if isinstance(value, dict) else [(None, value)]:
            if item is not None:
                quantization.append([_code(f"{key}.{name}" if name is not None else key), _code(item)])
    data = [
        [_code(name), str(identity["rows"]), f"`{identity['sha256']}`"] for name, identity in results["data"].items()
    ]
    stages = [
        [
            _code(stage["name"]),
            str(stage["steps"]),
            f"{stage['seconds']:.0f}",
            ", ".join(f"{escape_markdown(name)} {value:.4g}" for name, value in stage["final_losses"].items()) or "–",
        ]
        for stage in results["stages"]
    ]
    versions = ", ".join(escape_markdown(f"{name} {version}") for name, version in results["versions"].items())
    sections = [
        f"# {title}",
        sentence,
        "## How to use",
        _usage(tag, model_id, example),
        "## Size and score",
        _scores(results),
        f"All three on the {split}. Largest difference between a logit of the packed model and of the fake-quant "
        f"student: {packed['max_logit_difference']:.3g}. MB is 10^6 bytes, MiB is 2^20.",
        *_latency(folder),
        "## Quantization",
        _table(["field of config.json", "value"], quantization),
        "## Training data and recipe",
        f"Data set: {', '.join(map(_code, datasets)) or 'own data'}, task {label}. "
        f"Teacher: {_code(teacher['model'])}, seed {teacher['seed']}.",
        _table(["split", "rows", "SHA-256 of the rows"], data),
        _table(["stage", "steps", "seconds", "final losses"], stages),
        _recipe_text(results),
        "## Limitations",
        _paragraphs(limitations) or "None stated.",
        "## Files and versions",
        _files_table(folder),
        f"Run {_code(results['run'])}, recipe fingerprint {_code(results['fingerprint'])}, commit "
        f"{_code(results['commit'] or 'unknown')}, on {escape_markdown(results['device'])} in "
        f"{results['seconds']:.0f} s. Versions: {versions}.",
    ]
    return "\n\n".join(sections) + "\n"


def build_card(
    folder: str | Path,
    results: Mapping[str, Any],
    *,
    model_id: str | None = None,
    base_model: str | Sequence[str] | None = None,
    license: str = "apache-2.0",
    language: str | None = "en",
    datasets: Sequence[str] | None = None,
    tags: Sequence[str] = (),
    example: Sequence[str] | None = None,
    limitations: str | None = None,
) -> ModelCard:
    """The card of the packed checkpoint in `folder`.

    Args:
        folder: packed checkpoint with `config.json` and `model.safetensors`.
        results: content of the `results.json` of the run that made it.
        model_id: Hub id or folder that the usage example loads. Default: the folder's name.
        base_model: Hub id(s) of the model that was quantized. Default: the results'; none where that was a folder.
        license: Hub licence id.
        language: ISO code, or None.
        datasets: Hub ids of the training data. Default: the task's; none for own data.
        tags: added to the zoo's own tags.
        example: one text, or two for a task on pairs. Default: a text that fits the task.
        limitations: plain text; an empty line starts a paragraph. Default: the results'.

    Returns:
        Card whose front matter has `model-index` with every metric of the packed model.

    Raises:
        ValueError: invalid results; a config that is no packed checkpoint's; weights other than the results speak of.
    """
    folder = Path(folder)
    validate_results(results, "results of the card")
    config = _read_config(folder)
    _check_weights(folder, results)
    tag = _pipeline_tag(config, folder)
    model_id = folder.resolve().name if model_id is None else model_id
    base_model = results.get("base_model") if base_model is None else base_model
    limitations = results.get("limitations", "") if limitations is None else limitations
    task = TASKS.get(results["task"]) if results["task"] else None
    if datasets is None:
        datasets = [task.dataset] if task and task.dataset else []
    if example is None:
        example = ["a gripping, funny film"]
        if tag == "question-answering":
            example = ["When was the lighthouse built?", "The lighthouse on the northern cape was built in 1871."]
        elif task is not None and task.text_pair is not None:
            example = ["A man is playing a guitar.", "Someone plays an instrument."]
    # A further split's metrics have its name at their end.
    further = {split.removeprefix("validation_"): split for split in (task.eval_splits[1:] if task else ())}
    named = [(metric, metric.rpartition("_")) for metric in results["packed"]["metrics"]]
    scores = [
        EvalResult(
            task_type=tag,
            dataset_type=datasets[0] if datasets else "own-data",
            dataset_name=task_label(results["task"]),
            dataset_config=task.name if task else None,
            dataset_split=further.get(end, results["split"]),
            metric_type=base if end in further else metric,
            metric_value=results["packed"]["metrics"][metric],
        )
        for metric, (base, _, end) in named
    ]
    quantizers = [_quantization(config).get(name) for name in ("weight_quantizer", "binary_quantizer")]
    own_tags = ["qbert", "quantization", "low-bit", config.get("model_type"), *quantizers]
    data = _CardData(
        license=license,
        language=language,
        library_name="sentence-transformers" if tag == "sentence-similarity" else "transformers",
        pipeline_tag=tag,
        base_model=list(base_model) if isinstance(base_model, list | tuple) else base_model,
        base_model_relation="quantized" if base_model else None,
        datasets=list(datasets) or None,
        metrics=list(results["packed"]["metrics"]),
        tags=[str(name) for name in (*own_tags, *tags) if name],
        model_name=model_id,
        eval_results=scores,
    )
    body = _body(folder, results, config, tag, model_id, example, datasets, limitations)
    card = _Card.from_template(data, template_str=_TEMPLATE, body=body)
    if card.data.to_dict() != data.to_dict():
        raise ValueError(f"{folder / CARD_NAME}: the front matter does not parse back to the values of the card")
    return card


def write_card(folder: str | Path, results: Mapping[str, Any], **options: Any) -> Path:
    """Writes the card of `build_card` (same arguments) atomically to `README.md` in `folder` and returns its path."""
    path = Path(folder) / CARD_NAME
    write_atomic(path, str(build_card(folder, results, **options)).encode())
    return path
