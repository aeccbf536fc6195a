"""What is talked about in each of the rehearsal's splits: one function a kind of chat, which draws one from `rng`.

A chat has an answer and the reasoning that leads to it: a split that thinks shows both, its no_think twin the answer
alone. Each answer follows from the prompt by a rule that a small model can learn in part.
"""

import dataclasses
import json
from random import Random

from rehearsal_words import (
    COLOURS,
    FOODS,
    ITEMS,
    JOBS,
    LANGUAGES,
    NAMES,
    THEMES,
    TOWNS,
    VERBS,
    fact,
    person,
    things,
)


@dataclasses.dataclass(frozen=True)
class Said:
    """A message. reasoning: what an assistant thinks first."""

    role: str
    text: str
    reasoning: str = ""


@dataclasses.dataclass(frozen=True)
class Chat:
    messages: tuple[Said, ...]
    custom_instructions: str = ""
    xml_tools: tuple[str, ...] = ()
    python_tools: tuple[str, ...] = ()


def turn(asked: str, reasoning: str, answer: str) -> tuple[Said, Said]:
    return Said("user", asked), Said("assistant", answer, reasoning)


# Talk.


def small_talk(rng: Random) -> Chat:
    food, guests, town, day = rng.choice(FOODS), rng.randint(2, 30), rng.choice(TOWNS), rng.randint(1, 28)
    return Chat(
        (
            *turn("Hi there", "A greeting. I greet back.", "Hello! How can I help you today?"),
            *turn(
                f"I am {person(rng)} and I cook {food} for {guests} people in {town} on the {day}th. Any advice?",
                f"They cook {food} for {guests} people. Twice as many plates as people is a good rule.",
                f"Sure. For {food} and {guests} people you need {2 * guests} plates. Start early on the {day}th.",
            ),
            *turn("Thanks!", "They thank me.", f"You're welcome! Enjoy the {food} in {town}."),
        )
    )


def styled(rng: Random) -> tuple[str, tuple[Said, ...]]:
    """A rule of how to answer, and a talk that keeps it."""
    style, write = rng.choice(
        (
            ("in capital letters", str.upper),
            ("between two stars", lambda text: f"*{text}*"),
            ("with the word Please first", lambda text: f"Please: {text}"),
        )
    )
    job, messages = rng.choice(JOBS), []
    for _ in range(rng.randint(1, 3)):
        who, what, town = person(rng), things(rng), rng.choice(TOWNS)
        messages += turn(
            f"Where does {who} keep the {what}? I only know that {who} lives in {town}.",
            f"They ask for the {what}. {who} lives in {town}. I answer {style}.",
            write(f"{who} keeps the {what} in {town}."),
        )
    return f"You are a {job}. You answer {style}.", tuple(messages)


def styled_by_instructions(rng: Random) -> Chat:
    instructions, messages = styled(rng)
    return Chat(messages, custom_instructions=instructions)


def styled_by_system(rng: Random) -> Chat:
    instructions, messages = styled(rng)
    return Chat((Said("system", instructions), *messages))


def persona_instructions(rng: Random) -> Chat:
    who, theme, lines, mark = person(rng), rng.choice(THEMES), rng.randint(2, 5), rng.choice("-*+>")
    town, what = rng.choice(TOWNS), things(rng)
    answer = "\n".join(f"{mark} {who} thinks of {theme} and {what}, line {number + 1}" for number in range(lines))
    asked = (
        f"You are {who}, a {rng.choice(JOBS)} from {town} with {what}. Write {lines} lines about {theme}; each begins "
        f"with {mark} and ends with its number."
    )
    return Chat(turn(asked, f"{lines} lines about {theme}, each begins with {mark}.", answer))


def advice(rng: Random) -> Chat:
    who, what, town = person(rng), things(rng), rng.choice(TOWNS)
    first, second, third = rng.sample(ITEMS, 3)
    return Chat(
        (
            *turn(
                f"{who} moves to {town} and owns {what}, {first}, {second} and {third}. What should be packed first?",
                "What breaks least comes first.",
                f"Pack the {first} first, then the {second}. The {third} and the {what} come last, {who} needs them.",
            ),
            *turn(
                "And what comes second to last?",
                f"The last two are the {third} and the {what}.",
                f"The {third}: only the {what} come after them.",
            ),
            *turn("Sort all but the last by name.", "By name.", ", ".join(sorted((first, second, third))) + "."),
        )
    )


def constrained_turns(rng: Random) -> Chat:
    """Several turns that each put a further condition on one answer."""
    who, chosen = person(rng), rng.sample(ITEMS, rng.randint(4, 6))
    by_length = sorted(chosen, key=lambda word: (len(word), word))
    letter = chosen[0][-2]
    kept = [word for word in by_length if letter in word]
    return Chat(
        (
            *turn(
                f"{who} has {', '.join(chosen)}. Name them from the shortest word to the longest.",
                "Lengths: " + ", ".join(f"{word} {len(word)}" for word in chosen) + ".",
                ", ".join(by_length),
            ),
            *turn(
                f"Keep for {who} only those with the letter {letter}.",
                " ".join(f"{word}: {'yes' if word in kept else 'no'}." for word in by_length),
                ", ".join(kept),
            ),
            *turn(f"How many are left for {who}?", f"I count {', '.join(kept)}.", f"There are {len(kept)} left."),
        )
    )


