"""From a plan to the nodes of a graph: one module for each kind of lowering."""
