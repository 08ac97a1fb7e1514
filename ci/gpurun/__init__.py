"""What the gsm8k runs and the GPU cases share: processes, vLLM's server, patched copies, and what a result is of.

Nothing here imports torch or vLLM; `process` and `server` need the standard library alone.
"""
