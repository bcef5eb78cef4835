"""Wrap policies: which modules of a tree they take, in which order, and where wrappers go."""

from __future__ import annotations

import functools

import pytest

import dtrain as torch
from dtrain.distributed.fsdp import wrap as wrapping
from dtrain.distributed.fsdp.wrap import (
    CustomPolicy,
    ModuleWrapPolicy,
    always_wrap_policy,
    chosen_modules,
    enable_wrap,
    lambda_auto_wrap_policy,
    replace_modules,
    size_based_auto_wrap_policy,
    transformer_auto_wrap_policy,
    wrap,
)

nn = torch.nn


class Block(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.norm, self.wide = nn.LayerNorm(width), nn.Linear(width, width)


def tree():
    """78 elements: two blocks of 28 (norm 8, linear 20), a linear layer of 20, an empty list."""
    return nn.Sequential(Block(), nn.ModuleList([Block()]), nn.Linear(4, 4), nn.Tanh())


def taken(model, policy, **options):
    """Names of what a policy takes, in the order in which it is to be wrapped."""
    names = {module: name or "root" for name, module in model.named_modules()}
    return [names[module] for module in chosen_modules(model, policy, **options)]


def by_size(least, **options):
    return functools.partial(size_based_auto_wrap_policy, min_num_params=least, **options)


def test_children_come_before_what_holds_them():
    assert taken(tree(), always_wrap_policy) == [
        *("0.norm", "0.wide", "0", "1.0.norm", "1.0.wide", "1.0", "1", "2", "3", "root")
    ]


@pytest.mark.parametrize(
    "policy",
    [
        ModuleWrapPolicy({Block}),
        functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={Block}),
        functools.partial(lambda_auto_wrap_policy, lambda_fn=lambda m: isinstance(m, Block)),
        functools.partial(wrapping._or_policy, policies=[ModuleWrapPolicy([Block])]),
        functools.partial(wrapping._module_wrap_policy, module_classes=[Block]),
        functools.partial(wrapping._wrap_module_cls_individually, module_classes=[Block]),
        CustomPolicy(lambda m: isinstance(m, Block)),
    ],
)
def test_policies_by_class(policy):
    assert taken(tree(), policy) == ["0", "1.0"]
    model = tree()
    assert taken(model, policy, ignored_modules={model[0]}) == ["1.0"]


def test_one_or_the_other():
    either = [ModuleWrapPolicy([Block]), ModuleWrapPolicy([nn.Tanh])]
    policy = functools.partial(wrapping._or_policy, policies=either)
    assert taken(tree(), policy) == ["0", "1.0", "3"]


@pytest.mark.parametrize(
    ("least", "expected"),
    [
        # the blocks keep 8 elements of their norm, below 20: only what is left over counts
        (20, ["0.wide", "1.0.wide", "2"]),
        (28, ["0", "1.0"]),  # 20 are left for the root
        (29, ["root"]),  # 76 in all; the list holds 28
        (77, []),
    ],
)
def test_policy_by_size(least, expected):
    assert taken(tree(), by_size(least)) == expected


def test_policy_by_size_leaves_and_exceptions():
    # a leaf is neither looked into nor taken: its elements are left for what holds it
    assert taken(tree(), by_size(20, force_leaf_modules={Block})) == ["2", "root"]
    assert taken(tree(), by_size(20, exclude_wrap_modules={nn.Linear})) == ["0", "1.0", "root"]
    assert taken(tree(), by_size(20, force_leaf_modules={nn.Sequential})) == []


def test_a_list_is_not_taken_for_its_size():
    model = nn.Sequential(nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]))
    assert taken(model, by_size(40)) == ["root"]
    assert taken(model, by_size(40, exclude_wrap_modules=())) == ["0"]


def test_ignored_parameters_do_not_count():
    model = tree()
    assert taken(model, by_size(21), ignored_params=[]) == ["0", "1.0"]
    assert taken(model, by_size(21), ignored_params=[model[0].norm.weight, model[0].norm.bias]) == [
        "1.0", "root"
    ]  # fmt: skip


def test_arguments_of_a_custom_policy():
    model = tree()
    answers = {model[0]: {"depth": 3}, model[2]: True, model[3]: {}}
    policy = CustomPolicy(lambda module: answers.get(module, False))
    chosen = chosen_modules(model, policy, root_kwargs={"depth": 1, "wide": 2})
    assert chosen == {model[0]: {"depth": 3, "wide": 2}, model[2]: {"depth": 1, "wide": 2}}
    chosen[model[2]]["depth"] = 9  # each has its own
    with pytest.raises(ValueError, match=r"should return False/True or a kwarg dict, but it .* 3"):
        chosen_modules(model, CustomPolicy(lambda module: 3))


class Around(nn.Module):
    def __init__(self, inner, **options):
        super().__init__()
        self.inner, self.options = inner, options


def test_wrappers_replace_a_shared_module_everywhere():
    shared, seen = nn.Linear(2, 2), []
    model = nn.Sequential(shared, nn.Sequential(shared, nn.Tanh()))

    def wrapper(module, **options):
        seen.append(module)
        return Around(module, **options)

    chosen = chosen_modules(model, ModuleWrapPolicy([nn.Linear]), root_kwargs={"a": 1})
    assert replace_modules(model, chosen, wrapper) is model
    assert model[0] is model[1][0]
    assert model[0].inner is shared
    assert seen == [shared]
    assert model[0].options == {"a": 1}
    assert list(model._modules) == ["0", "1"]


def test_a_wrapped_root_is_returned_with_wrapped_children_inside():
    model = nn.Sequential(nn.Linear(2, 2))
    made = replace_modules(model, chosen_modules(model, always_wrap_policy), Around)
    assert isinstance(made, Around)
    assert made.inner is model
    assert isinstance(model[0], Around)


def test_size_counts_a_shared_module_once():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(nn.Sequential(shared), nn.Sequential(shared, nn.Linear(4, 1)))
    # 25 elements; the second branch has 5 beside what was taken under the first
    assert taken(model, by_size(20)) == ["0.0"]
    assert taken(model, by_size(5, exclude_wrap_modules=())) == ["0.0", "1.1"]


def test_wrap_where_a_model_is_written():
    bare = wrap(nn.Linear(2, 2), depth=1)
    assert isinstance(bare, nn.Linear)
    with enable_wrap(wrapper_cls=Around, depth=1, wide=2):
        made = wrap(nn.Linear(2, 2), depth=3)
        with enable_wrap(wrapper_cls=nn.Sequential):
            assert isinstance(wrap(nn.Tanh()), nn.Sequential)
        assert isinstance(wrap(nn.Tanh()), Around)
    assert made.options == {"depth": 3, "wide": 2}
    assert isinstance(wrap(nn.Tanh()), nn.Tanh)
