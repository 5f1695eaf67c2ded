"""From statistics to plans: ranges, grids, predicted noise, and the choice among candidates."""
