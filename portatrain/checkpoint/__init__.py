"""Save and restore the checkpoints of a run, find the newest valid one, and convert other formats (interop).

A shard becomes bytes in three steps: `saver.py` asks the backend for the boxes that this process writes,
`host_copies.py` copies them from the devices, and `checkpoints_format/writer.py` writes the copies into files.
`restore.py` is the way back.
"""
