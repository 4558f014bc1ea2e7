"""Tokens and labels: what the assistant says counts, under any template; what is too long is cut, split or left out."""

import json
from pathlib import Path

import pytest
import trl
from datasets import Dataset
from models import TEMPLATE, save_tiny_llama
from transformers import AutoTokenizer, ByT5Tokenizer

from lisa_dist.data.encoding import IGNORED, PLAIN_TEMPLATE, Encoder, encode_examples, set_chat_template
from lisa_dist.data.formats import ExampleError, to_turns
from lisa_dist.data.readers import ORIGIN
from lisa_dist.data.sources import Source, load_turns
from lisa_dist.errors import UserError

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
)
# As Mistral's: no prompt for what is to be generated, and what it begins with is within the turn.
INST = (
    "<s>{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
    "{% else %} {{ message['content'] }}</s>{% endif %}{% endfor %}"
)
# Renders what the assistant has said otherwise once more turns follow, as those do that leave old thoughts out.
FORGETFUL = (
    "{% for message in messages %}<{{ message['role'] }}>"
    "{{ message['content'] if loop.last or message['role'] == 'user' else 'old' }}<end>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TRL_TEMPLATES = Path(trl.__file__).parent / "chat_templates"
TURNS = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two, é!"},
    {"role": "user", "content": "Three?"},
    {"role": "assistant", "content": " Four\n"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_tiny_llama(folder)
    return folder


@pytest.fixture
def tokenizer(folder):
    """A tokenizer of bytes, with the special tokens of many models, and no template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    special = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|eot_id|>", "<|end|>", "<|user|>", "<|assistant|>"]
    special += ["<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>", "<|begin_of_text|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special, "bos_token": "<s>"})
    tokenizer.chat_template = None
    return tokenizer


def pieces(tokenizer, turns, template=None, assistant_only=True, tools=None) -> list[tuple[str, bool]]:
    if template is not None:
        tokenizer.chat_template = template
    encoder = Encoder(tokenizer, assistant_only)
    return encoder.describe(*encoder.encode(turns, tools))


OF_CHATML = [
    ("<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n", False),
    ("Two, é!<|im_end|>", True),
    ("\n<|im_start|>user\nThree?<|im_end|>\n<|im_start|>assistant\n", False),
    (" Four\n<|im_end|>", True),
    ("\n", False),
]
OF_INST = [
    ("<s>[INST] One? [/INST]", False),
    (" Two, é!</s>", True),
    ("[INST] Three? [/INST]", False),
    ("  Four\n</s>", True),
]
OF_TOKENS = [
    ("<user>One?<end><assistant>", False),
    ("Two, é!<end>", True),
    ("<user>Three?<end><assistant>", False),
    (" Four\n<end>", True),
]
PLAIN = [("One?\n", False), ("Two, é!<end>", True), ("Three?\n", False), (" Four\n<end>", True)]


@pytest.mark.parametrize(
    ("template", "expected"),
    [(CHATML, OF_CHATML), (MARKED, OF_CHATML), (INST, OF_INST), (TEMPLATE, OF_TOKENS), (PLAIN_TEMPLATE, PLAIN)],
    ids=["chatml", "marked", "inst", "tokens", "plain"],
)
def test_what_the_assistant_says_counts(tokenizer, template, expected):
    assert pieces(tokenizer, TURNS, template) == expected
    everything = pieces(tokenizer, TURNS, template, assistant_only=False)
    assert everything == [("".join(text for text, _ in expected), True)]


@pytest.mark.parametrize("name", ["llama3", "qwen2_5", "phi3", "gemma", "phi3_5"])
def test_real_templates_without_marks_count_what_trls_versions_mark(tokenizer, name):
    """TRL's own version of a template says what the assistant's turn is; here it is found without that."""
    template, marked = (
        (TRL_TEMPLATES / f"{file}.jinja").read_text(encoding="utf-8") for file in (name, f"{name}_training")
    )
    turns = [turn | {"content": turn["content"].strip()} for turn in TURNS]
    tokenizer.chat_template = template
    encoder = Encoder(tokenizer, True)
    encoder.marked_template = None
    ours = encoder.encode(turns)
    tokenizer.chat_template = marked
    encoder = Encoder(tokenizer, True)
    assert encoder.marked_template == marked
    ids, labels = encoder.encode(turns)
    assert ours[0] == ids
    differs = [token for token, one, other in zip(ids, ours[1], labels, strict=True) if one != other]
    assert tokenizer.decode(differs).strip() == "", "but for the line break after a turn"
    assert sum(label != IGNORED for label in labels) > len("Two, !Four")


def test_a_template_that_changes_what_was_said_is_refused(tokenizer):
    with pytest.raises(ExampleError, match="renders turn 2 differently once later turns follow"):
        pieces(tokenizer, TURNS, FORGETFUL)
    assert pieces(tokenizer, TURNS, FORGETFUL, assistant_only=False)
    assert pieces(tokenizer, TURNS[:2], FORGETFUL)[1] == ("Two, é!<end>", True)


# As Qwen's and Hermes', with the tools before the turns and calls within the assistant's.
WITH_TOOLS = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls %}<call>{{ call.function.name }}"
    "{% for name, value in call.function.arguments.items() %} {{ name }}={{ value }}{% endfor %}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL_ROW = {
    "messages": [
        {"role": "user", "content": "1+2, 3+4?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "add", "arguments": '{"x": 1, "y": 2}'}},
                {"id": "b", "type": "function", "function": {"name": "add", "arguments": '{"z": [3, 4]}'}},
            ],
        },
        {"role": "tool", "tool_call_id": "a", "content": "3"},
        {"role": "assistant", "content": "3, 7"},
    ],
    "tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}],
}


def test_tools_and_tool_calls_reach_the_template(tokenizer, tmp_path):
    """Through the cache, whose columns are alike for all rows; the assistant's turns alone count, calls included."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [{"messages": TURNS[:2]}, TOOL_ROW]))
    rows, _ = load_turns(Source(str(path)), False, 0)
    assert rows[0]["turns"] == TURNS[:2]
    assert rows[0]["tools"] is None
    expected = [
        (
            '<|im_start|>tools\n[{"type": "function", "function": {"name": "add", "parameters": {}}}]<|im_end|>\n'
            "<|im_start|>user\n1+2, 3+4?<|im_end|>\n<|im_start|>assistant\n",
            False,
        ),
        ("<call>add x=1 y=2</call><call>add z=[3, 4]</call><|im_end|>", True),
        ("\n<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n", False),
        ("3, 7<|im_end|>", True),
        ("\n", False),
    ]
    assert pieces(tokenizer, rows[1]["turns"], WITH_TOOLS, tools=rows[1]["tools"]) == expected
    encoded, _ = encode_examples(rows, encoder := Encoder(tokenizer, True), "rows")
    assert encoder.describe(encoded[1]["input_ids"], encoded[1]["labels"]) == expected


def test_trls_version_of_a_template_that_it_knows_is_taken(tokenizer):
    """With marks, by which tool calls count too."""
    turns, tools = to_turns(TOOL_ROW, "messages"), TOOL_ROW["tools"]
    tokenizer.chat_template, marked = (
        (TRL_TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8") for name in ("qwen3", "qwen3_training")
    )
    assert Encoder(tokenizer, True).marked_template == marked
    assert Encoder(tokenizer, False).marked_template is None
    found = pieces(tokenizer, turns, tools=tools)
    assert '"name": "add"' in found[0][0]
    counted = [text for text, has_labels in found if has_labels]
    assert len(counted) == 2
    assert '{"name": "add", "arguments": {"x": 1, "y": 2}}' in counted[0]
    assert "3, 7<|im_end|>" in counted[1]


def test_a_template_that_leaves_tools_out_is_refused(tokenizer):
    turns, tools = to_turns(TOOL_ROW, "messages"), TOOL_ROW["tools"]
    with pytest.raises(UserError, match="has examples with tool_calls, and the chat template leaves them out"):
        pieces(tokenizer, turns, CHATML)
    with pytest.raises(UserError, match="has examples with tools, and the chat template leaves them out"):
        pieces(tokenizer, TURNS, MARKED, tools=tools)
    tokenizer.chat_template = None
    set_chat_template(tokenizer, None)
    with pytest.raises(UserError, match="has examples with tools, and"):
        pieces(tokenizer, to_turns({"prompt": "q", "completion": "a"}, "prompt_completion"), tools=tools)
    with pytest.raises(ExampleError, match="begins with a tool call"):
        pieces(tokenizer, turns[1:], WITH_TOOLS)


@pytest.mark.parametrize("template", [CHATML, TEMPLATE])
def test_an_assistant_may_speak_first(tokenizer, template):
    """As in many a row of ShareGPT; no template renders the nothing before it."""
    turns = [{"role": "assistant", "content": "Hello!"}, *TURNS[:2]]
    answers = [text for text, has_labels in pieces(tokenizer, turns, template) if has_labels]
    assert len(answers) == 2
    assert answers[0].startswith("Hello!")
    assert answers[1:] == [text for text, has_labels in pieces(tokenizer, TURNS[:2], template) if has_labels]


RAISES = "{{ raise_exception('no tools here') }}"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (RAISES + CHATML, "the chat template refuses it: no tools here"),
        (RAISES + MARKED, "the chat template refuses it: no tools here"),
        ("{% for m in messages %}{{ m['content'] + 1 }}{% endfor %}", "the chat template refuses it: "),
        ("{{ 1 / 0 }}", "the chat template refuses it: division by zero"),
        ("hello", "has no answer in what the chat template makes of it"),
        ("{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}", "has no answer in what"),
    ],
)
def test_templates_that_fail_or_show_no_answer(tokenizer, template, said):
    with pytest.raises(ExampleError, match=said):
        pieces(tokenizer, TURNS[:2], template)


def test_a_tokenizer_without_offsets_is_refused():
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(ValueError, match="the tokenizer ByT5Tokenizer does not give the positions of its tokens"):
        Encoder(tokenizer, assistant_only=False)


def test_what_is_written_stays_as_it_is(tokenizer):
    turns = to_turns({"prompt": "2+2=", "completion": "4"}, "prompt_completion")
    set_chat_template(tokenizer, None)
    assert pieces(tokenizer, turns) == [("2+2=", False), ("4<end>", True)]
    assert pieces(tokenizer, turns, assistant_only=False) == [("2+2=4<end>", True)]
    turns = to_turns({"prompt": "", "completion": "4"}, "prompt_completion")
    assert pieces(tokenizer, turns) == [("4<end>", True)]
    assert pieces(tokenizer, [{"role": "text", "content": "Once"}]) == [("Once<end>", True)]
    assert pieces(tokenizer, [{"role": "text", "content": "Once<end>"}]) == [("Once<end>", True)], "not ended twice"


Q, A = {"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}
FORMS = {
    "alpaca": {"instruction": "Q?", "input": "", "output": "A."},
    "sharegpt": {"conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A."}]},
    "messages": {"messages": [Q, A]},
    "question_answer": {"question": "Q?", "answer": "A."},
    "prompt_completion": {"prompt": [Q], "completion": [A]},
}


