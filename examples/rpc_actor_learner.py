"""Actors play, one learner decides and learns: batched remote calls on a pole that must not fall.

    dtrun --standalone --nproc-per-node 3 examples/rpc_actor_learner.py

Rank 0 has the policy; every other rank has carts with a pole on each (the task of Barto, Sutton and
Anderson, 1983) and knows nothing of networks. At every step an actor asks the learner what its
carts should do. The learner answers when all actors have asked, with one forward pass for all of
them (`rpc.functions.async_execution`: no thread waits for the others), and learns when all poles
have fallen or the round is over (REINFORCE; the mean of all carts is the baseline of each step).

A cart earns 1 for every step until its pole falls, at most 200. Who acts at random earns 22; the
learner ends above 150. Carts draw from generators of their own, and the learner acts and learns in
the order of actors, whoever comes first: the same seed and number of actors give the same bits.
"""

import argparse
import math
import os
import threading
import time

import dtrain as torch
import dtrain.distributed.rpc as rpc

nn = torch.nn


class Carts:
    """`size` carts with poles: rows of [place, speed, angle, speed of the angle], in SI units."""

    def __init__(self, size, seed):
        self.size, self.generator = size, torch.Generator().manual_seed(seed)

    def reset(self):
        self.state = 0.1 * torch.rand(self.size, 4, generator=self.generator) - 0.05
        return self.state

    def step(self, actions):
        """Push left (0) or right (1) for 20 ms; the new states, and which poles still stand."""
        x, v, angle, w = self.state.unbind(dim=1)
        sin, cos = angle.sin(), angle.cos()
        push = (actions.float() * 2 - 1) * 10.0 + 0.05 * w.square() * sin
        turn = (9.8 * sin - cos * push / 1.1) / (0.5 * (4 / 3 - 0.1 * cos.square() / 1.1))
        drive = (push - 0.05 * turn * cos) / 1.1
        parts = [x + 0.02 * v, v + 0.02 * drive, angle + 0.02 * w, w + 0.02 * turn]
        self.state = torch.stack(parts, dim=1)
        return self.state, (self.state[:, 0].abs() < 2.4) & (self.state[:, 2].abs() < math.pi / 15)


class Actor:
    """Plays with its carts, on a rank of its own."""

    def __init__(self, learner, number, carts, seed):
        self.learner, self.number, self.carts = learner, number, Carts(carts, seed)

    def play(self, steps):
        """One round; for how many steps each pole stood."""
        state, stood = self.carts.reset(), torch.zeros(self.carts.size)
        stands = stood == 0
        for _ in range(steps):
            actions = self.learner.rpc_sync().act(self.number, state, stands)
            if actions is None:
                break
            state, up = self.carts.step(actions)
            stands = stands & up
            stood += stands
        return stood


class Learner:
    """The policy, its optimizer, and what was done in this round; lives on rank 0."""

    def __init__(self, actors, lr, seed):
        torch.manual_seed(seed)
        self.policy = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 2))
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=lr)
        self.actors, self.lock = actors, threading.Lock()
        self.asked, self.decided = {}, torch.futures.Future()
        self.round = []  # (states, which poles stand, actions) of all carts, step by step

    @rpc.functions.async_execution
    def act(self, number, state, stands):
        """A future of the actions of this actor's carts; of None when no pole stands any more."""
        with self.lock:
            self.asked[number] = state, stands
            mine = self.decided.then(lambda decided: decided.wait()[number])
            if len(self.asked) == self.actors:
                asked, self.asked = [self.asked[i] for i in range(self.actors)], {}
                decided, self.decided = self.decided, torch.futures.Future()
                try:
                    decided.set_result(self.decide(asked))
                except Exception as error:  # all who wait must hear of it
                    decided.set_exception(error)
        return mine

    def decide(self, asked):
        """The actions of all actors, in their order, by one forward pass."""
        states, stands = (torch.cat(parts) for parts in zip(*asked, strict=True))
        if not stands.any():
            return [None] * self.actors
        with torch.no_grad():
            chances = self.policy(states).softmax(dim=1)
        actions = torch.multinomial(chances, 1).squeeze(1)
        self.round.append((states, stands, actions))
        return actions.chunk(self.actors)

    def learn(self, stood):
        """What a cart did counts by how much longer its pole stood than those of the others."""
        states, stands, actions = (torch.stack(parts) for parts in zip(*self.round, strict=True))
        self.round = []
        still = (stood - torch.arange(len(states)).unsqueeze(1)) * stands
        better = (still - still.sum(dim=1, keepdim=True) / stands.sum(dim=1, keepdim=True)) * stands
        chosen = self.policy(states).log_softmax(dim=2).gather(2, actions.unsqueeze(2)).squeeze(2)
        self.optimizer.zero_grad()
        (-(chosen * better).sum() / stands.sum() / (better.std() + 1)).backward()
        self.optimizer.step()


def run_learner(args, actors):
    learner, seed = rpc.RRef(Learner(actors, args.lr, args.seed)), args.seed * actors
    handles = [
        rpc.remote(f"actor{i}", Actor, (learner, i, args.carts, seed + i)) for i in range(actors)
    ]
    begin = time.time()
    for number in range(args.rounds):
        games = [handle.rpc_async().play(args.steps) for handle in handles]
        stood = torch.cat(torch.futures.wait_all(games))
        learner.local_value().learn(stood)
        reward = f"reward {stood.mean().item():5.1f}"
        print(f"round {number:2d}  {reward}  {time.time() - begin:.1f} s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option, default in {"rounds": 18, "steps": 200, "carts": 16, "seed": 0}.items():
        parser.add_argument(f"--{option}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--lr", type=float, default=0.02)
    args = parser.parse_args()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world < 2:
        parser.error("one learner and at least one actor: --nproc-per-node 2 or more")
    rpc.init_rpc("learner" if rank == 0 else f"actor{rank - 1}", rank=rank, world_size=world)
    if rank == 0:
        run_learner(args, world - 1)
    rpc.shutdown()  # the actors serve until the learner comes here


if __name__ == "__main__":
    main()
