"""For whoever maintains the series: check, lint, the matrix, proofs, new pins and what upstream does."""
