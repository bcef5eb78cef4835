"""The Generator against numbers recorded from PyTorch, and what its state promises."""

from __future__ import annotations

import contextlib
import copy
import math
import pickle
import threading
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from dtrain import draws, dtypes, random
from dtrain.generator import Generator
from tests.draw_cases import CASES, MIXED, SEEDS, WEIGHTS, Draw
from tests.recorded import load

KEPT = slice(5024, 5032)  # of a state: the kept normal, a float64 made by log, sin and cos


def drawn(generator: Generator, case: Draw) -> np.ndarray:
    """The case drawn from our generator, cut to what is recorded."""
    arguments = dict(case.arguments)
    if "dtype" in arguments:
        arguments["dtype"] = dtypes.BY_NAME[arguments["dtype"]]
    if case.method == "bernoulli_each":
        (n,) = arguments["shape"]
        result = generator.bernoulli((np.arange(n) / (n - 1)).astype(arguments["dtype"].numpy))
    elif case.method == "multinomial":
        rows = WEIGHTS[0] if arguments.pop("rows") == 1 else WEIGHTS
        weights = np.array(rows, arguments.pop("dtype").numpy)
        result = generator.multinomial(weights, **arguments)
    else:
        result = getattr(generator, case.method)(**arguments)
        if "dtype" in arguments:
            assert dtypes.from_numpy(result.dtype) is arguments["dtype"]
    return result.reshape(-1)[-case.keep :]


def tolerance(case: Draw, want: np.ndarray) -> float:
    """How far from PyTorch a number may be: 0, or one unit in the last place of the largest.

    Exact: everything made of words, products and sums alone. Not exact: normal and exponential
    (their log, sin and cos are NumPy's or the C library's), and float64 uniforms that are scaled
    and shifted (PyTorch rounds once, we twice).
    """
    shifted = case.method == "uniform" and case.get("low") != 0
    if case.method in ("normal", "exponential") or (shifted and case.get("dtype") == "float64"):
        eps = dtypes.finfo(dtypes.BY_NAME[case.get("dtype")]).eps
        return eps * float(np.abs(want).max(initial=0))
    return 0.0


def assert_recorded(case: Draw, got: np.ndarray, want: np.ndarray) -> None:
    if got.dtype.name == "bfloat16":
        got = got.astype(np.float32)
    assert got.dtype == want.dtype
    limit = tolerance(case, want)
    if limit == 0:
        np.testing.assert_array_equal(got, want)
    else:
        np.testing.assert_allclose(got, want, rtol=0, atol=limit)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_draws_are_those_of_pytorch(case):
    recorded = load("random_draws")
    for seed in SEEDS:
        generator = Generator().manual_seed(seed)
        assert_recorded(case, drawn(generator, case), recorded[f"{seed}/{case}"])
        following = generator.uniform((1,))
        np.testing.assert_array_equal(following, recorded[f"{seed}/{case}/next"])


@pytest.mark.parametrize("seed", SEEDS)
def test_mixed_draws_and_states_are_those_of_pytorch(seed):
    recorded, generator = load("random_mixed"), Generator().manual_seed(seed)
    for index, case in enumerate(MIXED):
        ours, theirs = generator.get_state(), recorded[f"{seed}/state/{index}"]
        # The kept normal is a float64 of log, sin and cos: bytes 5024 to 5032, compared as one.
        np.testing.assert_array_equal(
            np.delete(ours, slice(5024, 5032)), np.delete(theirs, slice(5024, 5032))
        )
        kept = ours[5024:5032].view(np.float64), theirs[5024:5032].view(np.float64)
        np.testing.assert_allclose(*kept, rtol=1e-15)
        assert_recorded(case, drawn(generator, case), recorded[f"{seed}/{index}"])


@pytest.mark.parametrize("index", range(len(MIXED)))
def test_a_state_of_pytorch_is_gone_on_from(index):
    recorded, generator = load("random_mixed"), Generator()
    generator.set_state(recorded[f"7/state/{index}"])
    assert generator.initial_seed() == 7
    for later, case in enumerate(MIXED[index:], index):
        assert_recorded(case, drawn(generator, case), recorded[f"7/{later}"])


# --- properties ---

any_draw = st.sampled_from([case for case in (*CASES, *MIXED) if case.method != "randperm"])
seeds = st.integers(-(2**63), 2**64 - 1)
unhurried = settings(deadline=None)  # a loaded machine may take long for one example


