"""Items through a pipeline, several at a time: each stage has a thread, and works on another item.

            caller                stage 0               stage 1               caller
    items -> next() -> inbox 0 -> run -> slot -> inbox 1 -> run -> slot -> outbox -> next() -> results

* Whoever asks for a result also pulls the items, so nothing of the user's runs in other threads. At most depth x stages
  items have been pulled whose results have not been given away.
* Queues are `queue.SimpleQueue`, written in C, and hold an item's record; arrays are not copied. What bounds them is
  that a stage needs a free slot for its outputs: it has `depth` of them for each stage on the way to their last reader.
* One thread feeds each queue and one empties it: results are in order.
* An item that fails goes on through the queues, unprocessed, so that all results before it come first.
* Stage threads know the lanes, never the stream: when nobody refers to the stream any more, it is closed. So it is at
  exit. Threads are daemons, since Python waits for others before it tells anybody that it is about to exit.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Generic, TypeVar

from stitch.bundle import Made
from stitch.errors import StitchError, StreamError
from stitch.runtime import affinity
from stitch.runtime.stage import Arrays, Slot, Stage

T = TypeVar("T")
R = TypeVar("R")


class _Item:
    """An input on its way."""

    __slots__ = ("error", "given", "made", "position", "slots", "stage")

    def __init__(self, position: int, given: Arrays, stages: int) -> None:
        self.position = position
        self.given = given
        self.made: list[Arrays | None] = [None] * stages
        self.slots: list[Slot | None] = [None] * stages
        self.error: BaseException | None = None
        self.stage: str | None = None  # where the error was


class _Dead:
    """A stage's thread is about to end, for this reason."""

    def __init__(self, stage: str, error: BaseException) -> None:
        self.stage = stage
        self.error = error


class _Lanes:
    """What the threads share. `fresh`: numbers of each stage's outputs that are new arrays for each item."""

    def __init__(self, stages: Sequence[Stage], results: Sequence[Made], depth: int, reuse: bool) -> None:
        self.stages = tuple(stages)
        count = len(self.stages)
        last = [-1] * count  # the last stage that reads of a stage's slots; `count` is the caller
        for number, stage in enumerate(self.stages):
            for source in stage.sources:
                if isinstance(source, Made):
                    last[source.part] = number
        if reuse:
            for made in results:
                last[made.part] = count
        self.fresh = [frozenset(m.output for m in results if m.part == k and not reuse) for k in range(count)]
        self.inboxes: list[SimpleQueue[_Item | None]] = [SimpleQueue() for _ in range(count)]
        self.outbox: SimpleQueue[_Item | _Dead | None] = SimpleQueue()  # None: the stream was closed
        self.free: list[SimpleQueue[Slot | None] | None] = [SimpleQueue() if r >= 0 else None for r in last]
        for number, queue in enumerate(self.free):
            for _ in range(depth * (last[number] - number) if queue is not None else 0):
                queue.put(Slot())  # type: ignore[union-attr]
        self.released = [[k for k in range(count) if last[k] == reader] for reader in range(count + 1)]
        self.stopping = False

    def release(self, item: _Item, reader: int) -> None:
        """Nobody reads some slots of the item any more."""
        for number in self.released[reader]:
            slot, queue = item.slots[number], self.free[number]
            if slot is not None and queue is not None:
                item.slots[number] = None
                queue.put(slot)

    def work(self, number: int) -> None:
        """The life of a stage's thread."""
        stage = self.stages[number]
        try:
            affinity.pin(stage.cpus)
            self._work(number, stage)
        except BaseException as error:
            self.outbox.put(_Dead(stage.name, error))

    def _work(self, number: int, stage: Stage) -> None:
        inbox, free, fresh = self.inboxes[number], self.free[number], self.fresh[number]
        to: SimpleQueue[Any] = self.inboxes[number + 1] if number + 1 < len(self.stages) else self.outbox
        while True:
            item = inbox.get()
            if item is None or self.stopping:
                return
            if item.error is None:
                if free is not None:
                    slot = free.get()
                    if slot is None or self.stopping:
                        return
                    item.slots[number] = slot
                try:
                    arrays = stage.inputs(item.given, item.made)
                    item.made[number] = stage.fill(arrays, item.slots[number], fresh)
                except BaseException as error:
                    item.error, item.stage = error, stage.name
                arrays = None  # type: ignore[assignment]
            self.release(item, number)
            to.put(item)
            item = slot = None

    def stop(self) -> None:
        self.stopping = True
        for inbox, free in zip(self.inboxes, self.free, strict=True):
            inbox.put(None)
            if free is not None:
                free.put(None)
        self.outbox.put(None)  # for who waits for a result in another thread


