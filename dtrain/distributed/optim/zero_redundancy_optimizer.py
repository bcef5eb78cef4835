"""`ZeroRedundancyOptimizer`: every rank keeps the state of its share of the parameters.

A rank steps its own parameters with an ordinary optimizer and sends them to the others; the result
has the bits of that optimizer on all parameters. carriers.py says who owns what and how it travels.
Source: torch.distributed.optim.ZeroRedundancyOptimizer; Rajbhandari et al., ZeRO, SC 2020 (stage
1).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from dtrain.device import device
from dtrain.distributed.algorithms.join import Join, Joinable, JoinHook
from dtrain.distributed.objects import gather_object
from dtrain.distributed.optim.carriers import Carriers, owners
from dtrain.distributed.optim.partial_step import step_with
from dtrain.distributed.world import resolve
from dtrain.optim.optimizer import Group, Optimizer, StateDict
from dtrain.tensor import Tensor

_OWN = ("params", "param_names")  # of a group, what differs between this and the local optimizer


class _ZeROJoinHook(JoinHook):
    """A rank without inputs goes on stepping its share, with the gradients that DDP shadows."""

    def __init__(self, zero: ZeroRedundancyOptimizer) -> None:
        self.zero = zero

    def main_hook(self) -> None:
        self.zero.step()


class ZeroRedundancyOptimizer(Optimizer, Joinable):
    """`optimizer_class(params, **defaults)` with its state shared among the ranks of a group.

    params          as for any optimizer, the same on all ranks, all of one dtype
    process_group   the ranks, default all
    parameters_as_bucket_view   move the parameters into flat buffers, in which they are sent
                    without copies
    overlap_with_ddp   steps run in backward, by one of the hooks of `ddp_zero_hook`, from the first
                    pass on; `step()` then does nothing

    Parameters go, largest first, to the rank that has the fewest elements. A step sends each rank's
    parameters to the others in one broadcast, N at most, and blocks until they have come. Gradients
    must be equal on all ranks, as DDP leaves them. Learning rates are changed in `param_groups` as
    usual. `optim` is the local optimizer; `state` its state.
    """

    def __init__(
        self,
        params: Iterable[Any],
        optimizer_class: type[Optimizer],
        process_group: Any = None,
        parameters_as_bucket_view: bool = False,
        overlap_with_ddp: bool = False,
        **defaults: Any,
    ) -> None:
        self.process_group = resolve(process_group)
        self.rank, self.world_size = self.process_group.rank(), self.process_group.size()
        self.parameters_as_bucket_view = parameters_as_bucket_view
        self._overlap_with_ddp = overlap_with_ddp
        self._loads = [0] * self.world_size
        self._owner: dict[Any, int] = {}
        self._consolidated: dict[Any, Any] | None = None
        self._by_bucket: dict[tuple[int, ...], Carriers] = {}
        self.optim: Optimizer | None = None
        Joinable.__init__(self)
        Optimizer.__init__(self, _checked(params), defaults)
        _check_one_type(self._parameters())
        self.optim = optimizer_class(
            [self._local(group) for group in self.param_groups], **defaults
        )
        self.kept_as_saved = self.optim.kept_as_saved
        self.state = self.optim.state
        self._pull_options()
        self._prepare()

    # --- who owns what ---

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters, which are shared out among the ranks like the others."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        found = owners([p.numel() for p in group["params"]], self._loads)
        self._owner.update(zip(group["params"], found, strict=True))
        if self.optim is None:  # while this is made
            return
        _check_one_type(self._parameters())
        self.optim.add_param_group(self._local(group))
        self._pull_options()
        self._prepare()

    def _parameters(self) -> Iterator[Any]:
        return (p for group in self.param_groups for p in group["params"])

    def _owned(self, parameters: Iterable[Any], rank: int) -> list[Any]:
        return [p for p in parameters if self._owner[p] == rank]

    def _local(self, group: Group) -> Group:
        """This rank's share of a group, for the local optimizer."""
        mine: list[Any] = self._owned(group["params"], self.rank)
        if "param_names" in group:
            names = dict(zip(group["params"], group["param_names"], strict=True))
            mine = [(names[p], p) for p in mine]
        return {**_options(group), "params": mine}

    def _prepare(self) -> None:
        """The way of the parameters to the others; what was consolidated is out of date."""
        self._consolidated = None
        self._carriers = None
        if not self._overlap_with_ddp:
            self._carriers = Carriers(
                list(self._parameters()), self._owner, self.process_group,
                self.parameters_as_bucket_view,
            )  # fmt: skip

    def _push_options(self) -> None:
        for ours, local in zip(self.param_groups, self._local_optimizer.param_groups, strict=True):
            local.update(_options(ours))

    def _pull_options(self) -> None:
        for ours, local in zip(self.param_groups, self._local_optimizer.param_groups, strict=True):
            ours.update(_options(local))

    @property
    def _local_optimizer(self) -> Optimizer:
        assert self.optim is not None
        return self.optim

    # --- steps ---

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Update this rank's share, then get the others'; what `closure()` returned.

        All ranks must call it. More arguments go to the local optimizer's step.
        """
        Join.notify_join_context(self)
        if self._carriers is None:
            warnings.warn(
                "`step()` should not be included in the training loop when `overlap_with_ddp=True`:"
                " the hook steps in backward",
                stacklevel=3,
            )
            return None
        self._push_options()
        if closure is not None:
            kwargs["closure"] = closure
        loss = self._local_optimizer.step(**kwargs)
        self._pull_options()
        for work in self._carriers.send():
            work.wait()
        self._carriers.arrive()
        self._consolidated = None
        return loss

    def step_bucket(self, parameters: Sequence[Any], gradients: Sequence[Tensor]) -> None:
        """Update what this rank owns of a DDP bucket, with these gradients. Not in torch.

        For the hooks of `ddp_zero_hook`, which then send what `carriers_of` it are.
        """
        pairs = zip(parameters, gradients, strict=True)
        mine = {p: gradient for p, gradient in pairs if self._owner[p] == self.rank}
        self._push_options()
        if mine:
            step_with(self._local_optimizer, mine)
        self._consolidated = None

    def carriers_of(self, parameters: Sequence[Any]) -> Carriers:
        """The messages for a bucket's parameters, made once for each bucket."""
        key = tuple(map(id, parameters))
        if key not in self._by_bucket:
            known = {i for other in self._by_bucket for i in other}
            if not known.isdisjoint(key):  # DDP has rebuilt its buckets
                self._by_bucket.clear()
            self._by_bucket[key] = Carriers(parameters, self._owner, self.process_group)
        return self._by_bucket[key]

    # --- saving and loading ---

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Bring the state of all ranks to group rank `to`, where `state_dict()` gives it then.

        All ranks must call it, with the same `to`. Blocks until all have.
        """
        if not 0 <= to < self.world_size:
            raise ValueError(f"to={to} is not a rank of the group (size {self.world_size})")
        own = self._owned(self._parameters(), self.rank)
        mine = {i: self.state[p] for i, p in enumerate(own) if p in self.state}
        everyone: list[Any] | None = [None] * self.world_size if self.rank == to else None
        gather_object(mine, everyone, group=self.process_group, group_dst=to)
        self._consolidated = None
        if everyone is None:
            return
        everyone[to] = mine
        places: dict[Any, tuple[int, int]] = {}
        for rank in range(self.world_size):
            for i, p in enumerate(self._owned(self._parameters(), rank)):
                places[p] = rank, i
        self._consolidated = {
            p: everyone[rank][i]
            for p in self._parameters()
            for rank, i in (places[p],)
            if i in everyone[rank]
        }

    def state_dict(self) -> StateDict:
        """The state of all parameters, as the local optimizer's class would give it.

        RuntimeError unless it has been consolidated on this rank since the last step.
        """
        if self._consolidated is None:
            raise RuntimeError(
                "Optimizer state has not been consolidated on this rank. Please call "
                f"`consolidate_state_dict(to={self.rank})` on all ranks beforehand if you meant to "
                "save the global state."
            )
        own, self.state = self.state, self._consolidated  # type: ignore[assignment]
        try:
            return super().state_dict()
        finally:
            self.state = own

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Take over a whole `state_dict()` of this class or of the local one; alike on all ranks.

        A rank keeps what belongs to its parameters.
        """
        params = self._params_by_id(state_dict["param_groups"])
        mine = {
            key: value
            for key, value in state_dict["state"].items()
            if key not in params or self._owner[params[key]] == self.rank
        }
        super().load_state_dict({**state_dict, "state": mine})
        local = [
            {**_options(ours), **{k: group[k] for k in _OWN if k in group}}
            for ours, group in zip(
                self.param_groups, self._local_optimizer.param_groups, strict=True
            )
        ]
        self._local_optimizer.__setstate__({"state": self.state, "param_groups": local})
        self._consolidated = None

    # --- uneven inputs ---

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """Steps of a rank that has no more inputs; `kwargs` are accepted and ignored."""
        return _ZeROJoinHook(self)

    @property
    def join_device(self) -> device:
        return device("cpu")

    @property
    def join_process_group(self) -> Any:
        return self.process_group


def _options(group: Group) -> Group:
    return {key: value for key, value in group.items() if key not in _OWN}


def _checked(params: Any) -> list[Any]:
    """The parameters as a list; TypeError and ValueError in torch's words."""
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        raise TypeError(
            "`params` argument should be an iterable of Tensors or dicts, but got "
            f"{type(params).__name__}"
        )
    found = list(params)
    if not found:
        raise ValueError("ZeroRedundancyOptimizer got an empty parameter list")
    return found


def _check_one_type(parameters: Iterable[Any]) -> None:
    kinds = list(dict.fromkeys(p.type() for p in parameters))
    if len(kinds) > 1:
        raise ValueError(
            "ZeroRedundancyOptimizer only supports using the same dense type for all parameters "
            f"but got both {kinds[0]} and {kinds[1]}"
        )
