"""The part of a recipe that reads text files."""

from portatrain.data import TextFiles

# Data: a document is a file; paths are files, folders or globs, from the folder in which the run is started. A token
# is a byte; tokenizer="tokenizer.json" takes its tokens (and VOCAB is then their number).
DATA = TextFiles(paths="corpus", seq_len=128, validation=0.1)
VOCAB = 256
