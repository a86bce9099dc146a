"""The definition of a model: modules, operations, layers, layouts, LoRA, precision, remat policies, random numbers.
This room imports no framework and touches no device or disk."""
