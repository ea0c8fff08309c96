"""Many recipes of one model: made, measured on the same positions, and weighed against each other."""