@pytest.mark.parametrize("template", [TEMPLATE, CHATML, MARKED, INST, None])
def test_all_forms_of_a_row_are_encoded_alike(tokenizer, template):
    tokenizer.chat_template = template
    set_chat_template(tokenizer, None)
    encoder = Encoder(tokenizer, True)
    encoded = [encoder.encode(to_turns(row, name)) for name, row in FORMS.items()]
    written = {"prompt": "Q?" if template else "Q?\n", "completion": "A."}
    encoded.append(encoder.encode(to_turns(written, "prompt_completion")))
    assert all(one == encoded[0] for one in encoded)
    assert any(label != IGNORED for label in encoded[0][1])


# The template


def test_the_plain_template_begins_as_the_tokenizer_does(tokenizer):
    assert set_chat_template(tokenizer, None).startswith("plain")
    assert tokenizer.chat_template == PLAIN_TEMPLATE
    turns = [{"role": "system", "content": "Be brief."}, *TURNS[:2]]
    assert pieces(tokenizer, turns) == [("Be brief.\n\nOne?\n", False), ("Two, é!<end>", True)]
    call = type(tokenizer).__call__

    class Beginning(type(tokenizer)):
        def __call__(self, *args, **kwargs):
            encoded = call(self, *args, **kwargs)
            if kwargs.get("add_special_tokens", True):
                encoded["input_ids"].insert(0, self.bos_token_id)
            return encoded

    tokenizer.chat_template, tokenizer.__class__ = None, Beginning
    set_chat_template(tokenizer, None)
    assert tokenizer.chat_template == "{{ bos_token }}" + PLAIN_TEMPLATE
    assert pieces(tokenizer, TURNS[:2]) == [("<s>One?\n", False), ("Two, é!<end>", True)]


