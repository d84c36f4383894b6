"""Control agents: one file an algorithm, pure torch, no Ray."""
