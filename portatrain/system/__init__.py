"""The machine under a run: JSON files, object stores, processes, signals, cloud notices, the watchdog, exit codes and
environment variables. It knows nothing of models, recipes or checkpoints."""
