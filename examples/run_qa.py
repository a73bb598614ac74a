"""Fine-tune a low-bit BERT on extractive question answering (SQuAD 1.1 and 2.0) with the plain `Trainer`.

python examples/run_qa.py --model_name_or_path google-bert/bert-base-uncased --dataset_name rajpurkar/squad \
    --do_train --do_eval --max_seq_length 384 --doc_stride 128 --output_dir runs/squad

Own data: --train_file and --validation_file, JSON lines or Parquet with id, question, context and answers
({"text": [...], "answer_start": [...]}; both empty when the context holds no answer).
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
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from modeling_qbert import get_model_class
from trainers.question_answering import best_answers, score, windows
from trainers.recipe import DataSpec
from trainers.tasks import get_task


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
    doc_stride: int = field(default=128, metadata={"help": "Tokens from one part to the next."})
    max_query_length: int = field(default=64, metadata={"help": "Tokens of a question at most."})
    version_2_with_negative: bool = field(default=False, metadata={"help": "Some questions have no answer."})

    def __post_init__(self):
        if self.dataset_name is None and (self.train_file is None or self.validation_file is None):
            raise ValueError("give dataset_name, or train_file and validation_file")


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

    task = "squad_v2" if data_args.version_2_with_negative else "squad"
    spec = DataSpec(
        task=task,
        max_length=data_args.max_seq_length,
        doc_stride=data_args.doc_stride,
        max_query_length=data_args.max_query_length,
    )
    # A context longer than max_seq_length becomes several features, which know their example and their characters.
    train_dataset = windows(raw_datasets["train"], tokenizer, spec, config)
    eval_examples = raw_datasets["validation"]
    eval_dataset = windows(eval_examples, tokenizer, spec, config)

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
        logits = np.stack(trainer.predict(eval_dataset).predictions[:2], -1)
        answers = best_answers(logits, eval_dataset, eval_examples["context"], data_args.version_2_with_negative)
        accepted = [answers["text"] for answers in eval_examples["answers"]]
        scores = score(get_task(task), [answer["answer"] for answer in answers], accepted)
        metrics = {f"eval_{name}": 100 * value for name, value in scores.items()}
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)

    packed = os.path.join(training_args.output_dir, "packed")
    trainer.model.pack().save_pretrained(packed)
    tokenizer.save_pretrained(packed)
    logger.info("packed model: %s", packed)


if __name__ == "__main__":
    main()
