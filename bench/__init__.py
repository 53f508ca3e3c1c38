"""Time of the operators and of the model, beside the straightforward formulation; see docs/bench.md."""
