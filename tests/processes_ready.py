"""Imported once by the process that the others are copies of (`processes`): what an optimizer loads is loaded before there are copies."""

from __future__ import annotations

import torch

from justforward import MeZO
from justforward.directions import FAMILIES

torch.set_num_threads(1)
for family in FAMILIES:
    MeZO(torch.nn.Linear(2, 2), family=family)
