"""The sampler of elastic jobs, at torch.distributed.elastic.utils.data's names.

`dtrain.utils.data.DistributedSampler` with its state does more.
"""

from __future__ import annotations

from dtrain.distributed.elastic.utils.data.elastic_distributed_sampler import (
    ElasticDistributedSampler as ElasticDistributedSampler,
)
