"""Conversations: the records of `messages` and `sharegpt`, checked and brought into one shape.

The shape is what chat templates expect: a list of messages with role and content, a list of tools or None, and variables.
"""

import json

from .errors import BadRecord, quoted
from .records import DECODER, kind_of, need_field, text_field

ROLES = ("system", "user", "assistant", "tool")

RESERVED = ("messages", "tools", "add_generation_prompt")  # variables of a template that are not the user's to set

# What may stand beside a conversation.
SYSTEM_KEYS = ("system", "system_prompt")
VARIABLES_KEY = "chat_template_kwargs"
CONVERSATION_KEYS = frozenset((*SYSTEM_KEYS, "tools", VARIABLES_KEY))
MARKED_KEYS = frozenset(("role", "content", "weight", "train"))  # of a message; the others are the template's alone
SILENT_KEYS = MARKED_KEYS | {"name"}  # besides which there may be words
TURN_KEYS = frozenset(("from", "value", "weight", "train"))

# Who speaks in ShareGPT-like data, in the spellings that are about.
SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}


def messages_of(value, name="messages"):
    """The checked messages of a list; `name` is what the list is called in the record."""
    if not isinstance(value, list) or not value:
        raise BadRecord(f'the field "{name}" must be a list of at least one message')
    return [message_of(message, f"{name}[{i}]") for i, message in enumerate(value)]


def message_of(message, name):
    if not isinstance(message, dict):
        raise BadRecord(f"{name} is a JSON {kind_of(message)}, not an object with role and content")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        if "from" in message and "role" not in message:
            raise BadRecord(f'{name} has "from" instead of "role"; give --format sharegpt')
        raise BadRecord(f'{name}: role is {quoted(role)}, must be one of {", ".join(ROLES)}')
    content = message.get("content")
    if len(message) == 2 and isinstance(content, str):
        return message
    message = dict(message)
    if message.get("function_call"):
        raise BadRecord(f'{name} has "function_call", which templates do not know any more; write "tool_calls"')
    if isinstance(content, list):
        message["content"] = joined_parts(content, f"{name}.content")
    elif content is None and role == "assistant" and message.get("tool_calls"):
        message["content"] = ""  # an assistant that calls a tool may have nothing to say
    else:
        text_field(message, "content", f"{name}.content")
    if message.get("tool_calls") is not None:
        message["tool_calls"] = tool_calls_of(message["tool_calls"], f"{name}.tool_calls")
    weight, train = message.get("weight"), message.get("train")
    if weight is not None and weight not in (0, 1):
        raise BadRecord(f"{name}.weight is {quoted(json.dumps(weight))}, must be 0 or 1")
    if train is not None and not isinstance(train, bool):
        raise BadRecord(f"{name}.train is {quoted(json.dumps(train))}, must be true or false")
    return message


def is_trained(message):
    """A message may say itself that it is not to be learned: `weight` 0 as OpenAI has it, or `train` false."""
    return message.get("weight") != 0 and message.get("train") is not False


def is_empty(message):
    """Whether a message says nothing, not even a call or a reasoning beside the content."""
    return not message["content"].strip() and not any(message[key] for key in message.keys() - SILENT_KEYS)


def joined_parts(parts, name):
    """Content in parts, [{"type": "text", "text": ...}], as one text."""
    texts = []
    for i, part in enumerate(parts):
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else kind_of(part)
            raise BadRecord(
                f"{name}[{i}] is of the type {quoted(kind)}; only parts of type text can be learned from"
            )
        texts.append(text_field(part, "text", f"{name}[{i}].text"))
    return "".join(texts)


