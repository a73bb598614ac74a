"""Fine-tune a low-bit BERT on extractive question answering (SQuAD 1.1 and 2.0) with the plain `Trainer`.

python examples/run_qa.py --model_name_or_path google-bert/bert-base-uncased --dataset_name rajpurkar/squad \
    --do_train --do_eval --max_seq_length 384 --doc_stride 128 --output_dir runs/squad

Own data: --train_file and --validation_file, JSON lines or Parquet with id, question, context and answers
({"text": [...], "answer_start": [...]}; both empty when the context holds no answer).
"""

import collections
import logging
import os
import re
import string
import sys
from dataclasses import dataclass, field

import numpy as np
from datasets import Dataset, load_dataset
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from modeling_qbert import get_model_class


logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "Full-precision or latent BERT, RoBERTa or ELECTRA."})
    family: str = field(default="ternary", metadata={"help": "Family of the zoo: ternary or binary."})
    bits: str | None = field(default=None, metadata={"help": "Bits of weights-embedding-activations, such as 2-2-8."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Default: the model's."})


@dataclass
class DataTrainingArguments:
    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_file: str | None = field(default=None, metadata={"help": "JSON lines or Parquet."})
    validation_file: str | None = field(default=None, metadata={"help": "JSON lines or Parquet."})
    max_seq_length: int = field(default=384, metadata={"help": "Tokens of question and part of the context."})
    doc_stride: int = field(default=128, metadata={"help": "Tokens that neighbouring parts share."})
    n_best_size: int = field(default=20, metadata={"help": "Starts and ends that are combined."})
    max_answer_length: int = field(default=30, metadata={"help": "Tokens of an answer at most."})
    version_2_with_negative: bool = field(default=False, metadata={"help": "Some questions have no answer."})

    def __post_init__(self):
        if self.dataset_name is None and (self.train_file is None or self.validation_file is None):
            raise ValueError("give dataset_name, or train_file and validation_file")


def normalize(text: str) -> str:
    """SQuAD's comparison: lower case, no punctuation, no articles, single blanks."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1(prediction: str, answer: str) -> float:
    """Overlap of words; two empty texts agree."""
    left, right = normalize(prediction).split(), normalize(answer).split()
    if not left or not right:
        return float(left == right)
    common = sum((collections.Counter(left) & collections.Counter(right)).values())
    return 2 * common / (len(left) + len(right))


def squad_metrics(predictions: dict[str, str], examples: Dataset) -> dict[str, float]:
    exact, overlap = [], []
    for example in examples:
        answers, prediction = example["answers"]["text"] or [""], predictions[example["id"]]
        exact.append(max(float(normalize(prediction) == normalize(answer)) for answer in answers))
        overlap.append(max(f1(prediction, answer) for answer in answers))
    return {"exact_match": 100 * float(np.mean(exact)), "f1": 100 * float(np.mean(overlap))}


def best_spans(
    examples: Dataset, features: Dataset, logits: tuple[np.ndarray, np.ndarray], data_args: DataTrainingArguments
) -> dict[str, str]:
    """id -> text of the best span over all parts of a context; "" where no answer is allowed and likelier."""
    parts = collections.defaultdict(list)
    for index, identity in enumerate(features["example_id"]):
        parts[identity].append(index)
    size = data_args.n_best_size
    predictions = {}
    for example in examples:
        best, text, empty = -np.inf, "", np.inf
        for index in parts[example["id"]]:
            starts, ends = logits[0][index], logits[1][index]
            offsets = features[index]["offset_mapping"]
            empty = min(empty, starts[0] + ends[0])
            for start in np.argsort(starts)[: -size - 1 : -1].tolist():
                for end in np.argsort(ends)[: -size - 1 : -1].tolist():
                    if max(start, end) >= len(offsets) or offsets[start] is None or offsets[end] is None:
                        continue
                    if start <= end < start + data_args.max_answer_length and starts[start] + ends[end] > best:
                        best = starts[start] + ends[end]
                        text = example["context"][offsets[start][0] : offsets[end][1]]
        predictions[example["id"]] = "" if data_args.version_2_with_negative and empty > best else text
    return predictions


def main():
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        model_args, data_args, training_args = parser.parse_json_file(json_file=os.path.abspath(sys.argv[1]))
    else:
        model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    logging.basicConfig(level=logging.INFO)
    set_seed(training_args.seed)

    if data_args.dataset_name is not None:
        raw_datasets = load_dataset(data_args.dataset_name, data_args.dataset_config_name)
    else:
        kind = data_args.train_file.rpartition(".")[2].replace("jsonl", "json")
        files = {"train": data_args.train_file, "validation": data_args.validation_file}
        raw_datasets = load_dataset(kind, data_files=files)

    # Low-bit classes load the full-precision checkpoint tensor by tensor: latent weights have BERT's own names.
    backbone = AutoConfig.from_pretrained(model_args.model_name_or_path).model_type.rpartition("_")[2]
    model_class = get_model_class(model_args.family, backbone, "question-answering")
    overrides = {"bits": model_args.bits} if model_args.bits else {}
    config = model_class.config_class.from_pretrained(model_args.model_name_or_path, num_labels=2, **overrides)
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or model_args.model_name_or_path)
    model = model_class.from_pretrained(model_args.model_name_or_path, config=config)

    def tokenize(examples):
        """Features of questions and parts of contexts; a long context overflows into several of them."""
        return tokenizer(
            [question.lstrip() for question in examples["question"]],
            examples["context"],
            truncation="only_second",
            max_length=data_args.max_seq_length,
            stride=data_args.doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )

    def prepare_train_features(examples):
        tokenized = tokenize(examples)
        samples, offset_mapping = tokenized.pop("overflow_to_sample_mapping"), tokenized.pop("offset_mapping")
        tokenized["start_positions"], tokenized["end_positions"] = [], []
        for index, offsets in enumerate(offset_mapping):
            answers = examples["answers"][samples[index]]
            start = end = 0  # the first token stands for "no answer here"
            if answers["text"]:
                first = answers["answer_start"][0]
                last = first + len(answers["text"][0])
                context = [place for place, part in enumerate(tokenized.sequence_ids(index)) if part == 1]
                inside = [place for place in context if offsets[place][0] < last and offsets[place][1] > first]
                if inside and offsets[context[0]][0] <= first and offsets[context[-1]][1] >= last:
                    start, end = inside[0], inside[-1]
            tokenized["start_positions"].append(start)
            tokenized["end_positions"].append(end)
        return tokenized

    def prepare_validation_features(examples):
        tokenized = tokenize(examples)
        samples = tokenized.pop("overflow_to_sample_mapping")
        tokenized["example_id"] = [examples["id"][sample] for sample in samples]
        tokenized["offset_mapping"] = [
            [offset if part == 1 else None for offset, part in zip(offsets, tokenized.sequence_ids(index))]
            for index, offsets in enumerate(tokenized["offset_mapping"])
        ]
        return tokenized

    columns = raw_datasets["train"].column_names
    train_dataset = raw_datasets["train"].map(prepare_train_features, batched=True, remove_columns=columns)
    eval_examples = raw_datasets["validation"]
    eval_features = eval_examples.map(prepare_validation_features, batched=True, remove_columns=columns)
    eval_dataset = eval_features.remove_columns(["example_id", "offset_mapping"])

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset if training_args.do_train else None,
        eval_dataset=eval_dataset if training_args.do_eval else None,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    if training_args.do_train:
        train_result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
        trainer.log_metrics("train", train_result.metrics)
        trainer.save_metrics("train", train_result.metrics)
        trainer.save_state()
    if training_args.do_eval:
        logits = trainer.predict(eval_dataset).predictions
        predictions = best_spans(eval_examples, eval_features, logits, data_args)
        metrics = {f"eval_{name}": value for name, value in squad_metrics(predictions, eval_examples).items()}
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)

    packed = os.path.join(training_args.output_dir, "packed")
    trainer.model.pack().save_pretrained(packed)
    tokenizer.save_pretrained(packed)
    logger.info("packed model: %s", packed)


if __name__ == "__main__":
    main()
