"""What a sharded model tells of its last pass: `step_report`, in words.

Rules: 1. It reads what `meter` has kept: it may be called at any time between passes, by one rank
alone, and sends nothing. 2. A unit for which this rank stood still gets the reason that the
timestamps show; `why_exposed` says how it is told.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dtrain.distributed.fsdp.meter import Pass, Transfer
from dtrain.nn.parallel.reports import MAIN, came_late, ms, wait_words

if TYPE_CHECKING:
    from dtrain.distributed.fsdp.root import Root
    from dtrain.distributed.fsdp.state import ModuleState


def why_exposed(done: Pass, each: Transfer, memory: bool) -> str | None:
    """Why this rank stood still for a unit; None when it did not.

    In this order: another rank came late, for more than half of the time (where ranks share
    `memory`: by messages, waiting for a rank is also waiting for bytes under way); it was never
    meant to run beside what computes; it was not gathered ahead; the calls before it were still
    running when it could have begun, or the thread that carries calls came late to it; as many
    units as may be were being reduced; else there was less to compute than to send.
    """
    if each.exposed <= 0.0:
        return None
    if memory and (late := came_late(each.waits, each.exposed)):
        return late
    if not each.beside:
        return "where it was wanted: beside it, it would have taken the core that computes"
    if not each.ahead:
        return _why_not_ahead(done, each)
    return _why_queued(done, each) or _why_short(each)


def _why_queued(done: Pass, each: Transfer) -> str | None:
    """What kept its call from running as soon as it was issued, if that is the reason."""
    queued = each.begun - each.issued
    if queued <= MAIN * each.exposed:
        return None
    before = max((t.ended for t in done.transfers if t.seq < each.seq), default=each.issued)
    blocked = min(before, each.begun) - each.issued
    if blocked > MAIN * each.exposed:
        return f"previous still running: it waited {ms(blocked)} for the calls before it"
    return f"started late: the thread that carries calls came to it after {ms(queued)}"


def _why_short(each: Transfer) -> str:
    took = each.ended - each.begun
    beside = max(0.0, min(each.wanted, each.ended) - each.begun)
    if each.cause == "limit":
        return f"limit: no more units may be reduced at once; it took {ms(took)}"
    left = "nothing left to compute" if each.cause == "end" else "too little to compute beside it"
    return f"{left}: it took {ms(took)}, {ms(beside)} of it beside computing"


def _why_not_ahead(done: Pass, each: Transfer) -> str:
    gathered = [t for t in done.transfers if t.kind == "gather" and t.phase == each.phase]
    if each is gathered[0]:
        return f"not gathered ahead: nothing is computed before it in {each.phase}"
    if done.number == 0 and each.phase == "forward":
        return "not gathered ahead: the order of units is learned in the first pass"
    return (
        "not gathered ahead: no prefetch names it, or modules were called in another order than in "
        "the pass before"
    )


def words(done: Pass, root: Root) -> str:
    """The report of one pass, for people."""
    group = root.groups[0]
    began, ended = done.forward
    memory = group.shares_memory
    lines = [
        f"pass {done.number} on rank {group.rank()} of {group.size()}"
        f"{' (without input: it has joined)' if done.shadow else ''}: forward "
        f"{ms(ended - began)}, backward {ms(done.computed - done.began)}, then "
        f"{ms(done.ended - done.computed)} until all gradients were there",
        f"communication {ms(done.communication)} in {len(done.transfers)} calls, "
        f"this rank stood still for {ms(done.exposed)}",
    ]
    if done.fenced:
        lines.append(f"waited {ms(done.fenced)} until all ranks had shown their parameters")
    lines += [_unit_words(done, each, memory) for each in done.transfers]
    lines += wait_words((each.waits for each in done.transfers), memory)
    return "\n  ".join(lines)


def _unit_words(done: Pass, each: Transfer, memory: bool) -> str:
    why = why_exposed(done, each, memory)
    hidden = "hidden" if why is None else f"exposed {ms(each.exposed)}: {why}"
    verb = "gather for" if each.kind == "gather" else "reduce in"
    unit = each.unit or "the root"
    return f"{verb} {each.phase} {unit} ({each.nbytes / 2**20:.2f} MiB, #{each.seq}): {hidden}"


class ReportingUnits:
    """The part of a sharded module that tells what it did.

    A plain class, as `JoiningUnits` is.
    """

    _fsdp_state: ModuleState

    def step_report(self) -> str:
        """The last pass with a backward pass, in words: computing, communication, and for each unit
        whether this rank stood still for it, how long and why. Not in torch.

        Every rank has its own view; nothing is sent. RuntimeError before the first pass.
        """
        root = self._fsdp_state.root
        if root is None or root.meter.last is None:
            raise RuntimeError("no backward pass has been reduced yet: there is nothing to report")
        return words(root.meter.last, root)
