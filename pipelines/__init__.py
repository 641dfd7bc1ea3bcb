"""Runs it on Ray: plan, units, stages, shards, published corpus, and the `x2i` command line."""

__version__ = "0.1.0"
