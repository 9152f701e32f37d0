"""What real clients of an OpenAI-compatible server ask, each a function of `openai`'s client.

Each gives what must be the same from every server that has the model: texts, tokens, logprobs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Literal

import pydantic
from openai import OpenAI
from random_checkpoints import prompts

Client = Callable[[OpenAI, str], Any]

_CHAT: Any = [
    {"role": "system", "content": "you answer in short words"},
    {"role": "user", "content": "which of these two cities is larger, and by how much?"},
]


class City(pydantic.BaseModel):
    """No string or number without an end, which a random model would not reach."""

    name: Literal["Oslo", "Bergen", "Trondheim"]
    has_harbour: bool
    climate: Literal["wet", "dry", "cold"]


_TOOL: Any = {
    "type": "function",
    "function": {"name": "look_up", "strict": True, "parameters": City.model_json_schema()},
}


def chat(client: OpenAI, model: str) -> Any:
    """With logprobs."""
    choice = _chat(client, model, max_tokens=20, logprobs=True, top_logprobs=2).choices[0]
    assert choice.logprobs is not None
    assert len(choice.logprobs.content or ()) == 20
    return [choice.message.content, choice.logprobs.model_dump()]


def stream(client: OpenAI, model: str) -> Any:
    """A streamed chat, joined; the usage comes last."""
    parts = list(
        _chat(client, model, max_tokens=20, stream=True, stream_options={"include_usage": True})
    )
    assert len(parts) > 3
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    return [text, parts[-1].usage.completion_tokens, parts[-1].usage.prompt_tokens]


def several(client: OpenAI, model: str) -> Any:
    """Several answers to one prompt, drawn with a seed."""
    choices = _chat(client, model, max_tokens=8, n=3, temperature=0.7, seed=5).choices
    texts = [choice.message.content for choice in choices]
    assert len(set(texts)) == 3
    return texts


def batch(client: OpenAI, model: str) -> Any:
    """Completions of several texts in one request, each up to a stop word."""
    texts = ["the first", "a second, longer one", "third\n"]
    answer = client.completions.create(
        model=model, prompt=texts, max_tokens=16, temperature=0, stop=["e"], logprobs=2
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    return [[choice.text, choice.finish_reason] for choice in answer.choices]


def beams(client: OpenAI, model: str) -> Any:
    """vLLM searches beams by many short requests that ask for logprobs."""
    answer = client.completions.create(
        model=model,
        prompt="two ways on",
        max_tokens=4,
        n=2,
        temperature=0,
        extra_body={"use_beam_search": True},
    )
    return [choice.text for choice in answer.choices]


def schema(client: OpenAI, model: str) -> Any:
    """An answer that a JSON schema constrains."""
    content = _chat(
        client,
        model,
        max_tokens=80,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "city", "schema": City.model_json_schema(), "strict": True},
        },
    ).choices[0].message.content  # fmt: skip
    return City.model_validate_json(content).model_dump()


def tool(client: OpenAI, model: str) -> Any:
    """What the grammar of a tool's call allows; a random model may not come to its end."""
    named = {"type": "function", "function": {"name": "look_up"}}
    answer = _chat(client, model, max_tokens=80, tools=[_TOOL], tool_choice=named)
    message = answer.choices[0].message
    calls = [call.function.model_dump() for call in message.tool_calls or ()]
    assert message.content or calls
    return [message.content, calls]


def score(client: OpenAI, model: str) -> Any:
    """What lm-eval does with a server: token ids in, in batches; the logprobs of the continuation,
    and whether it is the likeliest one.
    """
    found = []
    given = [ids for ids in prompts(8).values() if len(ids) > 4]
    for max_tokens in (1, 0):
        answer = client.completions.create(
            model=model,
            prompt=given,
            max_tokens=max_tokens,
            temperature=0,
            logprobs=1,
            echo=True,
            seed=1234,
        )
        for ids, choice in zip(given, answer.choices, strict=True):
            said: Any = choice.logprobs
            continuation = slice(2, len(ids))
            own, likeliest = (of[continuation] for of in (said.token_logprobs, said.top_logprobs))
            assert len(own) == len(ids) - 2
            greedy = all(p == max(at.values()) for p, at in zip(own, likeliest, strict=True))
            found.append([sum(own), greedy, likeliest])
    return found


def echo(client: OpenAI, model: str) -> Any:
    """A prompt back, before its completion, with logprobs of both."""
    text = "said once more"
    answer = client.completions.create(
        model=model, prompt=text, max_tokens=6, temperature=0, echo=True, logprobs=3
    )
    choice = answer.choices[0]
    assert choice.text.startswith(text)
    assert choice.logprobs is not None
    return [choice.text, json.loads(choice.logprobs.model_dump_json())]


def _chat(client: OpenAI, model: str, **more: Any) -> Any:
    given: dict[str, Any] = {"messages": _CHAT, "temperature": 0} | more
    return client.chat.completions.create(model=model, **given)


CLIENTS: dict[str, Client] = {
    one.__name__: one for one in (chat, stream, several, batch, beams, schema, tool, score, echo)
}
