"""Communication hooks: what each computes, against NumPy; what it sends, against the transport."""

from __future__ import annotations

import functools

import ml_dtypes
import numpy as np
import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain.distributed.algorithms.ddp_comm_hooks import (
    DDPCommHookType,
    OneBitState,
    Payload,
    TopKState,
    debugging_hooks,
    default_hooks as default,
    one_bit_hook,
    post_localSGD_hook as local,
    powerSGD_hook as power,
    quantization_hooks as quantization,
    register_ddp_comm_hook,
    top_k_hook,
)
from dtrain.distributed.algorithms.ddp_comm_hooks.one_bit_hook import pack, unpack
from dtrain.errors import PeerLost
from dtrain.testing.distributed import run_distributed
from tests.distributed.algorithms.hook_cases import (
    SHAPES,
    Bucket,
    call,
    gradients_of,
    make_parameters,
    mean_of,
)

N = 3


def powerSGD_state(**options):
    return power.PowerSGDState(None, start_powerSGD_iter=0, **options)


HOOKS = {
    "allreduce": (lambda: None, default.allreduce_hook),
    "fp16": (lambda: None, default.fp16_compress_hook),
    "bf16": (lambda: None, default.bf16_compress_hook),
    "noop": (lambda: None, debugging_hooks.noop_hook),
    "per tensor": (lambda: None, quantization.quantization_pertensor_hook),
    "per channel": (lambda: None, quantization.quantization_perchannel_hook),
    "one bit": (OneBitState, one_bit_hook),
    "top k": (lambda: TopKState(density=0.05), top_k_hook),
    "PowerSGD": (powerSGD_state, power.powerSGD_hook),
    "PowerSGD before its start": (lambda: power.PowerSGDState(None), power.powerSGD_hook),
    "batched PowerSGD": (powerSGD_state, power.batched_powerSGD_hook),
    "fp16 of PowerSGD": (powerSGD_state, default.fp16_compress_wrapper(power.powerSGD_hook)),
    "bf16 of allreduce": (lambda: None, default.bf16_compress_wrapper(default.allreduce_hook)),
}


def sent_by(hook, state):
    """Bytes that left this rank for one bucket, by the transport's counters, and as computed."""
    bucket = Bucket(make_parameters(), gradients_of(dist.get_rank()))
    statistics = dist.group.WORLD.arrays.statistics
    dist.barrier()
    computed, before = hook.payload(state, bucket), statistics().bytes_sent
    hook(state, bucket).wait()
    return statistics().bytes_sent - before, computed.sent(2)


@pytest.mark.parametrize("name", HOOKS)
def test_bytes_are_as_computed(name):
    """With 2 ranks an all-reduce sends its bytes once from each, an all-gather likewise."""
    make, hook = HOOKS[name]
    for counted, computed in run_distributed(2, lambda: sent_by(hook, make()), transport="zmq"):
        assert counted == computed


def test_payloads_in_closed_form():
    """SHAPES: 360 + 7 + 480 + 1 + 360 elements; the buffer has gaps up to 64 bytes."""
    bucket = Bucket(make_parameters(), gradients_of(0))
    n, buffer = 1208, bucket.buffer().numel()
    assert sum(int(np.prod(s)) for s in SHAPES) == n
    payload = {name: hook.payload(make(), bucket) for name, (make, hook) in HOOKS.items()}
    assert payload["allreduce"] == Payload(all_reduce=4 * buffer)
    assert payload["fp16"] == Payload(all_reduce=2 * buffer)
    assert payload["noop"] == Payload()
    assert payload["per tensor"] == Payload(all_gather=n + 8)
    assert payload["per channel"] == Payload(all_gather=3 * (512 + 8))
    assert payload["one bit"] == Payload(all_gather=151 + 8 * (12 + 1 + 40 + 1 + 12))
    assert payload["top k"] == Payload(all_gather=8 * (18 + 1 + 24 + 1 + 18))
    rank_one = (12 + 30) + 7 + (40 + 12) + 1 + (12 + 30)
    assert payload["PowerSGD"] == Payload(all_reduce=4 * rank_one)
    assert payload["fp16 of PowerSGD"] == Payload(all_reduce=2 * rank_one)
    assert payload["batched PowerSGD"] == Payload(all_reduce=4 * 2 * 35)


def test_payload_over_many_ranks():
    assert Payload(all_reduce=800, all_gather=10).sent(4) == 2 * 3 / 4 * 800 + 3 * 10


