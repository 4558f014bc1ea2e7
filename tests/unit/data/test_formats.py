"""Each format of rows becomes turns; a row that breaks a rule says which."""

import json

import pytest

from lisa_dist.data.formats import ExampleError, describe_columns, detect, to_turns, tools_of

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}


@pytest.mark.parametrize(
    ("row", "name", "turns"),
    [
        ({"messages": [SYSTEM, USER, ASSISTANT]}, "messages", [SYSTEM, USER, ASSISTANT]),
        ({"messages": [{"role": "User", "content": "q"}, ASSISTANT], "id": 1}, "messages", [USER, ASSISTANT]),
        ({"messages": [USER, ASSISTANT], "system": "s"}, "messages", [SYSTEM, USER, ASSISTANT]),
        ({"conversations": [HUMAN, GPT], "system": "s"}, "sharegpt", [SYSTEM, USER, ASSISTANT]),
        ({"conversations": [{"from": "system", "value": "s"}, HUMAN, GPT]}, "sharegpt", [SYSTEM, USER, ASSISTANT]),
        ({"conversations": [USER, ASSISTANT]}, "sharegpt", [USER, ASSISTANT]),
        ({"conversations": [HUMAN, GPT], "system": ""}, "sharegpt", [USER, ASSISTANT]),
        ({"instruction": "q", "output": "a"}, "alpaca", [USER, ASSISTANT]),
        (
            {"instruction": "q", "input": "", "output": "a", "system": None, "history": None},
            "alpaca",
            [USER, ASSISTANT],
        ),
        (
            {"instruction": "q", "input": "i", "output": "a"},
            "alpaca",
            [{"role": "user", "content": "q\n\ni"}, ASSISTANT],
        ),
        (
            {"instruction": "q", "output": "a", "history": [["q", "a"], ("q", "a")], "system": "s"},
            "alpaca",
            [SYSTEM, *[USER, ASSISTANT] * 3],
        ),
        ({"question": "q", "answer": "a"}, "question_answer", [USER, ASSISTANT]),
        (
            {"prompt": "q", "completion": "a"},
            "prompt_completion",
            [{"role": "prompt", "content": "q"}, {"role": "completion", "content": "a"}],
        ),
        ({"prompt": [SYSTEM, USER], "completion": [ASSISTANT]}, "prompt_completion", [SYSTEM, USER, ASSISTANT]),
        (
            {"prompt": [USER], "completion": [ASSISTANT], "system": "s"},
            "prompt_completion",
            [SYSTEM, USER, ASSISTANT],
        ),
        ({"text": "t"}, "text", [{"role": "text", "content": "t"}]),
    ],
)
def test_rows_become_turns(row, name, turns):
    assert detect(list(row)) == name
    assert to_turns(row, name) == turns


def test_columns_that_are_not_read_are_told():
    assert describe_columns("messages", ["id", "messages", "tools"]) == "messages (messages, tools; ignored: id)"
    assert describe_columns("alpaca", ["instruction", "input", "output"]) == "alpaca (instruction, input, output)"


CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": '{"x": 1}'}, "id": None}]},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {"x": 1}}]},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"x": 1}}'},
    ],
    ids=["openai", "arguments_of_json", "functions_alone", "sharegpt"],
)
def test_tool_calls_take_the_form_of_chat_templates(turn):
    result = {"role": "tool", "content": "2", "tool_call_id": "a"}
    assert to_turns({"messages": [USER, turn, result, ASSISTANT]}, "messages") == [USER, CALLED, result, ASSISTANT]


def test_tools_take_the_form_of_chat_templates():
    for given in ([TOOL], json.dumps([TOOL]), [TOOL["function"]], json.dumps(TOOL["function"])):
        assert tools_of({"messages": [USER], "tools": given}, "messages") == [TOOL]
    assert tools_of({"messages": [USER], "tools": "[]"}, "messages") is None
    assert tools_of({"text": "t", "tools": "saw, hammer"}, "text") is None, "a column of another meaning"
    with pytest.raises(ExampleError, match="tools is no JSON"):
        tools_of({"messages": [USER], "tools": "add"}, "messages")


def test_columns_of_no_format():
    assert detect(["question", "label"]) is None
    assert detect([]) is None
    assert detect(["text", "prompt", "completion"]) == "prompt_completion", "what says more comes first"


