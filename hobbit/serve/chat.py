"""Chat requests: messages to a prompt, tools and schemas to a grammar."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ..errors import HobbitError, UsageError
from ..generate import parsed_grammar
from ..template import ChatTemplate

Call = dict[str, Any]


def chat_prompt(template: ChatTemplate, body: dict[str, Any], tools: Tools) -> str:
    """Return the text before the answer; raises UsageError for messages it cannot take."""
    messages = [_plain_message(message) for message in _list_of_messages(body.get("messages"))]
    more = body.get("chat_template_kwargs")
    wishes = {**more} if isinstance(more, dict) else {}
    if isinstance(effort := body.get("reasoning_effort"), str):
        wishes = {"reasoning_effort": effort} | wishes
    try:
        return template.render(messages, tools=tools.shown or None, **wishes)
    except HobbitError as exc:
        raise UsageError(f"the messages cannot be put into words: {exc}") from exc


@dataclass(frozen=True)
class Tools:
    """The functions that the model may call. `forced` is the one it must call; `required` that it
    must call one of them.
    """

    tools: tuple[dict[str, Any], ...] = ()
    forced: str = ""
    required: bool = False

    @property
    def shown(self) -> list[dict[str, Any]]:
        """What the template is given."""
        return [*self.tools]

    def schema(self) -> dict[str, Any] | None:
        """Return what the answer must be where it must be a call; None where it is free."""
        if self.forced:
            return _parameters(next(t for t in self.tools if t["function"]["name"] == self.forced))
        if not self.required:
            return None
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool["function"]["name"]},
                    "arguments": _parameters(tool),
                },
                "required": ["name", "arguments"],
            }
            for tool in self.tools
        ]
        return calls[0] if len(calls) == 1 else {"anyOf": calls}


def tools_of(body: dict[str, Any]) -> Tools:
    """Return a request's tools and its choice among them; `functions` is their old name."""
    tools = body.get("tools") or [
        {"type": "function", "function": function} for function in body.get("functions") or []
    ]
    choice = body.get("tool_choice", body.get("function_call"))
    if not isinstance(tools, list) or not all(map(_is_tool, tools)):
        raise UsageError('tools must be a list of {"type": "function", "function": {"name": ...}}')
    if not tools or choice == "none":
        return Tools()
    if choice in (None, "auto"):
        return Tools(tuple(tools))
    if choice == "required":
        return Tools(tuple(tools), required=True)
    name = _name_of(choice)
    if name not in [tool["function"]["name"] for tool in tools]:
        raise UsageError(f"tool_choice: there is no tool {name!r}")
    return Tools(tuple(tools), forced=name)


def grammar_of(body: dict[str, Any], tools: Tools) -> str:
    """Return the grammar that an answer must follow, as GBNF text; empty for none."""
    schema = tools.schema()
    if schema is None:
        schema = _response_schema(body.get("response_format"))
    if schema is None and body.get("json_schema") is not None:
        schema = body["json_schema"]
    if schema is not None:
        return parsed_grammar("", json.dumps(schema))
    grammar = body.get("grammar") or ""
    if not isinstance(grammar, str):
        raise UsageError("grammar must be GBNF text")
    return parsed_grammar(grammar)


def _response_schema(wanted: object) -> Any:
    if wanted is None:
        return None
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if not isinstance(wanted, dict) or kind not in ("text", "json_object", "json_schema"):
        raise UsageError("response_format must have a type: text, json_object or json_schema")
    if kind == "text":
        return None
    if kind == "json_object":
        return wanted.get("schema") or {"type": "object"}
    named = wanted.get("json_schema")
    if not isinstance(named, dict) or not isinstance(named.get("schema"), dict):
        raise UsageError("response_format: json_schema needs a schema")
    return named["schema"]


def _is_tool(tool: object) -> bool:
    function = tool.get("function") if isinstance(tool, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _name_of(choice: object) -> str:
    if isinstance(choice, dict):
        function = choice.get("function", choice)
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            return str(function["name"])
    raise UsageError("tool_choice must be none, auto, required, or name a function")


def _parameters(tool: dict[str, Any]) -> dict[str, Any]:
    parameters = tool["function"].get("parameters")
    return parameters if isinstance(parameters, dict) and parameters else {"type": "object"}


def _list_of_messages(messages: object) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise UsageError("messages must be a list with at least one message")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UsageError("each message must be an object with a role")
    return messages


def _plain_message(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message as templates know it: its content text, a call's arguments an object."""
    plain = message | {"content": _text(message.get("content"))}
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        plain["tool_calls"] = [_plain_call(call) for call in calls]
    return plain


def _text(content: object) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        if all(isinstance(part, str) for part in parts):
            return "".join(str(part) for part in parts)
    raise UsageError(
        "the content of a message must be text: this model sees no images, hears no sound"
    )


def _plain_call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    return call | {"function": function | {"arguments": arguments}}
