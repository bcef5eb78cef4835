"""What the ranks of benchmarks/launch.py do: `launched.py LIBRARY ACT FOLDER`.

Owns: one function per act. Runs with dtrain and with PyTorch alike, and imports neither before it
must. What happens is appended to FOLDER/history as lines of JSON, times on the clock that all
processes of a host share (`time.monotonic`).
"""

import collections
import importlib
import itertools
import json
import os
import sys
import time

RANK = int(os.environ["RANK"])
START = int(os.environ["TORCHELASTIC_RESTART_COUNT"])


def note(event):
    """Add a line to the history; whole, as it is short."""
    line = {"at": time.monotonic(), "event": event, "start": START, "rank": RANK}
    text = json.dumps(line | {"pid": os.getpid()}) + "\n"
    descriptor = os.open(os.path.join(FOLDER, "history"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, text.encode())
    os.close(descriptor)


def join(library):
    """The library, after its first all_reduce."""
    torch = importlib.import_module(library)
    dist = importlib.import_module(f"{library}.distributed")
    dist.init_process_group(*["gloo"] * (library == "torch"))
    dist.all_reduce(torch.ones(1))
    return torch, dist


def first(library):
    """To the end of the first all_reduce."""
    _, dist = join(library)
    note("up")
    dist.destroy_process_group()


def train(library):
    """Train until killed, from the last commit on."""
    torch, dist = join(library)
    layers = torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Sequential(*layers))
    optimizer = torch.optim.Adam(model.parameters())
    try:
        for step in (steps_of_dtrain if library == "dtrain" else steps_of_torch)(model, optimizer):
            loss = model(torch.ones(8, 32)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step is not None:
                note("up")
    except RuntimeError:
        note("told")
        raise
    dist.destroy_process_group()


def numbers():
    """The number of the first step of a start, then None."""
    return itertools.chain([0], itertools.repeat(None))


def steps_of_dtrain(model, optimizer):
    """Steps that commit into memory which outlives the rank."""
    elastic = importlib.import_module("dtrain.elastic")
    state = elastic.State(model=model, optimizer=optimizer)
    for number, _ in zip(numbers(), elastic.run(state, 1 << 40), strict=False):
        yield number


def steps_of_torch(model, optimizer):
    """Steps whose state rank 0 writes to a file, and all ranks read when they start."""
    torch = importlib.import_module("torch")
    path = os.path.join(FOLDER, "state")
    if os.path.exists(path):
        for part, content in zip((model, optimizer), torch.load(path), strict=True):
            part.load_state_dict(content)
    for number in numbers():
        yield number
        if RANK == 0:
            torch.save([model.state_dict(), optimizer.state_dict()], f"{path}.partial")
            os.replace(f"{path}.partial", path)


def asleep(library):
    """In Python, where a signal is heard."""
    join(library)
    note("up")
    time.sleep(1000)


def in_c(library):
    """In a C function that neither returns, nor asks for signals, nor lets other threads run."""
    join(library)
    note("up")
    collections.deque(itertools.repeat(0), maxlen=0)


def in_collective(library):
    """All but one rank wait for one that does not come."""
    torch, dist = join(library)
    note("up")
    if RANK == 0:
        time.sleep(1000)
    dist.all_reduce(torch.ones(1))


def with_loaders(library):
    """Two worker processes of a data loader beside each rank."""
    torch, _ = join(library)
    data = importlib.import_module(f"{library}.utils.data")
    examples = data.TensorDataset(torch.ones(1 << 12, 4))
    for number in itertools.count():
        for _ in data.DataLoader(examples, batch_size=4, num_workers=2):
            if number == 0:
                note("up")
                number = 1
            time.sleep(0.01)


ACTS = (first, train, asleep, in_c, in_collective, with_loaders)

if __name__ == "__main__":
    LIBRARY, ACT, FOLDER = sys.argv[1:]
    {act.__name__: act for act in ACTS}[ACT](LIBRARY)
