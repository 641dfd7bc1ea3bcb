"""What flows through x2i: typed records, their Arrow form, the shard format and the recipe."""