def tool_calls_of(calls, name):
    """Tool calls whose arguments are objects: templates write them as JSON, so a string would be escaped twice."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadRecord(f'the field "{name}" must be a list of objects')
    checked = []
    for i, call in enumerate(calls):
        function = call.get("function", call)
        if not isinstance(function, dict):
            raise BadRecord(f'the field "{name}[{i}].function" must be an object')
        text_field(function, "name", f"{name}[{i}].function.name")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = parsed(arguments, f"{name}[{i}].function.arguments")
        if arguments is not None and not isinstance(arguments, dict):
            raise BadRecord(
                f'the field "{name}[{i}].function.arguments" is a JSON {kind_of(arguments)}, must be an object'
            )
        function = {**function, "arguments": arguments or {}}
        checked.append({**call, "function": function} if "function" in call else function)
    return checked


def parsed(text, name):
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f'the field "{name}" is a string that is not JSON; correct it') from error


def tools_of(record):
    """The field `tools`: a list of objects, also as a string of JSON; None where there is none."""
    tools = record.get("tools")
    if isinstance(tools, str):
        tools = parsed(tools, "tools") if tools.strip() else None
    if not tools:
        if tools not in (None, []):
            raise BadRecord('the field "tools" must be a list of objects')
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRecord('the field "tools" must be a list of objects')
    return tools


def system_of(record):
    """(key, text) of the system text that stands beside a conversation, under one of two names; the text may be empty."""
    given = {key: text_field(record, key, default="") for key in SYSTEM_KEYS}
    filled = {key: text for key, text in given.items() if text}
    if len(set(filled.values())) > 1:
        raise BadRecord(f'the fields {" and ".join(map(quoted, filled))} differ; keep one')
    return next(iter(filled.items()), (SYSTEM_KEYS[0], ""))


def with_system(record, messages, name):
    """The messages of the record's field `name`, the first of them the system text that stands beside them."""
    key, system = system_of(record)
    own = [message["content"] for message in messages if message["role"] == "system"] if system else []
    if any(text != system for text in own):
        raise BadRecord(f'a system text stands in "{key}" and another one in "{name}"; keep one')
    return messages if own or not system else [{"role": "system", "content": system}, *messages]


def variables_of(record):
    """The field `chat_template_kwargs`, TRL's name for variables of the template."""
    variables = record.get(VARIABLES_KEY)
    if variables is None:
        return {}
    if not isinstance(variables, dict):
        raise BadRecord(f'the field "{VARIABLES_KEY}" is a JSON {kind_of(variables)}, must be an object')
    taken = next((key for key in variables if key in (*RESERVED, "chat_template", "continue_final_message")), None)
    if taken:
        raise BadRecord(f'the field "{VARIABLES_KEY}.{taken}" is no free variable of the template; remove it')
    return variables


def from_sharegpt(record):
    """The messages of {"conversations": [{"from": "human", "value": ...}, ...]}."""
    need_field(record, "conversations")
    turns = record["conversations"]
    if not isinstance(turns, list) or not turns:
        raise BadRecord('the field "conversations" must be a list of at least one turn')
    messages = []
    for i, turn in enumerate(turns):
        name = f"conversations[{i}]"
        if not isinstance(turn, dict):
            raise BadRecord(f"{name} is a JSON {kind_of(turn)}, not an object with from and value")
        if "from" not in turn and "role" in turn:
            messages.append(message_of(turn, name))
        else:
            messages.append(turn_of(turn, name))
    return messages


def turn_of(turn, name):
    speaker = turn.get("from")
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise BadRecord(f'{name}: from is {quoted(speaker)}, must be one of {", ".join(SPEAKERS)}')
    value = text_field(turn, "value", f"{name}.value")
    extra = {key: turn[key] for key in ("weight", "train") if turn.get(key) is not None}
    if speaker != "function_call":
        message = {"role": SPEAKERS[speaker], "content": value, **extra}
        return message_of(message, name) if extra else message
    calls = parsed(value, f"{name}.value")
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) for call in calls):
        raise BadRecord(f"{name}.value must be JSON of a call, an object with name and arguments")
    calls = [{"type": "function", "function": call} for call in calls]
    return message_of({"role": "assistant", "content": "", "tool_calls": calls, **extra}, name)
