"""Sources: raw rows, wherever they are, as canonical conversations.

Each kind of source is a module that reads the rows of a dataset in sft_core/datasets/kinds, and names its class SOURCE.
"""
