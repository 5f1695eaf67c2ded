"""The whole chunk step of a gated delta rule as a program: keys, decays, inverse, values and state."""
