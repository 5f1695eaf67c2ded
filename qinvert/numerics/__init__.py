"""Numbers: the module that rounds, its scalar twins, scales, accumulators, and the law of a processor."""
