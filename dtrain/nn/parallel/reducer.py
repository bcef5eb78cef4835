"""The reducer: turns "this gradient is complete" into all-reduces that run beside backward.

Rules:
1. Buckets are reduced in index order on every rank, whatever order gradients come in.
2. A bucket is submitted as soon as it is full and all before it are; the group's thread reduces
   it while backward goes on. Where that would only take the core from backward
   (`ProcessGroup.runs_aside`), the caller reduces all at the end: measured on 2 cores, an MLP's
   step with a thread beside it waits milliseconds for the scheduler, for sums of half a one. One
   bucket is enough then, unless sizes were asked for: a call more takes 0.1 ms there. Over a
   network there are up to 16 and more, so that little is left when backward ends.
3. At the end of the pass the rest is submitted, parameters without a gradient counting as absent,
   and all works are waited for in order. Nobody needs to say beforehand what is unused.
4. After the first pass that reduces, buckets are made anew in the order in which rank 0 saw
   gradients come, once, and with `tunes` as `tuning` says. Sums are elementwise, so this changes
   no bits.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np

from dtrain.autograd import engine
from dtrain.comm.collectives import AllReduce, Broadcast
from dtrain.comm.reduce import ReduceOp
from dtrain.comm.work import Future, Work
from dtrain.distributed.world import ProcessGroup
from dtrain.errors import DistError
from dtrain.nn.parallel.buckets import DEFAULT_CAPS, WHOLE, Bucket, assign, caps_for_messages
from dtrain.nn.parallel.divergence import Sentinel
from dtrain.nn.parallel.meter import Meter
from dtrain.nn.parallel.tuning import Tuner
from dtrain.tensor import Tensor

CommHook = Callable[[Any, Any], Future[Any]]


class Flight:
    """One bucket between submission and the end of the pass."""

    __slots__ = ("bucket", "future", "kept", "work")

    def __init__(
        self,
        bucket: Bucket,
        work: Work,
        future: Future[Any] | None,
        kept: dict[int, np.ndarray | None],
    ) -> None:
        self.bucket, self.work, self.future, self.kept = bucket, work, future, kept


class Reducer:
    """Keeps the gradients of the parameters equal on all ranks of `group`: their mean.

    `named`: (name, parameter) of all that take part. `sync` says whether the next backward pass
    reduces (see DDP.no_sync). `divide_by`: by what the sum over ranks is divided; None is the
    number of ranks. `caps`: sizes of buckets, as `assign` takes them; None: those that suit the
    transport (`_usual_caps`). `loss_weight`: how much the rank's loss of the
    passes to come stands for; if not None, sums are divided by the weights' sum over ranks and
    passes instead, which costs one all-reduce of 8 bytes. `delayed`: ids of parameters to be
    reduced behind all others. `tunes`: whether `caps` are only the first sizes that are tried.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, Any]],
        group: ProcessGroup,
        caps: Sequence[int] | None = None,
        sentinel: Sentinel | None = None,
        delayed: Collection[int] = (),
        tunes: bool = False,
    ) -> None:
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.group = group
        self.sync = True
        self.divide_by: int | None = None
        self.loss_weight: float | None = None
        self._weight = np.zeros(1)  # of the passes since the last reduction
        self._weighing: Work | None = None
        self.tuner: Tuner | None = None  # from the first rebuilding on, while no hook reduces
        self._tunes = tunes
        self.went_around: Callable[[], str | None] = lambda: None  # see `checks.Watch`
        self.meter = Meter(self.names)
        self._hook: tuple[CommHook, Any] | None = None
        self._sentinel = sentinel
        self._aside = group.arrays.runs_aside
        self._chooses = caps is None
        self.caps: Sequence[int] = caps or self._usual_caps()
        self._running = False
        self._counted = False  # whether this pass's weight has been added
        self._alone = False  # in a pass that does not reduce
        self._next = 0  # the first bucket not yet submitted
        self._flights: list[Flight] = []
        self.rebuilt: bool
        self._order: list[int]  # parameters as their gradients came in the first pass
        self.place: list[tuple[Bucket, int]] = []  # of each parameter
        self._delayed = [i for i, p in enumerate(self.parameters) if id(p) in delayed]
        self._make_first()
        me = weakref.ref(self)
        hooks = [p.register_post_accumulate_grad_hook(partial(_tell, me, index))
                 for index, p in enumerate(self.parameters)]  # fmt: skip
        weakref.finalize(self, _let_go, hooks, self.parameters, self.place).atexit = False

    # ---- buckets

    def _usual_caps(self) -> Sequence[int]:
        """Sizes when nobody has asked for any; they change no bits."""
        if not self._aside:
            return WHOLE
        if self.group.shares_memory:
            return DEFAULT_CAPS
        return caps_for_messages(sum(p._data.nbytes for p in self.parameters))

    def _assigned(self, order: Iterable[int], caps: Sequence[int]) -> list[list[int]]:
        """Which parameters each bucket has when they are taken in this order."""
        late = set(self._delayed)
        usual = [i for i in order if i not in late]
        return [
            *assign(self.parameters, caps, usual),
            *assign(self.parameters, caps[-1:], self._delayed),
        ]

    def _make_first(self) -> None:
        """Buckets in reverse order of registration, to be rebuilt after a pass."""
        self._make(self._assigned(reversed(range(len(self.parameters))), self.caps))
        self.first_sizes = [bucket.gradients.nbytes for bucket in self.buckets]  # in bytes
        self.rebuilt, self._order = False, []

    def _make(self, members: Sequence[Sequence[int]]) -> None:
        """New buckets; gradients and flags that are there move into them."""
        used = [bool(bucket.flags[place]) for bucket, place in self.place]
        self.buckets = [Bucket(i, m, self.parameters, self.group) for i, m in enumerate(members)]
        places = {m: (b, i) for b in self.buckets for i, m in enumerate(b.members)}
        self.place[:] = [places[index] for index in range(len(self.parameters))]
        for bucket in self.buckets:
            bucket.settle(self.parameters)
        for (bucket, place), flag in zip(self.place, used, strict=False):
            bucket.flags[place] = flag

    def _arrange(self) -> None:
        """Before a pass that reduces: new buckets, if it is time for them."""
        if self._order and not self.rebuilt:
            self._rebuild()
        elif self.tuner is not None and self.tuner.advance(self.group):
            self.caps, members = self.tuner.tried[self.tuner.now]
            self._make(members)

    def _rebuild(self) -> None:
        """Arrange the buckets in the order in which rank 0 saw gradients come; once."""
        self.rebuilt = True
        total = sum(bucket.gradients.nbytes for bucket in self.buckets)
        if len(self.buckets) == 1 and total < self.caps[0] and not self._tunes:
            return  # all in one, whatever the order
        seen = set(self._order)
        late = [i for i in reversed(range(len(self.parameters))) if i not in seen]
        order = np.array([*self._order, *late], np.int64)
        self.group.issue(Broadcast(order, 0))
        agreed = order.tolist()
        members = self._assigned(agreed, self.caps)
        if members != [list(bucket.members) for bucket in self.buckets]:
            self._make(members)
        if self._tunes:
            self.tuner = Tuner(partial(self._assigned, agreed), total)

    def register_hook(self, hook: CommHook, state: Any) -> None:
        """From now on `hook(state, bucket)` reduces; RuntimeError for a second one."""
        if self._hook is not None:
            raise RuntimeError(
                "register_comm_hook or register_builtin_comm_hook can only be called once."
            )
        self._hook = hook, state
        self._tunes, self.tuner = False, None
        # From now on something does run beside backward, and may give what depends on the buckets.
        if self._chooses and self.caps != DEFAULT_CAPS:
            self.caps = DEFAULT_CAPS
            self._make_first()

    @property
    def hook_name(self) -> str | None:
        """The name of the communication hook, None when there is none."""
        return (
            None if self._hook is None else getattr(self._hook[0], "__name__", str(self._hook[0]))
        )

    @property
    def runs_aside(self) -> bool:
        """Whether buckets are reduced beside backward."""
        return self._aside or self._hook is not None

    @property
    def order(self) -> list[int]:
        """Parameters in the order in which their gradients came in the first pass here."""
        return list(self._order)

    # ---- a pass

    def prepare(self, sync: bool) -> None:
        """Before a forward pass: say whether the backward to come reduces.

        A pass that an exception cut short leaves nothing behind.
        """
        self.sync, self._counted, self._alone = sync, False, False
        if self._running:
            self._running = False
            for bucket in self.buckets:
                bucket.tail[...] = 0
        if sync:
            self._arrange()

    def _ready(self, index: int, parameter: Any) -> None:
        """The hook of every parameter: its gradient of this pass is complete."""
        if self.loss_weight is not None and not self._counted:
            self._count_weight(self.loss_weight)
        bucket, place = self.place[index]
        if not self.sync:
            if not self._alone:
                self._alone = True
                engine.queue_callback(self._pass_alone_ends)
            bucket.keep(place, parameter)
            return
        if not self._running:
            self._start(index)
        if not self.rebuilt:
            self._order.append(index)
        bucket.add(place, parameter)
        if not bucket.pending:
            self.meter.filled(bucket.index)
            if self.runs_aside:
                self._submit_full()

    def _count_weight(self, weight: float) -> None:
        """Once a pass: how much its loss stands for."""
        self._counted = True
        self._weight += weight
        engine.queue_callback(self._pass_ends)

    def _pass_ends(self) -> None:
        self._counted = False

    def _pass_alone_ends(self) -> None:
        self._alone = False
        self.meter.alone(engine.started_at())

    def _start(self, index: int) -> None:
        place = self.went_around()
        if place is not None:
            raise RuntimeError(
                f"rank {self.group.rank()}: parameter '{self.names[index]}' got a gradient from a "
                "forward pass that did not go through DistributedDataParallel: its module was "
                f"called directly at {place}. Other ranks would wait for gradients that mean "
                "something else. Call the wrapper, or detach the result (or use torch.no_grad()) "
                "if no gradient is wanted."
            )
        self._running, self._next, self._flights = True, 0, []
        if not self.rebuilt:
            self._order = []
        self.meter.start(engine.started_at(), len(self.buckets))
        for bucket in self.buckets:
            bucket.start()
        if self._sentinel is not None:
            self._sentinel.sign(self.buckets)
        self._weigh()
        engine.queue_callback(self._finish)

    def _weigh(self) -> None:
        if self.loss_weight is not None:
            self._weighing = self.group.issue(AllReduce(self._weight), async_op=True)

    def _submit_full(self) -> None:
        while self._next < len(self.buckets) and not self.buckets[self._next].pending:
            self._submit(self.buckets[self._next], {})

    def _submit(self, bucket: Bucket, kept: dict[int, np.ndarray | None]) -> None:
        averages = self.divide_by is None and self.loss_weight is None
        op = ReduceOp.AVG if averages else ReduceOp.SUM
        self.meter.submitted(bucket.index)
        future = None
        if self._hook is None:
            work = self._reduce(bucket, op)
        else:
            hook, state = self._hook
            last = bucket.index == len(self.buckets) - 1
            future = hook(state, bucket.as_grad_bucket(self.parameters, last))
            if not isinstance(future, Future):
                raise TypeError(
                    f"the communication hook {getattr(hook, '__name__', hook)} returned "
                    f"{type(future).__name__} for bucket {bucket.index}, expected a Future of the "
                    "reduced gradients (dist.Future; a Work's is get_future())"
                )
            work = self.group.issue(AllReduce(bucket.tail, op), async_op=True)
        self._flights.append(Flight(bucket, work, future, kept))
        self._next += 1

    def _reduce(self, bucket: Bucket, op: ReduceOp) -> Work:
        try:
            return self.group.issue(AllReduce(bucket.buffer.array, op), async_op=self._aside)
        except DistError as error:
            error.add_note(self._where(bucket))
            raise

    def _finish(self) -> None:
        """The end of the pass: submit what is left, wait for all, in order."""
        self.meter.computed()
        for bucket in self.buckets[self._next :]:
            self._submit(bucket, bucket.fill_unused(self.parameters))
        self._running = False
        self._land_all()

    def _land_all(self) -> None:
        flights, self._flights = self._flights, []
        if self._weighing is not None:
            self._weighing.wait()
        for flight in flights:
            self._land(flight)
        self.meter.end(flights)
        if self.tuner is not None and self.meter.last is not None:
            self.tuner.add(self.meter.last.ended - self.meter.last.began)
        for flight in flights:
            flight.bucket.finish(self.parameters, flight.kept)
        self._weighing, self._weight[...] = None, 0.0

    def _land(self, flight: Flight) -> None:
        """Wait for one bucket and leave what its gradients shall be in it."""
        bucket = flight.bucket
        try:
            if flight.future is not None:
                _take(flight.future.wait(), bucket, self.hook_name)
            flight.work.wait()
        except DistError as error:
            error.add_note(self._where(bucket))
            raise
        if self._sentinel is not None:
            self._sentinel.compare(bucket)
        self._divide(bucket, 1 if flight.future is None else self.group.size())
        self.meter.landed(bucket.index)

    def _divide(self, bucket: Bucket, already: int) -> None:
        """Divide by weights or active ranks; a hook's mean is divided `already`, by all ranks."""
        by = self.divide_by if self._weighing is None else float(self._weight[0])
        if by:
            by = by / already
            gradients = bucket.gradients
            np.divide(gradients, gradients.dtype.type(by), out=gradients)

    def _where(self, bucket: Bucket) -> str:
        names = [self.names[member] for member in bucket.members]
        return (
            f"in the backward pass of DistributedDataParallel on rank {self.group.rank()}, "
            f"reducing bucket {bucket.index} of {len(self.buckets)} (gradients of '{names[0]}' to "
            f"'{names[-1]}'). If ranks have different numbers of batches, use `with "
            "model.join():`, or give all of them the same number."
        )

    # ---- a rank that has no more inputs (see `joining`)

    def prepare_shadow(self) -> None:
        """What `prepare` does on the others, before a pass of theirs that reduces."""
        self._arrange()

    def shadow(self, weighs: bool) -> None:
        """The reductions of one backward pass of the others, with nothing to contribute.

        `weighs`: whether they have set a loss_weight. What gradients this rank had are dropped;
        after it they are those of the others.
        """
        self._next, self._flights = 0, []
        self.meter.start_shadow(len(self.buckets))
        self._weight[...] = 0.0
        self.loss_weight = 0.0 if weighs else None
        if self._sentinel is not None:
            self._sentinel.sign(self.buckets, taking_part=False)
        self._weigh()
        for parameter in self.parameters:
            parameter._grad = None
        for bucket in self.buckets:
            bucket.tail[...] = 0
            self._submit(bucket, bucket.fill_unused(self.parameters))
        if not self._order:  # should rank 0 be this one, it has seen nothing
            self._order = list(reversed(range(len(self.parameters))))
        self._land_all()


def _tell(reducer: weakref.ref[Reducer], index: int, parameter: Any) -> None:
    """The hook of every parameter. It keeps no wrapper alive: a model may be wrapped anew."""
    alive = reducer()
    if alive is not None:
        alive._ready(index, parameter)


def _let_go(
    hooks: Sequence[Any], parameters: Sequence[Any], place: Sequence[tuple[Bucket, int]]
) -> None:
    """Undo what a reducer that is gone did to the parameters."""
    for hook, parameter, (bucket, i) in zip(hooks, parameters, place, strict=True):
        hook.remove()
        if parameter._home is bucket.views[i]:
            del parameter._home


def _take(value: Any, bucket: Bucket, hook: str | None) -> None:
    """Put what a communication hook's future gave into the bucket, unless it is there already."""
    result = value[0] if isinstance(value, (list, tuple)) and value else value
    size = bucket.gradients.size
    if not isinstance(result, Tensor) or result.numel() != size:
        got = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(
            f"the future of the communication hook {hook} gave {got} for bucket {bucket.index}, "
            f"expected a Tensor like bucket.buffer(), of {size} elements"
        )
    if result._data is not bucket.gradients:
        np.copyto(bucket.gradients, result._data.reshape(-1), casting="same_kind")
