"""Release assets for packagers: `dist` and one module per distribution channel."""