@pytest.mark.parametrize(
    ("row", "name", "said"),
    [
        ({"prompt": "q"}, "prompt_completion", "has no completion"),
        ({"completion": "a"}, "prompt_completion", "has no prompt"),
        ({"prompt": "q", "completion": " "}, "prompt_completion", "completion is empty"),
        ({"prompt": 1, "completion": "a"}, "prompt_completion", "prompt is a number, not text"),
        ({"prompt": "q", "completion": "a", "system": "s"}, "prompt_completion", "question=prompt answer=completion"),
        ({"instruction": "q"}, "alpaca", "has no output"),
        ({"instruction": "q", "output": None}, "alpaca", "has no output"),
        ({"instruction": "q", "output": " \n"}, "alpaca", "output is empty, so there is nothing to train on"),
        ({"instruction": 3, "output": "a"}, "alpaca", "instruction is a number, not text"),
        ({"instruction": "q", "output": ["a"]}, "alpaca", "output is a list, not text"),
        (
            {"instruction": "q", "output": "a", "history": [["q"]]},
            "alpaca",
            "entry 1 of history is not a pair",
        ),
        ({"instruction": "q", "output": "a", "history": "q"}, "alpaca", "history is text, not a list"),
        ({"question": "q", "answer": True}, "question_answer", "answer is true or false, not text"),
        ({"text": ""}, "text", "text is empty"),
        ({"messages": []}, "messages", "messages is an empty list"),
        ({"messages": [USER, "a"]}, "messages", "turn 2 of messages is text, not an object with role and content"),
        ({"messages": [USER, {"role": "assistant"}]}, "messages", "turn 2 of messages has no content"),
        ({"messages": [{"content": "q"}]}, "messages", "turn 1 of messages has no role"),
        ({"messages": [USER | {"tool_calls": [CALL]}]}, "messages", "has tool_calls, and its role is user"),
        (
            {"messages": [CALLED | {"tool_calls": [{"id": 1}]}]},
            "messages",
            "turn 1 of messages is no function with a name",
        ),
        (
            {"messages": [CALLED | {"tool_calls": [{"name": "add", "arguments": "x=1"}]}]},
            "messages",
            "the arguments of add in tool_calls of turn 1 of messages is no JSON",
        ),
        (
            {"messages": [CALLED | {"tool_calls": [{"name": "add", "arguments": "[1]"}]}]},
            "messages",
            "tool_calls of turn 1 of messages has arguments of add that are no object",
        ),
        (
            {"messages": [CALLED | {"tool_calls": [{"name": "add", "arguments": '{"x": NaN}'}]}]},
            "messages",
            "tool_calls of turn 1 of messages has what is no JSON",
        ),
        ({"conversations": [{"from": "function_call", "value": "f(x)"}]}, "sharegpt", "is no JSON"),
        ({"conversations": [{"from": "function_call", "value": "[]"}]}, "sharegpt", "is an empty answer"),
        ({"messages": [CALLED | {"tool_calls": "[]"}]}, "messages", "turn 1 of messages is an empty answer"),
        (
            {"messages": [USER, {"role": "assistant", "content": ""}]},
            "messages",
            "turn 2 of messages is an empty answer",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": [1]}]},
            "messages",
            "content of turn 2 of messages is a list, not text",
        ),
        (
            {"messages": [{"role": "narrator", "content": "q"}, ASSISTANT]},
            "messages",
            "turn 1 of messages has the unknown role 'narrator'; known roles are system, user, assistant, tool",
        ),
        ({"messages": [SYSTEM, USER, SYSTEM, ASSISTANT]}, "messages", "has 2 system turns; at most one is allowed"),
        ({"messages": [USER, SYSTEM, ASSISTANT]}, "messages", "has a system turn as turn 2; it must be the first"),
        ({"messages": [SYSTEM, USER]}, "messages", "has no assistant turn, so there is nothing to train on"),
        ({"conversations": [{"from": "human"}]}, "sharegpt", "turn 1 of conversations has no value"),
        (
            {"conversations": [{"from": "human", "value": 1}]},
            "sharegpt",
            "value of turn 1 of conversations is a number",
        ),
        ({"conversations": [{"value": "q"}]}, "sharegpt", "turn 1 of conversations has no from"),
    ],
)
def test_a_bad_row_says_its_rule(row, name, said):
    with pytest.raises(ExampleError) as error:
        to_turns(row, name)
    assert said in str(error.value)
