"""Makes task samples: one module per task family, and `annotators/` for the artefacts they are views over."""
