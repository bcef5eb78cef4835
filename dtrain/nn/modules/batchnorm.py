"""Normalisation over a batch: BatchNorm1d, 2d and 3d, and SyncBatchNorm over all ranks' batches.

Training uses the batch's statistics and follows them with running ones, evaluation uses the
running ones if there are any. This package does not know of communication: with whom statistics
are shared is asked of `dtrain.ranks`. Source: torch.nn.modules.batchnorm.
"""

from __future__ import annotations

from typing import Any

from dtrain import dtypes
from dtrain.nn import functional as F, init
from dtrain.nn.modules.module import Module
from dtrain.nn.modules.normalization import _Affine
from dtrain.ops.create import ones, tensor, zeros
from dtrain.ops.norm import batch_norm_over_ranks
from dtrain.ranks import peers
from dtrain.tensor import Tensor


class _BatchNorm(_Affine):
    """What the three have in common; they differ in the number of dimensions they take.

    `momentum` weighs the newest batch in the running statistics; None: they are plain averages.
    """

    _version = 2
    _dims: tuple[int, ...]

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: dtypes.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        options = {"device": device, "dtype": dtype}
        self._make((num_features,), affine, affine and bias, **options)
        tracked = {
            "running_mean": lambda: zeros(num_features, **options),
            "running_var": lambda: ones(num_features, **options),
            "num_batches_tracked": lambda: tensor(0, dtype=dtypes.int64, device=device),
        }
        for name, first in tracked.items():
            self.register_buffer(name, first() if track_running_stats else None)
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Forget the batches seen."""
        if self.running_mean is not None:
            init.zeros_(self.running_mean)
            init.ones_(self.running_var)
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Forget the batches seen; weight 1, bias 0."""
        self.reset_running_stats()
        super().reset_parameters()

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim not in self._dims:
            expected = " or ".join(f"{n}D" for n in self._dims)
            raise ValueError(f"expected {expected} input (got {input.ndim}D input)")

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        tracking = self.training and self.track_running_stats
        factor = self.momentum
        if tracking and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if factor is None:
                factor = 1.0 / self.num_batches_tracked.item()
        use_running = tracking or not self.training
        return self._normalize(
            input,
            self.running_mean if use_running else None,
            self.running_var if use_running else None,
            0.0 if factor is None else factor,
        )

    def _normalize(self, input: Tensor, mean: Any, var: Any, factor: float) -> Tensor:
        of_batch = self.training or (self.running_mean is None and self.running_var is None)
        return F.batch_norm(
            input, mean, var, self.weight, self.bias, of_batch, factor, self.eps
        )  # fmt: skip

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        # Version 1 had no count of batches: this module's stays.
        if local_metadata.get("version", 1) < 2 and self.num_batches_tracked is not None:
            state_dict.setdefault(prefix + "num_batches_tracked", self.num_batches_tracked)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}, bias={self.bias is not None}, "
            f"track_running_stats={self.track_running_stats}"
        )


class BatchNorm1d(_BatchNorm):
    """Batch normalisation of (N, C) or (N, C, L). Source: torch.nn.BatchNorm1d."""

    _dims = (2, 3)


class BatchNorm2d(_BatchNorm):
    """Batch normalisation of (N, C, H, W). Source: torch.nn.BatchNorm2d."""

    _dims = (4,)


class BatchNorm3d(_BatchNorm):
    """Batch normalisation of (N, C, D, H, W). Source: torch.nn.BatchNorm3d."""

    _dims = (5,)


class SyncBatchNorm(_BatchNorm):
    """In training, batch normalisation by the statistics of the batches of all ranks together.

    Equal to BatchNorm on one process that has the whole batch: (N, C, *), where N may differ from
    rank to rank, also be 0. In evaluation, without a process group and alone in one it is
    BatchNorm. `process_group` None is the default one.

    Forward makes one all-gather of 2 C + 1 numbers and backward one all-reduce of 2 C; both wait
    for all ranks, which must run the same layers in the same order. Second derivatives are refused
    (RuntimeError). Source: torch.nn.SyncBatchNorm, which is for GPUs only.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: dtypes.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias
        )
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected at least 2D input (got {input.ndim}D input)")
        if input.shape[1] == 0:
            raise ValueError("SyncBatchNorm number of input channels should be non-zero")

    def _normalize(self, input: Tensor, mean: Any, var: Any, factor: float) -> Tensor:
        others = peers(self.process_group) if self.training else None
        if others is None:
            return super()._normalize(input, mean, var, factor)
        return batch_norm_over_ranks(
            input, mean, var, self.weight, self.bias, factor, self.eps, others
        )

    @classmethod
    def convert_sync_batchnorm(cls, module: Module, process_group: Any = None) -> Module:
        """`module` with SyncBatchNorm in place of every BatchNorm in it, changed in place.

        Parameters and buffers are taken over as they are. A BatchNorm itself gives a new module.
        """
        made: dict[Module, Module] = {}  # a layer that is in two places stays one layer

        def converted(layer: _BatchNorm) -> Module:
            if layer not in made:
                made[layer] = cls._in_place_of(layer, process_group)
            return made[layer]

        for parent in list(module.modules()):
            for name, child in list(parent._modules.items()):
                if isinstance(child, _BatchNorm):
                    parent._modules[name] = converted(child)
        return converted(module) if isinstance(module, _BatchNorm) else module

    @classmethod
    def _in_place_of(cls, layer: _BatchNorm, process_group: Any) -> SyncBatchNorm:
        new = cls(
            layer.num_features, layer.eps, layer.momentum, layer.affine,
            layer.track_running_stats, process_group, bias=layer.bias is not None,
        )  # fmt: skip
        new._parameters.update(layer._parameters)
        new._buffers.update(layer._buffers)
        return new.train(layer.training)
