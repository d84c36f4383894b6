"""Networks, and nothing else: no Ray, no vLLM, no environments, no training loop."""