@unhurried
@given(seeds, st.lists(any_draw, max_size=4), st.lists(any_draw, min_size=1, max_size=3))
def test_a_state_resumes_the_stream_anywhere(seed, before, after):
    generator = Generator().manual_seed(seed)
    for case in before:
        drawn(generator, case)
    state = generator.get_state()
    want = [drawn(generator, case) for case in after]
    restored = Generator()
    restored.set_state(state.tobytes())
    for case, values in zip(after, want, strict=True):
        np.testing.assert_array_equal(drawn(restored, case), values)
    np.testing.assert_array_equal(restored.get_state(), generator.get_state())


@unhurried
@given(seeds, st.integers(0, 700), st.integers(0, 700))
def test_split_draws_give_the_numbers_of_one(seed, first, second):
    """Word for word: uniform, randint, bernoulli, exponential. Normals only below 16 at once."""
    whole, split = Generator().manual_seed(seed), Generator().manual_seed(seed)
    for draw in (
        lambda g, n: g.uniform((n,)),
        lambda g, n: g.uniform((n,), dtypes.float64),
        lambda g, n: g.randint(0, 1 << 40, (n,)),
        lambda g, n: g.bernoulli(0.3, (n,)),
        lambda g, n: g.exponential((n,)),
        lambda g, n: np.concatenate([g.normal((1,)) for _ in range(n % 11)] or [np.empty(0)]),
    ):
        parts = np.concatenate([draw(split, first), draw(split, second)])
        if first % 11 + second % 11 == (first + second) % 11:
            np.testing.assert_array_equal(draw(whole, first + second), parts)
        else:
            draw(whole, first), draw(whole, second)
        assert (whole.get_state() == split.get_state()).all()


@unhurried
@given(st.integers(0, 2**32), st.integers(1, 15), st.integers(0, 15))
def test_few_normals_come_in_pairs_whose_second_is_kept(seed, first, second):
    whole, split = Generator().manual_seed(seed), Generator().manual_seed(seed)
    pairs = whole._normal_pairs(first + second)
    np.testing.assert_array_equal(
        np.float32(pairs), np.concatenate([split.normal((first,)), split.normal((second,))])
    )


def test_sixteen_normals_neither_use_nor_lose_the_kept_one():
    one, two = Generator().manual_seed(1), Generator().manual_seed(1)
    first, second = one.normal((2,))
    assert two.normal((1,)) == first
    two.normal((16,))
    assert two.normal((1,)) == second


@unhurried
@given(seeds, st.integers(0, 12_000))
def test_randperm_is_a_forward_shuffle(seed, n):
    generator = Generator().manual_seed(seed)
    words = Generator().manual_seed(seed)._u32(max(n - 1, 0)).tolist()
    want = list(range(n))
    for i, word in enumerate(words):
        j = i + word % (n - i)
        want[i], want[j] = want[j], want[i]
    assert generator.randperm(n).tolist() == want


@unhurried
@given(seeds, st.integers(0, 5000), st.integers(1, 200))
def test_the_shuffle_in_blocks_survives_colliding_swaps(seed, beyond, reach):
    """Targets close to their place: every block has swaps that depend on earlier ones."""
    n = 4097 + beyond
    steps = Generator().manual_seed(seed).randint(0, reach, (n - 1,))
    targets = np.minimum(np.arange(n - 1) + steps, n - 1)
    want = list(range(n))
    for i, j in enumerate(targets.tolist()):
        want[i], want[j] = want[j], want[i]
    assert draws.shuffled(n, targets).tolist() == want


def test_the_shuffle_of_very_long_permutations():
    """Inside out: place i takes what stands at a random place <= i, which then gets i."""
    generator, words = Generator(), Generator()
    want: list[int] = []
    for i, word in enumerate(words._u64(500).tolist()):
        place = word % (i + 1)
        want.append(i)
        want[i], want[place] = want[place], i
    assert draws.inside_out(500, generator._u64).tolist() == want
    assert sorted(want) == list(range(500))


# --- the documented edges ---


def test_seeds():
    generator = Generator()
    assert generator.initial_seed() == 67280421310721
    assert generator.manual_seed(-1) is generator
    assert generator.initial_seed() == 2**64 - 1
    assert generator.manual_seed(np.int64(5)).initial_seed() == 5
    low_bits = generator.manual_seed(2**40 + 5).uniform((3,))
    np.testing.assert_array_equal(low_bits, generator.manual_seed(5).uniform((3,)))
    assert generator.seed() == generator.initial_seed()
    assert generator.seed() != generator.seed()


def test_seeding_forgets_the_kept_normal():
    generator = Generator().manual_seed(3)
    first = generator.normal((1,))
    np.testing.assert_array_equal(generator.manual_seed(3).normal((1,)), first)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, Generator.clone_state])
