"""Models on the meta device that are sharded first and get their values then: `fully_shard` and
`FullyShardedDataParallel`. The oracle is the same model made whole, with the same draws."""

from __future__ import annotations

import tracemalloc

import pytest

import dtrain as torch
import dtrain.distributed as dist
import dtrain.distributed.checkpoint as dcp
from dtrain.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from dtrain.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel as FSDP,
    fully_shard,
)
from dtrain.distributed.fsdp.wrap import always_wrap_policy
from dtrain.testing.distributed import run_distributed
from tests.distributed.fsdp import training

nn = torch.nn
NO_DATA = "Cannot copy out of meta tensor; no data!"


def reset(model):
    """First values, in the order in which layers are made."""
    torch.manual_seed(5)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


def sharded_first(name, **options):
    with torch.device("meta"):
        model = training.MODELS[name][0]()
    model = training.sharded(name, model, **options)
    assert all(p.is_meta for p in model.parameters())
    return reset(model.to_empty(device="cpu"))


def train(name, first, **options):
    if first:
        model = sharded_first(name, **options)
    else:
        model = training.sharded(name, reset(training.made(name)), **options)
    return training.descend(model, training.MODELS[name][1]), training.whole(model)


@pytest.mark.parametrize("transport", ["local", "zmq"])
@pytest.mark.parametrize("name", training.MODELS)
def test_golden_losses_are_those_of_a_model_made_whole(name, transport):
    expected = run_distributed(2, train, name, False, transport=transport)
    assert run_distributed(2, train, name, True, transport=transport) == expected


def test_offloaded_parameters_come_without_a_whole_too():
    options = {"offload_policy": CPUOffloadPolicy()}

    def main(first):
        return train("MLP", first, **options)

    assert run_distributed(2, main, True) == run_distributed(2, main, False)


LAYERS, WIDTH, RANKS = 32, 256, 4


def peak_of(place):
    """Bytes that all ranks together held at most while they built the model."""

    def build():
        with torch.device(place):
            layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)]
        model = nn.Sequential(*layers)
        dist.barrier()
        for layer in layers:
            fully_shard(layer)
        fully_shard(model)
        if place == "meta":
            model.to_empty(device="cpu")
            for layer in layers:
                layer.reset_parameters()

    tracemalloc.start()
    try:
        run_distributed(RANKS, build, transport="zmq")
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_no_rank_ever_holds_the_model():
    size = LAYERS * WIDTH * WIDTH * 4
    assert peak_of("cpu") > RANKS * size
    # Everybody's parts, and room for a layer on each rank while it is drawn: 1.4 is usual.
    assert size < peak_of("meta") < 2.2 * size


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.inner(x) * self.scale


def meta_block():
    with torch.device("meta"):
        block = Block()
    return fully_shard(block)


def refused(error, sentence, call):
    with pytest.raises(error) as raised:
        call()
    assert sentence in str(raised.value)


def test_what_needs_values_says_so_on_every_rank(tmp_path):
    def main(folder):
        model = meta_block()
        optimizer = torch.optim.AdamW(model.parameters())
        sentence = "FSDP parameters should be materialized from meta device before training"
        refused(RuntimeError, sentence, lambda: model(torch.ones(2, 4)))
        refused(RuntimeError, "['scale', 'inner.weight', 'inner.bias']", model.unshard)
        refused(NotImplementedError, NO_DATA, model.scale.full_tensor)
        refused(NotImplementedError, NO_DATA, lambda: model.scale + 1)
        refused(NotImplementedError, NO_DATA, model.scale.numpy)
        refused(NotImplementedError, NO_DATA, lambda: model.to("cpu"))
        state = get_model_state_dict(model)
        refused(dcp.CheckpointException, NO_DATA, lambda: dcp.save(state, checkpoint_id=folder))
        assert all(tensor.is_meta for tensor in state.values())
        assert model.scale.device == torch.device("meta")
        assert "device='meta'" in repr(model.scale)
        assert model.scale.to_local().is_meta
        nn.init.ones_(model.scale)
        nn.init.normal_(model.inner.weight)
        assert model.scale.is_meta  # nothing was written
        before = list(model.parameters())
        model.to_empty(device="cpu")
        assert [id(p) for p in model.parameters()] == [id(p) for p in before]
        reset(model)
        with torch.no_grad():
            model.scale.fill_(1)
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        return model.scale.full_tensor().tolist()

    one, two = run_distributed(2, main, tmp_path / "saved")
    assert one == two
    assert all(value != 1 for value in one)


