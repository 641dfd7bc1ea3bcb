"""Runs it on Ray: plan, units, stages, shards, published corpus, and the `x2i` command line."""
