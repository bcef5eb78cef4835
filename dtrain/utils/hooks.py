"""torch.utils.hooks: where scripts look for the handle that registering a hook returns.

The class itself is `dtrain.autograd.handle.RemovableHandle`, since tensors hand it out too.
"""

from __future__ import annotations

from dtrain.autograd.handle import RemovableHandle as RemovableHandle
