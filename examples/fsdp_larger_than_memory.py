"""Train a model whose state is 1.5 times the memory that a rank may use: with FSDP, not with DDP.

    dtrun --nproc-per-node 2 examples/fsdp_larger_than_memory.py
    dtrun --nproc-per-node 2 examples/fsdp_larger_than_memory.py --ddp    # MemoryError

Parameters, gradients and AdamW's moments are 16 bytes per parameter. Each rank limits the private
memory that it may ask for (RLIMIT_DATA) to two thirds of that, for everything, and learns to
continue bytes of text. Blocks are sharded one after the other as they are made, what a rank keeps
of them is in files (TMPDIR, on a disk), and only the units that compute are in memory.
"""

import argparse
import resource

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--width", type=int, default=1024)
parser.add_argument("--depth", type=int, default=16)
parser.add_argument("--steps", type=int, default=12)
parser.add_argument("--ddp", action="store_true", help="try it with DistributedDataParallel")
args = parser.parse_args()

PARAMETERS = args.depth * 4 * args.width**2
STATE = 16 * PARAMETERS
LIMIT = STATE * 2 // 3
resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))  # before anything is allocated

import dtrain as torch  # noqa: E402
import dtrain.distributed as dist  # noqa: E402
from dtrain.distributed.fsdp import CPUOffloadPolicy, fully_shard  # noqa: E402
from dtrain.nn.parallel import DistributedDataParallel  # noqa: E402

nn, F = torch.nn, torch.nn.functional
torch.set_num_threads(1)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(F.rms_norm(x, (x.shape[-1],)))))


def build(shard):
    """Byte embedding, blocks, scores of the next byte; each part is sharded when it is made."""
    torch.manual_seed(0)
    parts = [shard(nn.Embedding(256, args.width))]
    parts += [shard(Block(args.width)) for _ in range(args.depth)]
    parts += [shard(nn.Linear(args.width, 256, bias=False))]
    return shard(nn.Sequential(*parts))


def peak(field):
    """MiB that this process had at most, by /proc/self/status."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) / 1024


dist.init_process_group()
rank = dist.get_rank()
if rank == 0:
    print(f"{PARAMETERS / 1e6:.0f} M parameters, {STATE >> 20} MiB of state, a rank may use "
          f"{LIMIT >> 20}")  # fmt: skip
if args.ddp:
    model = DistributedDataParallel(build(lambda part: part))
else:
    policy = CPUOffloadPolicy()
    model = build(lambda part: fully_shard(part, offload_policy=policy))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

with open(__file__, "rb") as source:
    text = torch.tensor(list(source.read()))
for step in range(args.steps):
    at = torch.arange(64) * 16 + 7 * step + rank
    inputs, targets = text[at % (len(text) - 1)], text[at % (len(text) - 1) + 1]
    loss = F.cross_entropy(model(inputs), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    mean = loss.detach() / dist.get_world_size()
    dist.all_reduce(mean)
    if rank == 0 and step in (0, args.steps - 1):
        print(f"step {step:3d}  loss {mean.item():.3f}")
if rank == 0:
    print(f"private memory {peak('VmData'):.0f} MiB, resident at most {peak('VmHWM'):.0f} MiB")
dist.destroy_process_group()
