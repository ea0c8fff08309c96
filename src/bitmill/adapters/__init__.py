"""Low-rank adapters: learned on a base that stays quantized, read, and merged into weights."""
