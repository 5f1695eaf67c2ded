"""One pass over the data: streaming statistics that can be merged, saved and resumed."""
