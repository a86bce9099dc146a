"""The part of a recipe that reads files of token ids."""

from portatrain.data import TokenMemmap

# Data: files of token ids, from the folder in which the run is started. With separator=ID, the id that stands between
# two documents, attention and targets do not cross documents, and some of them can be held out.
DATA = TokenMemmap(paths="tokens.bin", seq_len=128, vocab=50_257, dtype="uint16", validation=0.1)
VOCAB = -(-DATA.vocab // 128) * 128  # rounded up, so that a mesh divides it
