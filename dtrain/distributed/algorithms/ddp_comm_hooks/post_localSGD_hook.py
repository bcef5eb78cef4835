"""Reduce over all ranks for some steps, then only inside small groups of ranks.

Later steps go with a model averager, which brings the groups together now and then. Source:
torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook; Lin et al., Don't Use Large
Mini-Batches, Use Local SGD, ICLR 2020.
"""

from __future__ import annotations

from typing import Any

from dtrain.comm.work import Future
from dtrain.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from dtrain.distributed.algorithms.ddp_comm_hooks.default_hooks import mean
from dtrain.distributed.algorithms.ddp_comm_hooks.stages import Payload, sends
from dtrain.tensor import Tensor


class PostLocalSGDState:
    """What `post_localSGD_hook` needs: two groups, and how many backward passes there were.

    process_group        reduces the first `start_localSGD_iter` passes; None: the default group
    subgroup             reduces later ones: this rank's group of those that share a host, say
    post_local_gradient_allreduce   False: later passes reduce nothing at all
    """

    def __init__(
        self,
        process_group: Any,
        subgroup: Any,
        start_localSGD_iter: int,
        post_local_gradient_allreduce: bool = True,
    ) -> None:
        if subgroup is None and post_local_gradient_allreduce:
            raise ValueError(
                "PostLocalSGDState needs the subgroup to reduce in: one of dist.new_subgroups(), "
                "made on all ranks, or post_local_gradient_allreduce=False"
            )
        self.process_group = process_group
        self.subgroup = subgroup
        self.start_localSGD_iter = start_localSGD_iter
        self.post_local_gradient_allreduce = post_local_gradient_allreduce
        self.iter = 0

    def maybe_increase_iter(self, bucket: Any) -> None:
        """Count a backward pass when its last bucket is here."""
        if bucket.is_last():
            self.iter += 1


def _payload(state: PostLocalSGDState, bucket: Any) -> Payload:
    """Bytes into the group that reduces now."""
    quiet = state.iter >= state.start_localSGD_iter and not state.post_local_gradient_allreduce
    return Payload(all_reduce=0 if quiet else bucket.buffer().nbytes)


@sends(_payload)
def post_localSGD_hook(state: PostLocalSGDState, bucket: Any) -> Future[Tensor]:
    """The mean over `state.process_group` at first, over `state.subgroup` or nobody later."""
    everyone = state.iter < state.start_localSGD_iter
    state.maybe_increase_iter(bucket)
    if everyone:
        return mean(bucket.buffer(), state.process_group)
    if not state.post_local_gradient_allreduce:
        return noop_hook(None, bucket)
    return mean(bucket.buffer(), state.subgroup)
