"""Memory of results: lent, given back when nothing refers to it any more, and lent again."""

from __future__ import annotations

import gc
import pickle
import threading
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stitch.runtime.memory import ALIGNMENT, KEPT, LENT_FROM, Blocks, address_of, capacity

F32 = np.dtype(np.float32)
SHAPE = (LENT_FROM // 4, 2)

REFERENCES: dict[str, Callable[[np.ndarray], object]] = {
    "itself": lambda a: a,
    "slice": lambda a: a[3:, 1:],
    "slice of a slice": lambda a: a[3:][5:].T,
    "reshaped": lambda a: a.reshape(-1)[1:],
    "other type": lambda a: a.view(np.int32)[2:],
    "memoryview": lambda a: memoryview(a)[1:],  # type: ignore[arg-type]
    "array of a memoryview": lambda a: np.asarray(memoryview(a)[1:])[1:],  # type: ignore[arg-type]
    "frombuffer": lambda a: np.frombuffer(a, np.uint8)[1:],
    "base": lambda a: a.base,
    "view of base": lambda a: a.base[7:],  # type: ignore[index]
    "subclass": lambda a: a.view(np.matrix)[1:],
    "iterator": lambda a: a.flat,
    "interface": lambda a: np.from_dlpack(a),
}


@pytest.mark.parametrize("kind", REFERENCES)
def test_a_block_is_lent_while_anything_refers_to_it(kind: str) -> None:
    blocks = Blocks()
    array = blocks.array(SHAPE, F32)
    place = address_of(array)
    array[...] = 7
    kept = REFERENCES[kind](array)
    del array
    gc.collect()
    assert not blocks.free
    other = blocks.array(SHAPE, F32)
    assert address_of(other) != place
    del kept
    gc.collect()
    assert len(blocks.free) == 1
    assert address_of(blocks.array(SHAPE, F32)) == place


@given(st.lists(st.integers(0, 3 * LENT_FROM), max_size=12), st.randoms(use_true_random=False))
def test_results_share_nothing(sizes: list[int], random: object) -> None:
    """Whatever is dropped in between, each array keeps what was written to it."""
    blocks, held = Blocks(), list[np.ndarray]()
    for number, size in enumerate(sizes):
        held.append(blocks.array((size,), np.dtype(np.uint8)))
        held[-1][...] = number
        if number % 3 == 2:
            random.shuffle(held)  # type: ignore[attr-defined]
            held.pop()
        assert all((a == a[0]).all() for a in held if a.size)
    assert len({int(a[0]) for a in held if a.size}) == sum(1 for a in held if a.size)


@given(st.integers(LENT_FROM, 1 << 34))
def test_blocks_have_few_sizes(size: int) -> None:
    assert size + ALIGNMENT <= capacity(size) <= size + size // 8 + 4096 + ALIGNMENT
    assert capacity(capacity(size) - ALIGNMENT) == capacity(size)


def test_not_more_is_kept_than_so_much() -> None:
    """The blocks that came last stay."""
    blocks = Blocks()
    arrays = [blocks.array((KEPT // 4,), np.dtype(np.uint8)) for _ in range(6)]
    places = [address_of(a) for a in arrays]
    while arrays:
        arrays.pop(0)
    assert sum(b.size for b in blocks.free) <= KEPT
    found = [blocks.array((KEPT // 4,), np.dtype(np.uint8)) for _ in range(len(blocks.free))]
    assert sorted(map(address_of, found)) == sorted(places[-len(found) :])
    assert len(found) >= 2


def test_threads() -> None:
    """No two threads are ever lent the same block."""
    blocks = Blocks()
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(300):
            array = blocks.array(SHAPE, F32)
            array[:64] = number
            array[-64:] = number
            if not ((array[:64] == number).all() and (array[-64:] == number).all()):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    assert len(blocks.free) <= len(threads)


def test_lent_arrays_are_plain_ones() -> None:
    blocks = Blocks()
    array = blocks.array(SHAPE, F32)
    assert type(array) is np.ndarray
    assert array.flags.c_contiguous
    assert array.flags.writeable
    assert address_of(array) % ALIGNMENT == 0
    array[...] = np.arange(array.size).reshape(SHAPE)
    for copy in (array.copy(), pickle.loads(pickle.dumps(array))):
        assert np.array_equal(copy, array)
