"""Ternary models, trained: weights of -1, 0 and 1 from the first step on."""
