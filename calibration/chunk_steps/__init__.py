"""Plans of the whole chunk step: what its tensors hold, which widths they need, and what that costs."""