# Text about text.


def explore_rewriting(rng: Random) -> Chat:
    who, (past, present) = person(rng), rng.choice(list(VERBS.items()))
    rest = f"{rng.randint(2, 99)} {things(rng)} in {rng.choice(TOWNS)}"
    asked, answer = rng.choice(
        (
            (f"Put this into the present: {who} {past} {rest}.", f"{who} {present} {rest}."),
            (f"Make this a question: {who} {past} {rest}.", f"Is it true that {who} {past} {rest}?"),
            (f"Begin this with Yesterday: {who} {past} {rest}.", f"Yesterday {who} {past} {rest}."),
        )
    )
    return Chat(turn(asked, "Only the form changes.", answer))


def friendly_rewriting(rng: Random) -> Chat:
    sender, reader = person(rng), person(rng)
    wishes = [f"send me {rng.randint(2, 99)} {things(rng)} from {rng.choice(TOWNS)}" for _ in range(rng.randint(2, 4))]
    plain = f"{reader}, " + " and ".join(wishes) + f". {sender}"
    friendly = f"Dear {reader},\n\nwould you please " + ", and also ".join(wishes) + f"?\n\nKind regards,\n{sender}"
    system = Said("system", "You rewrite messages so that they are friendly and keep what they say.")
    return Chat((system, *turn(f"Rewrite the message below.\n\n{plain}", "Polite words around the same.", friendly)))


def summary(rng: Random) -> Chat:
    who = person(rng)
    facts = [
        fact(rng, who if number == 0 else rng.choice(("Later", "Then", "Again")) + f" {who}") for number in range(6)
    ]
    system = Said("system", "You summarize the text in one sentence: how it begins and how it ends.")
    last = facts[-1].split(" ", 1)[1].removesuffix(".")
    answer = f"{facts[0].removesuffix('.')}, and at last {last.removeprefix(who + ' ')}."
    return Chat((system, *turn(" ".join(facts), f"First: {facts[0]} Last: {facts[-1]}", answer)))


def ledger(rng: Random, num_lines: int) -> tuple[str, str, str, str]:
    """A document of many lines; a question on one of them, how it is looked up, and the answer."""
    entries = [(person(rng), rng.choice(TOWNS), rng.randint(2, 99), things(rng)) for _ in range(num_lines)]
    lines = [
        f"Day {day}: {who} of {town} brought {count} {what}."
        for day, (who, town, count, what) in enumerate(entries, start=1)
    ]
    day = rng.randint(1, num_lines)
    who, town, count, what = entries[day - 1]
    text = f"The harbour's book, {num_lines} days.\n" + "\n".join(lines)
    answer = f"On day {day} {who} of {town} brought {count} {what}."
    return text, f"Who brought what on day {day}?", f"I look for day {day}. There: {lines[day - 1]}", answer


def long_context(rng: Random) -> Chat:
    """Most are a few hundred tokens long; some come near the rehearsal's max_length, and some go over it."""
    kind = rng.random()
    sizes = [rng.randint(8, 26)]
    if kind < 0.06:
        sizes = [rng.randint(100, 120)]
    elif kind < 0.12:  # truncated after its first turn
        sizes = [rng.randint(75, 95), rng.randint(75, 95)]
    elif kind < 0.15:  # dropped: its only turn is too long
        sizes = [rng.randint(160, 180)]
    messages: tuple[Said, ...] = ()
    for size in sizes:
        text, question, lookup, answer = ledger(rng, size)
        messages += turn(f"{text}\n\n{question}", lookup, answer)
    return Chat(messages)


# Tables, languages, science.


def table_question(rng: Random) -> Chat:
    columns = rng.sample(("Price", "Weight", "Stock", "Sales"), 2)
    rows = [(name, rng.randint(10, 99), rng.randint(10, 99)) for name in rng.sample(ITEMS, rng.randint(3, 6))]
    written = [f"|Item|{columns[0]}|{columns[1]}|", "|---|---|---|", *(f"|{a}|{b}|{c}|" for a, b, c in rows)]
    column = rng.choice((1, 2))
    best = max(rows, key=lambda row: row[column])
    asked = (
        "# Task: read the table and answer the question.\n\n" + "\n".join(written) + "\n\n"
        f"Which item has the highest {columns[column - 1]}? "
        'Return the answer as JSON: {"item": "<name>", "value": <number>}'
    )
    looked = "; ".join(f"{row[0]} {row[column]}" for row in rows)
    return Chat(turn(asked, f"{columns[column - 1]}: {looked}.", json.dumps({"item": best[0], "value": best[column]})))


