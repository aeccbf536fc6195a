"""The recipe's datasets: the kinds of them, and the mixture that they make."""
