"""The GPT of train_gpt.py cut into stages, one on each rank; the losses are those of one process.

    dtrun --standalone --nproc-per-node 2 examples/pipeline_gpt.py --schedule 1F1B

At the end it tells which part of the time the ranks computed nothing, and what that part would be
if all stages took equally long and messages no time.
"""

import argparse

from train_gpt import GPT, batch_of, read_text

import dtrain as torch
from dtrain.distributed.pipelining import PipelineStage
from dtrain.distributed.pipelining.orders import play
from dtrain.distributed.pipelining.schedules import get_schedule_class

nn, F, dist = torch.nn, torch.nn.functional, torch.distributed


class Part(nn.Module):
    """Blocks of a GPT; the first part has the embeddings as well, the last one the head."""

    def __init__(self, gpt, stage, stages):
        super().__init__()
        begin, end = (len(gpt.blocks) * s // stages for s in (stage, stage + 1))
        self.blocks = gpt.blocks[begin:end]
        self.first, self.last = stage == 0, stage == stages - 1
        if self.first:
            self.tokens, self.places = gpt.tokens, gpt.places
        if self.last:
            self.ln, self.head = gpt.ln, gpt.head

    def forward(self, h):
        if self.first:
            h = self.tokens(h) + self.places(torch.arange(h.shape[1]))
        h = self.blocks(h)
        return self.head(self.ln(h)) if self.last else h


def loss_of(logits, targets):
    return F.cross_entropy(logits.reshape(-1, 256), targets.reshape(-1))


def clip_grad_norm(parameters, limit):
    """Scale the gradients of all stages to a common norm of at most `limit`."""
    squares = torch.stack([p.grad.square().sum() for p in parameters]).sum()
    dist.all_reduce(squares)
    for p in parameters:
        p.grad *= min(1.0, limit / (squares.sqrt().item() + 1e-6))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a file to learn from, instead of the standard library")
    parser.add_argument("--schedule", default="1F1B", help="GPipe or 1F1B (default)")
    numbers = {"steps": 100, "microbatches": 8, "layers": 4, "width": 128}
    numbers |= {"batch-size": 16, "context": 64, "seed": 0}
    for option, default in numbers.items():
        parser.add_argument(f"--{option}", type=int, default=default, help=f"default {default}")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    rank, stages = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(args.seed)
    model = Part(GPT(args.context, args.width, args.layers), rank, stages)
    stage = PipelineStage(model, rank, stages)
    schedule = get_schedule_class(args.schedule)(stage, args.microbatches, loss_of)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    text, spent = read_text(args.data), torch.zeros(2)
    for step in range(args.steps):
        x, y = batch_of(text, args.batch_size, args.context, seed=args.seed + step)
        losses = []
        optimizer.zero_grad()
        schedule.step(x, target=y, losses=losses, return_outputs=False)
        clip_grad_norm(list(model.parameters()), 1.0)
        optimizer.step()
        spent += torch.tensor(schedule.last_step)
        if stage.is_last and (step + 1) % 10 == 0:
            print(f"step {step + 1:4d}  loss {torch.stack(losses).mean().item():.4f}")
    total, waited = spent
    computed = total - waited
    dist.all_reduce(computed, op=dist.ReduceOp.AVG)
    dist.all_reduce(total, op=dist.ReduceOp.MAX)
    if rank == 0:
        bubble = 1 - (computed / total).item()
        ideal = play(list(schedule.pipeline_order.values()), stages, args.microbatches).bubble
        print(f"{args.schedule}, {stages} stages, {args.microbatches} microbatches: "
              f"bubble {bubble:.0%}, of equal stages {ideal:.0%}")  # fmt: skip
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
