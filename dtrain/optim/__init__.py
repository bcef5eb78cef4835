"""Optimizers and learning rate schedules, at torch.optim's names and paths.

An optimizer is one file: an update rule over flat arrays (update.py) with torch's constructor.
optimizer.py holds groups, state and hooks; lr_scheduler.py the schedules.
"""

from __future__ import annotations

from dtrain.optim.adam import Adam as Adam
from dtrain.optim.adamw import AdamW as AdamW
from dtrain.optim.optimizer import Optimizer as Optimizer
from dtrain.optim.sgd import SGD as SGD
