"""Two machines in turn on one bucket: each works for a random time, is killed, and the other goes on."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.campaign.attempts import Attempt
from tests.campaign.kills import WHOLE_S
from tests.campaign.pipeline import recipe
from tests.object_server import ObjectServer


class Turns(NamedTuple):
    """A run that machines ended in turns. failed: attempts that failed by themselves."""

    turns: int
    failed: int
    different: list[str]
    left: list[str]  # kept checkpoints that nobody removed


def turns(seed: int, number: int, folder: Path, expected: dict[str, str]) -> Iterator[Turns]:
    rng = random.Random(seed)
    with ObjectServer() as server:
        for count in range(number):
            bucket = f"turns-{seed}-{count}"
            server.client.create_bucket(Bucket=bucket)
            yield _turns(rng, server, bucket, folder / f"turns-{count}", expected)


def _turns(rng: random.Random, server: ObjectServer, bucket: str, folder: Path, expected: dict[str, str]) -> Turns:
    shutil.rmtree(folder, ignore_errors=True)
    count = failed = 0
    while True:
        machine = folder / rng.choice(["one", "two"])
        environment = {**server.environment, "SFT_CACHE": str(machine / "cache")}
        attempt = Attempt(recipe(f"s3://{bucket}/store"), machine, environment=environment)
        code = attempt.ended_within(WHOLE_S if count >= 8 else rng.uniform(5, 40))
        attempt.kill()
        count += 1
        if code == 0:
            break
        failed += code is not None
        if failed > 3:
            break
    found, left = {}, []
    for name in server.names(bucket):
        path = name.removeprefix("store/")
        if path.startswith(".partial/"):
            left.append(path)
        if path.startswith(".data/"):
            _, output, _, file = path.split("/", 3)
            if file.split("/")[0] != "logs":
                body = server.client.get_object(Bucket=bucket, Key=name)["Body"].read()
                found[f"{output.replace('-', '/', 1)}/{file}"] = hashlib.sha256(body).hexdigest()
    different = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    return Turns(count, failed, different, left)


def as_row(found: list[Turns]) -> tuple[str, str, str]:
    whole = sum(not one.different and not one.failed and not one.left for one in found)
    return (
        f"{sum(one.turns for one in found)} turns of two machines on a bucket, in {len(found)} runs",
        "each run ends with the same bits, and nothing is left of what was kept",
        f"{whole} of {len(found)} runs",
    )


def is_kept(found: list[Turns]) -> bool:
    return all(not one.different and not one.failed and not one.left for one in found)
