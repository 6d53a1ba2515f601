"""Maths without domain words: arrays in, arrays out."""
