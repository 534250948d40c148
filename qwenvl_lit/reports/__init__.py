"""Reports for people: datasets and scores as HTML pages and in the terminal, and model cards."""
