"""How a model is written: modules, operations, layers, layouts, precision, random numbers. No framework, no device."""
