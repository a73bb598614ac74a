"""Fine-tune a low-bit BERT on token classification (named entities, parts of speech) with the plain `Trainer`.

python examples/run_ner.py --model_name_or_path google-bert/bert-base-cased --dataset_name conll2003 \
    --do_train --do_eval --output_dir runs/ner

Own data: --train_file and --validation_file, JSON lines with a list of words and a list of tags of the same length.
"""

import logging
import os
import sys
from dataclasses import dataclass, field

import numpy as np
from datasets import load_dataset
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    EvalPrediction,
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
    text_column_name: str = field(default="tokens", metadata={"help": "Column of words."})
    label_column_name: str = field(default="ner_tags", metadata={"help": "Column of tags."})
    max_seq_length: int = field(default=128, metadata={"help": "Longer texts are truncated."})
    label_all_tokens: bool = field(
        default=False, metadata={"help": "Label every piece of a word, not only its first."}
    )

    def __post_init__(self):
        if self.dataset_name is None and (self.train_file is None or self.validation_file is None):
            raise ValueError("give dataset_name, or train_file and validation_file")


def entities(tags: list[str]) -> set[tuple[int, int, str]]:
    """(first word, word after the last, kind) of the spans that IOB2 tags mark; a lone I- starts a span, too."""
    spans, start, kind = set(), 0, None
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        if kind is not None and not (prefix == "I" and name == kind):
            spans.add((start, place, kind))
            kind = None
        if kind is None and prefix in ("B", "I"):
            start, kind = place, name
    return spans


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
    text_column, label_column = data_args.text_column_name, data_args.label_column_name
    feature = getattr(raw_datasets["train"].features[label_column], "feature", None)
    if getattr(feature, "names", None):
        label_list, label_to_id = feature.names, {index: index for index in range(len(feature.names))}
    else:
        label_list = sorted({tag for tags in raw_datasets["train"][label_column] for tag in tags})
        label_to_id = {label: index for index, label in enumerate(label_list)}

    # Low-bit classes load the full-precision checkpoint tensor by tensor: latent weights have BERT's own names.
    backbone = AutoConfig.from_pretrained(model_args.model_name_or_path).model_type.rpartition("_")[2]
    model_class = get_model_class(model_args.family, backbone, "token-classification")
    config = model_class.config_class.from_pretrained(
        model_args.model_name_or_path,
        num_labels=len(label_list),
        id2label=dict(enumerate(map(str, label_list))),
        label2id={str(label): index for index, label in enumerate(label_list)},
        **({"bits": model_args.bits} if model_args.bits else {}),
    )
    # RoBERTa's tokenizer takes words only if it may put a space before the first.
    options = {"add_prefix_space": True} if backbone == "roberta" else {}
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or model_args.model_name_or_path, **options)
    model = model_class.from_pretrained(model_args.model_name_or_path, config=config)

    def tokenize_and_align_labels(examples):
        tokenized = tokenizer(
            examples[text_column], truncation=True, max_length=data_args.max_seq_length, is_split_into_words=True
        )
        tokenized["labels"] = []
        for row, tags in enumerate(examples[label_column]):
            labels, previous = [], None
            for word in tokenized.word_ids(batch_index=row):
                ignored = word is None or (word == previous and not data_args.label_all_tokens)
                labels.append(-100 if ignored else label_to_id[tags[word]])
                previous = word
            tokenized["labels"].append(labels)
        return tokenized

    tokenized_datasets = raw_datasets.map(
        tokenize_and_align_labels, batched=True, remove_columns=raw_datasets["train"].column_names
    )

    def compute_metrics(prediction: EvalPrediction):
        predicted = np.argmax(prediction.predictions, axis=2)
        correct = found = wanted = same = words = 0
        for guesses, labels in zip(predicted, prediction.label_ids):
            kept = labels != -100
            guess_tags = [str(label_list[index]) for index in guesses[kept]]
            true_tags = [str(label_list[index]) for index in labels[kept]]
            same, words = same + sum(map(str.__eq__, guess_tags, true_tags)), words + len(true_tags)
            guessed, true = entities(guess_tags), entities(true_tags)
            correct, found, wanted = correct + len(guessed & true), found + len(guessed), wanted + len(true)
        return {
            "precision": correct / max(found, 1),
            "recall": correct / max(wanted, 1),
            "f1": 2 * correct / max(found + wanted, 1),
            "accuracy": same / max(words, 1),
        }

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=tokenized_datasets["train"] if training_args.do_train else None,
        eval_dataset=tokenized_datasets["validation"] if training_args.do_eval else None,
        processing_class=tokenizer,
        data_collator=DataCollatorForTokenClassification(tokenizer),
        compute_metrics=compute_metrics,
    )
    if training_args.do_train:
        train_result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
        trainer.log_metrics("train", train_result.metrics)
        trainer.save_metrics("train", train_result.metrics)
        trainer.save_state()
    if training_args.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)

    packed = os.path.join(training_args.output_dir, "packed")
    trainer.model.pack().save_pretrained(packed)
    tokenizer.save_pretrained(packed)
    logger.info("packed model: %s", packed)


if __name__ == "__main__":
    main()
