"""The names PyTorch programs rely on exist, at the module paths where PyTorch has them.

Scripts name `torch.nn.Linear`, pickles name `torch.nn.modules.linear.Linear`: both must be found
with `dtrain` for `torch`, and be the same object. The tables are promises: a name is added here
with the change that brings it, and never removed without a deprecation.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from types import ModuleType

import pytest

# Public face, defining module -> classes. Both paths lead to the same class.
CLASSES = {
    ("dtrain.autograd", "dtrain.autograd.function"): "Function",
    ("dtrain.autograd", "dtrain.autograd.grad_mode"): (
        "no_grad enable_grad inference_mode set_grad_enabled"
    ),
    ("dtrain.distributed", "dtrain.distributed.device_mesh"): "DeviceMesh",
    ("dtrain.distributed.algorithms", "dtrain.distributed.algorithms.join"): (
        "Join Joinable JoinHook"
    ),
    (
        "dtrain.distributed.elastic.utils.data",
        "dtrain.distributed.elastic.utils.data.elastic_distributed_sampler",
    ): "ElasticDistributedSampler",
    ("dtrain.distributed.nn", "dtrain.distributed.nn.api.remote_module"): "RemoteModule",
    ("dtrain.distributed.optim", "dtrain.distributed.optim.optimizer"): "DistributedOptimizer",
    ("dtrain.distributed.optim", "dtrain.distributed.optim.post_localSGD_optimizer"): (
        "PostLocalSGDOptimizer"
    ),
    ("dtrain.nn", "dtrain.nn.modules.module"): "Module",
    ("dtrain.nn", "dtrain.nn.modules.batchnorm"): "BatchNorm1d BatchNorm2d SyncBatchNorm",
    ("dtrain.nn", "dtrain.nn.modules.container"): "Sequential ModuleList",
    ("dtrain.nn", "dtrain.nn.modules.linear"): "Linear",
    ("dtrain.nn", "dtrain.nn.modules.sparse"): "Embedding",
    ("dtrain.nn", "dtrain.nn.modules.normalization"): "LayerNorm",
    ("dtrain.nn", "dtrain.nn.modules.dropout"): "Dropout",
    ("dtrain.nn", "dtrain.nn.modules.conv"): "Conv2d",
    ("dtrain.nn", "dtrain.nn.modules.pooling"): "MaxPool2d",
    ("dtrain.nn", "dtrain.nn.modules.activation"): "GELU ReLU Softmax",
    ("dtrain.nn", "dtrain.nn.modules.flatten"): "Flatten",
    ("dtrain.nn", "dtrain.nn.modules.loss"): "CrossEntropyLoss MSELoss",
    ("dtrain.nn", "dtrain.nn.parameter"): "Parameter",
    ("dtrain.nn.parallel", "dtrain.nn.parallel.distributed"): "DistributedDataParallel",
    ("dtrain.distributed.optim", "dtrain.distributed.optim.zero_redundancy_optimizer"): (
        "ZeroRedundancyOptimizer"
    ),
    ("dtrain.optim", "dtrain.optim.optimizer"): "Optimizer",
    ("dtrain.optim", "dtrain.optim.sgd"): "SGD",
    ("dtrain.optim", "dtrain.optim.adam"): "Adam",
    ("dtrain.optim", "dtrain.optim.adamw"): "AdamW",
    ("dtrain.optim", "dtrain.optim.rmsprop"): "RMSprop",
    ("dtrain.optim", "dtrain.optim.adagrad"): "Adagrad",
    ("dtrain.optim", "dtrain.optim.adadelta"): "Adadelta",
    ("dtrain.optim", "dtrain.optim.adamax"): "Adamax",
    ("dtrain.optim", "dtrain.optim.nadam"): "NAdam",
    ("dtrain.optim", "dtrain.optim.radam"): "RAdam",
    ("dtrain.optim.lr_scheduler", "dtrain.optim.lr_scheduler"): (
        "LambdaLR MultiplicativeLR StepLR MultiStepLR ConstantLR LinearLR ExponentialLR "
        "PolynomialLR CosineAnnealingLR CosineAnnealingWarmRestarts SequentialLR ChainedScheduler"
    ),
    ("dtrain.utils.data", "dtrain.utils.data.dataset"): (
        "Dataset IterableDataset TensorDataset StackDataset ConcatDataset ChainDataset Subset"
    ),
    ("dtrain.utils.data", "dtrain.utils.data.sampler"): (
        "Sampler SequentialSampler RandomSampler SubsetRandomSampler WeightedRandomSampler "
        "BatchSampler"
    ),
    ("dtrain.utils.data", "dtrain.utils.data.distributed"): "DistributedSampler",
    ("dtrain.utils.data", "dtrain.utils.data.dataloader"): "DataLoader",
}

# Module -> everything else that programs look up there.
NAMES = {
    "dtrain": """
        Tensor tensor Generator manual_seed dtype device Size __version__
        float32 float64 float16 bfloat16 int64 int32 uint8 bool float double long
        rand randn randint randperm zeros ones full empty arange zeros_like ones_like
        cat stack matmul exp log sqrt tanh where softmax
        no_grad enable_grad inference_mode set_grad_enabled is_grad_enabled
        nn optim autograd distributed futures utils testing""",
    "dtrain.autograd": "backward grad gradcheck gradgradcheck Function",
    "dtrain.nn": "functional init utils parallel",
    "dtrain.nn.functional": """
        linear embedding layer_norm dropout conv2d max_pool2d gelu relu softmax log_softmax
        cross_entropy mse_loss scaled_dot_product_attention""",
    "dtrain.nn.init": "uniform_ normal_ kaiming_uniform_ xavier_uniform_ zeros_ ones_",
    "dtrain.nn.utils": "clip_grad_norm_",
    "dtrain.nn.utils.clip_grad": "clip_grad_norm_",
    "dtrain.optim": "lr_scheduler",
    "dtrain.optim.lr_scheduler": "LRScheduler OneCycleLR ReduceLROnPlateau",
    "dtrain.utils.data": "random_split default_collate default_convert get_worker_info",
    "dtrain.distributed": """
        init_process_group destroy_process_group is_initialized is_available get_rank
        get_world_size get_backend new_group ReduceOp
        all_reduce broadcast reduce all_gather gather scatter reduce_scatter all_to_all
        all_gather_into_tensor reduce_scatter_tensor all_to_all_single
        barrier send recv isend irecv
        all_gather_object broadcast_object_list gather_object scatter_object_list
        Store TCPStore FileStore HashStore PrefixStore Work ProcessGroup group
        all_gather_single reduce_scatter_single gather_single gather_into_tensor
        all_reduce_coalesced all_gather_coalesced _coalescing_manager monitored_barrier
        P2POp batch_isend_irecv send_object_list recv_object_list
        new_subgroups new_subgroups_by_enumeration split_group get_pg_count set_timeout
        get_process_group_ranks get_group_rank get_global_rank get_node_local_rank GroupMember
        Backend BackendConfig get_backend_config is_backend_available is_gloo_available
        is_nccl_available is_mpi_available is_ucc_available is_xccl_available
        is_torchelastic_launched DeviceMesh init_device_mesh device_mesh nn
        DebugLevel get_debug_level set_debug_level set_debug_level_from_env breakpoint statistics
        rank0_first rank0_section PreHookArgs PostHookArgs
        shrink_group SHRINK_DEFAULT SHRINK_ABORT FakeStore allow_pickle default_pg_timeout
        distributed_c10d _functional_collectives
        DistError DistBackendError DistNetworkError DistStoreError QueueEmptyError""",
    "dtrain.futures": "Future collect_all wait_all",
    "dtrain.distributed.algorithms.ddp_comm_hooks": """
        DDPCommHookType register_ddp_comm_hook one_bit_hook OneBitState top_k_hook TopKState""",
    "dtrain.distributed.algorithms.ddp_comm_hooks.default_hooks": """
        allreduce_hook fp16_compress_hook bf16_compress_hook
        fp16_compress_wrapper bf16_compress_wrapper""",
    "dtrain.distributed.algorithms.ddp_comm_hooks.debugging_hooks": "noop_hook",
    "dtrain.distributed.algorithms.ddp_comm_hooks.quantization_hooks": (
        "quantization_pertensor_hook quantization_perchannel_hook"
    ),
    "dtrain.distributed.algorithms.ddp_comm_hooks.powerSGD_hook": (
        "PowerSGDState powerSGD_hook batched_powerSGD_hook"
    ),
    "dtrain.distributed.algorithms.ddp_comm_hooks.ddp_zero_hook": (
        "hook_with_zero_step hook_with_zero_step_interleaved"
    ),
    "dtrain.distributed.optim": "_apply_optimizer_in_backward _get_in_backward_optimizers",
    "dtrain.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook": (
        "PostLocalSGDState post_localSGD_hook"
    ),
    "dtrain.distributed.algorithms._comm_hooks": "LOW_PRECISION_HOOKS",
    "dtrain.distributed.algorithms._comm_hooks.default_hooks": """
        DefaultState LowPrecisionState allreduce_hook reduce_scatter_hook fp16_compress_hook
        bf16_compress_hook""",
    "dtrain.distributed.algorithms._checkpoint.checkpoint_wrapper": """
        checkpoint_wrapper CheckpointImpl CheckpointWrapper ActivationWrapper offload_wrapper
        apply_activation_checkpointing""",
    "dtrain.distributed.fsdp": """
        fully_shard FSDPModule UnshardHandle register_fsdp_forward_method MixedPrecisionPolicy
        OffloadPolicy FullyShardedDataParallel OptimStateKeyType share_comm_ctx""",
    "dtrain.distributed.fsdp.wrap": """
        always_wrap_policy lambda_auto_wrap_policy transformer_auto_wrap_policy
        size_based_auto_wrap_policy ModuleWrapPolicy CustomPolicy enable_wrap wrap
        _or_policy _module_wrap_policy""",
    "dtrain.distributed.checkpoint.format_utils": """
        dcp_to_torch_save torch_save_to_dcp BroadcastingTorchSaveReader DynamicMetaLoadPlanner""",
    "dtrain.distributed.pipelining": """
        PipelineStage ScheduleGPipe Schedule1F1B ScheduleInterleaved1F1B ScheduleLoopedBFS""",
    "dtrain.distributed.pipelining.schedules": "get_schedule_class",
    "dtrain.distributed.pipelining.microbatch": (
        "TensorChunkSpec split_args_kwargs_into_chunks merge_chunks"
    ),
    "dtrain.distributed.nn": "functional all_reduce",
    "dtrain.distributed.nn.functional": """
        broadcast gather scatter reduce reduce_scatter all_gather all_to_all all_to_all_single
        all_reduce _all_gather_base""",
    "dtrain.distributed.algorithms.model_averaging.averagers": """
        ModelAverager PeriodicModelAverager""",
    "dtrain.distributed.algorithms.model_averaging.hierarchical_model_averager": """
        HierarchicalModelAverager""",
    "dtrain.distributed.algorithms.model_averaging.utils": """
        average_parameters get_params_to_average average_parameters_or_parameter_groups""",
    "dtrain.autograd.graph": "saved_tensors_hooks Node",
    "dtrain.utils.checkpoint": """
        checkpoint checkpoint_sequential CheckpointError noop_context_fn set_checkpoint_early_stop
        set_checkpoint_debug_enabled CheckpointPolicy SelectiveCheckpointContext
        create_selective_checkpoint_contexts""",
    "dtrain.testing": "run_world gradcheck",
}


def missing(module: ModuleType, names: str) -> list[str]:
    """Which of the space-separated `names` the module lacks."""
    return [name for name in names.split() if not hasattr(module, name)]


@pytest.mark.parametrize("path", NAMES)
def test_promised_names_exist(path):
    assert missing(importlib.import_module(path), NAMES[path]) == []


@pytest.mark.parametrize(("face", "home"), CLASSES)
def test_classes_live_where_torch_has_them(face, home):
    shown, defined = importlib.import_module(face), importlib.import_module(home)
    names = CLASSES[face, home]
    assert missing(defined, names) == []
    for name in names.split():
        cls = getattr(defined, name)
        assert getattr(shown, name) is cls
        assert (cls.__module__, cls.__qualname__) == (home, name)


def test_a_missing_name_would_be_seen():
    assert missing(sys.modules[__name__], "NAMES Nonesuch") == ["Nonesuch"]


@pytest.mark.parametrize("path", ["dtrain", "dtrain.nn", "dtrain.optim", "dtrain.distributed"])
def test_dir_lists_what_getattr_finds_and_nothing_else_is_found(path):
    module = importlib.import_module(path)
    assert set(NAMES[path].split()) <= set(dir(module))
    with pytest.raises(AttributeError, match="nonesuch"):
        _ = module.nonesuch


def test_one_import_reaches_every_sub_package():
    program = (
        "import dtrain as torch\n"
        "torch.nn.functional.relu, torch.optim.lr_scheduler, torch.utils, torch.autograd.Function\n"
        "assert torch.distributed.is_available() and not torch.distributed.is_initialized()\n"
        "torch.nn.parallel.DistributedDataParallel, torch.testing\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)
