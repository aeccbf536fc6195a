"""A campaign of faults against the whole pipeline: kills, flipped bits, full disks, machines in turn, bad input.

    python -m tests.campaign --help

Its oracles read files and hash them by themselves; they ask neither the store nor its manifests.
"""
