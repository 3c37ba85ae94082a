"""Make the records of the demo of function calling: Russian requests, and the calls that they ask for."""

import json
import random
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from saigakit.core.files import write_text
from saigakit.demo import packages
from saigakit.errors import SaigaError

Record = dict[str, Any]
_FILE = Path(__file__).with_name("tool_texts.toml")
_TEXTS = tomllib.loads(_FILE.read_text(encoding="utf-8"))
_NO_CALL = {"role": "assistant", "content": _TEXTS["no_call"]}
# That are due in each of twenty records. None is due for talk only: not to call a function that is missing beside
# similar ones is more than the demo's model learns.
CALLS = (0,) * 7 + (1,) * 11 + (2,) * 2
TOOLS = (3, 5)  # in a record; fewer beside a long request, so that a prompt has about 400 tokens at most


class Function(NamedTuple):
    """A function, and the requests that ask for it."""

    name: str
    action: str
    thing: str
    parameters: Mapping[str, str]
    requests: Mapping[str, Sequence[str]]  # by "seen" and "unseen"

    @property
    def tool(self) -> Record:
        """Without a description: its name says all."""
        properties = {name: {"type": kind} for name, kind in self.parameters.items()}
        function = {"name": self.name, "parameters": {"type": "object", "properties": properties}}
        return {"type": "function", "function": function}


def _functions() -> Iterator[Function]:
    for action in _TEXTS["actions"]:
        for thing, russian in action["things"].items():
            requests = {
                style: [text.replace("{thing}", russian) for text in action[style]] for style in ("seen", "unseen")
            }
            yield Function(f"{action['name']}_{thing}", action["name"], thing, action["parameters"], requests)


FUNCTIONS = tuple(_functions())
_TALK = Function("", "", "", {"topic": "string"}, _TEXTS["talk"])
HELD_OUT = frozenset(_TEXTS["held_out"])  # names of functions that training never shows


def packaged_records() -> Path:
    """The directory of train.jsonl and held_out.jsonl, made once per version of this module."""
    return packages.packaged_records(write_records, Path(__file__), _FILE)


def write_records(directory: Path, *, train: int = 480, held_out: int = 200, seed: int = 7) -> tuple[Path, Path]:
    """Write train.jsonl and held_out.jsonl without duplicates.

    Half of the evaluation requests are phrased, and have values, as training never shows; a quarter asks for functions
    of HELD_OUT.
    """
    rng, known = random.Random(seed), [each for each in FUNCTIONS if each.name not in HELD_OUT]
    made: set[str] = set()
    rows = _records(rng, "seen", train, known, known, made)
    new = [each for each in FUNCTIONS if each.name in HELD_OUT]
    tests: list[Record] = []
    for style in ("seen", "unseen"):
        tests += _records(rng, style, held_out // 4, known, FUNCTIONS, made)
        tests += _records(rng, style, held_out // 4, [*new, *rng.sample(known, len(new))], FUNCTIONS, made)
    directory.mkdir(parents=True, exist_ok=True)
    files = zip(("train.jsonl", "held_out.jsonl"), (rows, tests), strict=True)
    first, second = (
        write_text(directory / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found))
        for name, found in files
    )
    return first, second


def _records(
    rng: random.Random,
    style: str,
    count: int,
    asked: Sequence[Function],
    offered: Sequence[Function],
    made: set[str],
) -> list[Record]:
    """`asked`: what requests ask for; `offered`: of which the tools are. The requests are added to `made`."""
    numbers = [CALLS[index * len(CALLS) // count] for index in range(count)]
    rng.shuffle(numbers)
    found: list[Record] = []
    for _ in range(50 * count):
        if len(found) == count:
            return found
        functions = rng.sample(asked, numbers[len(found)])
        pairs = [_request(rng, style, function) for function in functions or [_TALK]]
        if (text := " ".join(request for request, _ in pairs)) in made:
            continue
        made.add(text)
        due = [(function, arguments) for function, (_, arguments) in zip(functions, pairs, strict=False)]
        count_of_tools = rng.randint(TOOLS[0], max(TOOLS[0], TOOLS[1] - (len(text) + 14) // 32))
        found.append(_conversation(text, due, _choose_tools(rng, functions, offered, count_of_tools)))
    raise SaigaError(f"The sentences are not enough for {count} records: ask for fewer.")


def _request(rng: random.Random, style: str, function: Function) -> tuple[str, Record]:
    """A text that asks for a call, and its arguments."""
    made = {
        "time": f"{rng.randint(0, 23)}:{rng.randint(0, 59):02}",
        "minutes": rng.choice([number for number in range(5, 60) if number % 10 in (0, 5, 6, 7, 8, 9)]),
        "date": f"{rng.randint(1, 28)} {rng.choice(_TEXTS['values']['month'])}",
        **{name: _choose(rng, style, _TEXTS["values"][name]) for name in ("city", "text", "topic")},
    }
    arguments = {name: made[name] for name in function.parameters}
    return rng.choice(function.requests[style]).format(**arguments), arguments


def _choose(rng: random.Random, style: str, values: Sequence[str]) -> str:
    """Training shows the first three quarters."""
    known = len(values) * 3 // 4
    return rng.choice(values[:known] if style == "seen" else values[known:])


def _choose_tools(
    rng: random.Random, due: Sequence[Function], offered: Sequence[Function], count: int
) -> list[Function]:
    """What is due, up to two others that do the same or something else with the same thing, and any others."""
    others = [each for each in rng.sample(offered, len(offered)) if each not in due]
    actions, things = ({getattr(each, name) for each in due} for name in ("action", "thing"))
    similar = [each for each in others if each.action in actions or each.thing in things][: rng.randint(0, 2)]
    chosen = [*due, *similar, *(each for each in others if each not in similar)][:count]
    return rng.sample(chosen, count)


def _conversation(text: str, due: Sequence[tuple[Function, Record]], tools: Sequence[Function]) -> Record:
    calls = [{"type": "function", "function": {"name": each.name, "arguments": values}} for each, values in due]
    answer = {"role": "assistant", "content": "", "tool_calls": calls} if calls else _NO_CALL
    return {"messages": [{"role": "user", "content": text}, answer], "tools": [each.tool for each in tools]}
