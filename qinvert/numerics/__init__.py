"""Numbers: the one module that rounds, its scalar twins, scales, accumulators, and a processor's own law."""
