"""Replay a step on two sides and in the oracle, and name the first operation, parameter or rule at which they part.

`step.replay` takes steps one after another, each from the same state on both sides, and judges each.
Every part is judged by the float64 oracle on the side's own numbers, so that the answer says which side is wrong.
"""
