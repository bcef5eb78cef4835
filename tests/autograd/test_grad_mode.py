"""no_grad, enable_grad, set_grad_enabled and inference_mode: as blocks, decorators and calls."""

from __future__ import annotations

import threading

import pytest

import dtrain as torch

MODES = {
    "no_grad": (torch.no_grad, False),
    "enable_grad": (torch.enable_grad, True),
    "inference_mode": (torch.inference_mode, False),
    "set_grad_enabled(False)": (lambda: torch.set_grad_enabled(False), False),
    "set_grad_enabled(True)": (lambda: torch.set_grad_enabled(True), True),
}
every_mode = pytest.mark.parametrize(("mode", "enabled"), MODES.values(), ids=MODES)


@pytest.fixture(autouse=True)
def _restored():
    yield
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


@every_mode
@pytest.mark.parametrize("outside", [True, False])
def test_block(mode, enabled, outside):
    with torch.set_grad_enabled(outside):
        with mode():
            assert torch.is_grad_enabled() is enabled
            with torch.set_grad_enabled(not enabled):
                assert torch.is_grad_enabled() is not enabled
            assert torch.is_grad_enabled() is enabled
        assert torch.is_grad_enabled() is outside
        with pytest.raises(KeyError), mode():
            raise KeyError
        assert torch.is_grad_enabled() is outside


@every_mode
def test_decorator(mode, enabled):
    @mode()
    def depth(n):
        """Documented."""
        assert torch.is_grad_enabled() is enabled
        return n and depth(n - 1)

    assert torch.is_grad_enabled()
    assert depth(3) == 0
    assert (depth.__name__, depth.__doc__) == ("depth", "Documented.")


def test_decorators_without_parentheses():
    for mode, enabled in ((torch.no_grad, False), (torch.enable_grad, True),
                          (torch.inference_mode, False)):  # fmt: skip
        with torch.set_grad_enabled(not enabled):
            assert mode(torch.is_grad_enabled)() is enabled
            assert torch.is_grad_enabled() is not enabled


def test_a_generator_has_the_mode_only_while_it_runs():
    events = []

    @torch.no_grad()
    def numbers():
        try:
            got = yield torch.is_grad_enabled()
            events.append((got, torch.is_grad_enabled()))
            try:
                yield torch.is_grad_enabled()
            except KeyError:
                events.append(("caught", torch.is_grad_enabled()))
            yield 3
            return "end"
        finally:
            events.append(("closed", torch.is_grad_enabled()))

    generator = numbers()
    assert next(generator) is False
    assert torch.is_grad_enabled()
    assert generator.send("sent") is False
    assert generator.throw(KeyError) == 3
    with pytest.raises(StopIteration, match="end"):
        next(generator)
    assert events == [("sent", False), ("caught", False), ("closed", False)]
    other = numbers()
    next(other)
    other.close()
    assert events[3:] == [("closed", False)]


def test_classes_are_decorated_with_a_warning():
    with pytest.warns(FutureWarning, match="only wraps __init__"):

        @torch.no_grad()
        class Model:
            def __init__(self):
                self.enabled = torch.is_grad_enabled()

    assert Model().enabled is False


def test_set_grad_enabled_as_a_call():
    torch.set_grad_enabled(False)
    try:
        assert not torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)
    assert torch.is_grad_enabled()


def test_one_instance_may_be_entered_repeatedly():
    mode = torch.no_grad()
    with mode:
        with mode:
            assert not torch.is_grad_enabled()
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_inference_mode_says_so_and_can_be_off():
    with torch.inference_mode():
        assert torch.is_inference_mode_enabled()
        with torch.inference_mode(mode=False):
            assert not torch.is_inference_mode_enabled()
    with torch.inference_mode(False):
        assert torch.is_grad_enabled()


def test_threads_start_enabled_and_change_nothing_here():
    found = []

    def work():
        found.append(torch.is_grad_enabled())
        torch.set_grad_enabled(False)

    with torch.no_grad():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(10)
    assert found == [True]
    assert torch.is_grad_enabled()
