"""Judges an image or a sample: scorers turn pixels into columns, decisions turn columns into keep or drop."""
