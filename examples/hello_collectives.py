"""Every rank says hello, and what each collective left in its tensor.

dtrun --standalone --nproc-per-node 3 examples/hello_collectives.py
"""

import dtrain as torch

dist = torch.distributed


def main():
    dist.init_process_group()
    rank, world = dist.get_rank(), dist.get_world_size()
    own = torch.tensor([rank + 1.0])  # rank r starts each time with r + 1

    total = own.clone()
    dist.all_reduce(total)

    first = own.clone()
    dist.broadcast(first, src=0)

    everyone = [torch.zeros(1) for _ in range(world)]
    dist.all_gather(everyone, own)

    sent = torch.arange(world, dtype=torch.float32) + 10 * rank
    received = torch.zeros(world)
    dist.all_to_all_single(received, sent)

    # A ring: to the next rank without waiting, then from the one before.
    left, passed = (rank - 1) % world, torch.zeros(1)
    if world > 1:
        sending = dist.isend(own, dst=(rank + 1) % world)
        dist.recv(passed, src=left)
        sending.wait()

    names = [None] * world
    dist.all_gather_object(names, {"rank": rank, "greeting": f"hello from {rank}"})

    dist.barrier()
    print(
        f"rank {rank} of {world}: all_reduce {total.item():g}, broadcast {first.item():g}, "
        f"all_gather {[t.item() for t in everyone]}, all_to_all {received.tolist()}, "
        f"from rank {left} {passed.item():g}, objects {[n['greeting'] for n in names]}"
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
