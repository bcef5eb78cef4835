"""Programs whose outcome PyTorch has recorded: views, changes in place, hooks, graphs.

`run(torch, text)` executes one with PyTorch or dtrain. A program fills the list `out` with tensors,
numbers, bools or None. `a` (2, 3) and `w` (3) are leaves that require grad, `b = a * 1` is not one,
`data` (2, 3) requires none.
"""

from __future__ import annotations

from typing import Any

import numpy as np

PROGRAMS = {
    # --- a base changed in place, its views used ---
    "base then view": "v = b[0]; b.mul_(2); (v * w).sum().backward(); out += [a.grad, w.grad, v]",
    "base by a tensor": "v = b[0]; b.mul_(w); (v * v).sum().backward()\nout += [a.grad, w.grad, v]",
    "view then base": "v = b[0]; v.mul_(w); (b * b).sum().backward()\nout += [a.grad, w.grad, b]",
    "view then view": "v, u = b[0], b[:, 1]; v.mul_(3); (u * u).sum().backward()\n"
    "out += [a.grad, u]",
    "chain of views": "v = b.t()[1:].t()[0]; v.mul_(w[:2]); (b * b).sum().backward()\n"
    "out += [a.grad, w.grad]",
    "reshaped": "v = b.view(3, 2)[1]; v.exp_(); (b * b).sum().backward(); out += [a.grad, b]",
    "flattened": "v = b.view(-1)[1:4]; v.mul_(w); b.sum().backward(); out += [a.grad, w.grad]",
    "strided": "v = b[:, ::2]; v.mul_(5); (b * w).sum().backward(); out += [a.grad, w.grad]",
    "unsqueezed": "v = b.unsqueeze(0).transpose(0, 2); v.mul_(2); (b * b).sum().backward()\n"
    "out += [a.grad, v.shape[0]]",
    "diagonal": "v = b.diagonal(); v.mul_(w[:2]); (b * b).sum().backward()\n"
    "out += [a.grad, w.grad]",
    "narrow": "b.narrow(1, 1, 2).mul_(3); (b * w).sum().backward(); out += [a.grad, w.grad]",
    "select": "b.select(1, 0).zero_(); (b * b).sum().backward(); out += [a.grad]",
    "plain base becomes part": "v = data[0]; data.mul_(w); out += [v.requires_grad]\n"
    "(v * 2).sum().backward(); out += [w.grad, v.is_leaf]",
    "seen without recording": "v = data[0]; data.mul_(w)\nwith torch.no_grad():\n"
    "    out += [v.requires_grad, v.is_leaf]\n(v * 2).sum().backward(); out += [w.grad]",
    "plain view becomes part": "v = data[0]; v.mul_(w); out += [data.requires_grad]\n"
    "(data * data).sum().backward(); out += [w.grad]",
    "sister becomes part": "v, u = data[0], data[:, 1]; v.mul_(w); out += [u.requires_grad]\n"
    "(u * u).sum().backward(); out += [w.grad]",
    "views of views": "v = b[0]; u = v[1:]; u.mul_(w[1:]); v.mul_(2); (b * b).sum().backward()\n"
    "out += [a.grad, w.grad]",
    "expanded reader": "e = w.expand(2, 3); c = b * e; c.sum().backward(); out += [a.grad, w.grad]",
    "detached shares": "v = b.detach(); v.zero_(); out += [b]; b.sum().backward(); out += [a.grad]",
    "no_grad both": "with torch.no_grad():\n    v = b[0]\n    v.mul_(2)\n"
    "b.sum().backward(); out += [a.grad, b]",
    "leaf under no_grad": "with torch.no_grad():\n    a[0].mul_(2)\n    a -= 1\n"
    "(a * a).sum().backward(); out += [a.grad, a]",
    # --- assignment ---
    "set row": "b[0] = w; (b * b).sum().backward(); out += [a.grad, w.grad, b]",
    "set number": "b[:, 1] = 7; (b * b).sum().backward(); out += [a.grad]",
    "set element": "b[0, 1] = w[2]; (b * b).sum().backward(); out += [a.grad, w.grad]",
    "set mask": "b[b > 0] = 0.5; (b * b).sum().backward(); out += [a.grad, b]",
    "set mask from": "m = torch.tensor([True, False]); b[m] = w; (b * b).sum().backward()\n"
    "out += [a.grad, w.grad]",
    "set index": "b[[1, 0], [0, 2]] = w[:2]; (b * b).sum().backward(); out += [a.grad, w.grad]",
    "set broadcast": "b[:] = w; (b * b).sum().backward(); out += [a.grad, w.grad]",
    "set leading ones": "b[0] = w.view(1, 1, 3); (b * b).sum().backward(); out += [w.grad]",
    "set other dtype": "b[0] = w.double(); (b * b).sum().backward(); out += [a.grad, w.grad]",
    "set mixed": "b[0, [2, 1]] = w[1:]; (b * b).sum().backward(); out += [a.grad, w.grad]",
    "set view of itself": "b[0] += w; b[1] -= b[0]; (b * b).sum().backward()\n"
    "out += [a.grad, w.grad, b]",
    "set in view": "v = b[1]; v[0] = w[0]; v[1:] *= 2; (b * b).sum().backward()\n"
    "out += [a.grad, w.grad, b]",
    "set plain": "data[1] = w; out += [data.requires_grad, data.is_leaf]\n"
    "(data * data).sum().backward(); out += [w.grad]",
    "loop over rows": "c = torch.zeros(3)\nfor i in range(2):\n    c[i] = (b[i] * w).sum()\n"
    "c.pow(2).sum().backward(); out += [a.grad, w.grad, c]",
    "scatter rows": "c = torch.zeros(4, 3); c[torch.tensor([3, 1])] = b; (c * w).sum().backward()\n"
    "out += [a.grad, w.grad]",
    # --- in-place ops ---
    "add alpha": "b.add_(w, alpha=2); (b * b).sum().backward(); out += [a.grad, w.grad]",
    "mul saves the old": "b.mul_(w); b.sum().backward(); out += [a.grad, w.grad]",
    "div": "b.div_(w); (b * b).sum().backward(); out += [a.grad, w.grad]",
    "pow": "b.pow_(2); b.sum().backward(); out += [a.grad]",
    "exp": "b.exp_(); b.sum().backward(); out += [a.grad]",
    "relu": "b.relu_(); (b * w).sum().backward(); out += [a.grad, w.grad]",
    "clamp": "b.clamp_(-0.5, 0.5); (b * w).sum().backward(); out += [a.grad]",
    "copy": "b.copy_(w); (b * b).sum().backward(); out += [a.grad, w.grad]",
    "copy other dtype": "b.copy_(w.double()); (b * b).sum().backward(); out += [w.grad]",
    "fill": "b.fill_(3); out += [b.requires_grad]; (b * w).sum().backward()\n"
    "out += [a.grad, w.grad]",
    "zero": "b.zero_(); (b + w).sum().backward(); out += [a.grad, w.grad]",
    "masked_fill": "b.masked_fill_(b > 0, -1); (b * b).sum().backward(); out += [a.grad]",
    "lerp": "b.lerp_(w, 0.25); (b * b).sum().backward(); out += [a.grad, w.grad]",
    "addcmul": "b.addcmul_(w, w, value=2); b.sum().backward(); out += [w.grad]",
    "into plain": "data += w; out += [data.requires_grad, data.is_leaf]; data.sum().backward()\n"
    "out += [w.grad]",
    "requires_grad in place": "data.requires_grad_(); data.sum().backward(); out += [data.grad]",
    # --- graphs ---
    "used twice": "(b * b + b).sum().backward(); out += [a.grad]",
    "accumulates": "b.sum().backward(); (a * 2).sum().backward(); out += [a.grad]",
    "retain_grad": "b.retain_grad(); c = b * w; c.retain_grad(); c.sum().backward()\n"
    "out += [a.grad, b.grad, c.grad]",
    "retain_grad after hook": "b.retain_grad(); b.register_hook(lambda g: g * 10)\n"
    "b.sum().backward(); out += [a.grad, b.grad]",
    "retain_grad in place": "b.retain_grad(); b.mul_(3); b.sum().backward()\n"
    "out += [a.grad, b.grad]",
    "hook before change": "b.register_hook(lambda g: out.append(g)); b.mul_(3)\n"
    "b.sum().backward()\n"
    "out += [a.grad]",
    "hooks in order": "b.register_hook(lambda g: g + 1); b.register_hook(lambda g: g * 2)\n"
    "b.sum().backward(); out += [a.grad]",
    "leaf hook": "a.register_hook(lambda g: g * 5); (b + a).sum().backward(); out += [a.grad]",
    "hook returns None": "a.register_hook(lambda g: None); b.sum().backward(); out += [a.grad]",
    "inputs": "(b * w).sum().backward(inputs=[w]); out += [a.grad, w.grad]",
    "inputs not leaves": "(b * w).sum().backward(inputs=[b, a]); out += [b.grad, a.grad, w.grad]",
    "inputs twice": "(b * w).sum().backward(inputs=[b, b, a, a]); out += [b.grad, a.grad]",
    "grad": "out += torch.autograd.grad((b * w).sum(), [a, w]); out += [a.grad]",
    "grad of middle": "c = b * w; d = c * b; out += torch.autograd.grad(d.sum(), [c, b, a, d])",
    "grad same twice": "out += torch.autograd.grad((b * w).sum(), [w, w])",
    "grad unused": "out += torch.autograd.grad(b.sum(), [a, w], allow_unused=True)",
    "grad materialized": "out += torch.autograd.grad(b.sum(), [a, w], materialize_grads=True)",
    "grad several outputs": "out += torch.autograd.grad([b.sum(), (w * w).sum()], [a, w])",
    "grad with outputs": "out += torch.autograd.grad([b, w * 2], [a, w], [data, w.detach()])",
    "grad of itself": "out += torch.autograd.grad(b, b, data)",
    "grad where a path ends": "c = b.detach() * w\n"
    "out += torch.autograd.grad((c + b).sum(), [a, w])",
    "second order": "(g,) = torch.autograd.grad((b ** 3).sum(), a, create_graph=True)\n"
    "out += [g.requires_grad]; (g * w).sum().backward(); out += [a.grad, w.grad]",
    "third order": "(g,) = torch.autograd.grad((b ** 4).sum(), a, create_graph=True)\n"
    "(h,) = torch.autograd.grad(g.sum(), a, create_graph=True); h.sum().backward()\n"
    "out += [a.grad]",
    "create_graph backward": "(b ** 3).sum().backward(create_graph=True); out += [a.grad]\n"
    "g = a.grad; a.grad = None; g.sum().backward(); out += [a.grad]",
    "penalty": "(g,) = torch.autograd.grad((b.tanh() * w).sum(), a, create_graph=True)\n"
    "((b * w).sum() + g.norm() ** 2).backward(); out += [a.grad, w.grad]",
    "softmax second order": "p = torch.softmax(b, 1)\n"
    "(g,) = torch.autograd.grad((p * w).sum(), a, create_graph=True); g.pow(2).sum().backward()\n"
    "out += [a.grad, w.grad]",
    "gelu second order": "y = torch.nn.functional.gelu(b)\n"
    "(g,) = torch.autograd.grad(y.sum(), a, create_graph=True); g.pow(2).sum().backward()\n"
    "out += [a.grad]",
    "layer_norm second order": "y = torch.nn.functional.layer_norm(b, (3,), w, w)\n"
    "(g,) = torch.autograd.grad((y ** 3).sum(), a, create_graph=True); g.pow(2).sum().backward()\n"
    "out += [a.grad, w.grad]",
    "retain_graph": "y = (b * b).sum(); y.backward(retain_graph=True); y.backward()\n"
    "out += [a.grad]",
    "split unused": "u, v, x = b.split(1, 1); (v * 2).sum().backward(); out += [a.grad]",
    "unbind": "u, v = b; (u * v).sum().backward(); out += [a.grad]",
    "max unused indices": "b.max(1).values.sum().backward(); out += [a.grad]",
    "data": "a.data.mul_(2); a.data = a.data + 1; b2 = a * a; b2.sum().backward()\n"
    "out += [a, a.grad]",
    "no_grad": "with torch.no_grad():\n    c = b * w\nout += [c.requires_grad, c.is_leaf]",
    "enable_grad": "with torch.no_grad():\n    with torch.enable_grad():\n        c = b * w\n"
    "out += [c.requires_grad]; c.sum().backward(); out += [a.grad]",
    "gradient of another dtype": "b.backward(data.double()); out += [a.grad]",
    "several roots": "torch.autograd.backward([b.sum(), (w * w).sum()]); out += [a.grad, w.grad]",
    "same root twice": "y = b.sum(); torch.autograd.backward([y, y]); out += [a.grad]",
    "mixed dtypes": "c = b.double() * w; c.sum().backward(); out += [a.grad, w.grad]",
    "detach_": "c = b * w; c.detach_(); (c * w).sum().backward(); out += [a.grad, w.grad]",
    "where": "torch.where(b > 0, b * w, b).sum().backward(); out += [a.grad, w.grad]",
    "clone": "c = b.clone(); c.mul_(2); (b * c).sum().backward(); out += [a.grad]",
}


def run(torch: Any, text: str) -> list[Any]:
    """What the program leaves in `out`, tensors as arrays."""
    a = torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.25, -0.75]], requires_grad=True)
    names = {
        "torch": torch, "out": [], "a": a, "b": a * 1,
        "w": torch.tensor([2.0, -0.5, 1.25], requires_grad=True),
        "data": torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.5, 4.0]]),
    }  # fmt: skip
    exec(text, names)
    return [v.detach().numpy() if isinstance(v, torch.Tensor) else v for v in names["out"]]


def as_plain(values: list[Any]) -> list[Any]:
    """`run`'s outcome as JSON holds it: a tensor as its dtype and nested lists."""
    return [
        {"dtype": v.dtype.name, "values": v.tolist()} if isinstance(v, np.ndarray) else v
        for v in values
    ]
