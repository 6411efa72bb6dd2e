"""A graph made smaller and plainer without changing what it computes.

Values are kept to the last bit, NaN, infinities and the sign of zero included. Only where a sum or a product over an
axis is involved may the order of additions, or where they are rounded, change; and an erf of x / sqrt(2) may be
rounded once less (`halves`).

`passes` is the ordered list of passes; a pass is one or more tables of rules for `stitch.rewrite`, each at the end of
the module that holds its rules. A rule's docstring shows a before, an after, and the condition under which it is safe.

A constant of the result may be a strided view of the model's memory: whoever needs it contiguous copies it.
"""

from stitch.simplify.passes import moving, simplify

__all__ = ["moving", "simplify"]
