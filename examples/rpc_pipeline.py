"""A GPT in stages on several workers, driven by one more over remote references.

    dtrun --standalone --nproc-per-node 3 examples/rpc_pipeline.py

Rank 0 drives and holds no parameters; every other rank holds one stage. A batch is cut into
micro-batches. For each of them the driver asks the first stage for a reference to what it will
compute, hands that reference to the next stage, and goes on at once: a stage fetches its input
from the stage before, not by way of the driver, and computes one micro-batch while the next stage
computes the one before. The backward pass goes the same ways back (`dist_autograd`), and each
stage has an optimizer beside its parameters (`DistributedOptimizer`).

The losses are those of one process with the whole model, but for rounding: stages take up
micro-batches in the order in which they come, and sums of gradients are rounded in that order. With
`--microbatches 1` the same seed gives the same bits.

With static schedules (1F1B) and without a driver: pipeline_gpt.py.
"""

import argparse
import os
import threading
import time

from pipeline_gpt import Part, loss_of
from train_gpt import GPT, batch_of, read_text

import dtrain as torch
import dtrain.distributed.rpc as rpc
from dtrain.distributed import autograd as dist_autograd
from dtrain.distributed.optim import DistributedOptimizer


class Stage(torch.nn.Module):
    """Some blocks of the GPT; computes one micro-batch at a time. Lives on a rank of its own."""

    def __init__(self, args, stage, stages):
        super().__init__()
        torch.manual_seed(args["seed"])  # all stages draw the whole model, and keep their part
        self.part = Part(GPT(args["context"], args["width"], args["layers"]), stage, stages)
        self.lock = threading.Lock()

    def forward(self, source):
        """What this stage makes of what `source` refers to."""
        x = source.to_here()  # waits outside of the lock: another micro-batch may be computed
        with self.lock:
            return self.part(x)

    def loss(self, source, targets):
        """For the last stage: the logits stay where they are."""
        return loss_of(self(source), targets)

    def parameter_rrefs(self):
        return [rpc.RRef(parameter) for parameter in self.parameters()]


class Pipeline:
    """The driver's view of the stages."""

    def __init__(self, args, workers):
        shape = {name: getattr(args, name) for name in ("seed", "context", "width", "layers")}
        self.microbatches = args.microbatches
        self.stages = [
            rpc.remote(worker, Stage, (shape, number, len(workers)))
            for number, worker in enumerate(workers)
        ]

    def parameter_rrefs(self):
        """References to all parameters, each owned by its stage."""
        return [
            reference for stage in self.stages for reference in stage.rpc_sync().parameter_rrefs()
        ]

    def loss(self, x, targets):
        """Mean loss of a batch; every micro-batch is under way before the first is waited for."""
        losses = []
        for some, wanted in zip(
            x.chunk(self.microbatches), targets.chunk(self.microbatches), strict=True
        ):
            reference = rpc.RRef(some)
            for stage in self.stages[:-1]:
                reference = stage.remote().forward(reference)
            losses.append(self.stages[-1].rpc_async().loss(reference, wanted))
        return torch.stack(torch.futures.wait_all(losses)).mean()


def drive(args, workers):
    pipeline = Pipeline(args, workers)
    parameters = pipeline.parameter_rrefs()
    optimizer = DistributedOptimizer(torch.optim.AdamW, parameters, lr=3e-3, weight_decay=0.1)
    text, begin, total = read_text(args.data), time.time(), 0.0
    for step in range(args.steps):
        x, targets = batch_of(text, args.batch_size, args.context, seed=args.seed + step)
        with dist_autograd.context() as context:
            loss = pipeline.loss(x, targets)
            dist_autograd.backward(context, [loss])
            optimizer.step(context)
        total += loss.item()
        if (step + 1) % 10 == 0:
            print(f"step {step + 1:4d}  loss {total / 10:.4f}", flush=True)
            total = 0.0
    seconds = time.time() - begin
    print(
        f"{len(parameters)} parameters in {len(workers)} stages, "
        f"{args.steps * x.numel() / seconds:.0f} tokens/s"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a file to learn from, instead of the standard library")
    numbers = {"steps": 60, "microbatches": 4, "layers": 2, "width": 64}
    numbers |= {"batch-size": 16, "context": 32, "seed": 0}
    for option, default in numbers.items():
        parser.add_argument(f"--{option}", type=int, default=default, help=f"default {default}")
    args = parser.parse_args()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world < 2:
        parser.error("a driver and at least one stage: --nproc-per-node 2 or more")
    if args.batch_size % args.microbatches:
        parser.error(f"--batch-size {args.batch_size} is no multiple of --microbatches")
    names = ["driver", *(f"stage{number}" for number in range(world - 1))]
    rpc.init_rpc(names[rank], rank=rank, world_size=world)
    if rank == 0:
        drive(args, names[1:])
    rpc.shutdown()  # the stages serve until the driver comes here


if __name__ == "__main__":
    main()
