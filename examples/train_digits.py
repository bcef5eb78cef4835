"""A small CNN on handwritten digits: 97 % of held-out digits right after a few seconds.

    python examples/train_digits.py
    dtrun --standalone --nproc-per-node 2 examples/train_digits.py

The data are scikit-learn's 1,797 real digits of 8x8 pixels (pip install scikit-learn).
"""

import argparse
import os
import time

from sklearn.datasets import load_digits

import dtrain as torch

nn, F, dist, data = torch.nn, torch.nn.functional, torch.distributed, torch.utils.data


class CNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.classify = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(32 * 2 * 2, 10))

    def forward(self, images):
        return self.classify(self.features(images))


def load_data():
    """(train, test) datasets: images [1, 8, 8] in [0, 1], labels; one image in five is held out."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(digits.target)
    held_out = torch.arange(len(labels)) % 5 == 0
    return (
        data.TensorDataset(images[~held_out], labels[~held_out]),
        data.TensorDataset(images[held_out], labels[held_out]),
    )


@torch.no_grad()
def accuracy(model, dataset):
    model.eval()
    images, labels = dataset.tensors
    right = (model(images).argmax(dim=1) == labels).float().mean().item()
    model.train()
    return right


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=32, help="images per step, all ranks")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    launched = "RANK" in os.environ
    if launched:
        dist.init_process_group("gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if launched else (0, 1)
    if args.batch_size % world:
        parser.error(f"--batch-size {args.batch_size} does not divide over {world} ranks")

    torch.manual_seed(args.seed)
    train, test = load_data()
    sampler = data.distributed.DistributedSampler(
        train, num_replicas=world, rank=rank, seed=args.seed
    )
    loader = data.DataLoader(train, batch_size=args.batch_size // world, sampler=sampler)
    model = CNN()
    ddp = nn.parallel.DistributedDataParallel(model) if launched else model
    optimizer = torch.optim.Adam(ddp.parameters(), lr=args.lr)
    begin = time.time()
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        total = torch.zeros(1)
        for images, labels in loader:
            loss = F.cross_entropy(ddp(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        if launched:
            dist.all_reduce(total)
        if rank == 0:
            print(
                f"epoch {epoch}  loss {total.item() / len(loader) / world:.4f}  "
                f"accuracy {accuracy(model, test):.3f}  {time.time() - begin:.1f} s",
                flush=True,
            )
    if launched:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
