"""Communication hooks and optimizers in backward under DistributedDataParallel itself."""

from __future__ import annotations

import math

import pytest
from sklearn.datasets import load_digits

import dtrain as torch
import dtrain.distributed as dist
from dtrain.distributed.algorithms.ddp_comm_hooks import (
    OneBitState,
    TopKState,
    ddp_zero_hook,
    default_hooks as default,
    one_bit_hook,
    powerSGD_hook as power,
    quantization_hooks as quantization,
    top_k_hook,
)
from dtrain.distributed.algorithms.join import Join
from dtrain.distributed.optim import ZeroRedundancyOptimizer, _apply_optimizer_in_backward
from dtrain.nn.parallel import DistributedDataParallel as DDP
from dtrain.testing.distributed import run_distributed

nn, F = torch.nn, torch.nn.functional
STEPS = 4


def make_model():
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 3)
    )


def wrapped(model):
    """In several buckets, which are made anew after the first pass."""
    return DDP(model, bucket_cap_mb=600 / 2**20)


def loss_of(model, step):
    generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
    return model(torch.randn(5, 6, generator=generator)).square().mean()


def values(model):
    return [p.tolist() for p in model.parameters()]


def plainly(make_state=None, hook=None):
    model = wrapped(make_model())
    if hook is not None:
        model.register_comm_hook(make_state(), hook)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    return values(model)


def test_the_first_hook_is_what_happens_without_one():
    expected = run_distributed(2, plainly)
    assert run_distributed(2, plainly, lambda: None, default.allreduce_hook) == expected


BUILTIN = {
    dist.BuiltinCommHookType.ALLREDUCE: default.allreduce_hook,
    dist.BuiltinCommHookType.FP16_COMPRESS: default.fp16_compress_hook,
}


def built_in(kind):
    """Gradients of three ranks in two groups, and what has been sent for them."""
    group = dist.new_subgroups_by_enumeration([[0, 2], [1]])[0]
    model = DDP(make_model(), process_group=group)
    if isinstance(kind, dist.BuiltinCommHookType):
        model._register_builtin_comm_hook(kind)
    else:
        model.register_comm_hook(group, kind)
    before = group.arrays.statistics().bytes_sent
    loss_of(model, 0).backward()
    sent = group.arrays.statistics().bytes_sent - before
    return [p.grad.tolist() for p in model.parameters()], sent


@pytest.mark.parametrize("kind", BUILTIN)
def test_built_in_hooks_reduce_in_the_group_of_the_model(kind):
    assert run_distributed(3, built_in, kind) == run_distributed(3, built_in, BUILTIN[kind])


def wrong_built_in():
    model = DDP(nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"expected a dist\.BuiltinCommHookType, got 'FP16'"):
        model._register_builtin_comm_hook("FP16")
    model._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)
    assert model.logging_data()["comm_hook"] == "fp16_compress_hook"
    with pytest.raises(RuntimeError, match="can only be called once"):
        model._register_builtin_comm_hook(dist.BuiltinCommHookType.ALLREDUCE)


def test_a_built_in_hook_is_one_hook():
    run_distributed(1, wrong_built_in)


def early_powerSGD():
    return power.PowerSGDState(None, start_powerSGD_iter=0, min_compression_rate=1)


HOOKS = {
    "fp16": (lambda: None, default.fp16_compress_hook),
    "per channel": (lambda: None, quantization.quantization_perchannel_hook),
    "one bit": (OneBitState, one_bit_hook),
    "top k": (TopKState, top_k_hook),
    "PowerSGD": (early_powerSGD, power.powerSGD_hook),
    "batched PowerSGD": (early_powerSGD, power.batched_powerSGD_hook),
    "bf16 of PowerSGD": (early_powerSGD, default.bf16_compress_wrapper(power.powerSGD_hook)),
}


@pytest.mark.parametrize("name", HOOKS)
def test_ranks_stay_equal(name):
    first, *others = run_distributed(3, plainly, *HOOKS[name])
    assert others == [first, first]
    assert first != run_distributed(3, plainly)[0]


def weighted(hook):
    """Three samples on rank 0, one on rank 1: the mean of all four is 4."""
    model = DDP(nn.Linear(1, 1, bias=False))
    if hook is not None:
        model.register_comm_hook(None, hook)
    x = torch.tensor([[1.0, 2.0, 3.0], [10.0]][dist.get_rank()]).reshape(-1, 1)
    model.set_loss_weight(len(x))
    model(x).mean().backward()
    return model.module.weight.grad.item()


def test_weights_of_losses_divide_what_a_hook_has_averaged():
    for hook in (None, default.allreduce_hook, default.fp16_compress_hook):
        assert run_distributed(2, weighted, hook) == [4.0, 4.0]


def returning(value):
    model = DDP(nn.Linear(1, 1))
    model.register_comm_hook(None, lambda state, bucket: value)
    model(torch.ones(1, 1)).sum().backward()


@pytest.mark.parametrize("value", [None, 3, torch.ones(2)])
def test_a_hook_that_returns_no_future_is_an_error(value):
    with pytest.raises(TypeError, match=f"returned {type(value).__name__} for bucket 0"):
        run_distributed(2, returning, value)