def test_a_template_can_be_given(tokenizer, folder, tmp_path):
    (tmp_path / "chat.jinja").write_text(CHATML)
    assert set_chat_template(tokenizer, str(tmp_path / "chat.jinja")) == str(tmp_path / "chat.jinja")
    assert tokenizer.chat_template == CHATML
    assert set_chat_template(tokenizer, None) == "the tokenizer's own"
    assert set_chat_template(tokenizer, str(folder)) == f"that of {folder}"
    assert tokenizer.chat_template == TEMPLATE


def test_a_template_that_is_no_use_is_named(tokenizer, folder, tmp_path):
    with pytest.raises(ValueError, match=r"--chat_template_path absent\.jinja: no such file"):
        set_chat_template(tokenizer, "absent.jinja")
    with pytest.raises(ValueError, match=r"--chat_template_path no/tokenizer: is not a \.jinja file, and no tokenizer"):
        set_chat_template(tokenizer, "no/tokenizer")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="that tokenizer has no chat template"):
        set_chat_template(tokenizer, str(tmp_path / "bare"))
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path / "chatml")
    plain = AutoTokenizer.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"its template uses the tokens <\|im_end\|>, <\|im_start\|>, which the model"):
        set_chat_template(plain, str(tmp_path / "chatml"))
    plain.chat_template, plain.eos_token = None, None
    with pytest.raises(ValueError, match="no chat template and no end-of-text token"):
        set_chat_template(plain, None)


