"""Reinforcement learning of reasoning language models in the manner of Kimi k1.5 (arXiv 2501.12599)."""
