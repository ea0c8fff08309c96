"""What a model asks of a machine: exact where a runtime's own allocation is known, modelled elsewhere."""
