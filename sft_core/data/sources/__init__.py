"""Sources: raw rows, wherever they are, as canonical conversations.

Each kind of source is a module that reads the rows of a dataset of sft_core/recipe/datasets/kinds. It names its class
SOURCE.
"""
