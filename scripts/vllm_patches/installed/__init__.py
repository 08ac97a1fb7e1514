"""vLLM where it is installed: patched in place, put back, and what any vLLM has of the fixes."""
