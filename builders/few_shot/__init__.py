"""Few-shot groups: finished samples become examples for each other, where they show one and the same mapping."""
