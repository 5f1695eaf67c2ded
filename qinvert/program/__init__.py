"""Programs: a flat list of typed steps between named ports, as pure data."""
