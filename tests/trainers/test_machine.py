"""The machine: its name, and freed memory that stays while a model trains."""

import os
import platform
import subprocess
import sys

import pytest

from trainers import machine


def test_cpu_name(tmp_path, monkeypatch):
    path = tmp_path / "cpuinfo"
    path.write_text("cpu family\t: 25\nmodel\t\t: 1\nmodel name\t: AMD EPYC\n\nmodel name\t: AMD EPYC\n")
    monkeypatch.setattr(machine, "Path", lambda _: path)
    assert machine.cpu_name() == "AMD EPYC (family 25, model 1)"
    path.write_text("processor\t: 0\nCPU part\t: 0xd0c\n")
    assert machine.cpu_name() == (platform.processor() or platform.machine())
    path.unlink()
    assert machine.cpu_name() == (platform.processor() or platform.machine())


PROGRAM = """
import re, sys
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from trainers import machine
from trainers.checkpointing import AtomicCheckpointMixin

machine.KEPT_SHARE = float(sys.argv[2])

def resident():  # MiB
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

class Memory(AtomicCheckpointMixin, Trainer):
    def training_step(self, *arguments, **keywords):
        before = resident()
        for size in (128, 256):  # each filled, then freed
            torch.ones(size, 2**18)
        loss = super().training_step(*arguments, **keywords)
        self.kept = resident() - before
        return loss

config = BertConfig(vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
rows = [{"input_ids": [1, 2, 3], "labels": 0}] * 8
arguments = TrainingArguments(sys.argv[1], max_steps=1, report_to=[], use_cpu=True, save_strategy="no")
trainer = Memory(model=BertForSequenceClassification(config), args=arguments, train_dataset=rows)
start = resident()
trainer.train()
print("kept", trainer.kept)
print("left", resident() - start)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other systems' allocators are left as they are")
@pytest.mark.parametrize("share", [machine.KEPT_SHARE, 0])
def test_freed_memory_stays_while_training_and_there_is_enough(tmp_path, share):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "run"), str(share)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    numbers = dict(line.split() for line in done.stdout.splitlines() if line.startswith(("kept", "left")))
    assert (float(numbers["kept"]) > 200) == (share > 0), done.stdout  # the freed 256 MiB
    assert float(numbers["left"]) < 150, done.stdout  # they went back afterwards


def test_memory_limit_is_a_containers_own(tmp_path, monkeypatch):
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(machine, "Path", lambda _: limit)
    for text, expected in (("max\n", physical), ("1048576\n", 2**20)):
        limit.write_text(text)
        assert machine.memory_limit() == expected
    limit.unlink()
    assert machine.memory_limit() == physical
