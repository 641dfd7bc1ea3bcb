"""Scorers: encoded images and their captions in, columns out. They measure; `filters.decide` judges."""
