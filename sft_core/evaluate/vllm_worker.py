"""The process that answers prompts with vLLM, for as long as the pipe to it is open: JSON in, JSON out.

The first message is the engine's settings, answered by its version once it is up; each one after it is prompts,
answered by their new tokens. An error is written to stderr and ends it: an engine that failed is not asked again.

It runs by its path in an environment that need not hold this project: vLLM pins libraries to other versions than ours.
"""

import json
import os
import runpy
import sys
from multiprocessing.connection import Connection
from pathlib import Path


def main() -> None:
    end, started_by = int(sys.argv[1]), int(sys.argv[2])
    # By its path, too: with the project on the search path, an installed one would bring its libraries along.
    runpy.run_path(str(Path(__file__).parent.parent / "die_with_parent.py"))["die_with_parent"](started_by)
    os.set_inheritable(end, False)
    pipe = Connection(end)
    settings = json.loads(pipe.recv_bytes())

    import vllm

    engine = vllm.LLM(**settings)
    pipe.send_bytes(json.dumps({"version": vllm.__version__}).encode())
    while True:
        try:
            asked = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        answers = engine.generate(
            [{"prompt_token_ids": ids} for ids in asked["prompts"]],
            [vllm.SamplingParams(**params) for params in asked["sampling"]],
            use_tqdm="TQDM_DISABLE" not in os.environ,  # of a bar that is switched off vLLM divides by its time
        )
        pipe.send_bytes(json.dumps({"answers": [list(answer.outputs[0].token_ids) for answer in answers]}).encode())


if __name__ == "__main__":
    main()
