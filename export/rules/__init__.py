"""Rules that graphs must follow, whoever wrote them, and an index of what a graph contains."""
