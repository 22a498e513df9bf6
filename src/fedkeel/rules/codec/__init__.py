"""Codecs: a row to bytes and back, with a stated error bound and an exact byte count.

A codec is built for a layout, as layers are columns of it. `float32` is the reference: its payload is the row. Bytes
in what follows are those of one payload; zstd may follow any codec (`client.zstd`).
"""

from fedkeel.rules.codec import floats, integers, low_rank, mixed, sparse

__all__ = ["floats", "integers", "low_rank", "mixed", "sparse"]
