"""`backward` and `grad`: what a user calls, over the engine that walks the graph.

Both take one tensor or a sequence of them. Source: torch.autograd.
"""

from __future__ import annotations

from typing import Any

from dtrain.autograd import engine


def _sequence(values: Any) -> list[Any]:
    return list(values) if isinstance(values, (tuple, list)) else [values]


def _gradients(roots: list[Any], grads: Any) -> list[Any]:
    if grads is None:
        return [None] * len(roots)
    given = _sequence(grads)
    if len(given) != len(roots):
        raise RuntimeError(f"got {len(roots)} tensors and {len(given)} gradients")
    return given


def backward(
    tensors: Any,
    grad_tensors: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> None:
    """Accumulate the gradients of `tensors` into the leaves (or into `inputs` only).

    `grad_tensors` are the gradients to start from, 1 for a scalar. Source: torch.autograd.backward.
    """
    roots = _sequence(tensors)
    if inputs is not None:
        inputs = _sequence(inputs)
    keep = create_graph if retain_graph is None else retain_graph
    engine.backward(roots, _gradients(roots, grad_tensors), keep, create_graph, inputs)


def grad(
    outputs: Any,
    inputs: Any,
    grad_outputs: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    allow_unused: bool | None = None,
    is_grads_batched: bool = False,
    materialize_grads: bool = False,
) -> tuple[Any, ...]:
    """The gradients of `outputs` with respect to `inputs`, without touching any `.grad`.

    `is_grads_batched=True` is refused: there is no vmap here. Source: torch.autograd.grad.
    """
    if is_grads_batched:
        raise NotImplementedError("grad(is_grads_batched=True) needs vmap, which dtrain has not")
    if materialize_grads and allow_unused is False:
        raise ValueError(
            "Expected allow_unused to be True or not passed when materialize_grads=True, but got: "
            "allow_unused=False."
        )
    roots, places = _sequence(outputs), _sequence(inputs)
    keep = create_graph if retain_graph is None else retain_graph
    unused = materialize_grads if allow_unused is None else allow_unused
    found = engine.grad_of(
        roots, places, _gradients(roots, grad_outputs), keep, create_graph, unused
    )
    if materialize_grads:
        found = [
            p.new_zeros(p.shape) if g is None else g for g, p in zip(found, places, strict=True)
        ]
    return tuple(found)
