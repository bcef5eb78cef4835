"""Tensor parallelism: one process == 2 ranks == 4 ranks, losses and parameters; what it costs.

An MLP and a GPT in float64, where sums in another order differ in the last bits only; the GPT of
examples/ in float32 beside losses recorded from PyTorch.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

import dtrain as torch
import dtrain.distributed as dist
import dtrain.nn.functional as F
from dtrain import nn
from dtrain.distributed.tensor import DTensor, Replicate, Shard
from dtrain.distributed.tensor._api import wrap
from dtrain.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleInputOutput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from dtrain.testing.distributed import run_distributed
from dtrain.utils.checkpoint import checkpoint
from tests import gpt_run
from tests.recorded.registry import load

STEPS, WIDTH, HEADS, WORDS, BATCH, LENGTH = 4, 16, 4, 24, 2, 8


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        heads = (t(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
                 for t in (self.q, self.k, self.v))  # fmt: skip
        y = F.scaled_dot_product_attention(*heads, is_causal=True)
        return self.proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.mlp = Attention(), MLP()
        self.keeps_less = False

    def forward(self, x):
        x = x + self.attention(self.ln1(x))
        if self.keeps_less:
            return x + checkpoint(self.mlp, self.ln2(x), use_reentrant=False)
        return x + self.mlp(self.ln2(x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.ln, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, x):
        return self.head(self.ln(self.blocks(self.tokens(x))))


BLOCK = {
    "blocks.*.attention.[qkv]": ColwiseParallel(),
    "blocks.*.attention.proj": RowwiseParallel(),
    "blocks.*.mlp.up": ColwiseParallel(),
    "blocks.*.mlp.down": RowwiseParallel(),
}
SEQUENCE = {
    "tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
    "blocks.*.ln[12]": SequenceParallel(),
    "blocks.*.attention": PrepareModuleInput(
        input_layouts=Shard(1), desired_input_layouts=Replicate()
    ),
    "blocks.*.attention.[qkv]": ColwiseParallel(),
    "blocks.*.attention.proj": RowwiseParallel(output_layouts=Shard(1)),
    "blocks.*.mlp": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
    "blocks.*.mlp.up": ColwiseParallel(),
    "blocks.*.mlp.down": RowwiseParallel(output_layouts=Shard(1)),
    "ln": SequenceParallel(),
    "head": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
}
PLANS = {
    "blocks": BLOCK,
    "tokens and head": {
        **BLOCK,
        "tokens": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate()),
    },
    "columns of tokens": {
        "tokens": ColwiseParallel(output_layouts=Replicate()),
        "head": ColwiseParallel(use_local_output=False),
    },
    "sequence": SEQUENCE,
}


def loss_of(scores, targets):
    if isinstance(scores, DTensor) and not isinstance(targets, DTensor):
        targets = DTensor.from_local(targets, scores.device_mesh)
    with loss_parallel():
        loss = F.cross_entropy(scores.flatten(0, 1), targets.flatten())
    return loss.full_tensor() if isinstance(loss, DTensor) else loss


def train(model, dp=None):
    """Losses of some steps, with clipping, and the parameters after them; `dp`: the group of the
    ranks that share the batch.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    generator, losses = torch.Generator().manual_seed(1), []
    for _ in range(STEPS):
        x = torch.randint(0, WORDS, (BATCH, LENGTH + 1), generator=generator)
        if dp is not None:
            x = x.chunk(dp.size())[dp.rank()]
        loss = loss_of(model(x[:, :-1]), x[:, 1:].contiguous())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        mean = loss.detach()
        if dp is not None:
            dist.all_reduce(mean, dist.ReduceOp.AVG, dp)
        losses.append(mean.item())
    state = model.state_dict().items()
    whole = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in state}
    return losses, {name: value.numpy().copy() for name, value in whole.items()}


def made(kind=GPT):
    torch.manual_seed(0)
    return kind().double()


def check_gpt(name):
    expected, wanted = train(made())
    mesh, model = dist.init_device_mesh("cpu", (dist.get_world_size(),)), made()
    parallelize_module(model, mesh, PLANS[name])
    assert sum(isinstance(p, DTensor) for p in model.parameters()) >= 2
    losses, state = train(model)
    np.testing.assert_allclose(losses, expected, rtol=1e-12)
    for key, value in wanted.items():
        np.testing.assert_allclose(state[key], value, rtol=0, atol=1e-9, err_msg=key)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", PLANS)
def test_gpt(name, size):
    run_distributed(size, check_gpt, name)


def test_every_transport_gives_the_same_bits():
    def losses():
        mesh = dist.init_device_mesh("cpu", (2,))
        return train(parallelize_module(made(), mesh, SEQUENCE))[0]

    assert run_distributed(2, losses) == run_distributed(2, losses, transport="zmq")


