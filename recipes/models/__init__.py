"""Models that recipes share: a Llama-like decoder and a vision transformer. They import portatrain only."""