def test_copies_go_on_alone(copied):
    generator = Generator().manual_seed(11)
    generator.normal((3,))
    other = copied(generator)
    np.testing.assert_array_equal(generator.normal((20,)), other.normal((20,)))
    generator.uniform((1,))
    assert (generator.get_state() != other.get_state()).any()


def test_pickling_keeps_the_place():
    generator = Generator().manual_seed(11)
    generator.normal((3,))
    other = pickle.loads(pickle.dumps(generator))
    np.testing.assert_array_equal(generator.normal((3,)), other.normal((3,)))


def test_long_draws_need_little_memory_beside_the_result():
    for draw in (
        lambda g, n: g.uniform((n,), dtypes.float32, -1, 1),
        lambda g, n: g.normal((n,), dtypes.float32, 1, 2),
        lambda g, n: g.exponential((n,)),
        lambda g, n: g.randint(0, 255, (n,), dtypes.uint8),
        lambda g, n: g.bernoulli(0.5, (n,)),
    ):
        tracemalloc.start()
        result = draw(Generator(), 1_000_000)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak - result.nbytes < 3_000_000  # one chunk's temporaries; 8 MB if it were whole


def test_distributions_have_their_moments():
    """Means and deviations of 200,000 draws, within five standard errors: the dtypes PyTorch lacks
    no recording for are still distributions."""
    generator, n = Generator().manual_seed(0), 200_000
    for values, mean, std in (
        (generator.uniform((n,), dtypes.float32, -1, 3), 1, 4 / math.sqrt(12)),
        (generator.normal((n,), dtypes.float64, 5, 2), 5, 2),
        (generator.exponential((n,), dtypes.float32, 4), 0.25, 0.25),
        (generator.bernoulli(0.3, (n,)), 0.3, math.sqrt(0.21)),
        (generator.multinomial(np.array([1.0, 0, 3.0]), n, True), 1.5, math.sqrt(0.75)),
    ):
        assert abs(values.mean(dtype=np.float64) - mean) < 5 * std / math.sqrt(n)
        assert abs(values.std(dtype=np.float64) - std) < 0.02 * std


REFUSED = [
    (lambda g: g.manual_seed(2**64), ValueError, "Overflow when unpacking long long"),
    (lambda g: g.manual_seed(-(2**63) - 1), ValueError, "Overflow when unpacking long long"),
    (lambda g: g.manual_seed(1.5), RuntimeError, "manual_seed expected a long, but got float"),
    (lambda g: g.manual_seed(True), RuntimeError, "manual_seed expected a long, but got bool"),
    (lambda g: Generator("cuda"), RuntimeError, "Expected one of cpu, meta device type"),
    (lambda g: g.set_state(b"abc"), RuntimeError, "size 5056 but found the input RNG state size"),
    (lambda g: g.set_state(np.zeros(5056)), TypeError, "RNG state must be a torch.ByteTensor"),
    (lambda g: g.set_state([1, 2]), TypeError, "RNG state must be a torch.ByteTensor"),
    (lambda g: g.set_state(bytes(5056)), RuntimeError, "Invalid mt19937 state"),
    (lambda g: g.uniform((2,), dtypes.int64), NotImplementedError, "not implemented for 'Long'"),
    (lambda g: g.uniform((2,), dtypes.float32, 3, 1), RuntimeError, "found from=3 > to=1"),
    (lambda g: g.uniform((2,), dtypes.float32, 0, 1e39), RuntimeError, "exceed the limit"),
    (lambda g: g.uniform((2,), dtypes.float64, 0, math.nan), RuntimeError, "exceed the limit"),
    (lambda g: g.normal((2,), dtypes.int64), NotImplementedError, "not implemented for 'Long'"),
    (lambda g: g.normal((2,), std=-1), RuntimeError, "normal expects std >= 0.0, but found std -1"),
    (lambda g: g.exponential((2,), dtypes.int64), RuntimeError, "you specified Long"),
    (lambda g: g.exponential((2,), lambd=0), RuntimeError, "lambda > 0.0, but found lambda=0"),
    (lambda g: g.randint(5, 5, (2,)), RuntimeError, "got from=5 >= to=5"),
    (lambda g: g.randint(0, 257, (2,), dtypes.uint8), RuntimeError, "to - 1 is out of bounds"),
    (lambda g: g.randint(-1, 5, (2,), dtypes.uint8), RuntimeError, "from is out of bounds"),
    (lambda g: g.randint(0, 70_000, (2,), dtypes.float16), RuntimeError, "to - 1 is out of bounds"),
    (lambda g: g.randint(0, 3, (2,), dtypes.bool_), RuntimeError, "to - 1 is out of bounds"),
    (lambda g: g.randperm(-1), RuntimeError, "negative dimension -1"),
    (lambda g: g.randperm(300, dtypes.uint8), RuntimeError, "to - 1 is out of bounds"),
    (lambda g: g.randperm(3000, dtypes.float16), RuntimeError, "greater than 2049 for Half type"),
    (lambda g: g.bernoulli(1.5, (2,)), RuntimeError, "p to be in [0, 1], but got p=1.5"),
    (lambda g: g.bernoulli(0.5), ValueError, "needs a shape"),
    (lambda g: g.bernoulli(np.array([1.5])), RuntimeError, "Expected p_in >= 0 && p_in <= 1"),
    (lambda g: g.bernoulli(np.array([1])), NotImplementedError, "bernoulli_tensor_cpu_p_"),
    (lambda g: g.dropout_mask(-0.1, (2,)), ValueError, "has to be between 0 and 1, but got -0.1"),
    (lambda g: g.multinomial(np.array([1, 2]), 1), RuntimeError, "got: Long"),
    (lambda g: g.multinomial(np.ones((2, 2, 2)), 1), RuntimeError, "must be 1 or 2 dim"),
    (lambda g: g.multinomial(np.ones(2), 0), RuntimeError, "cannot sample n_sample <= 0 samples"),
    (lambda g: g.multinomial(np.ones(2), 3), RuntimeError, "n_sample > prob_dist.size(-1)"),
    (lambda g: g.multinomial(np.array([1, -1.0]), 1), RuntimeError, "`inf`, `nan` or element < 0"),
    (lambda g: g.multinomial(np.array([1, np.nan]), 1), RuntimeError, "`inf`, `nan` or element"),
    (lambda g: g.multinomial(np.array([np.inf]), 1), RuntimeError, "`inf`, `nan` or element"),
    (lambda g: g.multinomial(np.zeros(2), 1), RuntimeError, "sum of probabilities <= 0"),
]


