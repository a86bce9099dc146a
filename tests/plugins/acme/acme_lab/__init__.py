"""What a lab adds to portatrain in one package: a scheduler, a data source, an optimizer, a tracker, a hook, a chip.

Nothing here imports a framework; the lab's backend is in `acme_chip`. The entry points are in the package's metadata.
"""
