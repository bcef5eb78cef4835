"""A byte-level GPT that learns Python from the source of Python's own standard library.

    python examples/train_gpt.py                                    # one process
    dtrun --standalone --nproc-per-node 2 examples/train_gpt.py     # two ranks, the same losses
    dtrun --standalone --nproc-per-node 2 examples/train_gpt.py --fsdp    # each holds a half

With `import torch` instead of `import dtrain as torch` it runs under torchrun, the same way.
"""

import argparse
import importlib
import math
import os
import sysconfig
import time
from pathlib import Path

import numpy as np

import dtrain as torch

nn, F, dist = torch.nn, torch.nn.functional, torch.distributed


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        B, T, C = x.shape
        split = self.qkv(self.ln1(x)).split(C, dim=2)
        q, k, v = (t.view(B, T, self.heads, C // self.heads).transpose(1, 2) for t in split)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.ln2(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self, context, width=128, layers=2, heads=4):
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.ln, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        for embedding in (self.tokens, self.places):
            nn.init.normal_(embedding.weight, std=0.1)

    def forward(self, x, targets=None):
        h = self.blocks(self.tokens(x) + self.places(torch.arange(x.shape[1])))
        y = self.head(self.ln(h))
        return y if targets is None else F.cross_entropy(y.view(-1, 256), targets.view(-1))


def read_text(path):
    """The bytes of a file, or of the standard library's top-level modules, as a tensor."""
    files = [path] if path else sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = np.frombuffer(b"\n".join(Path(f).read_bytes() for f in files), np.uint8)
    return torch.from_numpy(text.astype(np.int64))


def batch_of(text, size, context, seed):
    """`size` random pieces of the text, and the same shifted by one byte; a function of `seed`."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(text) - context - 1, (size,), generator=generator)
    pieces = torch.stack([text[s : s + context + 1] for s in starts.tolist()])
    return pieces[:, :-1].contiguous(), pieces[:, 1:].contiguous()


def checkpoint(path, model, optimizer, step=None):
    """Save both by the model's names, each rank its part; without `step` load them, and give it."""
    dcp = importlib.import_module(f"{dist.__name__}.checkpoint")
    tools = importlib.import_module(f"{dist.__name__}.checkpoint.state_dict")
    held, moments = tools.get_state_dict(model, optimizer)
    state = {"model_state_dict": held, "optim_state_dict": moments, "step": step}
    if step is not None:
        return dcp.save(state, checkpoint_id=path)
    dcp.load(state, checkpoint_id=path)
    step = state.pop("step")
    tools.set_state_dict(model, optimizer, **state)
    return step


@torch.no_grad()
def sample(model, prompt, length):
    out = list(prompt.encode())
    for _ in range(length):
        logits = model(torch.tensor([out[-model.places.num_embeddings :]]))[0, -1]
        out.append(torch.multinomial(F.softmax(logits / 0.8, dim=-1), 1).item())
    return bytes(out).decode(errors="replace")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a file to learn from, instead of the standard library")
    parser.add_argument("--checkpoint", default="checkpoints/gpt", help="made every 40 steps")
    parser.add_argument("--fsdp", action="store_true", help="fully sharded, not replicated")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint, if any")
    for option, default in {"steps": 800, "batch-size": 16, "context": 64, "seed": 0}.items():
        parser.add_argument(f"--{option}", type=int, default=default, help=f"default {default}")
    args = parser.parse_args()
    launched = "RANK" in os.environ
    if launched:
        dist.init_process_group("gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if launched else (0, 1)
    assert args.batch_size % world == 0, f"{world} ranks cannot have equal shares of --batch-size"
    torch.manual_seed(args.seed)
    text = read_text(args.data)
    train, valid = text[: -len(text) // 10], text[-len(text) // 10 :]
    model = GPT(args.context)
    for part in (*model.blocks, model) if args.fsdp else ():  # a unit for each block and the rest
        importlib.import_module(f"{dist.__name__}.fsdp").fully_shard(part)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    resume = args.resume and os.path.exists(args.checkpoint)
    first = checkpoint(args.checkpoint, model, optimizer) if resume else 0
    ddp = nn.parallel.DistributedDataParallel(model) if launched and not args.fsdp else model
    share, begin = args.batch_size // world, time.time()
    for step in range(first, args.steps):
        cosine = 0.55 + 0.45 * math.cos(math.pi * step / args.steps)
        optimizer.param_groups[0]["lr"] = 3e-3 * min((step + 1) / 20, cosine)
        x, y = batch_of(train, args.batch_size, args.context, args.seed + step)
        loss = ddp(*(t[rank * share : (rank + 1) * share] for t in (x, y)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 40 == 0 or step == args.steps - 1:
            mean = loss.detach() / world
            if launched:
                dist.all_reduce(mean)
            checkpoint(args.checkpoint, model, optimizer, step + 1)
            with torch.no_grad():
                held_out = model(*batch_of(valid, 16, args.context, 0))
            if rank == 0:
                pace = (time.time() - begin) / (step + 1 - first)
                speed, left = args.batch_size * args.context / pace, pace * (args.steps - 1 - step)
                print(f"step {step:4d}  loss {mean.item():.4f}  valid {held_out.item():.4f}  "
                      f"{speed:6.0f} tokens/s  {left:3.0f} s left", flush=True)  # fmt: skip
    text = sample(model, "def ", 240)
    if rank == 0:
        print(text)
    if launched:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