def each(hook, make_state=lambda: None, steps=1, dtype=torch.float32):
    state, parameters = make_state(), make_parameters(dtype)
    return [call(state, hook, parameters, step, dtype) for step in range(steps)]


def run(hook, *args, ranks=N, **options):
    """The gradients after each step, on which all ranks agree in every bit."""
    results = run_distributed(ranks, functools.partial(each, hook, *args, **options))
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            assert all((a == b).all() for a, b in zip(ours, theirs, strict=True))
    return results[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_allreduce_is_the_sum_in_rank_order_over_n(dtype):
    (got,) = run(default.allreduce_hook, dtype=dtype)
    everyone = [gradients_of(r, dtype=dtype) for r in range(N)]
    for value, parts in zip(got, zip(*everyone, strict=True), strict=True):
        a, b, c = (part.numpy() for part in parts)
        assert (value == (a + b + c) / value.dtype.type(N)).all()


@pytest.mark.parametrize(
    ("hook", "half"),
    [
        (default.fp16_compress_hook, np.float16),
        (default.bf16_compress_hook, ml_dtypes.bfloat16),
        (default.fp16_compress_wrapper(default.allreduce_hook), np.float16),
        (default.bf16_compress_wrapper(default.allreduce_hook), ml_dtypes.bfloat16),
    ],
)
def test_16_bits_round_each_gradient_and_the_mean_once(hook, half):
    (got,) = run(hook)
    everyone = [gradients_of(r) for r in range(N)]
    for value, parts in zip(got, zip(*everyone, strict=True), strict=True):
        a, b, c = (part.numpy().astype(half).astype(np.float32) for part in parts)
        expected = ((a + b + c) / np.float32(N)).astype(half).astype(np.float32)
        assert (value == expected).all()


def overflowing():
    bucket = Bucket(make_parameters(shapes=((2,),)), [torch.tensor([1e6, 1.0])])
    return default.fp16_compress_hook(None, bucket).wait().tolist()[:2]


def test_what_float16_cannot_hold_is_inf():
    assert run_distributed(2, overflowing) == [[float("inf"), 1.0]] * 2


def test_noop_keeps_each_ranks_own():
    results = run_distributed(2, functools.partial(each, debugging_hooks.noop_hook))
    for rank, (got,) in enumerate(results):
        own = gradients_of(rank)
        assert all((a == b.numpy()).all() for a, b in zip(got, own, strict=True))


def quantized(values):
    """The oracle of one channel: 256 steps over a range that includes 0."""
    low, high = min(0.0, values.min()), max(0.0, values.max())
    scale = np.float32((np.float32(high) - np.float32(low)) / np.float32(255))
    zero = np.rint(-np.float32(low) / scale)
    codes = np.clip(np.rint(values / scale) + zero, 0, 255)
    return ((codes - zero) * scale).astype(np.float32)


@pytest.mark.parametrize("width", [None, 512, 100])
def test_quantization(width):
    def hook(state, bucket):
        if width is None:
            return quantization.quantization_pertensor_hook(state, bucket)
        return quantization.quantization_perchannel_hook(state, bucket, bucket_size=width)

    (got,) = run(hook)
    total, steps = 0, 0
    for rank in range(N):
        flat = np.concatenate([g.numpy().reshape(-1) for g in gradients_of(rank)])
        parts = np.split(flat, range(width, flat.size, width)) if width else [flat]
        total = total + np.concatenate([quantized(part) for part in parts])
        steps += (flat.max() - flat.min()) / 255
    flat = np.concatenate([g.reshape(-1) for g in got])
    assert (flat == total / np.float32(N)).all()
    exact = np.concatenate([m.reshape(-1) for m in mean_of(N)])
    assert np.abs(flat - exact).max() <= steps / N / 2 + 1e-6


def test_quantization_shows_nan_and_keeps_zeros():
    rows = np.array([[1.0, np.nan, 2.0], [0.0, 0.0, 0.0], [-1.0, 0.0, 3.0]], np.float32)
    back = quantization.dequantize(quantization.quantize(rows), 3)
    assert np.isnan(back[0]).all()
    assert (back[1] == 0).all()
    assert back[2, 1] == 0
    with pytest.raises(ValueError, match="bucket_size must be positive, got 0"):
        quantization.quantization_perchannel_hook(None, None, 0)


def test_one_bit_is_the_best_two_levels_of_each_row():
    values = np.array([3.0, 1.0, -2.0, 5.0, 4.0, 0.0, -1.0, -3.0, -2.0], np.float32)
    back = unpack(pack(values, [(2, 3), (1, 3)]), [(2, 3), (1, 3)])
    assert back.tolist() == [2.0, 2.0, -2.0, 3.0, 3.0, 3.0, -2.0, -2.0, -2.0]


FEEDBACK = {
    "one bit": (OneBitState, one_bit_hook),
    "top k": (lambda: TopKState(density=0.05), top_k_hook),
    "PowerSGD": (powerSGD_state, power.powerSGD_hook),
    "batched PowerSGD": (powerSGD_state, power.batched_powerSGD_hook),
}
STEPS = 6


def with_residuals(make, hook):
    state, parameters = make(), make_parameters(torch.float64)
    received = [call(state, hook, parameters, step, torch.float64) for step in range(STEPS)]
    left = [state.residuals.get(p, np.zeros(p.shape)) for p in parameters]
    return [np.sum(parts, axis=0) for parts in zip(*received, strict=True)], left


@pytest.mark.parametrize("name", FEEDBACK)
def test_what_was_sent_and_what_is_left_are_all_gradients(name):
    """Error feedback: sum of the means received + mean of the residuals = sum of the means."""
    results = run_distributed(N, functools.partial(with_residuals, *FEEDBACK[name]))
    for i, shape in enumerate(SHAPES):
        given = np.sum([mean_of(N, step, torch.float64)[i] for step in range(STEPS)], axis=0)
        left = np.mean([residuals[i] for _, residuals in results], axis=0)
        assert left.shape == shape
        # the header of one bit is float32
        np.testing.assert_allclose(results[0][0][i] + left, given, rtol=1e-5, atol=1e-5)
    assert any(np.abs(residual).max() > 0.1 for residual in results[0][1])


@pytest.mark.parametrize("batch", [False, True])
def test_powerSGD_is_the_projection_of_the_mean(batch):
    """P spans the mean gradients times Q; the result is P P^T times the mean."""
    options = {"matrix_approximation_rank": 2, "batch_tensors_with_same_shape": batch}
    (got,) = run(power.powerSGD_hook, lambda: powerSGD_state(**options), dtype=torch.float64)
    rng, means = np.random.RandomState(0), mean_of(N, 0, torch.float64)
    order = [0, 4, 2, 1, 3] if batch else range(len(SHAPES))  # shapes 0 and 4 are alike
    for value, exact in ((got[i], means[i]) for i in order):
        matrix = exact.reshape(exact.shape[0], -1)
        n, m = matrix.shape
        if (n + m) * 2 * 2 >= n * m:
            np.testing.assert_allclose(value, exact, rtol=1e-12)
            continue
        q = np.linalg.qr(rng.standard_normal((m, 2)))[0]
        p = np.linalg.qr(matrix @ q)[0]
        expected = p @ (p.T @ matrix)
        np.testing.assert_allclose(value.reshape(n, m), expected, atol=1e-12)


def repeated(warm_start):
    """The same gradient 12 times without feedback: warm start makes it power iteration."""
    state = powerSGD_state(use_error_feedback=False, warm_start=warm_start)
    parameters = make_parameters(torch.float64, ((20, 30),))
    args = parameters, 0, torch.float64, ((20, 30),)
    for _ in range(60):
        (got,) = call(state, power.powerSGD_hook, *args)
    return np.linalg.norm(got - mean_of(2, *args[1:])[0])


def test_warm_start_converges_to_the_best_approximation():
    """Eckart-Young: no matrix of rank 1 is nearer than the first singular triple."""
    exact = mean_of(2, 0, torch.float64, ((20, 30),))[0]
    singular = np.linalg.svd(exact, compute_uv=False)
    best = np.sqrt((singular[1:] ** 2).sum())
    warm, cold = (run_distributed(2, functools.partial(repeated, w))[0] for w in (True, False))
    assert warm == pytest.approx(best, rel=1e-3)
    assert cold > warm * 1.001


def test_orthogonalization():
    rng = np.random.RandomState(1)
    matrices = rng.standard_normal((3, 9, 4))
    for epsilon, tolerance in ((0, 1e-12), (1e-8, 1e-7)):
        q = power.orthogonalize(matrices, epsilon)
        np.testing.assert_allclose(q.swapaxes(1, 2) @ q, np.tile(np.eye(4), (3, 1, 1)),
                                   atol=tolerance)  # fmt: skip
        np.testing.assert_allclose(q @ (q.swapaxes(1, 2) @ matrices), matrices, atol=1e-6)
    zero = np.zeros((9, 2))
    assert np.isfinite(power.orthogonalize(zero, 0)).all()
    assert (power.orthogonalize(zero, 1e-8) == 0).all()


def with_start(start):
    state = power.PowerSGDState(None, start_powerSGD_iter=start)
    parameters = make_parameters(torch.float64)
    errors = []
    for step in range(4):
        got = call(state, power.powerSGD_hook, parameters, step, torch.float64)
        exact = mean_of(2, step, torch.float64)
        errors.append(max(np.abs(a - b).max() for a, b in zip(got, exact, strict=True)))
    return errors, state.iter, state.compression_stats()


def test_powerSGD_starts_later_and_counts():
    errors, passes, (rate, before, after) = run_distributed(2, functools.partial(with_start, 3))[0]
    assert max(errors[:3]) < 1e-12 < errors[3]
    assert passes == 4
    assert (before, after) == (1208, 144)
    assert rate == pytest.approx(1208 / 144)


def several_buckets():
    """All called before any is waited for, as in backward; the order of waiting does not matter."""
    state, parameters = powerSGD_state(), make_parameters()
    buckets = [
        Bucket([p], [g], i, last=i == len(SHAPES) - 1)
        for i, (p, g) in enumerate(zip(parameters, gradients_of(dist.get_rank()), strict=True))
    ]
    futures = [power.powerSGD_hook(state, bucket) for bucket in buckets]
    assert state.iter == 1
    order = (2, 0, 4, 1, 3)
    values = [futures[i].wait() for i in order]
    return [value.tolist() for value in values], futures[0].done()


def test_buckets_are_under_way_together():
    first, second = run_distributed(2, several_buckets)
    assert first == second
    assert first[1]


def one_gone():
    """Rank 1 leaves between the stages: rank 0 gets its error from the second, and no hang."""
    state, parameters = powerSGD_state(), make_parameters()
    future = power.powerSGD_hook(state, Bucket(parameters, gradients_of(dist.get_rank())))
    if dist.get_rank() == 1:
        dist.destroy_process_group()
        return None
    with pytest.raises(PeerLost, match="rank 1"):
        future.wait()
    with pytest.raises(PeerLost, match="rank 1"):
        future.wait()
    return "told"


def test_a_rank_that_leaves_between_two_stages_is_an_error():
    assert run_distributed(2, one_gone, timeout=10)[0] == "told"


def half_groups():
    groups, _ = dist.new_subgroups(2)
    state = local.PostLocalSGDState(None, groups, start_localSGD_iter=1)
    quiet = local.PostLocalSGDState(None, None, 0, post_local_gradient_allreduce=False)
    parameters = make_parameters(shapes=((2,),))

    def value(which):
        own = torch.full((2,), float(dist.get_rank()))
        return local.post_localSGD_hook(which, Bucket(parameters, [own])).wait()[0].item()

    return [value(state), value(state), value(quiet)]


def test_post_local_sgd():
    """Ranks 0..3 hold their number: the mean of all is 1.5, of the halves 0.5 and 2.5."""
    got = run_distributed(4, half_groups)
    assert got == [[1.5, 0.5, 0.0], [1.5, 0.5, 1.0], [1.5, 2.5, 2.0], [1.5, 2.5, 3.0]]
    with pytest.raises(ValueError, match="needs the subgroup to reduce in"):
        local.PostLocalSGDState(None, None, 3)


class Model:
    def register_comm_hook(self, state, hook):
        self.registered = state, hook


def test_registering_by_name():
    model = Model()
    register_ddp_comm_hook(DDPCommHookType.BF16_COMPRESS, model, "group")
    assert model.registered == ("group", default.bf16_compress_hook)
    register_ddp_comm_hook(DDPCommHookType.POWER_SGD_RANK2, model)
    state, hook = model.registered
    assert (state.matrix_approximation_rank, state.process_group) == (2, None)
    assert hook is power.powerSGD_hook
    assert len(DDPCommHookType) == 10


def test_bad_options():
    with pytest.raises(ValueError, match="density must be above 0 and at most 1, got 0"):
        TopKState(density=0)
    with pytest.raises(ValueError, match="matrix_approximation_rank must be positive, got 0"):
        power.PowerSGDState(None, matrix_approximation_rank=0)
