"""Running compiled artifacts: memory, threads and devices.

Imported as `stitch.runtime`. Never imports `stitch.codegen`.
"""

if __name__ != "stitch.runtime":
    raise ImportError("import stitch.runtime, not runtime")
