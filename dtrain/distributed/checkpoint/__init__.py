"""torch.distributed.checkpoint: the state of all ranks in one folder, and back on any number.

state_dict_saver.py and state_dict_loader.py save and load; default_planner.py decides who writes
and reads what; filesystem.py is the storage; state_dict.py names a model's and its optimizer's
state. Source: torch.distributed.checkpoint.
"""

from __future__ import annotations

from dtrain.distributed.checkpoint._series import latest as latest
from dtrain.distributed.checkpoint.api import (
    CheckpointException as CheckpointException,
    DamagedCheckpoint as DamagedCheckpoint,
)
from dtrain.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner as DefaultLoadPlanner,
    DefaultSavePlanner as DefaultSavePlanner,
)
from dtrain.distributed.checkpoint.filesystem import (
    FileSystemReader as FileSystemReader,
    FileSystemWriter as FileSystemWriter,
)
from dtrain.distributed.checkpoint.metadata import (
    BytesStorageMetadata as BytesStorageMetadata,
    ChunkStorageMetadata as ChunkStorageMetadata,
    Metadata as Metadata,
    TensorStorageMetadata as TensorStorageMetadata,
)
from dtrain.distributed.checkpoint.planner import (
    LoadPlan as LoadPlan,
    LoadPlanner as LoadPlanner,
    ReadItem as ReadItem,
    SavePlan as SavePlan,
    SavePlanner as SavePlanner,
    WriteItem as WriteItem,
)
from dtrain.distributed.checkpoint.staging import (
    AsyncStager as AsyncStager,
    DefaultStager as DefaultStager,
    StagingOptions as StagingOptions,
)
from dtrain.distributed.checkpoint.state_dict_loader import (
    load as load,
    load_state_dict as load_state_dict,
)
from dtrain.distributed.checkpoint.state_dict_saver import (
    AsyncCheckpointerType as AsyncCheckpointerType,
    AsyncSaveResponse as AsyncSaveResponse,
    async_save as async_save,
    save as save,
    save_state_dict as save_state_dict,
)
from dtrain.distributed.checkpoint.stateful import Stateful as Stateful
from dtrain.distributed.checkpoint.storage import (
    StorageReader as StorageReader,
    StorageWriter as StorageWriter,
)
