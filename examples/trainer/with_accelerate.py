"""The same with Accelerate, which puts model and batches where they are to be.

python examples/trainer/with_accelerate.py MODEL_FOLDER README.md run.jfl
"""

import sys
from pathlib import Path

from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

import justforward as jf

folder, data, log = sys.argv[1:]

tokenizer = AutoTokenizer.from_pretrained(folder)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
lines = [line for line in Path(data).read_text(encoding="utf-8").splitlines() if line.strip()]
rows = [tokenizer(line, truncation=True, max_length=64) for line in lines]
collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)

accelerator = Accelerator()  # no mixed precision: a look needs all bits of a loss
model, loader = accelerator.prepare(
    AutoModelForCausalLM.from_pretrained(folder),
    DataLoader(rows, batch_size=8, shuffle=True, collate_fn=collate),
)
# After the model has its place. The optimizer is not prepared: there is no gradient to scale or to share.
opt = jf.MeZO(accelerator.unwrap_model(model), lr=1e-3, rule="rms", log=log)
for step, batch in enumerate(loader):
    loss = opt.step(lambda batch=batch: model(**batch).loss)
    if step % 10 == 0:
        accelerator.print(f"step {step}: loss {loss:.4f}")
opt.close()
