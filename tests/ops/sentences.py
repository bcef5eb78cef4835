"""Statements that must fail, and the sentence of PyTorch's error that must be in ours.

People search for these words. What follows them in our messages (a hint, the shapes) is ours.
"""

from __future__ import annotations

from typing import Any

ERRORS = {
    # shapes
    "ones(2, 3) + ones(2, 4)": "The size of tensor a (3) must match the size of tensor b (4) at "
    "non-singleton dimension 1",
    "ones(2, 3) @ ones(10, 5)": "mat1 and mat2 shapes cannot be multiplied (2x3 and 10x5)",
    "ones(2, 2, 3) @ ones(4, 5)": "mat1 and mat2 shapes cannot be multiplied (4x3 and 4x5)",
    "ones(3) @ ones(4)": "inconsistent tensor size, expected tensor [3] and src [4] to have the "
    "same number of elements, but got 3 and 4 elements respectively",
    "ones(2, 3) @ ones(4)": "size mismatch, got input (2), mat (2x3), vec (4)",
    "ones(2, 2, 3) @ ones(2, 4, 5)": "Expected size for first two dimensions of batch2 tensor to "
    "be: [2, 3] but got: [2, 4].",
    "ones(2, 2, 3) @ ones(3, 3, 5)": "The size of tensor a (2) must match the size of tensor b (3) "
    "at non-singleton dimension 0",
    "tensor(1.0) @ ones(3)": "both arguments to matmul need to be at least 1D",
    "ones(2, 3).double() @ ones(3, 4)": "expected m1 and m2 to have the same dtype, but got: "
    "double != float",
    "F.linear(ones(2, 3), ones(5, 10))": "mat1 and mat2 shapes cannot be multiplied (2x3 and 10x5)",
    "torch.dot(ones(2, 2), ones(2))": "1D tensors expected, but got 2D and 1D tensors",
    "ones(6).view(4, 2)": "shape '[4, 2]' is invalid for input of size 6",
    "ones(6).reshape(-1, 4)": "shape '[-1, 4]' is invalid for input of size 6",
    "ones(2, 3).reshape(-1, -1)": "only one dimension can be inferred",
    "ones(2, 3).reshape(-2, 3)": "invalid shape dimension -2 at index 0 of shape [-2, 3]",
    "ones(2, 3).t().view(6)": "view size is not compatible with input tensor's size and stride (at "
    "least one dimension spans across two contiguous subspaces). Use .reshape(...) instead.",
    "ones(2, 3).expand(3, 3)": "The expanded size of the tensor (3) must match the existing size "
    "(2) at non-singleton dimension 0.  Target sizes: [3, 3].  Tensor sizes: [2, 3]",
    "ones(2, 3).expand(3)": "the number of sizes provided (1) must be greater or equal to the "
    "number of dimensions in the tensor (2)",
    "ones(2, 3).permute(0)": "number of dimensions in the tensor input does not match the length "
    "of the desired ordering of dimensions i.e. input.dim() = 2 is not equal to len(dims) = 1",
    "ones(2, 3).permute(0, 0)": "permute(): duplicate dims are not allowed.",
    "ones(2, 2, 2).t()": "t() expects a tensor with <= 2 dimensions, but self is 3D",
    "ones(3).sum(3)": "Dimension out of range (expected to be in range of [-1, 0], but got 3)",
    "ones(2, 3).sum((0, 0))": "dim 0 appears multiple times in the list of dims",
    "ones(3).squeeze(1)": "Dimension out of range (expected to be in range of [-1, 0], but got 1)",
    "torch.cat([ones(2, 3), ones(2, 4)])": "Sizes of tensors must match except in dimension 0. "
    "Expected size 3 but got size 4 for tensor number 1 in the list.",
    "torch.cat([])": "torch.cat(): expected a non-empty list of Tensors",
    "torch.cat([ones(2), ones(2, 2)])": "Tensors must have same number of dimensions: got 1 and 2",
    "torch.stack([])": "stack expects a non-empty TensorList",
    "torch.stack([ones(2), ones(3)])": "stack expects each tensor to be equal size, but got [2] at "
    "entry 0 and [3] at entry 1",
    "ones(2).chunk(0)": "chunk expects `chunks` to be greater than 0, got: 0",
    "ones(2).split(0)": "split_size can only be 0 if dimension size is 0, but got dimension size "
    "of 2",
    "ones(2).split([1, 2])": "split_with_sizes expects split_sizes to sum exactly to 2 (input "
    "tensor's size at dimension 0), but got split_sizes=[1, 2]",
    "ones(2).narrow(0, 1, 5)": "start (1) + length (5) exceeds dimension size (2).",
    "tensor(1.0).unbind()": "Dimension specified as 0 but tensor has no dimensions",
    # indices
    "ones(3)[5]": "index 5 is out of bounds for dimension 0 with size 3",
    "ones(2, 3)[:, -4]": "index -4 is out of bounds for dimension 1 with size 3",
    "ones(3)[tensor([0, 5])]": "index 5 is out of bounds for dimension 0 with size 3",
    "ones(3)[tensor([True, False])]": "The shape of the mask [2] at index 0 does not match the "
    "shape of the indexed tensor [3] at index 0",
    "ones(3, 3)[[0, 1], [0, 1, 2]]": "shape mismatch: indexing tensors could not be broadcast "
    "together with shapes [2], [3]",
    "ones(3)[0, 0]": "too many indices for tensor of dimension 1",
    "tensor(1.0)[0]": "invalid index of a 0-dim tensor. Use `tensor.item()` in Python or "
    "`tensor.item<T>()` in C++ to convert a 0-dim tensor to a number",
    "ones(3)[1.5]": "only integers, slices (`:`), ellipsis (`...`), None and long or byte "
    "Variables are valid indices (got float)",
    "ones(3)[::-1]": "step must be greater than zero",
    "ones(3)[tensor([1.0])]": "tensors used as indices must be long, int, byte or bool tensors",
    "ones(3).gather(0, tensor([5]))": "index 5 is out of bounds for dimension 0 with size 3",
    "ones(3, 3).gather(0, tensor([0]))": "Index tensor must have the same number of dimensions as "
    "input tensor",
    "ones(3).index_select(0, tensor([5]))": "index out of range in self",
    "F.embedding(tensor([9]), ones(3, 2))": "index out of range in self",
    "ones(3).masked_fill(ones(3), 0)": "only supports boolean masks",
    "torch.where(ones(2), 1, 2)": "where expected condition to be a boolean tensor, but got a "
    "tensor with dtype Float",
    "ones(3).topk(4)": "selected index k out of range",
    "x = ones(2, 3); x[0] = ones(4)": "",
    "x = torch.zeros(3, dtype=torch.uint8); x[0] = 300": "value cannot be converted to type "
    "uint8_t without overflow",
    # numbers and dtypes
    "bool(ones(2))": "Boolean value of Tensor with more than one value is ambiguous",
    "bool(ones(0))": "Boolean value of Tensor with no values is ambiguous",
    "ones(2).item()": "a Tensor with 2 elements cannot be converted to Scalar",
    "float(ones(2))": "only one element tensors can be converted to Python scalars",
    "len(tensor(1))": "len() of a 0-d tensor",
    "iter(tensor(1))": "iteration over a 0-d tensor",
    "tensor([1]) // tensor([0])": "ZeroDivisionError",
    "tensor([1]) % 0": "ZeroDivisionError",
    "tensor([2]) ** -1": "Integers to negative integer powers are not allowed.",
    "tensor([True]) - tensor([True])": "Subtraction, the `-` operator, with two bool tensors is "
    "not supported. Use the `^` or `logical_xor()` operator instead.",
    "tensor([True]) - 1": "Subtraction, the `-` operator, with a bool tensor is not supported. If "
    "you are trying to invert a mask, use the `~` or `logical_not()` operator instead.",
    "-tensor([True])": "Negation, the `-` operator, on a bool tensor is not supported. If you are "
    "trying to invert a mask, use the `~` or `logical_not()` operator instead.",
    "torch.arange(3).mean()": "mean(): could not infer output dtype. Input dtype must be either a "
    "floating point or complex dtype. Got: Long",
    "torch.arange(3).var()": "std and var only support floating point and complex dtypes",
    "torch.add(torch.arange(2), torch.arange(2), alpha=1.5)": "For integral input tensors, "
    "argument alpha must not be a floating point number.",
    "torch.allclose(ones(2), ones(2).double())": "Float did not match Double",
    "ones(2) + [1, 2]": "unsupported operand type(s) for +: 'Tensor' and 'list'",
    "ones(2) * None": "unsupported operand type(s) for *: 'Tensor' and 'NoneType'",
    "torch.mul(ones(2), 'a')": "must be Tensor, not str",
    "torch.zeros(0).max()": "max(): Expected reduction dim to be specified for input.numel() == 0. "
    "Specify the reduction dim with the 'dim' argument.",
    "torch.zeros(0, 3).max(0)": "max(): Expected reduction dim 0 to have non-zero size.",
    "ones(2).clamp()": "At least one of 'min' or 'max' must not be None",
    "torch.div(ones(2), 2, rounding_mode='up')": "div expected rounding_mode to be one of None, "
    "'trunc', or 'floor' but found 'up'",
    "ones(2, 3) @ ones(3, 2).long()": "expected m1 and m2 to have the same dtype, but got: float "
    "!= long",
    # creation
    "tensor([[1, 2], [3]])": "expected sequence of length 2 at dim 1 (got 1)",
    "tensor(None)": "Could not infer dtype of NoneType",
    "torch.arange(1, 0)": "upper bound and lower bound inconsistent with step sign",
    "torch.arange(0, 1, 0)": "step must be nonzero",
    "torch.linspace(0, 1, -1)": "number of steps must be non-negative",
    "torch.zeros(-1)": "Dimension size must be non-negative",
    "torch.FloatTensor(2.5)": "new(): data must be a sequence (got float)",
    "torch.from_numpy([1])": "expected np.ndarray (got list)",
    "torch.arange(3).requires_grad_()": "only Tensors of floating point",
    # in place
    "ones(1).add_(ones(3))": "output with shape [1] doesn't match the broadcast shape [3]",
    "tensor([1]).add_(1.5)": "result type Float can't be cast to the desired output type Long",
    "ones(1).expand(3).add_(1)": "unsupported operation: more than one element of the written-to "
    "tensor refers to a single memory location. Please clone() the tensor before performing the "
    "operation.",
    "leaf.add_(1)": "a leaf Variable that requires grad is being used in an in-place operation.",
    "leaf[0] = 1": "a view of a leaf Variable that requires grad is being used in an in-place "
    "operation.",
    "leaf[0].add_(1)": "a view of a leaf Variable that requires grad is being used in an in-place "
    "operation.",
    "(leaf * 1).split(1)[0].add_(1)": "is a view and is being modified inplace. This view is the "
    "output of a function that returns multiple views. Such functions do not allow the output "
    "views to be modified inplace. You should replace the inplace operation by an out-of-place "
    "one.",
    "x = leaf * 1\nwith torch.no_grad(): v = x[0]\nv.add_(1)": "A view was created in no_grad mode "
    "and is being modified inplace with grad mode enabled.",
    # gradients
    "(leaf * 1).backward()": "grad can be implicitly created only for scalar outputs",
    "ones(1).backward()": "element 0 of tensors does not require grad and does not have a grad_fn",
    "y = (leaf * leaf).sum(); y.backward(); y.backward()": "Trying to backward through the graph a "
    "second time (or directly access saved tensors after they have already been freed). Saved "
    "intermediate values of the graph are freed when you call .backward() or autograd.grad(). "
    "Specify retain_graph=True if you need to backward through the graph a second time or if you "
    "need to access saved tensors after calling backward.",
    "y = leaf.exp(); y.add_(1); y.sum().backward()": "one of the variables needed for gradient "
    "computation has been modified by an inplace operation: [",
    "y = leaf.exp(); y.add_(1); y.sum().backward()  #": "Tensor [3]], which is output 0 of Exp, is "
    "at version 1; expected version 0 instead.",
    "y = leaf * 1; z = y * y; y.add_(1); z.sum().backward()": "Tensor [3]], which is output 0 of "
    "Add, is at version 1; expected version 0 instead.",
    "y = leaf * 1; z = y.sin(); y.detach().add_(1); z.sum().backward()": "is at version 1; "
    "expected version 0 instead.",
    "leaf.numpy()": "Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() "
    "instead.",
    "np.asarray(leaf)": "Can't call numpy() on Tensor that requires grad.",
    "(leaf * 2).backward(ones(4))": "Mismatch in shape: grad_output[0] has a shape of ",
    "leaf.sum().backward(inputs=[])": "`inputs` argument to `backward()` cannot be empty.",
    "torch.autograd.grad(leaf.sum(), [leaf, other])": "The differentiated Tensor at index 1 "
    "appears to not have been used in the graph. Set allow_unused=True if this is the desired "
    "behavior.",
    "torch.autograd.grad(leaf.sum(), ones(1))": "One of the differentiated Tensors does not "
    "require grad",
    "torch.autograd.grad(leaf.sum(), leaf, allow_unused=False, materialize_grads=True)": "Expected "
    "allow_unused to be True or not passed when materialize_grads=True, but got: "
    "allow_unused=False.",
    "leaf.grad = 3": "assigned grad expected to be a Tensor or None but got grad of type int",
    "leaf.grad = ones(4)": "attempting to assign a gradient of size '[4]' to a tensor of size "
    "'[3]'. Please ensure that the gradient and the tensor are the same size",
    "leaf.grad = ones(3).double()": "attempting to assign a gradient with dtype ",
    "leaf.data = 3": "Variable data has to be a tensor, but got int",
    "(leaf * 1).requires_grad_(False)": "you can only change requires_grad flags of leaf "
    "variables. If you want to use a computed variable in a subgraph that doesn't require "
    "differentiation use var_no_grad = var.detach().",
    "(leaf * 1)[0].detach_()": "Can't detach views in-place. Use detach() instead.",
    "ones(1).register_hook(print)": "cannot register a hook on a tensor that doesn't require "
    "gradient",
    "ones(1).retain_grad()": "can't retain_grad on Tensor that has requires_grad=False",
    "(leaf * 1).register_post_accumulate_grad_hook(print)": "post accumulate grad hooks cannot be "
    "registered on non-leaf tensors",
    "leaf.register_hook(lambda g: 3.0); leaf.sum().backward()": "expected Variable, but hook "
    "returned 'float'",
    "leaf.register_hook(lambda g: ones(4)); leaf.sum().backward()": "has changed the size of value",
    "leaf.register_hook(lambda g: g.double()); leaf.sum().backward()": "has changed the type of "
    "value (was ",
    "copy.deepcopy(leaf * 1)": "Only Tensors created explicitly by the user (graph leaves) support "
    "the deepcopy protocol at the moment.",
    "(leaf // 2).sum().backward()": "floor_divide is not implemented",
}


def namespace(torch: Any) -> dict[str, Any]:
    """What the statements refer to: `leaf` and `other` require grad."""
    import copy

    import numpy as np

    return {
        "torch": torch, "F": torch.nn.functional, "np": np, "copy": copy, "ones": torch.ones,
        "tensor": torch.tensor, "leaf": torch.tensor([1.0, 2.0, 3.0], requires_grad=True),
        "other": torch.ones(2, requires_grad=True),
    }  # fmt: skip