# Long examples


def rows_of(*turns: list[dict]) -> Dataset:
    return Dataset.from_list(
        [{"turns": one, "tools": None, ORIGIN: f"row {n}"} for n, one in enumerate(turns, start=1)]
    )


def text(length: int) -> list[dict]:
    """A row of so many tokens, the last of which is the end of the text."""
    return [{"role": "text", "content": "x" * (length - 1)}]


def pair(prompt: int, completion: int) -> list[dict]:
    return [{"role": "prompt", "content": "p" * prompt}, {"role": "completion", "content": "c" * (completion - 1)}]


def encode(tokenizer, rows: Dataset, *args, **kwargs) -> tuple[list[int], list[str]]:
    """Lengths of the examples, and what is told of long ones."""
    set_chat_template(tokenizer, None)
    encoded, lines = encode_examples(rows, Encoder(tokenizer, True), "--dataset_name rows", *args, **kwargs)
    assert encoded.column_names == ["input_ids", "labels", ORIGIN]
    assert all(len(row["input_ids"]) == len(row["labels"]) for row in encoded)
    return [len(row["input_ids"]) for row in encoded], lines


def test_long_texts_are_split_and_nothing_is_lost(tokenizer):
    rows = rows_of(text(8), text(20), text(17))
    lengths, lines = encode(tokenizer, rows, 8)
    assert lengths == [8, 8, 8, 4, 8, 8], "the one token that is over has nothing to foretell"
    assert lines == ["2 examples have more than 8 tokens (row 2 has 20): 2 split into 5"]
    assert encode(tokenizer, rows, None) == ([8, 20, 17], [])
    assert encode(tokenizer, rows, 8, "truncate") == (
        [8, 8, 8],
        ["2 examples have more than 8 tokens (row 2 has 20): 2 truncated"],
    )
    assert encode(tokenizer, rows, 8, "drop") == ([8], ["2 examples have more than 8 tokens (row 2 has 20): 2 dropped"])


def test_long_conversations_are_cut_where_something_is_left_to_learn(tokenizer):
    rows = rows_of(pair(4, 4), pair(6, 6), pair(8, 3), pair(7, 9))
    lengths, lines = encode(tokenizer, rows, 8)
    assert lengths == [8, 8, 8]
    assert lines == ["3 examples have more than 8 tokens (row 4 has 16): 2 truncated, 1 dropped, as no label was left"]
    with pytest.raises(ValueError, match="rows: none of 1 examples can be used: 1 examples have more than 8 tokens"):
        encode(tokenizer, rows_of(pair(20, 2)), 8)


def test_rows_that_a_template_refuses_are_named_or_left_out(tokenizer):
    tokenizer.chat_template = FORGETFUL
    rows = rows_of(TURNS[:2], TURNS, TURNS)
    with pytest.raises(ValueError, match="2 of 3 examples are invalid") as error:
        encode(tokenizer, rows)
    assert "  row 2 the chat template renders turn 2 differently" in str(error.value)
    lengths, lines = encode(tokenizer, rows, skip_invalid=True)
    assert len(lengths) == 1
    assert lines[0].startswith("2 examples skipped, such as row 2 the chat template renders")


def test_what_was_encoded_is_found_again_and_only_that(tokenizer, tmp_path):
    """The cache is told apart by rows, tokenizer, template, what counts and lengths."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"turns": TURNS[:2], "tools": None, ORIGIN: f"row {n}"}) for n in range(4)))
    rows = Dataset.from_json(str(path), cache_dir=str(tmp_path / "cache"))
    tokenizer.chat_template = TEMPLATE

    def files(encoder: Encoder, *args) -> str:
        encoded, _ = encode_examples(rows, encoder, "rows", *args)
        return encoded.cache_files[0]["filename"]

    first = files(Encoder(tokenizer, True), 64)
    calls = []
    again = Encoder(tokenizer, True)
    again.encode = calls.append
    assert files(again, 64) == first
    assert not calls
    others = [files(Encoder(tokenizer, True), 65), files(Encoder(tokenizer, False), 64)]
    others.append(files(Encoder(tokenizer, True), 64, "truncate"))
    tokenizer.chat_template = CHATML
    others.append(files(Encoder(tokenizer, True), 64))
    assert len({first, *others}) == 5
