"""One page of HTML that shows a plan, what was measured on it, and what to do next."""
