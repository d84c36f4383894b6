"""Everything that touches vLLM: our model inside it, and the Generator around it. Works with vLLM 0.24 to 0.27.

vLLM is imported when a VLLMGenerator is made, or by vLLM itself when it calls `plugin.register`; importing this package
does not need it.
"""
