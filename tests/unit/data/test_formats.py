"""Each format of rows becomes turns; a row that breaks a rule says which."""

import json

import pytest

from lisa_dist.data.formats import ExampleError, describe_columns, detect, to_turns, tools_of

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
Q, A = {"instruction": "q", "output": "a"}, {"question": "q", "answer": "a"}


@pytest.mark.parametrize(
    ("name", "row", "turns"),
    [
        ("messages", {"messages": [SYSTEM, USER, ASSISTANT]}, [SYSTEM, USER, ASSISTANT]),
        ("messages", {"messages": [USER | {"role": "User"}, ASSISTANT], "id": 1}, [USER, ASSISTANT]),
        ("messages", {"messages": [USER, ASSISTANT], "system": "s"}, [SYSTEM, USER, ASSISTANT]),
        ("sharegpt", {"conversations": [HUMAN, GPT], "system": "s"}, [SYSTEM, USER, ASSISTANT]),
        ("sharegpt", {"conversations": [{"from": "system", "value": "s"}, HUMAN, GPT]}, [SYSTEM, USER, ASSISTANT]),
        ("sharegpt", {"conversations": [USER, ASSISTANT]}, [USER, ASSISTANT]),
        ("sharegpt", {"conversations": [HUMAN, GPT], "system": ""}, [USER, ASSISTANT]),
        ("alpaca", Q, [USER, ASSISTANT]),
        ("alpaca", Q | {"input": "", "system": None, "history": None}, [USER, ASSISTANT]),
        ("alpaca", Q | {"input": "i"}, [{"role": "user", "content": "q\n\ni"}, ASSISTANT]),
        ("alpaca", Q | {"history": [["q", "a"], ("q", "a")], "system": "s"}, [SYSTEM, *[USER, ASSISTANT] * 3]),
        ("question_answer", A, [USER, ASSISTANT]),
        ("prompt_completion", {"prompt": [SYSTEM, USER], "completion": [ASSISTANT]}, [SYSTEM, USER, ASSISTANT]),
        ("prompt_completion", {"prompt": [USER], "completion": [ASSISTANT], "system": "s"}, [SYSTEM, USER, ASSISTANT]),
        (
            "prompt_completion",
            {"prompt": "q", "completion": "a"},
            [{"role": "prompt", "content": "q"}, {"role": "completion", "content": "a"}],
        ),
        ("text", {"text": "t"}, [{"role": "text", "content": "t"}]),
    ],
)
def test_rows_become_turns(name, row, turns):
    assert detect(list(row)) == name
    assert to_turns(row, name) == turns


def test_columns_that_are_not_read_are_told():
    assert describe_columns("messages", ["id", "messages", "tools"]) == "messages (messages, tools; ignored: id)"
    assert describe_columns("alpaca", ["instruction", "input", "output"]) == "alpaca (instruction, input, output)"


CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}


def calling(call: dict | str) -> dict:
    """A turn with a call, or one of `add` with these arguments."""
    return CALLED | {"tool_calls": [call if isinstance(call, dict) else {"name": "add", "arguments": call}]}


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


OF_TURNS = [
    ([], "messages is an empty list"),
    ([USER, "a"], "turn 2 of messages is text, not an object with role and content"),
    ([USER, {"role": "assistant"}], "turn 2 of messages has no content"),
    ([{"content": "q"}], "turn 1 of messages has no role"),
    ([USER | {"tool_calls": [CALL]}], "has tool_calls, and its role is user"),
    ([calling({"id": 1})], "turn 1 of messages is no function with a name"),
    ([calling("x=1")], "the arguments of add in tool_calls of turn 1 of messages is no JSON"),
    ([calling("[1]")], "tool_calls of turn 1 of messages has arguments of add that are no object"),
    ([calling('{"x": NaN}')], "tool_calls of turn 1 of messages has what is no JSON"),
    ([CALLED | {"tool_calls": "[]"}], "turn 1 of messages is an empty answer"),
    ([USER, ASSISTANT | {"content": ""}], "turn 2 of messages is an empty answer"),
    ([USER, ASSISTANT | {"content": [1]}], "content of turn 2 of messages is a list, not text"),
    (
        [{"role": "narrator", "content": "q"}, ASSISTANT],
        "turn 1 of messages has the unknown role 'narrator'; known roles are system, user, assistant, tool",
    ),
    ([SYSTEM, USER, SYSTEM, ASSISTANT], "has 2 system turns; at most one is allowed"),
    ([USER, SYSTEM, ASSISTANT], "has a system turn as turn 2; it must be the first"),
    ([SYSTEM, USER], "has no assistant turn, so there is nothing to train on"),
]
OF_CONVERSATIONS = [
    ([{"from": "function_call", "value": "f(x)"}], "is no JSON"),
    ([{"from": "function_call", "value": "[]"}], "is an empty answer"),
    ([{"from": "human"}], "turn 1 of conversations has no value"),
    ([{"from": "human", "value": 1}], "value of turn 1 of conversations is a number"),
    ([{"value": "q"}], "turn 1 of conversations has no from"),
]
OF_COLUMNS = [
    ("prompt_completion", {"prompt": "q"}, "has no completion"),
    ("prompt_completion", {"completion": "a"}, "has no prompt"),
    ("prompt_completion", {"prompt": "q", "completion": " "}, "completion is empty"),
    ("prompt_completion", {"prompt": 1, "completion": "a"}, "prompt is a number, not text"),
    ("prompt_completion", {"prompt": "q", "completion": "a", "system": "s"}, "question=prompt answer=completion"),
    ("alpaca", {"instruction": "q"}, "has no output"),
    ("alpaca", Q | {"output": None}, "has no output"),
    ("alpaca", Q | {"output": " \n"}, "output is empty, so there is nothing to train on"),
    ("alpaca", Q | {"instruction": 3}, "instruction is a number, not text"),
    ("alpaca", Q | {"output": ["a"]}, "output is a list, not text"),
    ("alpaca", Q | {"history": [["q"]]}, "entry 1 of history is not a pair"),
    ("alpaca", Q | {"history": "q"}, "history is text, not a list"),
    ("question_answer", A | {"answer": True}, "answer is true or false, not text"),
    ("text", {"text": ""}, "text is empty"),
]


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        *OF_COLUMNS,
        *(("messages", {"messages": turns}, said) for turns, said in OF_TURNS),
        *(("sharegpt", {"conversations": turns}, said) for turns, said in OF_CONVERSATIONS),
    ],
)
def test_a_bad_row_says_its_rule(name, row, said):
    with pytest.raises(ExampleError) as error:
        to_turns(row, name)
    assert said in str(error.value)