def with_zero(wrap):
    model = wrapped(make_model())
    zero = ZeroRedundancyOptimizer(
        model.parameters(), torch.optim.Adam, overlap_with_ddp=True, lr=0.05
    )
    model.register_comm_hook(None, wrap(default.allreduce_hook, model, zero))
    for step in range(STEPS):
        zero.zero_grad()
        loss_of(model, step).backward()
    return values(model)


@pytest.mark.parametrize(
    "wrap", [ddp_zero_hook.hook_with_zero_step, ddp_zero_hook.hook_with_zero_step_interleaved]
)
def test_zero_steps_in_backward(wrap):
    assert run_distributed(3, with_zero, wrap) == run_distributed(3, plainly)


def in_backward():
    model = make_model()
    _apply_optimizer_in_backward(torch.optim.Adam, model.parameters(), {"lr": 0.05})
    model = wrapped(model)
    for step in range(STEPS):
        loss_of(model, step).backward()
        assert all(p.grad is None for p in model.parameters())
    return values(model)


def test_optimizers_in_backward_wait_for_the_reduction():
    assert run_distributed(2, in_backward) == run_distributed(2, plainly)


def uneven(shares_state):
    """Rank r has 1 + 2 r batches; ranks that are through step with the gradients of the others."""
    model = wrapped(make_model())
    if shares_state:
        optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.05)
        block = Join([model, optimizer])
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        block = model.join(step=optimizer.step)
    with block:
        for step in range(1 + 2 * dist.get_rank()):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
    return values(model)


def test_zero_with_uneven_inputs_has_the_bits_of_the_plain_optimizer():
    expected = run_distributed(3, uneven, False)
    assert expected[1:] == [expected[0]] * 2
    assert run_distributed(3, uneven, True) == expected


# --- the claims of the PowerSGD paper ------------------------------------------------------------


class Block(nn.Module):
    """Two convolutions with batch norm beside a shortcut, as in a ResNet."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outputs) for _ in range(2))
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=2, bias=False)

    def forward(self, x):
        inner = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.norms[1](self.second(inner)) + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.blocks = nn.Sequential(Block(8, 16), Block(16, 32))
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


EPOCHS, BATCH, START = 4, 64, 2


def train_digits(rank_of_matrices):
    """(accuracy on held-out digits, bytes computed, elements before and after compression)."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(digits.target)
    held_out = torch.arange(len(labels)) % 5 == 0
    train_images, train_labels = images[~held_out], labels[~held_out]
    torch.manual_seed(0)
    model, state = DDP(ResNet()), None
    if rank_of_matrices:
        state = power.PowerSGDState(None, rank_of_matrices, start_powerSGD_iter=START)
        model.register_comm_hook(state, power.powerSGD_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    steps = len(train_labels) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=EPOCHS * steps)
    statistics = dist.group.WORLD.arrays.statistics
    counts = []
    for epoch in range(EPOCHS):
        order = torch.randperm(len(train_labels), generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(BATCH)[:steps]:
            mine = batch[dist.get_rank() :: 2]
            loss = F.cross_entropy(model(train_images[mine]), train_labels[mine])
            optimizer.zero_grad()
            before = statistics().bytes_sent  # the buffers have been sent
            loss.backward()
            counts.append(statistics().bytes_sent - before)
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        right = (model.module(images[held_out]).argmax(1) == labels[held_out]).float().mean()
    return right.item(), counts[-1], None if state is None else state.compression_stats()


@pytest.mark.timeout(120)
def test_powerSGD_learns_like_SGD_with_a_ninth_of_the_bytes():
    """Digits, 2 ranks: accuracy within two standard errors of the difference, bytes as computed.

    Matrices: 16 x 72, 16 x 144, 32 x 144, 32 x 288 and 16 x 8, 32 x 16, 10 x 32, 8 x 9.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        (plain, all_bytes, _), _ = run_distributed(2, train_digits, 0)
        (rank_two, few_bytes, stats), _ = run_distributed(2, train_digits, 2)
    finally:
        torch.set_num_threads(threads)
    assert plain > 0.95
    noise = math.sqrt(2 * plain * (1 - plain) / 360)
    assert abs(rank_two - plain) <= 2 * noise + 1e-9, (rank_two, plain)

    shapes = [(16, 72), (16, 144), (32, 144), (32, 288), (16, 8), (32, 16), (10, 32), (8, 9)]
    vectors = 8 + 2 * 16 + 2 * 16 + 2 * 32 + 2 * 32 + 10  # biases, norms
    n = sum(a * b for a, b in shapes) + vectors
    sent = vectors + sum((a + b) * 2 if (a + b) * 4 < a * b else a * b for a, b in shapes)
    passes = EPOCHS * (1437 // BATCH) - START
    assert stats == (pytest.approx(n / sent), n * passes, sent * passes)
    parameters = len(shapes) + 10
    flags = few_bytes - 4 * sent  # which DDP sends itself, with hashes of parameters
    assert 4 * parameters <= flags < 256
    assert 4 * n + flags <= all_bytes <= 4 * n + flags + 64 * parameters  # gaps between them