def test_values_come_from_a_state_dict(tmp_path):
    torch.manual_seed(1)
    source = {name: t.clone() for name, t in Block().state_dict().items()}

    def whole(model):
        return {name: t.full_tensor().tolist() for name, t in model.state_dict().items()}

    def main():
        from_first, by_parts, from_disk = meta_block(), meta_block(), meta_block()
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        given = source if dist.get_rank() == 0 else {}
        set_model_state_dict(from_first, given, options=options)
        by_parts.load_state_dict(from_first.state_dict(), assign=True)
        dcp.save(get_model_state_dict(by_parts), checkpoint_id=tmp_path / "saved")
        from_disk.to_empty(device="cpu")
        dcp.load(get_model_state_dict(from_disk), checkpoint_id=tmp_path / "saved")
        for model in (from_first, by_parts, from_disk):
            assert not any(p.is_meta for p in model.parameters())
            model(torch.ones(2, 4)).sum().backward()
            assert model.scale.grad is not None
        return [whole(model) for model in (from_first, by_parts, from_disk)]

    expected = {name: tensor.tolist() for name, tensor in source.items()}
    assert run_distributed(2, main) == [[expected] * 3] * 2


def test_loading_without_assign_warns_and_changes_nothing():
    def main():
        model = meta_block()
        with pytest.warns(UserWarning, match="which is a no-op"):
            model.load_state_dict(fully_shard(Block()).state_dict())
        assert all(p.is_meta for p in model.parameters())
        with pytest.raises(RuntimeError, match="the data of a sharded parameter is a"):
            model.load_state_dict(Block().state_dict(), assign=True)
        assert all(p.is_meta for p in model.parameters())

    run_distributed(1, main)  # warnings are the process's


def test_the_padding_row_of_an_embedding_is_0():
    def main(first):
        torch.manual_seed(0)
        with torch.device("meta" if first else "cpu"):
            model = fully_shard(nn.Embedding(5, 3, padding_idx=-2))
        if first:
            model.to_empty(device="cpu").reset_parameters()
        return model.weight.full_tensor().tolist()

    result = run_distributed(3, main, True)
    assert result == run_distributed(3, main, False)
    assert result[0][3] == [0.0] * 3


# ---- the wrapper


def layers():
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Sequential(nn.Linear(7, 3)))


def draw(module):
    """Values that depend on the module's shape alone, and memory for them."""
    if any(t.is_meta for t in module.parameters(recurse=False)):
        module.to_empty(device="cpu", recurse=False)
    torch.manual_seed(sum(p.numel() for p in module.parameters(recurse=False)))
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()


def losses(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for step in range(3):
        optimizer.zero_grad()
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def wrapped(model, **options):
    return FSDP(model, auto_wrap_policy=always_wrap_policy, **options)


def test_param_init_fn_gives_each_wrapper_its_values():
    def main(first):
        with torch.device("meta" if first else "cpu"):
            model = layers()
        if not first:
            model.apply(draw)
        return losses(wrapped(model, param_init_fn=draw))

    assert run_distributed(2, main, True) == run_distributed(2, main, False)


def test_without_it_modules_reset_their_own():
    def main(first):
        with torch.device("meta" if first else "cpu"):
            model = nn.Sequential(nn.Linear(5, 7))
        torch.manual_seed(9)
        if not first:
            model[0].reset_parameters()
        return losses(wrapped(model))

    assert run_distributed(2, main, True) == run_distributed(2, main, False)


def test_the_first_rank_alone_may_have_the_model():
    def main(everybody):
        torch.manual_seed(2)
        whole = everybody or dist.get_rank() == 0
        with torch.device("cpu" if whole else "meta"):
            model = layers()

        def memory(module):
            if not whole:
                module.to_empty(device="cpu", recurse=False)

        return losses(wrapped(model, sync_module_states=True, param_init_fn=memory))

    assert run_distributed(2, main, False) == run_distributed(2, main, True)


def test_the_wrapper_says_what_is_missing():
    def main():
        with torch.device("meta"):
            block, linear = Block(), nn.Linear(2, 2)
        sentence = "Please ensure that your module of type <class"
        refused(RuntimeError, sentence, lambda: FSDP(block))
        refused(ValueError, "to be callable but got", lambda: FSDP(linear, param_init_fn=3))
        options = {"sync_module_states": True, "param_init_fn": lambda module: None}
        refused(RuntimeError, "['weight', 'bias'] have no v", lambda: FSDP(linear, **options))

    run_distributed(2, main)
