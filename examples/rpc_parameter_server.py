"""A parameter server for handwritten digits: it steps once for the gradients of all trainers.

    dtrun --standalone --nproc-per-node 3 examples/rpc_parameter_server.py

Rank 0 holds the model; the others hold the data, an equal share each. A trainer sends its gradients
and gets back the parameters after the step that everybody's gradients have made: one remote call.
Nobody blocks a thread of the server meanwhile, since `update_and_fetch` returns a future
(`rpc.functions.async_execution`), and the last trainer to come completes it for all.

The server adds gradients in the order of trainers, whoever comes first, and a batch is divided
among them: the same seed and number of trainers give the same bits, and other numbers the same
losses but for rounding. The data are scikit-learn's 1,797 real digits of 8x8 pixels
(pip install scikit-learn).
"""

import argparse
import os
import threading
import time

from sklearn.datasets import load_digits

import dtrain as torch
import dtrain.distributed.rpc as rpc

nn, F = torch.nn, torch.nn.functional


def load_data():
    """((images, labels) to learn from, (images, labels) to judge by); images are rows of 64."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().flatten(1) / 16
    labels = torch.from_numpy(digits.target)
    held_out = torch.arange(len(labels)) % 5 == 0
    return (images[~held_out], labels[~held_out]), (images[held_out], labels[held_out])


def make_model():
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


class ParameterServer:
    """The model and its optimizer; lives on rank 0."""

    def __init__(self, trainers, lr, seed):
        torch.manual_seed(seed)
        self.trainers, self.model = trainers, make_model()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr, momentum=0.9)
        self.lock = threading.Lock()
        self.gradients, self.updated = {}, torch.futures.Future()

    def fetch(self):
        return self.model.state_dict()

    @rpc.functions.async_execution
    def update_and_fetch(self, trainer, gradients):
        """A future of the parameters after a step with the gradients of all trainers."""
        with self.lock:
            self.gradients[trainer] = gradients
            updated = self.updated
            if len(self.gradients) == self.trainers:
                gradients, self.gradients = self.gradients, {}
                self.updated = torch.futures.Future()
                try:
                    self.step([gradients[number] for number in range(self.trainers)])
                    updated.set_result(self.model.state_dict())
                except Exception as error:  # all who wait must hear of it
                    updated.set_exception(error)
        return updated

    def step(self, parts):
        for parameter, *shares in zip(self.model.parameters(), *parts, strict=True):
            parameter.grad = torch.stack(shares).sum(dim=0)
        self.optimizer.step()

    def accuracy(self, images, labels):
        with torch.no_grad():
            return (self.model(images).argmax(dim=1) == labels).float().mean().item()


class Trainer:
    """Computes gradients on its share of every batch; lives on the rank that holds the data."""

    def __init__(self, server, number, trainers, batch_size):
        self.server, self.number, self.trainers = server, number, trainers
        self.batch_size, self.model = batch_size, make_model()
        (self.images, self.labels), _ = load_data()
        self.model.load_state_dict(server.rpc_sync().fetch())

    def train(self, seed):
        """One pass over the data, in an order that all trainers draw alike; its mean loss."""
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed))
        batches, total = order.split(self.batch_size)[:-1], 0.0
        for batch in batches:
            mine = batch[self.number :: self.trainers]
            logits = self.model(self.images[mine])
            loss = F.cross_entropy(logits, self.labels[mine], reduction="sum") / len(batch)
            self.model.zero_grad()
            loss.backward()
            gradients = [parameter.grad for parameter in self.model.parameters()]
            new = self.server.rpc_sync().update_and_fetch(self.number, gradients)
            self.model.load_state_dict(new)
            total += loss.item()
        return total / len(batches)


def run_server(args, trainers):
    """What rank 0 does: make the server and the trainers, and say when to begin a pass."""
    server = rpc.RRef(ParameterServer(trainers, args.lr, args.seed))
    handles = [
        rpc.remote(f"trainer{i}", Trainer, (server, i, trainers, args.batch_size))
        for i in range(trainers)
    ]
    _, test = load_data()
    begin = time.time()
    for epoch in range(args.epochs):
        passes = [handle.rpc_async().train(args.seed + epoch) for handle in handles]
        loss = sum(torch.futures.wait_all(passes))
        print(
            f"epoch {epoch}  loss {loss:.4f}  accuracy {server.local_value().accuracy(*test):.3f}  "
            f"{time.time() - begin:.1f} s",
            flush=True,
        )
    updates = rpc.statistics()["update_and_fetch of a reference"]
    print(f"{updates['calls']:.0f} updates, {updates['bytes'] / 1e6:.1f} MB of gradients")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32, help="images per step, all trainers")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world < 2:
        parser.error("one server and at least one trainer: --nproc-per-node 2 or more")
    rpc.init_rpc("server" if rank == 0 else f"trainer{rank - 1}", rank=rank, world_size=world)
    if rank == 0:
        run_server(args, world - 1)
    rpc.shutdown()  # the others serve until rank 0 comes here


if __name__ == "__main__":
    main()
