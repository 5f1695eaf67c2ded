"""Numbers: the one module that rounds, its scalar twins, scales, accumulators, and the rounding law of a processor."""
