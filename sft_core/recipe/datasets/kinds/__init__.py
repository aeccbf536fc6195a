"""The kinds of dataset, one a module: its keys in the recipe, as a subclass of Dataset named SECTION.

The module of the same name in sft_core/data/sources reads the rows. A new kind is these two files: both registries
(sft_core/recipe/datasets/union.py, sft_core/data/sources/registry.py) look into the folders.
"""
