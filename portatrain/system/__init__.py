"""The machine under a run: files, object stores, processes, signals, notices of a cloud. Knows nothing of training."""
