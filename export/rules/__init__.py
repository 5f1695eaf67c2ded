"""Rules that graphs keep to, whoever wrote them, and what there is to see in a graph."""
