"""Packed stores: the tokens of a source, packed once, in shards, in a folder or an object store, for runs of any size.

`layout.py` is the format, `places.py` where it lies. `packing.py` writes a store, with `stream_writer.py` for the
shards and `encoders.py` for the processes that tokenise; `reading.py` reads windows from it, with `cache.py` on the
local disk; `verify.py` reads every byte. This folder imports what the room `data` imports.
"""
