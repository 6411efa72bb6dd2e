"""How a cluster becomes machine code: the loop program, its transformations and its emission.

Imported as `stitch.codegen`. Never imports `stitch.runtime`.
"""

if __name__ != "stitch.codegen":
    raise ImportError("import stitch.codegen, not codegen")
