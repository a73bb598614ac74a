"""Fine-tune a low-bit BERT on a GLUE task, or on your own CSV, JSON or Parquet files, with the plain `Trainer`.

python examples/run_glue.py --model_name_or_path google-bert/bert-base-uncased --task_name mrpc \
    --do_train --do_eval --max_seq_length 128 --per_device_train_batch_size 32 --learning_rate 5e-5 \
    --num_train_epochs 3 --output_dir runs/mrpc

Training has latent fp32 weights and a fake-quantized forward; OUTPUT_DIR/packed then holds the bits. Distillation
(`qbert distill`) gives better scores than labels alone.
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
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from modeling_qbert import get_model_class
from trainers.metrics import score
from trainers.tasks import TASKS


logger = logging.getLogger(__name__)

SENTENCE_TASKS = sorted(name for name, task in TASKS.items() if task.kind in ("classification", "regression"))


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "Full-precision or latent BERT, RoBERTa or ELECTRA."})
    family: str = field(default="ternary", metadata={"help": "Family of the zoo: ternary or binary."})
    bits: str | None = field(default=None, metadata={"help": "Bits of weights-embedding-activations, such as 2-2-8."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Default: the model's."})


@dataclass
class DataTrainingArguments:
    task_name: str | None = field(default=None, metadata={"help": "One of: " + ", ".join(SENTENCE_TASKS)})
    train_file: str | None = field(default=None, metadata={"help": "CSV, JSON or Parquet; text columns and label."})
    validation_file: str | None = field(default=None, metadata={"help": "As train_file."})
    max_seq_length: int = field(default=128, metadata={"help": "Longer texts are truncated."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use the first rows only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use the first rows only."})

    def __post_init__(self):
        if self.task_name is None and (self.train_file is None or self.validation_file is None):
            raise ValueError("give task_name, or train_file and validation_file")
        if self.task_name is not None and self.task_name not in SENTENCE_TASKS:
            raise ValueError(f"task_name: expected one of {SENTENCE_TASKS}, found {self.task_name!r}")


def main():
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        model_args, data_args, training_args = parser.parse_json_file(json_file=os.path.abspath(sys.argv[1]))
    else:
        model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    logging.basicConfig(level=logging.INFO)
    set_seed(training_args.seed)

    task = TASKS[data_args.task_name] if data_args.task_name else None
    if data_args.train_file is not None:
        kind = data_args.train_file.rpartition(".")[2].replace("jsonl", "json")
        files = {"train": data_args.train_file, "validation": data_args.validation_file}
        raw_datasets = load_dataset(kind, data_files=files)
    else:
        raw_datasets = load_dataset(task.dataset, task.name)
        raw_datasets["validation"] = raw_datasets[task.eval_splits[0]]
    if task is not None:
        columns = [task.text] + ([task.text_pair] if task.text_pair else [])
    else:
        columns = [name for name in raw_datasets["train"].column_names if name not in ("label", "idx")][:2]
    is_regression = raw_datasets["train"].features["label"].dtype in ("float32", "float64")
    if is_regression:
        label_list = ["score"]
    elif task is not None:
        label_list = list(task.label_names)
    else:
        label_list = sorted(raw_datasets["train"].unique("label"))

    # Low-bit classes load the full-precision checkpoint tensor by tensor: latent weights have BERT's own names.
    backbone = AutoConfig.from_pretrained(model_args.model_name_or_path).model_type.rpartition("_")[2]
    model_class = get_model_class(model_args.family, backbone, "sequence-classification")
    config = model_class.config_class.from_pretrained(
        model_args.model_name_or_path,
        num_labels=len(label_list),
        problem_type="regression" if is_regression else "single_label_classification",
        **({"bits": model_args.bits} if model_args.bits else {}),
    )
    if not is_regression:
        config.id2label = {index: str(label) for index, label in enumerate(label_list)}
        config.label2id = {str(label): index for index, label in enumerate(label_list)}
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or model_args.model_name_or_path)
    model = model_class.from_pretrained(model_args.model_name_or_path, config=config)

    own_labels = {label: index for index, label in enumerate(label_list)} if task is None and not is_regression else {}

    def preprocess_function(examples):
        result = tokenizer(*(examples[name] for name in columns), truncation=True, max_length=data_args.max_seq_length)
        result["labels"] = [own_labels.get(label, label) for label in examples["label"]]
        return result

    tokenized = raw_datasets.map(preprocess_function, batched=True, remove_columns=raw_datasets["train"].column_names)
    train_dataset, eval_dataset = tokenized["train"], tokenized["validation"]
    if data_args.max_train_samples is not None:
        train_dataset = train_dataset.select(range(min(len(train_dataset), data_args.max_train_samples)))
    if data_args.max_eval_samples is not None:
        eval_dataset = eval_dataset.select(range(min(len(eval_dataset), data_args.max_eval_samples)))

    def compute_metrics(prediction: EvalPrediction):
        logits = prediction.predictions
        predictions = np.squeeze(logits, 1) if is_regression else np.argmax(logits, axis=1)
        if task is not None:
            return score(task, predictions, prediction.label_ids)
        if is_regression:
            return {"mse": float(((predictions - prediction.label_ids) ** 2).mean())}
        return {"accuracy": float((predictions == prediction.label_ids).mean())}

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset if training_args.do_train else None,
        eval_dataset=eval_dataset if training_args.do_eval else None,
        compute_metrics=compute_metrics,
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
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)

    packed = os.path.join(training_args.output_dir, "packed")
    trainer.model.pack().save_pretrained(packed)
    tokenizer.save_pretrained(packed)
    logger.info("packed model: %s", packed)


if __name__ == "__main__":
    main()
