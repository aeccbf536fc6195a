"""Chats with tools: JSON calls between tags, several at once, and Python calls in several steps."""

import json
from random import Random
from typing import Any

from rehearsal_chats import Chat, Said, turn
from rehearsal_words import ITEMS, TOWNS, person, things


def described(name: str, description: str, **parameters: str) -> dict[str, Any]:
    """A tool as JSON. parameters: each one's type."""
    properties = {key: {"type": kind} for key, kind in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"name": name, "description": description, "parameters": schema}


STOCK = described("get_stock", "How many of an item are in a town.", item="string", town="string")
PRICE = described("get_price", "The price of so many of an item.", item="string", count="integer")
WEATHER = described("get_weather", "The weather of a town.", town="string", day="integer")
STOCK_IN_PYTHON = 'def get_stock(item: str, town: str) -> int:\n    """How many of an item are in a town."""'
ANSWER_IN_PYTHON = 'def final_answer(answer: str) -> None:\n    """Ends the task with this answer."""'


def call(tool: dict[str, Any], **arguments: Any) -> str:
    return "<tool_call>\n" + json.dumps({"name": tool["name"], "arguments": arguments}) + "\n</tool_call>"


def function_calling(rng: Random) -> Chat:
    """A call, the tool's response, and the answer from it."""
    item, town, count = rng.choice(ITEMS), rng.choice(TOWNS), rng.randint(0, 500)
    tools = [STOCK, rng.choice((PRICE, WEATHER))]
    rng.shuffle(tools)
    asked, called = turn(
        f"I am {person(rng)}. How many {item} are there in {town}?",
        "get_stock tells it.",
        call(STOCK, item=item, town=town),
    )
    answer = f"There are {count} {item} in {town}." if count else f"There are no {item} in {town}."
    return Chat(
        (asked, called, Said("tool", json.dumps({"stock": count})), Said("assistant", answer)),
        xml_tools=tuple(json.dumps({"type": "function", "function": tool}) for tool in tools),
    )


def parallel_calls(rng: Random) -> Chat:
    """One turn with as many calls as are asked for."""
    tools = [PRICE, WEATHER, STOCK]
    rng.shuffle(tools)
    town, day, items = rng.choice(TOWNS), rng.randint(1, 28), [things(rng) for _ in range(rng.randint(1, 3))]
    counts = [rng.randint(2, 99) for _ in items]
    wishes = [f"what {count} {item} for {person(rng)} cost" for item, count in zip(items, counts, strict=True)]
    calls = [call(PRICE, item=item, count=count) for item, count in zip(items, counts, strict=True)]
    if rng.random() < 0.5:
        wishes.append(f"the weather in {town} on day {day} of {person(rng)}'s journey")
        calls.append(call(WEATHER, town=town, day=day))
    asked = f"{person(rng)} would like to know " + " and ".join(wishes) + "."
    return Chat(
        turn(asked, f"{len(calls)} calls.", "\n".join(calls)), xml_tools=tuple(json.dumps(tool) for tool in tools)
    )


def code_agent(rng: Random) -> Chat:
    """Python between tags, what it prints, and a last call with the answer."""
    item, (first, second) = rng.choice(ITEMS), rng.sample(TOWNS, 2)
    counts = rng.randint(2, 400), rng.randint(2, 400)
    more = first if counts[0] >= counts[1] else second
    lines = "\n".join(f'print(get_stock(item="{item}", town="{town}"))' for town in (first, second))
    return Chat(
        (
            *turn(
                f"For {person(rng)}: are there more {item} in {first} or in {second}?",
                f"I ask for both towns, {first} and {second}.",
                f"<code>\n{lines}\n</code>",
            ),
            *turn(
                f"Observation:\n{counts[0]}\n{counts[1]}",
                f"{first} has {counts[0]} and {second} {counts[1]}: more in {more}.",
                f'<code>\nfinal_answer("{more}")\n</code>',
            ),
        ),
        python_tools=(STOCK_IN_PYTHON, ANSWER_IN_PYTHON),
    )
