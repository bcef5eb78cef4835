"""Optimizers and learning rate schedules, at torch.optim's names and paths.

An optimizer is one file: an update rule over flat arrays (update.py) with torch's constructor.
optimizer.py holds groups, state and hooks; lr_scheduler.py the schedules.
"""

from __future__ import annotations

from dtrain.optim import lr_scheduler as lr_scheduler
from dtrain.optim.adadelta import Adadelta as Adadelta
from dtrain.optim.adagrad import Adagrad as Adagrad
from dtrain.optim.adam import Adam as Adam
from dtrain.optim.adamax import Adamax as Adamax
from dtrain.optim.adamw import AdamW as AdamW
from dtrain.optim.nadam import NAdam as NAdam
from dtrain.optim.optimizer import Optimizer as Optimizer
from dtrain.optim.radam import RAdam as RAdam
from dtrain.optim.rmsprop import RMSprop as RMSprop
from dtrain.optim.sgd import SGD as SGD
