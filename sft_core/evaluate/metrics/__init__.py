"""The metrics, one file a metric or a family of them.

A new metric is one new file in this folder with a class like this one; registry.py imports every file here, so that a
recipe can name the metric at once:

    class Words(Metric):
        \"\"\"The share of the wanted words that the output has.\"\"\"

        name = "words"
        is_share = False

        def score(self, output: str, wanted: str) -> float:
            return len({*wanted.split()} & {*output.split()}) / len({*wanted.split()})

What else a class may state and override stands in metric.py. A library that takes long to import is imported inside
the method that uses it: `sft plan` imports this folder, too.
"""
