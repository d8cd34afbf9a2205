"""A language model tuned on the lines of a text file with transformers' Trainer, as many scripts do it.

    python examples/trainer/before.py --model FOLDER --data README.md --out out

`trainer.diff` makes it one that tunes with forward passes: patch -o after.py before.py trainer.diff

    torchrun --nproc-per-node 2 after.py --cpu --model FOLDER --data README.md --out out
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

from transformers import Trainer, TrainingArguments  # isort: skip

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True)
parser.add_argument("--out", required=True)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--save-steps", type=int, default=50)
parser.add_argument("--resume", action="store_true")
parser.add_argument(
    "--cpu", action="store_true", help="needed where torchrun starts processes on CPUs"
)
given = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(given.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(given.model)
lines = [line for line in Path(given.data).read_text(encoding="utf-8").splitlines() if line.strip()]
rows = [tokenizer(line, truncation=True, max_length=64) for line in lines]

args = TrainingArguments(
    output_dir=given.out,
    learning_rate=5e-5,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    max_steps=given.steps,
    logging_steps=10,
    save_steps=given.save_steps,
    report_to="none",
    use_cpu=given.cpu,
)
trainer = Trainer(
    model,
    args,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    train_dataset=rows,
)
trainer.train(resume_from_checkpoint=given.resume)
trainer.save_model(str(Path(given.out) / "final"))
