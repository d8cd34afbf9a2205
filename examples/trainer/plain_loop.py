"""A language model tuned on the lines of a text file in a loop of one's own.

python examples/trainer/plain_loop.py MODEL_FOLDER README.md run.jfl
"""

import copy
import sys
from pathlib import Path

from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

import justforward as jf

folder, data, log = sys.argv[1:]

tokenizer = AutoTokenizer.from_pretrained(folder)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
base = AutoModelForCausalLM.from_pretrained(folder)
model = copy.deepcopy(base)
lines = [line for line in Path(data).read_text(encoding="utf-8").splitlines() if line.strip()]
rows = [tokenizer(line, truncation=True, max_length=64) for line in lines]
loader = DataLoader(
    rows, batch_size=8, shuffle=True, collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm=False)
)  # fmt: skip

opt = jf.MeZO(model, lr=1e-3, rule="rms", log=log)
losses = [opt.step(lambda batch=batch: model(**batch).loss) for batch in loader]
print(f"mean loss {sum(losses) / len(losses):.4f} over {len(losses)} steps")
opt.close()

jf.replay(base, log)
assert jf.fingerprint(base) == jf.fingerprint(model)
