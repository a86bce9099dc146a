"""The machine under a run: JSON files, object stores, processes, signals, cloud notices, the watchdog, exit codes and
environment variables. It knows nothing of models, recipes or checkpoints.

SIGTERM and every other request to stop arrive in `stop_signals.py`; `training/stop_requests.py` acts on them.
"""