def check_data_parallel():
    """DDP over one axis of a mesh, the layers cut over the other."""
    expected, wanted = train(made())
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = parallelize_module(made(), mesh["tp"], PLANS["tokens and head"])
    with pytest.raises(RuntimeError, match="their parts would be averaged"):
        nn.parallel.DistributedDataParallel(model)
    ddp = nn.parallel.DistributedDataParallel(model, device_mesh=mesh["dp"])
    losses, state = train(ddp, mesh.get_group("dp"))
    np.testing.assert_allclose(losses, expected, rtol=1e-12)
    for key, value in wanted.items():
        np.testing.assert_allclose(state[f"module.{key}"], value, rtol=0, atol=1e-9, err_msg=key)


def test_with_data_parallelism():
    run_distributed(4, check_data_parallel)


def check_keeps_less():
    expected, _ = train(made())
    mesh, model = dist.init_device_mesh("cpu", (2,)), made()
    for block in model.blocks:
        block.keeps_less = True
    parallelize_module(model, mesh, SEQUENCE)
    losses, _ = train(model)
    np.testing.assert_allclose(losses, expected, rtol=1e-12)


def check_example():
    """The example as it is: its fused queries, keys and values are gathered for the attention."""
    gpt = gpt_run.example()
    torch.manual_seed(0)
    text = gpt.read_text(gpt_run.ROOT / "LICENSE")
    model = gpt.GPT(gpt_run.CONTEXT, width=32, layers=2)
    plan = {
        "blocks.*.qkv": ColwiseParallel(output_layouts=Replicate()),
        "blocks.*.proj": RowwiseParallel(input_layouts=Replicate()),
        "blocks.*.up": ColwiseParallel(),
        "blocks.*.down": RowwiseParallel(),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(model, dist.init_device_mesh("cpu", (dist.get_world_size(),)), plan)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1), []
    for step in range(gpt_run.STEPS):
        loss = model(*gpt.batch_of(text, gpt_run.BATCH, gpt_run.CONTEXT, step))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    np.testing.assert_allclose(losses, load("gpt_losses")["losses"], atol=1e-3)


@pytest.mark.parametrize("size", [2, 4])
def test_the_examples_gpt(size):
    run_distributed(size, check_example)


def counted(step):
    """({kind: (calls, bytes of their buffers)}, bytes sent by this rank) of `step()`."""
    group = dist.group.WORLD.arrays
    before, sent = group.statistics().calls, group.statistics().bytes_sent
    result = step()
    after = group.statistics()
    none = type(next(iter(after.calls.values())))()
    kinds = {}
    for kind, now in after.calls.items():
        then = before.get(kind, none)
        if now.count > then.count:
            kinds[kind] = (now.count - then.count, now.bytes - then.bytes)
    return result, kinds, after.bytes_sent - sent


def check_costs():
    """A block of the GPT in one step: for B bytes of activations, two sums of B forward and two
    backward; with the sequence cut, all-gathers and reduce-scatters that are as much together.
    """
    n = dist.get_world_size()
    mesh = dist.init_device_mesh("cpu", (n,))
    x = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64, requires_grad=True)
    size, once = x.nbytes, x.nbytes * (n - 1) // n
    for name in ("blocks", "sequence"):
        model = made().blocks[0]
        plan = {k.removeprefix("blocks.*."): v for k, v in PLANS[name].items() if "blocks" in k}
        parallelize_module(model, mesh, plan)
        given = x * 1
        if name == "sequence":
            rows = LENGTH // n
            given = x[:, mesh.get_rank() * rows : (mesh.get_rank() + 1) * rows] * 1
        out, forward, sent = counted(partial(model, given))
        loss = (out.to_local() if isinstance(out, DTensor) else out).sum()
        _, backward, sent_back = counted(loss.backward)
        if name == "blocks":
            assert forward == backward == {"all_reduce": (2, 2 * size)}
            assert n > 2 or sent == sent_back == 4 * once  # so little goes to all at once
        else:
            norms = 4 * WIDTH * 8  # weights and biases of two LayerNorms: their gradients are sums
            assert {k: c for k, (c, _) in forward.items()} == {
                "gather_shards": 2, "reduce_shards": 2,
            }  # fmt: skip
            assert {k: c for k, (c, _) in backward.items()} == {
                "gather_shards": 2, "reduce_shards": 2, "all_reduce": 4,
            }  # fmt: skip
            assert sent == 4 * once
            assert n > 2 or sent_back == 4 * once + 2 * norms * (n - 1) // n


@pytest.mark.parametrize("size", [2, 4])
def test_costs(size):
    run_distributed(size, check_costs)


