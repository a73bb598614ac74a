"""The Python blocks of the README as a file: answer with a packed checkpoint, and make one from a fine-tuned BERT.

    python examples/quickstart.py [FINE_TUNED]

FINE_TUNED is a folder or Hub id of a BERT sequence classifier; by default the teacher that `make demo` left.
"""

import os
import sys
from pathlib import Path

from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from modeling_qbert import TernaryBertForSequenceClassification
from trainers.distillation import DistillationArguments, DistillationTrainer


def use(checkpoint: str) -> None:
    """Answer with a packed checkpoint."""
    classify = pipeline("text-classification", model=checkpoint)
    print(classify("a gripping, funny film"))


def make(fine_tuned: str, output: str) -> None:
    """From a fine-tuned BERT to a packed TernaryBERT; twenty steps show the path, a recipe takes many more."""
    teacher = AutoModelForSequenceClassification.from_pretrained(fine_tuned)
    tokenizer = AutoTokenizer.from_pretrained(fine_tuned)
    student = TernaryBertForSequenceClassification.from_pretrained(fine_tuned)  # latent weights, fake-quant forward

    sentences = load_dataset("parquet", data_files="examples/data/rotten_tomatoes/train.parquet", split="train")
    sentences = sentences.map(  # no labels: the student learns from the teacher
        lambda row: tokenizer(row["text"], truncation=True, max_length=64), remove_columns=["text", "label"]
    )
    arguments = DistillationArguments(
        output, max_steps=20, per_device_train_batch_size=32, learning_rate=1e-4, save_strategy="no", report_to="none"
    )
    trainer = DistillationTrainer(student, teacher, arguments, train_dataset=sentences, processing_class=tokenizer)
    trainer.train()

    packed = student.pack()  # the same codes and logits, four codes a byte
    packed.save_pretrained(f"{output}/packed")
    tokenizer.save_pretrained(f"{output}/packed")


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parent.parent)
    found = sys.argv[1:] or [str(folder) for folder in Path("runs/demo/teachers").glob("*/model")]
    if not found:
        sys.exit("quickstart: give a fine-tuned BERT as argument, or run `make demo` first")
    make(found[0], "runs/quickstart")
    use("runs/quickstart/packed")
