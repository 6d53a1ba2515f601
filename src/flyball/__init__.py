"""Flyball: the governor for LLM serving. Importing it is light; each part loads when it is used."""

__version__ = "0.1.0"
