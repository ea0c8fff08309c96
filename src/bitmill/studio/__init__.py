"""The studio: a model's own tensors on any grid, and numbers bit by bit: live, in a browser here."""
