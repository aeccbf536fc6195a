"""The process that answers prompts with vLLM: a JSON file of them in, one of their new tokens out.

It runs by its path in an environment that need not hold this project: vLLM pins libraries to other versions than ours.
"""

import json
import os
import runpy
import sys
from pathlib import Path


def main() -> None:
    job, out, started_by = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    # By its path, too: with the project on the search path, an installed one would bring its libraries along.
    runpy.run_path(str(Path(__file__).parent.parent / "lifetime.py"))["die_with_parent"](started_by)
    asked = json.loads(job.read_text())

    import vllm

    engine = vllm.LLM(**asked["engine"])
    answers = engine.generate(
        [{"prompt_token_ids": ids} for ids in asked["prompts"]],
        [vllm.SamplingParams(**params) for params in asked["sampling"]],
        use_tqdm="TQDM_DISABLE" not in os.environ,  # of a bar that is switched off vLLM divides by its time
    )
    told = {"version": vllm.__version__, "answers": [list(answer.outputs[0].token_ids) for answer in answers]}
    out.write_text(json.dumps(told))


if __name__ == "__main__":
    main()
