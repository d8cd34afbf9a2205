"""The same with Lightning (pip install lightning): manual optimization, since there is no backward pass to automate.

python examples/trainer/with_lightning.py MODEL_FOLDER README.md run.jfl
"""

import sys
from pathlib import Path

import lightning
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

import justforward as jf

folder, data, log = sys.argv[1:]


class Tuned(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = AutoModelForCausalLM.from_pretrained(folder)

    def training_step(self, batch, number):
        opt = self.optimizers(use_pl_optimizer=False)
        self.log("loss", opt.step(lambda: self.model(**batch).loss), prog_bar=True)

    def on_train_end(self):
        self.optimizers(use_pl_optimizer=False).close()

    def configure_optimizers(self):
        return jf.MeZO(self.model, lr=1e-3, rule="rms", log=log)


tokenizer = AutoTokenizer.from_pretrained(folder)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
lines = [line for line in Path(data).read_text(encoding="utf-8").splitlines() if line.strip()]
rows = [tokenizer(line, truncation=True, max_length=64) for line in lines]
loader = DataLoader(rows, 8, True, collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm=False))
lightning.Trainer(max_epochs=1, logger=False, enable_checkpointing=False).fit(Tuned(), loader)
