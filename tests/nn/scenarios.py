"""What happens in which order: programs run with PyTorch (recorded) and with dtrain (compared).

A scenario takes the package, builds modules of it and returns plain data. `@scenario` puts it
into SCENARIOS under its name.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

SCENARIOS: dict[str, Callable[[Any], Any]] = {}


def scenario(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    SCENARIOS[function.__name__] = function
    return function


def net(torch: Any) -> Any:
    nn = torch.nn
    inner = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    return nn.Sequential(OrderedDict(a=nn.Linear(2, 3), b=inner, c=inner, d=nn.ReLU()))


def plain(value: Any) -> Any:
    """Tensors as nested lists of rounded numbers."""
    if isinstance(value, (tuple, list)):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):
        return rounded(value.tolist())
    return value


def rounded(value: Any) -> Any:
    return [rounded(v) for v in value] if isinstance(value, list) else round(value, 4)


@scenario
def names(torch):
    model = net(torch)
    model.register_buffer("seen", torch.zeros(1), persistent=False)
    return {
        "parameters": [name for name, _ in model.named_parameters()],
        "parameters, duplicates": [
            name for name, _ in model.named_parameters(remove_duplicate=False)
        ],
        "parameters, here": [name for name, _ in model.named_parameters("p", recurse=False)],
        "buffers": [name for name, _ in model.named_buffers("x")],
        "modules": [name for name, _ in model.named_modules()],
        "modules, duplicates": [name for name, _ in model.named_modules(remove_duplicate=False)],
        "children": [name for name, _ in model.named_children()],
        "counts": [len(list(model.modules())), len(list(model.children()))],
        "state": list(model.state_dict(prefix="m.")),
        "metadata": [[k, v] for k, v in model.state_dict()._metadata.items()],
        "own": list(model.b[0].state_dict()),
    }


@scenario
def attributes(torch):
    nn = torch.nn
    m = nn.Module()
    m.x = 1
    m.p = nn.Parameter(torch.ones(2))
    m.q = None
    m.q = nn.Parameter(torch.ones(1))
    m.register_buffer("b", torch.ones(1))
    m.b = torch.zeros(3)
    m.c = nn.Buffer(torch.ones(2), persistent=False)
    m.child = nn.ReLU()
    first = [sorted(m._parameters), sorted(m._buffers), sorted(m._modules), list(m.state_dict())]
    m.p = None
    m.x = nn.Parameter(torch.ones(1))
    m.child = nn.Linear(1, 1)
    m.q = nn.Parameter(torch.ones(4))
    second = [sorted(m._parameters), sorted(m._buffers), sorted(m._modules), "x" in m.__dict__]
    del m.q, m.b, m.child
    third = [sorted(m._parameters), sorted(m._buffers), sorted(m._modules)]
    return [first, second, third, hasattr(m, "q"), m.p, {"x", "c", "p"} <= set(dir(m))]


@scenario
def forward_hooks(torch):
    log: list[Any] = []
    m = torch.nn.Linear(2, 2)
    torch.nn.init.ones_(m.weight)
    torch.nn.init.zeros_(m.bias)
    x = torch.ones(1, 2)

    def pre(name, factor):
        return lambda module, args: log.append(name) or (args[0] * factor)

    handle = m.register_forward_pre_hook(pre("pre 1", 2))
    m.register_forward_pre_hook(pre("pre 0", 3), prepend=True)
    m.register_forward_pre_hook(lambda *got: log.append(len(got)), with_kwargs=True)
    m.register_forward_hook(lambda module, args, out: log.append(plain(out)))
    m.register_forward_hook(lambda module, args, out: out + 1, prepend=True)
    m.register_forward_hook(
        lambda module, args, kwargs, out: log.append([plain(args), sorted(kwargs)]),
        with_kwargs=True,
    )
    out = [plain(m(x))]
    handle.remove()
    handle.remove()
    out.append(plain(m(x)))
    out.append(plain(copy.deepcopy(m)(x)))
    return [log, out]


@scenario
def keyword_arguments_through_hooks(torch):
    class Scale(torch.nn.Module):
        def forward(self, x, factor=1):
            return x * factor

    m = Scale()
    m.register_forward_pre_hook(lambda mod, args, kw: (args, {"factor": 5}), with_kwargs=True)
    with m.register_forward_hook(lambda mod, args, kw, out: out + kw["factor"], with_kwargs=True):
        first = plain(m(torch.ones(2), factor=3))
    second = plain(m(torch.ones(2)))
    m.register_forward_pre_hook(lambda mod, args, kw: 3, with_kwargs=True)
    try:
        m(torch.ones(2))
    except RuntimeError as error:
        return [first, second, str(error)]


@scenario
def hooks_of_every_module(torch):
    log: list[str] = []
    module = torch.nn.modules.module
    m = torch.nn.Sequential(torch.nn.ReLU())
    m.register_forward_hook(lambda *_: log.append("own"))
    handles = [
        module.register_module_forward_pre_hook(lambda mod, _: log.append("pre " + str(mod)[:4])),
        module.register_module_forward_hook(lambda mod, *_: log.append("after " + str(mod)[:4])),
    ]
    m(torch.ones(1))
    for handle in handles:
        handle.remove()
    m(torch.ones(1))
    return log


@scenario
def always_called(torch):
    log: list[Any] = []

    class Fails(torch.nn.Module):
        def forward(self, x):
            raise ValueError("on purpose")

    def raises(*_):
        raise RuntimeError("in a hook")

    m = Fails()
    m.register_forward_hook(lambda mod, args, out: log.append(out), always_call=True)
    m.register_forward_hook(raises, always_call=True)
    m.register_forward_hook(lambda *_: log.append("not called"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            m(torch.ones(1))
        except ValueError as error:
            log.append(str(error))
    return [log, [str(w.message) for w in caught]]


@scenario
def backward_hooks(torch):
    log: list[Any] = []
    nn = torch.nn
    m = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
    nn.init.ones_(m[0].weight)
    x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    m[0].register_full_backward_hook(lambda mod, gi, go: log.append(["0", plain(gi), plain(go)]))
    m[1].register_full_backward_hook(lambda mod, gi, go: log.append(["1", plain(gi), plain(go)]))
    m.register_full_backward_hook(lambda mod, gi, go: (gi[0] * 10,))
    m.register_full_backward_pre_hook(lambda mod, go: log.append(["pre", plain(go)]))
    m.register_full_backward_pre_hook(lambda mod, go: (go[0] * 2,), prepend=True)
    m(x).sum().backward()
    return [log, plain(x.grad), plain(m[0].weight.grad)]


@scenario
def backward_hooks_without_inputs_that_require_grad(torch):
    log: list[Any] = []
    m = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.ones_(m.weight)
    m.register_full_backward_hook(lambda mod, gi, go: log.append([plain(gi), plain(go)]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        m(torch.ones(1, 2)).sum().backward()
    return [log, plain(m.weight.grad)]


@scenario
def backward_hooks_with_many_inputs_and_outputs(torch):
    log: list[Any] = []

    class Two(torch.nn.Module):
        def forward(self, a, n, b):
            return a * n, n, a + b

    m = Two()
    m.register_full_backward_hook(lambda mod, gi, go: log.append([plain(gi), plain(go)]))
    a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    first, _, second = m(a, 3, b)
    (first.sum() + 2 * second.sum()).backward()
    m.register_full_backward_hook(lambda mod, gi, go: (gi[0],))
    try:
        m(a, 3, b)[0].sum().backward()
    except RuntimeError as error:
        return [log, plain(a.grad), plain(b.grad), str(error)]


@scenario
def state_hooks(torch):
    log: list[Any] = []
    m = torch.nn.Sequential(torch.nn.Linear(1, 1))
    m[0].register_state_dict_pre_hook(lambda mod, prefix, keep: log.append(["pre", prefix, keep]))
    m[0].register_state_dict_post_hook(
        lambda mod, state, prefix, meta: log.append(["post", prefix, list(state), meta])
    )
    m[0].register_load_state_dict_pre_hook(
        lambda mod, state, prefix, meta, strict, missing, unexpected, errors: log.append(
            ["load", prefix, sorted(state), meta, strict, missing, unexpected, errors]
        )
    )
    m.register_load_state_dict_post_hook(
        lambda mod, keys: log.append(["loaded", keys.missing_keys]) or keys.missing_keys.clear()
    )
    state = m.state_dict()
    del state["0.bias"]
    log.append(repr(m.load_state_dict(state)))
    return log


@scenario
def extra_state(torch):
    class Counts(torch.nn.Module):
        n = 3

        def get_extra_state(self):
            return {"n": self.n}

        def set_extra_state(self, state):
            self.n = state["n"]

    m, other = Counts(), Counts()
    m.n = 8
    state = m.state_dict()
    loaded = repr(other.load_state_dict(state))
    return [list(state), loaded, other.n, repr(other.load_state_dict({}, strict=False))]


@scenario
def assigning_state(torch):
    m = torch.nn.Linear(2, 1)
    m.bias.requires_grad_(False)
    weight, bias = torch.ones(1, 2, dtype=torch.float64), torch.ones(1)
    m.load_state_dict({"weight": weight, "bias": bias}, assign=True)
    weight[0, 0] = 7
    return [
        str(m.weight.dtype).rpartition(".")[2],
        plain(m.weight),
        m.weight.requires_grad,
        m.bias.requires_grad,
        type(m.bias).__name__,
    ]


@scenario
def old_batch_norm_state(torch):
    m = torch.nn.BatchNorm1d(2)
    state = OrderedDict((k, v) for k, v in m.state_dict().items() if "num" not in k)
    m.num_batches_tracked.fill_(5)
    return [repr(m.load_state_dict(state)), int(m.num_batches_tracked)]


@scenario
def containers(torch):
    nn = torch.nn
    a, b, c = nn.ReLU(), nn.Tanh(), nn.Sigmoid()
    s = nn.Sequential(a, b)
    s.append(c).insert(0, c)
    s[1] = nn.Flatten()
    popped = s.pop(-1)
    listed = nn.ModuleList([a, b])
    listed += [c]
    listed.insert(1, c)
    del listed[0]
    named = nn.ModuleDict([("x", a), ("y", b)])
    named.update({"z": c})
    sliced = nn.Sequential(OrderedDict(p=a, q=b, r=c))[1:]
    parameters = nn.ParameterList([torch.ones(1), torch.zeros(2)])
    of_names = nn.ParameterDict({"w": torch.ones(1)})
    of_names["v"] = torch.zeros(1)
    return {
        "sequential": [str(s), str(popped), len(s), str(s * 2), str(s + s), str(sliced)],
        "list": [str(listed), str(listed[-1]), str(listed[:2]), len(listed.__add__([a]))],
        "dict": [list(named), "x" in named, str(named.pop("x")), list(named.keys())],
        "parameters": [
            [name for name, _ in parameters.named_parameters()], len(parameters[1:]),
            list(of_names.keys()), of_names.pop("w").requires_grad, len(of_names),
            of_names.get("w", 4), plain(of_names.setdefault("u", torch.ones(1))),
        ],
    }  # fmt: skip


@scenario
def modes_and_gradients(torch):
    m = net(torch)
    m.eval()
    modes = [mod.training for mod in m.modules()]
    m.b.train()
    modes.append(m.training)
    m.requires_grad_(False)
    frozen = [p.requires_grad for p in m.parameters()]
    m.requires_grad_(True).train()
    m(torch.ones(4, 2)).sum().backward()
    m.zero_grad(set_to_none=False)
    zeros = [float(p.grad.abs().sum()) for p in m.parameters()]
    m.double()
    kinds = sorted({str(t.dtype).rpartition(".")[2] for t in m.state_dict().values()})
    grads = sorted({str(p.grad.dtype).rpartition(".")[2] for p in m.parameters()})
    m.zero_grad()
    visited: list[str] = []
    m.apply(lambda mod: visited.append(type(mod).__name__))
    return [modes, frozen, zeros, kinds, grads, [p.grad for p in m.parameters()], visited]


@scenario
def clipping(torch):
    def parameters():
        params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(3)]
        params[0].grad = torch.tensor([3.0, -4.0, 0.0])
        params[1].grad = torch.tensor([0.0, 12.0, 0.0])
        return params

    found: dict[str, Any] = {}
    for name, options in {
        "2": {}, "1": {"norm_type": 1}, "inf": {"norm_type": float("inf")},
        "3": {"norm_type": 3.0}, "large": {"max_norm": 100.0},
    }.items():  # fmt: skip
        params = parameters()
        norm = torch.nn.utils.clip_grad_norm_(params, **({"max_norm": 1.0} | options))
        found[name] = [plain(norm), [plain(p.grad) for p in params if p.grad is not None]]
    params = parameters()
    torch.nn.utils.clip_grad_value_(params[0], 2.5)
    found["value"] = plain(params[0].grad)
    return found


@scenario
def one_vector(torch):
    m = torch.nn.Linear(2, 1)
    vector = torch.tensor([1.0, 2.0, 3.0])
    torch.nn.utils.vector_to_parameters(vector, m.parameters())
    m.bias.data[0] = 9
    joined = torch.nn.utils.parameters_to_vector(m.parameters())
    return [plain(vector), plain(joined), joined.requires_grad]