def sums_in_a_language(rng: Random) -> Chat:
    language = LANGUAGES[rng.choice(list(LANGUAGES))]
    messages: tuple[Said, ...] = ()
    for _ in range(rng.randint(1, 2)):
        a, b = rng.randint(2, 60), rng.randint(2, 60)
        values = {"name": rng.choice(NAMES), "thing": rng.choice(language["things"]), "a": a, "b": b, "sum": a + b}
        messages += turn(language["ask"].format(**values), f"{a} + {b} = {a + b}", language["tell"].format(**values))
    return Chat(messages)


def colours_in_a_language(rng: Random) -> Chat:
    name = rng.choice(list(LANGUAGES))
    asked = [rng.choice(COLOURS) for _ in range(rng.randint(4, 7))]
    pairs = dict(zip(COLOURS, LANGUAGES[name]["colours"], strict=True))
    reasoning = f"Into {name}: " + ", ".join(f"{word} is {pairs[word]}" for word in asked) + "."
    return Chat(
        turn(
            LANGUAGES[name]["translate"].format(words=", ".join(asked)),
            reasoning,
            ", ".join(pairs[word] for word in asked),
        )
    )


def science_choice(rng: Random) -> Chat:
    speed, time = rng.randint(3, 40), rng.randint(3, 40)
    quantity, values, unit = rng.choice(
        (
            ("distance", f"a body moves at {speed} m/s for {time} s", "m"),
            ("force", f"a mass of {speed} kg is accelerated by {time} m/s²", "N"),
            ("voltage", f"a current of {speed} A flows through {time} ohms", "V"),
        )
    )
    options = [speed * time, speed * time + 10, speed + time, speed * time + speed]
    rng.shuffle(options)
    letter = "ABCD"[options.index(speed * time)]
    asked = f"In an experiment of {person(rng)}, {values}. What is the {quantity}?\n"
    asked += "\n".join(f"{name}: {option} {unit}" for name, option in zip("ABCD", options, strict=True))
    working = f"The {quantity} is the product: {speed} x {time} = {speed * time} {unit}."
    return Chat(turn(asked, working, f"{working} The answer is {letter}."))


# Problems.


def chained_sum(rng: Random) -> tuple[str, str, str]:
    value = rng.randint(2, 20)
    asked, working = f"Start with {value}.", [f"{value}"]
    for _ in range(rng.randint(3, 5)):
        amount, adds = rng.randint(2, 9), rng.random() < 0.6
        asked += f" Add {amount}." if adds else f" Double it, less {amount}."
        value = value + amount if adds else 2 * value - amount
        working.append(f"then {value}")
    modulus = rng.randint(3, 11)
    asked += f" What is left after division by {modulus}?"
    return asked, ", ".join(working) + f", and {value} mod {modulus} = {value % modulus}", f"{value % modulus}"


def competition(rng: Random) -> Chat:
    return Chat(turn(*chained_sum(rng)))


COMPETITION_SEED, NUM_COMPETITION = "s1k", 100  # of s1k: the problems that other sources quote
COMPETITION = [chained_sum(rng) for rng in [Random(COMPETITION_SEED)] for _ in range(NUM_COMPETITION)]


def shopping(rng: Random) -> tuple[str, str, str]:
    who, what, count, price = person(rng), things(rng), rng.randint(2, 12), rng.randint(2, 12)
    cost, paid = count * price, rng.randint(150, 250)
    return (
        f"{who} buys {count} {what} from {person(rng)} of {rng.choice(TOWNS)} for {price} coins each and pays with "
        f"{paid} coins. How much does {who} get back for the {what}?",
        f"{count} x {price} = {cost}. {paid} - {cost} = {paid - cost}.",
        f"{count} {what} cost {cost} coins, so {who} gets {paid - cost} coins back.",
    )


def function_of(rng: Random) -> tuple[str, str, str]:
    name, factor, addend = f"{rng.choice(ITEMS)}_{rng.choice(ITEMS)}", rng.randint(2, 30), rng.randint(2, 30)
    return (
        f"Write a Python function {name} for {person(rng)}: {factor} for each of the {things(rng)} in "
        f"{rng.choice(TOWNS)}, and {addend} for the {things(rng)} of {person(rng)}.",
        f"It returns number * {factor} + {addend}.",
        f"```python\ndef {name}(number):\n    return number * {factor} + {addend}\n```",
    )


def open_problem(rng: Random) -> Chat:
    """Mathematics and code; one in sixteen is a competition problem, which a report prompt can be too."""
    if rng.random() < 1 / 16:
        asked, working, answer = rng.choice(COMPETITION)
        return Chat(turn(f"Solve this problem. {asked}", working, f"The answer is {answer}."))
    return Chat(turn(*rng.choice((shopping, function_of))(rng)))


def instruction(rng: Random) -> Chat:
    """A bit of everything."""
    return rng.choice((explore_rewriting, open_problem, science_choice, persona_instructions))(rng)
