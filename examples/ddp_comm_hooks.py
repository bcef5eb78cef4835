"""What communication hooks send, and what it costs: bytes and loss of a small network for each.

    dtrun --standalone --nproc-per-node 2 examples/ddp_comm_hooks.py
    python examples/ddp_comm_hooks.py      # two ranks as threads of one process

"computed" is the closed form of each hook, "sent" what the transport counted: it has besides the
flags by which DDP tells who used a parameter. The data are scikit-learn's 1,797 real digits
(pip install scikit-learn).
"""

import argparse
import os
import time

from sklearn.datasets import load_digits

import dtrain as torch
from dtrain.distributed.algorithms.ddp_comm_hooks import (
    OneBitState,
    TopKState,
    default_hooks as default,
    one_bit_hook,
    quantization_hooks as quantization,
    top_k_hook,
)
from dtrain.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import (
    PowerSGDState,
    batched_powerSGD_hook,
    powerSGD_hook,
)
from dtrain.testing.distributed import run_distributed

nn, F, dist = torch.nn, torch.nn.functional, torch.distributed

HOOKS = {
    "none": (lambda: None, None),
    "allreduce": (lambda: None, default.allreduce_hook),
    "fp16": (lambda: None, default.fp16_compress_hook),
    "bf16": (lambda: None, default.bf16_compress_hook),
    "8 bits": (lambda: None, quantization.quantization_pertensor_hook),
    "8 bits per 512": (lambda: None, quantization.quantization_perchannel_hook),
    "1 bit": (OneBitState, one_bit_hook),
    "top 5 %": (lambda: TopKState(density=0.05), top_k_hook),
    "PowerSGD 1": (lambda: PowerSGDState(None, 1, start_powerSGD_iter=10), powerSGD_hook),
    "PowerSGD 4": (lambda: PowerSGDState(None, 4, start_powerSGD_iter=10), powerSGD_hook),
    "batched": (lambda: PowerSGDState(None, 1, start_powerSGD_iter=10), batched_powerSGD_hook),
}


def load_data():
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().flatten(1) / 16
    return images, torch.from_numpy(digits.target)


def counting(hook, computed):
    """`hook`, adding to `computed` what each call sends, in closed form."""

    def counted(state, bucket):
        computed.append(hook.payload(state, bucket).sent(dist.get_world_size()))
        return hook(state, bucket)

    return counted


def train(name, epochs, batch_size, lr):
    """(bytes a step as computed, bytes a step as sent, last epoch's loss, accuracy, seconds)."""
    make_state, hook = HOOKS[name]
    images, labels = load_data()
    held_out = torch.arange(len(labels)) % 5 == 0
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(),
                          nn.Linear(128, 10))  # fmt: skip
    ddp, computed = nn.parallel.DistributedDataParallel(model), []
    if hook is not None:
        ddp.register_comm_hook(make_state(), counting(hook, computed))
    optimizer = torch.optim.SGD(ddp.parameters(), lr=lr, momentum=0.9)
    train_images, train_labels = images[~held_out], labels[~held_out]
    statistics, steps = dist.group.WORLD.arrays.statistics, 0
    dist.barrier()
    sent, begin = statistics().bytes_sent, time.time()
    for epoch in range(epochs):
        order = torch.randperm(len(train_labels), generator=torch.Generator().manual_seed(epoch))
        loss_sum = torch.zeros(1)
        batches = order.split(batch_size)[:-1]
        for batch in batches:
            mine = batch[rank::world]
            loss = F.cross_entropy(ddp(train_images[mine]), train_labels[mine])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum += loss.detach()
            steps += 1
    sent, seconds = (statistics().bytes_sent - sent) / steps, time.time() - begin
    dist.all_reduce(loss_sum)
    with torch.no_grad():
        right = (model(images[held_out]).argmax(1) == labels[held_out]).float().mean().item()
    loss = loss_sum.item() / len(batches) / world
    return sum(computed) / steps, sent, loss, right, seconds


def main(epochs, batch_size, lr, names):
    for name in names:
        computed, sent, loss, right, seconds = train(name, epochs, batch_size, lr)
        if dist.get_rank() == 0:
            shown = "-" if name == "none" else f"{computed:.0f}"
            print(
                f"{name:<16}{shown:>10}{sent:>10.0f}{loss:>10.4f}{right:>10.3f}{seconds:>8.1f}",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=64, help="images per step, all ranks")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--hooks", nargs="*", choices=HOOKS, default=list(HOOKS))
    args = parser.parse_args()
    job = args.epochs, args.batch_size, args.lr, args.hooks
    launched = "RANK" in os.environ
    if int(os.environ.get("RANK", 0)) == 0:
        print("bytes a step and rank:  computed      sent      loss  accuracy seconds", flush=True)
    if launched:
        dist.init_process_group("zmq")  # messages can be counted; memory that is shared is not sent
        main(*job)
        dist.destroy_process_group()
    else:
        torch.set_num_threads(1)  # for matrix products: the ranks share the cores
        run_distributed(2, main, *job, timeout=120.0)
