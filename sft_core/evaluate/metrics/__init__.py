"""The metrics, one file a metric or a family of them.

A new metric is one new file in this folder with a class like this one. registry.py imports every file here, so a recipe
can name the metric at once:

    class Words(Metric):
        name = "words"
        is_share = False

        def score(self, output: str, wanted: str) -> float:
            return len({*wanted.split()} & {*output.split()}) / len({*wanted.split()})

metric.py has what else a class may state and override. Import a library that takes long inside the method that uses it:
`sft plan` imports this folder, too.
"""
