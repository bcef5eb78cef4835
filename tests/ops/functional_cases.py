"""Calls of torch.nn.functional whose results and gradients are recorded: plain data, no library.

A case is an expression over named arrays. Arrays are described by a letter and a shape: x normal,
p uniform in (0.05, 0.95), s signs, i5 integers below 5; float arrays get gradients unless their
name is upper case. `seeded` cases draw random numbers after `manual_seed(7)`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Case = tuple[str, dict[str, tuple[str, tuple[int, ...]]]]

X34 = {"x": ("x", (3, 4))}
ON_MATRIX = """
relu(x)|relu6(x * 4)|leaky_relu(x, 0.2)|elu(x, 1.5)|hardtanh(x, -0.5, 0.7)|silu(x)|gelu(x)
gelu(x, approximate="tanh")|softplus(x * 3, 2, 3)|logsigmoid(x * 5)|sigmoid(x)|tanh(x)|glu(x, 1)
glu(x)|threshold(x, 0.1, 3.0)|selu(x)|hardswish(x * 3)|mish(x)|softmin(x, 1)|softmax(x, 0)
log_softmax(x, 1)|normalize(x)|normalize(x, p=1, dim=0)|layer_norm(x, (4,))|layer_norm(x, (3, 4))
rms_norm(x, (4,))|dropout(x, 0.3, False)|pad(x, (1, 2))|pad(x, (1, -1, 2, 0), value=2.0)
pad(x, (1, 2), mode="replicate")|pad(x, (1, 2), mode="reflect")|pad(x, (1, 2), mode="circular")
"""
ON_IMAGES = """
max_pool2d(x, 2)|max_pool2d(x, 3, 2, 1)|max_pool2d(x, 2, ceil_mode=True)|max_pool2d(relu(x), 2)
max_pool2d(x, (3, 2), (2, 1), (1, 0), (1, 2))|max_pool2d(x, 3, 2, 1, ceil_mode=True)
avg_pool2d(x, 2)|avg_pool2d(x, 3, 2, 1)|avg_pool2d(x, 3, 2, 1, ceil_mode=True)
avg_pool2d(x, 3, 2, 1, True, False)|avg_pool2d(x, (2, 3), divisor_override=5)
adaptive_avg_pool2d(x, 1)|adaptive_avg_pool2d(x, (3, 4))|adaptive_avg_pool2d(x, (None, 2))
interpolate(x, scale_factor=2)|interpolate(x, size=(4, 3))|interpolate(x, scale_factor=1.7)
interpolate(x, size=(9, 5), mode="bilinear")|interpolate(x, scale_factor=1.7, mode="bilinear")
interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
interpolate(x, size=3, mode="area")|unfold(x, 2)|unfold(x, (3, 2), (1, 2), 1, (2, 1))
pad(x, (1, 2, 2, 1), mode="reflect")|pad(x, (1, 2, 2, 1), mode="circular")
max_pool2d(x, 2, return_indices=True)[1] * x.sum()
max_pool2d(x, 3, 2, 1, return_indices=True)[1] * x.sum()
"""


def _each(expressions: str, arrays: Any) -> list[Case]:
    return [(e, arrays) for line in expressions.split("\n") for e in line.split("|") if e]


def _convolutions() -> list[Case]:
    rows = [
        ("conv2d(x, w, b)", (1, 4, 7, 6), (6, 4, 3, 3)),
        ("conv2d(x, w, b, (2, 1), (1, 2), groups=2)", (1, 4, 7, 6), (6, 2, 3, 2)),
        ("conv2d(x, w, b, padding='same')", (1, 4, 7, 6), (6, 4, 3, 5)),
        ("conv2d(x, w, b, dilation=(2, 1), padding=2)", (4, 7, 6), (6, 4, 3, 3)),
        ("conv2d(x, w, b, 1, 'valid')", (1, 4, 5, 5), (6, 4, 1, 1)),
        ("conv2d(x, w, b, 2)", (1, 4, 5, 5), (6, 4, 1, 1)),
        ("conv1d(x, w, b, 2, 1)", (2, 4, 9), (6, 4, 3)),
        ("conv1d(x, w, b, groups=4)", (4, 9), (4, 1, 3)),
    ]
    cases = [(call, {"x": ("x", x), "w": ("x", w), "b": ("x", (w[0],))}) for call, x, w in rows]
    rows = [
        ("conv_transpose2d(x, w, b, 2, 1, 1)", (1, 4, 3, 5), (4, 3, 3, 3), 3),
        ("conv_transpose2d(x, w, b, groups=2, dilation=2)", (1, 4, 3, 5), (4, 3, 3, 2), 6),
        ("conv_transpose2d(x, w, b, padding=2)", (1, 4, 3, 5), (4, 3, 3, 3), 3),
        ("conv_transpose1d(x, w, b, 3)", (4, 5), (4, 3, 4), 3),
    ]
    for call, x, w, channels in rows:
        cases.append((call, {"x": ("x", x), "w": ("x", w), "b": ("x", (channels,))}))
    return cases


def _norms() -> list[Case]:
    x, c = ("x", (4, 3, 2, 5)), ("x", (3,))
    return [
        ("layer_norm(x, (4,), w, b, 1e-3)",
         {"x": ("x", (2, 3, 4)), "w": ("x", (4,)), "b": ("x", (4,))}),
        ("layer_norm(x, (3, 4), w)", {"x": ("x", (2, 3, 4)), "w": ("x", (3, 4))}),
        ("rms_norm(x, (4,), w, 0.1)", {"x": ("x", (2, 3, 4)), "w": ("x", (4,))}),
        ("group_norm(x, 2, w, b)", {"x": ("x", (2, 4, 3, 2)), "w": ("x", (4,)), "b": ("x", (4,))}),
        ("group_norm(x, 4)", {"x": ("x", (2, 4, 3))}),
        ("batch_norm(x, None, None, w, b, True)", {"x": x, "w": c, "b": c}),
        ("batch_norm(x, None, None, training=True)", {"x": ("x", (4, 3))}),
        ("batch_norm(x, M, V, w, b)", {"x": x, "M": c, "V": ("p", (3,)), "w": c, "b": c}),
        ("batch_norm(x, M, V)", {"x": ("x", (4, 3)), "M": c, "V": ("p", (3,))}),
    ]  # fmt: skip


def _losses(reduction: str) -> list[Case]:
    end = f"reduction={reduction!r})"
    x, y, p = ("x", (3, 4)), ("x", (3, 4)), ("p", (3, 4))
    rows, images = {"x": ("x", (4, 5)), "t": ("i5", (4,))}, {"x": ("x", (2, 5, 3))}
    weighted, mapped = {**rows, "W": ("p", (5,))}, {**images, "t": ("i5", (2, 3))}
    cases: list[Case] = [(f"nll_loss(x, t, {end}", rows)]
    cases.append((f"nll_loss(x, t, W, ignore_index=2, {end}", {**mapped, "W": ("p", (5,))}))
    for smooth in ("", "label_smoothing=0.1, "):
        cases += [
            (f"cross_entropy(x, t, {smooth}{end}", rows),
            (f"cross_entropy(x, t, W, ignore_index=1, {smooth}{end}", weighted),
            (f"cross_entropy(x, t, {smooth}{end}  # images", mapped),
            (f"cross_entropy(x, p, W, {smooth}{end}",
             {**images, "p": ("p", (2, 5, 3)), "W": ("p", (5,))}),
        ]  # fmt: skip
    for call in ("mse_loss(x, y, ", "l1_loss(x, y, ", "smooth_l1_loss(x, y, beta=0.5, ",
                 "smooth_l1_loss(x, y, beta=0, ", "huber_loss(x, y, delta=0.7, "):  # fmt: skip
        cases.append((call + end, {"x": x, "y": y}))
    return [
        *cases,
        (f"binary_cross_entropy(x, p, {end}", {"x": p, "p": p}),
        (f"binary_cross_entropy_with_logits(x * 4, p, W, pos_weight=P * 3, {end}",
         {"x": x, "p": p, "W": p, "P": ("p", (4,))}),
        (f"kl_div(x, p, {end}", {"x": x, "p": p}),
        (f"kl_div(x, y, log_target=True, {end}", {"x": x, "y": y}),
        (f"margin_ranking_loss(x, y, S, 0.3, {end}", {"x": x, "y": y, "S": ("s", (3, 4))}),
        (f"gaussian_nll_loss(x, y, v, full=True, {end}", {"x": x, "y": y, "v": p}),
    ]  # fmt: skip


def _attention() -> list[Case]:
    def qkv(*shape: int) -> dict[str, Any]:
        return dict.fromkeys("qkv", ("x", shape))

    f = "scaled_dot_product_attention(q, k, v"
    cases = [
        (f"{f}{options})  # {shape}", qkv(*shape))
        for options in ("", ", is_causal=True", ", scale=0.3")
        for shape in ((2, 2, 3, 2), (2, 3, 2), (3, 2), (1, 1, 70, 1), (2, 1, 2, 3, 2))
    ]
    grouped = {"q": ("x", (2, 6, 5, 4)), "k": ("x", (2, 2, 7, 4)), "v": ("x", (2, 2, 7, 3))}
    long = {"q": ("x", (2, 2, 7, 4)), "k": ("x", (2, 2, 5, 4)), "v": ("x", (2, 2, 5, 4))}
    wide = {"q": long["k"], "k": long["q"], "v": long["q"]}
    broad = {**wide, "k": ("x", (1, 2, 7, 4))}
    some = {**qkv(2, 3, 5, 4), "t": ("i5", (2, 3, 5, 5))}
    return [
        *cases,
        (f"{f}, attn_mask=m)", {**qkv(2, 3, 5, 4), "m": ("x", (5, 5))}),
        (f"{f}, m)", {**qkv(2, 3, 5, 4), "m": ("x", (2, 1, 5, 5))}),
        (f"{f}, t > 2)", some),
        (f"{f}, t > 3)", some),
        (f"{f}, enable_gqa=True)", grouped),
        (f"{f}, is_causal=True)  # long", long),
        (f"{f}, is_causal=True)  # wide", wide),
        (f"{f})  # broad", broad),
    ]


def _others() -> list[Case]:
    vector = {"x": ("x", (5,))}
    index = {"w": ("x", (5, 3)), "t": ("i5", (2, 4))}
    pair = {"x": ("x", (3, 4)), "y": ("x", (3, 4))}
    return [
        ("prelu(x, w)", {**X34, "w": ("p", (4,))}),
        ("prelu(x, w)  # one", {**X34, "w": ("p", (1,))}),
        ("max_pool2d(x, 2)  # (3, 5, 4)", {"x": ("x", (3, 5, 4))}),
        ("max_pool1d(x, 2, padding=1)", {"x": ("x", (2, 3, 7))}),
        ("avg_pool1d(x, 3, 2, 1)", {"x": ("x", (2, 3, 7))}),
        ("adaptive_avg_pool1d(x, 3)", {"x": ("x", (2, 3, 7))}),
        ("adaptive_avg_pool2d(x, 2)", {"x": ("x", (3, 7, 6))}),
        ("interpolate(x, scale_factor=2, mode='linear')", {"x": ("x", (2, 3, 5))}),
        ("fold(x, (4, 5), (2, 3))", {"x": ("x", (2, 12, 9))}),
        ("fold(x, (4, 5), 2, padding=1, stride=2)", {"x": ("x", (2, 12, 9))}),
        ("unfold(x, 2)  # (3, 4, 4)", {"x": ("x", (3, 4, 4))}),
        ("cross_entropy(x, t)", {**vector, "t": ("i5", ())}),
        ("nll_loss(x, t)", {**vector, "t": ("i5", ())}),
        ("cross_entropy(x, p)", {**vector, "p": ("p", (5,))}),
        ("cross_entropy(x, t, size_average=False)", {"x": ("x", (4, 5)), "t": ("i5", (4,))}),
        ("kl_div(x, p, reduction='batchmean')", {**X34, "p": ("p", (3, 4))}),
        ("cosine_similarity(x, y)", pair),
        ("cosine_similarity(x, y, dim=-2)", pair),
        ("embedding(t, w)", index),
        ("embedding(t, w, padding_idx=1)", index),
        ("one_hot(t, 5) * w", {"w": ("x", (5,)), "t": ("i5", (2, 4))}),
        ("linear(x, w, b)", {"x": ("x", (2, 3, 4)), "w": ("x", (5, 4)), "b": ("x", (5,))}),
        ("linear(x, w)", {"x": ("x", (4,)), "w": ("x", (5, 4))}),
    ]


def _seeded() -> list[Case]:
    qkv = dict.fromkeys("qkv", ("x", (2, 3, 5, 4)))
    return [
        ("dropout(x, 0.3)", {"x": ("x", (5, 7))}),
        ("dropout2d(x, 0.4)", {"x": ("x", (4, 3, 2, 2))}),
        ("dropout1d(x, 0.4)", {"x": ("x", (3, 4))}),
        ("scaled_dot_product_attention(q, k, v, dropout_p=0.4)", qkv),
    ]


CASES: list[Case] = [
    *_each(ON_MATRIX, X34),
    *_each(ON_IMAGES, {"x": ("x", (1, 2, 7, 6))}),
    *_convolutions(),
    *_norms(),
    *(case for reduction in ("mean", "sum", "none") for case in _losses(reduction)),
    *_attention(),
    *_others(),
    *_seeded(),
]


def arrays(case: Case) -> dict[str, np.ndarray]:
    """The arrays of a case, float64 and int64; always the same."""
    random = np.random.RandomState(len(case[0]))
    made = {}
    for name, (kind, shape) in case[1].items():
        if kind == "x":
            made[name] = np.asarray(random.randn(*shape))
        elif kind == "p":
            made[name] = random.uniform(0.05, 0.95, shape)
        elif kind == "s":
            made[name] = random.choice([-1.0, 1.0], shape)
        else:
            made[name] = np.asarray(random.randint(0, int(kind[1:]), shape))
    return made


def evaluate(torch: Any, case: Case, dtype: str = "float64") -> np.ndarray:
    """A case run with `torch` or what stands for it: the result's number of dimensions and sizes,
    then the result and the gradients of the float arrays, flattened into one vector.
    """
    names = dict(vars(torch.nn.functional))
    leaves = []
    for name, array in arrays(case).items():
        floating = array.dtype.kind == "f"
        names[name] = torch.tensor(array, dtype=getattr(torch, dtype) if floating else torch.int64)
        if floating and name.islower():
            leaves.append(names[name].requires_grad_())
    torch.manual_seed(7)
    result = eval(case[0], names)
    weights = np.random.RandomState(1).uniform(0.5, 1.5, tuple(result.shape))
    result.backward(torch.tensor(weights, dtype=result.dtype))
    parts = [result.detach(), *(leaf.grad for leaf in leaves)]
    assert all(part.dtype == getattr(torch, dtype) for part in parts)
    flat = [np.asarray([result.ndim, *result.shape])]
    return np.concatenate(flat + [part.numpy().ravel() for part in parts]).astype(np.float64)