class Stream(Generic[T, R], Iterator[R]):
    """Results in order. `close`, leaving a `with` block, or the end of the last reference stops its threads.
    Several threads may ask for results: each result goes to one of them. What waits for one ends when it is closed.

    `prepare` makes of an item the model's inputs, in order; `finish` makes of the model's outputs a result. With
    `reuse`, the arrays of a result are written again once the next one is asked for. `keep` lives as long as this.
    """

    def __init__(
        self, stages: Sequence[Stage], results: Sequence[Made], items: Iterable[T],
        prepare: Callable[[T], Arrays], finish: Callable[[Arrays], R], depth: int = 2, reuse: bool = False,
        keep: object = None,
    ) -> None:  # fmt: skip
        if depth < 1:
            raise ValueError(f"depth is {depth}, but must be at least 1")
        self._items = iter(items)
        self._keep = keep
        self._prepare, self._finish, self._results = prepare, finish, tuple(results)
        self._most = depth * len(stages)
        self._process = os.getpid()
        self._pulled = self._given = 0
        self._ended = False  # nothing more is pulled
        self._shown: _Item | None = None  # the last result, if its arrays are used again
        self._reuse = reuse
        self._lanes = _Lanes(stages, results, depth, reuse)
        self._threads = [
            threading.Thread(target=self._lanes.work, args=(k,), name=f"stitch-{stage.name}", daemon=True)
            for k, stage in enumerate(stages)
        ]
        self._asking = threading.RLock()  # one at a time asks for a result; an iterable that asks its own stream fails
        self._stop = weakref.finalize(self, _stop, self._lanes, self._threads, self._process)
        for thread in self._threads:
            thread.start()

    def __iter__(self) -> Stream[T, R]:
        return self

    def __next__(self) -> R:
        if not self._stop.alive:
            raise StopIteration
        if os.getpid() != self._process:
            raise StitchError("a stream does not survive a fork", "start a stream in the child process")
        try:
            with self._asking:
                return self._next()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the threads, after what they are running. Items that were pulled are dropped."""
        self._stop()
        self._shown = None

    def __enter__(self) -> Stream[T, R]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _next(self) -> R:
        if self._shown is not None:
            self._lanes.release(self._shown, len(self._threads))
            self._shown = None
        found = self._take()
        if found is None:
            raise StopIteration
        if isinstance(found, _Dead):
            raise StreamError(self._given, stage=found.stage, reason=found.error) from found.error
        if found.error is not None:
            raise StreamError(found.position, stage=found.stage, reason=found.error) from found.error
        self._given += 1
        if self._reuse:
            self._shown = found
        return self._finish([found.made[m.part][m.output] for m in self._results])  # type: ignore[index]

    def _take(self) -> _Item | _Dead | None:
        """The next result: one item is pulled first, so that the stages have work meanwhile, and more while it is not
        there yet."""
        while not self._ended and self._pulled - self._given < self._most:
            self._pull()
            try:
                return self._lanes.outbox.get_nowait()
            except Empty:
                pass
        if self._pulled == self._given:
            raise StopIteration
        return self._lanes.outbox.get()

    def _pull(self) -> None:
        """One more item; or, if there is none that is any good, the end, which comes after what is on its way."""
        item = _Item(self._pulled, [], len(self._threads))
        try:
            try:
                pulled = next(self._items)
            except StopIteration:
                self._ended = True
                return
            item.given = self._prepare(pulled)
        except Exception as error:
            self._ended = True
            item.error = error
        self._pulled += 1
        self._lanes.inboxes[0].put(item)


def _stop(lanes: _Lanes, threads: Sequence[threading.Thread], process: int) -> None:
    if os.getpid() != process:
        return  # in a child after fork, where these threads are not
    lanes.stop()
    for thread in threads:
        if thread is not threading.current_thread() and thread.ident is not None:
            thread.join()