def check_cost_of_a_cut_vocabulary():
    """Scores that stay cut: three numbers a row forward, one sum of the activations backward."""
    mesh, head = dist.init_device_mesh("cpu", (2,)), nn.Linear(WIDTH, WORDS).double()
    parallelize_module(head, mesh, ColwiseParallel(use_local_output=False))
    x = torch.randn(BATCH * LENGTH, WIDTH, dtype=torch.float64, requires_grad=True)
    targets = torch.arange(BATCH * LENGTH) % WORDS
    loss, forward, _ = counted(lambda: loss_of(head(x * 1).unflatten(0, (1, -1)), targets))
    assert forward == {"all_reduce": (3, 3 * BATCH * LENGTH * 8)}
    _, backward, _ = counted(loss.backward)
    assert backward == {"all_reduce": (1, x.nbytes)}


def check_words_for_all():
    """A vocabulary of which some rank would have nothing is refused on every rank, at once."""
    mesh = dist.init_device_mesh("cpu", (4,))
    tokens = parallelize_module(
        nn.Embedding(5, 4), mesh, RowwiseParallel(input_layouts=Replicate())
    )
    with pytest.raises(NotImplementedError, match="embedding has no rows on some rank"):
        tokens(torch.tensor([1, 2]))


def test_words_for_all():
    run_distributed(4, check_words_for_all)


def check_leaf_behind_a_part():
    """A plain leaf whose face in the module is a DTensor, as FSDP has it between two gathers."""
    mesh, model = dist.init_device_mesh("cpu", (2,)), made(MLP)
    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    x, expected = torch.randn(3, WIDTH, dtype=torch.float64), []
    model(x).square().sum().backward()
    leaves = {}
    for layer in (model.up, model.down):
        for name, parameter in list(layer._parameters.items()):
            expected.append(parameter.grad.to_local())
            leaf = nn.Parameter(parameter.to_local().detach())
            leaves[leaf] = layer._parameters[name] = wrap(leaf, parameter._spec)
    model(x).square().sum().backward()
    for leaf, grad in zip(leaves, expected, strict=True):
        assert np.array_equal(leaf.grad.numpy(), grad.numpy())


class Pair(nn.Module):
    def forward(self, a, b, *, scale):
        return a + b * scale, a


def check_preparing():
    mesh = dist.init_device_mesh("cpu", (2,))
    a, b = torch.ones(2, 3), torch.arange(6.0).reshape(2, 3)
    model = PrepareModuleInputOutput(
        input_layouts=(Shard(0), Replicate()), desired_input_layouts=(Replicate(), Shard(1)),
        input_kwarg_layouts={"scale": Replicate()}, desired_input_kwarg_layouts={"scale": Shard(0)},
        output_layouts=(Replicate(), None), desired_output_layouts=(Shard(0), None),
    )  # fmt: skip
    seen = []

    class Watched(Pair):
        def forward(self, a, b, *, scale):
            seen.extend([a.placements, b.placements, scale.placements, a.shape])
            return super().forward(a, torch.ones_like(a), scale=torch.ones_like(a))

    module = parallelize_module(Watched(), mesh, model)
    first, second = module(a, b, scale=torch.ones(4, 3))
    assert seen == [(Replicate(),), (Shard(1),), (Shard(0),), (4, 3)]
    assert first.tolist() == [[2.0] * 3] * 2
    assert isinstance(second, DTensor)
    with pytest.raises(ValueError, match="same length"):
        PrepareModuleInput(input_layouts=Shard(0), desired_input_layouts=None)
    with pytest.raises(ValueError, match="same length"):
        PrepareModuleOutput(output_layouts=Shard(0), desired_output_layouts=())


def check_mistakes():
    mesh = dist.init_device_mesh("cpu", (1,))
    with pytest.warns(UserWarning, match="could not be resolved: no submodule matching"):
        parallelize_module(MLP(), mesh, {"upp": ColwiseParallel()})
    with pytest.warns(UserWarning, match="No parallelize_plan is provided"):
        parallelize_module(MLP(), mesh)
    with pytest.raises(NotImplementedError, match=r"only support nn.Linear and nn.Embedding"):
        parallelize_module(nn.LayerNorm(4), mesh, ColwiseParallel())
    with pytest.raises(RuntimeError, match="needs a device_mesh"):
        parallelize_module(MLP())
    square = dist.init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp"))
    with pytest.raises(ValueError, match="take a slice of it"):
        parallelize_module(MLP(), square, {"up": ColwiseParallel()})
    model = parallelize_module(MLP(), mesh, {"up": ColwiseParallel()})
    with pytest.raises(TypeError, match="expected a Tensor to be cut"):
        model([1.0])
    with pytest.raises(IndexError, match="index 24, but the embedding has 24 rows"):
        parallelize_module(nn.Embedding(24, 4), mesh, RowwiseParallel(input_layouts=Replicate()))(
            torch.tensor([24])
        )


def test_mistakes():
    run_distributed(1, check_mistakes)


@pytest.mark.parametrize(
    "check",
    [check_keeps_less, check_preparing, check_cost_of_a_cut_vocabulary, check_leaf_behind_a_part],
)
def test_two_ranks(check):
    run_distributed(2, check)