@pytest.mark.parametrize(("call", "error", "sentence"), REFUSED)
def test_refusals_say_why_and_draw_nothing(call, error, sentence):
    generator = Generator().manual_seed(3)
    before = generator.get_state()
    with pytest.raises(error) as raised:
        call(generator)
    assert sentence in str(raised.value)
    np.testing.assert_array_equal(generator.get_state(), before)


# --- the default generator ---


def test_the_default_generator_is_the_process_one_in_every_thread():
    seen: list[Generator] = []
    thread = threading.Thread(target=lambda: seen.append(random.default_generator()))
    thread.start()
    thread.join(timeout=10)
    assert seen == [random.default_generator()]


def test_threads_that_install_their_own_do_not_meet():
    """Two ranks as threads draw in turns; each gets the numbers of its own seed."""
    results: dict[int, np.ndarray] = {}
    turns = threading.Barrier(2, timeout=10)

    def rank(seed: int) -> None:
        with random.use_generator(Generator()):
            random.manual_seed(seed)
            parts = []
            for _ in range(5):
                turns.wait()
                parts.append(random.default_generator().normal((3,)))
            results[seed] = np.concatenate(parts)

    threads = [threading.Thread(target=rank, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    for seed in (1, 2):
        alone = Generator().manual_seed(seed)
        np.testing.assert_array_equal(
            results[seed], np.concatenate([alone.normal((3,)) for _ in "12345"])
        )


def interrupted(block):
    with contextlib.suppress(KeyError), block:
        raise KeyError


def test_blocks_end_with_an_error_too():
    outside = random.default_generator()
    with random.use_generator(Generator()) as inside:
        assert random.default_generator() is inside
    assert random.default_generator() is outside
    interrupted(random.use_generator(inside))
    assert random.default_generator() is outside


def test_functions_speak_to_the_default_generator():
    with random.use_generator(Generator()) as generator:
        assert random.manual_seed(1.7) is generator
        assert random.initial_seed() == 1
        state = random.get_rng_state()
        first = generator.uniform((3,))
        random.set_rng_state(state)
        np.testing.assert_array_equal(generator.uniform((3,)), first)
        assert random.seed() == random.initial_seed() == generator.initial_seed()


@pytest.mark.parametrize("enabled", [True, False])
def test_fork_rng_puts_the_state_back(enabled):
    with random.use_generator(Generator()) as generator:
        before = generator.get_state()
        with random.fork_rng(enabled=enabled):
            generator.uniform((3,))
        assert (generator.get_state() == before).all() == enabled
