"""Lower a model and run its steps: one Protocol (`base.py`) and one folder for each framework.

A new backend is a folder here, or a package of its own. `choose_kernel.py` chooses the implementation of attention from
the table in `kernels.py`, which names the function of each implementation. `state.py` lists everything that
the state of a run consists of. Only the folders of the frameworks import a framework.
"""
