"""Trained networks in the formats of other programs, and those programs as something to compare with."""
