"""Guess tokens cheaply, verify them in one step of the model, and keep its distribution: speculative decoding."""
