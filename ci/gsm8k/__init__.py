"""gsm8k accuracy of stock against patched vLLM, and the offline fixture that stands in for gsm8k."""
