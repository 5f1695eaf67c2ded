"""Plans: a program with an integer format and a scale for every tensor."""
