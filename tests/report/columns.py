"""The columns of the score table and of its overview, for a recipe of one phase."""

HEADER = ("task", "metric", "n", "base", "tuned", "stderr", "difference", "low", "high", "flags")
OVERVIEW = ("task", "n", "base loss", "tuned loss", "metric", "base", "tuned", "difference", "low", "high", "flags")
