"""The process that answers prompts with vLLM, for as long as the pipe to it is open: JSON in, JSON out.

The first message holds the engine's settings; the reply, once the engine is up, is its version. Each later message
holds prompts; the reply is their new tokens. An error goes to stderr and ends the process.

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
    # Load by path: with the project on the search path, its installed libraries would win over this environment's.
    runpy.run_path(str(Path(__file__).parent.parent / "die_with_parent.py"))["die_with_parent"](started_by)
    os.set_inheritable(end, False)
    pipe = Connection(end)
    settings = json.loads(pipe.recv_bytes())

    import vllm

    engine = vllm.LLM(**settings)
    pipe.send_bytes(json.dumps({"version": vllm.__version__}).encode())
    while True:
        try:
            request = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        answers = engine.generate(
            [{"prompt_token_ids": ids} for ids in request["prompts"]],
            [vllm.SamplingParams(**params) for params in request["sampling"]],
            use_tqdm="TQDM_DISABLE" not in os.environ,  # with a hidden bar vLLM divides by zero seconds
        )
        pipe.send_bytes(json.dumps({"answers": [list(answer.outputs[0].token_ids) for answer in answers]}).encode())


if __name__ == "__main__":
    main()
