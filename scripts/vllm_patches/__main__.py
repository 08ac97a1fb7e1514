"""``python -m vllm_patches``."""

import sys

from vllm_patches.cli import main

sys.exit(main())
