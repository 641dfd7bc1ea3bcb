"""Produces artefacts of an image: condition maps, masks, captions."""
