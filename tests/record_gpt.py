"""The first losses of examples/train_gpt.py under PyTorch: what the same seed must give here."""

from __future__ import annotations

import numpy as np

from tests.gpt_run import losses
from tests.recorded.registry import recording


@recording
def gpt_losses():
    return {"losses": np.array(losses("torch"))}
