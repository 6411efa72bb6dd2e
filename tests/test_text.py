"""Golden texts of small graphs."""

from textwrap import dedent

import numpy as np

from stitch import dims, dtypes
from stitch.graph import Builder, Origin, Value
from stitch.text import render

N = dims.symbol("n")


def check(builder: Builder, golden: str, **outputs: Value) -> None:
    assert render(builder.finish(outputs)) == dedent(golden).lstrip()


def test_elementwise_with_a_guard() -> None:
    b = Builder("tiny")
    x = b.input("x", dtypes.FLOAT32, [dims.symbol("batch"), 4])
    y = b.input("y", dtypes.FLOAT32, [N, 4])
    b.origin = Origin("sum", "Add", "", 14)
    total = b.add(x, y)
    b.origin = Origin("scale", "Mul", "my.domain", 1)
    golden = """
        graph tiny
        input %0 'x' : float32[n, 4]
        input %1 'y' : float32[n, 4]
        guard batch == n  # Add 'sum'
        %2 = add(%0, %1) : float32[n, 4]  # Add 'sum'
        %3 = const {2.0} : float32[]  # my.domain.Mul 'scale'
        %4 = broadcast(%3) shape=[n, 4] : float32[n, 4]  # my.domain.Mul 'scale'
        %5 = mul(%2, %4) : float32[n, 4]  # my.domain.Mul 'scale'
        output 'z' = %5
    """
    check(b, golden, z=b.mul(total, 2.0))


def test_constants_and_attributes() -> None:
    b = Builder("constants")
    w = b.const(np.arange(12, dtype=np.float32).reshape(3, 4))
    small = b.const(np.array([True, False]))
    t = b.transpose(w, (1, 0))
    golden = """
        graph constants
        %0 = const {f0d417e7} : float32[3, 4]
        %1 = const {True, False} : bool[2]
        %2 = transpose(%0) perm=[1, 0] : float32[4, 3]
        %3 = cast(%2) dtype=float16 : float16[4, 3]
        output 'a' = %3
        output 'b' = %1
        output 'c' = %3
    """
    half = b.apply("cast", t, dtype=dtypes.FLOAT16)
    check(b, golden, a=half, b=small, c=half)


def test_shapes_and_hosts() -> None:
    b = Builder()
    x = b.input("x y", dtypes.FLOAT32, [N, 2 * N])
    flat = b.reshape(x, [2 * N * N])
    rows = b.dims([N, N * 2])
    (found,) = b.host("flatnonzero", [flat], [(dtypes.INT64, (b.fresh("nonzero"),))])
    golden = """
        graph graph
        input %0 'x y' : float32[n, 2*n]
        %1 = reshape(%0) shape=[2*n*n] : float32[2*n*n]
        %2 = shape() dims=[n, 2*n] shape=[2] : int64[2]
        %3 = host(%1) function=flatnonzero dtypes=[int64] shapes=[[nonzero.1]] : int64[nonzero.1]
        output 'rows' = %2
        output 'found' = %3
    """
    check(b, golden, rows=rows, found=found)


def test_numbering_does_not_depend_on_names() -> None:
    texts = []
    for spare in (0, 3):
        b = Builder("g")
        x = b.input("x", dtypes.FLOAT32, [N])
        for _ in range(spare):
            b.fresh_name("exp.0")
        texts.append(render(b.finish({"y": b.unary("exp", x)})))
    assert texts[0] == texts[1]
