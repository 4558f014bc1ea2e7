"""The chat template: the tokenizer's own, one that is given, or a plain one."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lisa_dist.errors import UserError
from lisa_dist.files import read_text

# A question, a line break, the answer and the end-of-text token.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}"
    "{% elif message['role'] == 'system' %}{{ '\\n\\n' }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
)


def set_chat_template(tokenizer: PreTrainedTokenizerBase, path: str | None) -> str:
    """Set the template of `--chat_template_path`, or the plain one if there is none; returns a description of it.

    Raises UserError if the path is neither a template nor a tokenizer with one.
    """
    if path is None:
        if tokenizer.chat_template is not None:
            return "the tokenizer's own"
        if tokenizer.eos_token is None:
            raise UserError("the tokenizer has no chat template and no end-of-text token: give --chat_template_path.")
        adds_bos = tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = ("{{ bos_token }}" if adds_bos else "") + PLAIN_TEMPLATE
        return "plain, as the model has none"
    if Path(path).suffix in (".jinja", ".j2"):
        tokenizer.chat_template = read_text("--chat_template_path", path)
        return path
    try:
        other = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--chat_template_path {path}: is not a .jinja file, and no tokenizer of that name can be loaded "
            f"({type(error).__name__})."
        ) from error
    if other.chat_template is None:
        raise UserError(f"--chat_template_path {path}: that tokenizer has no chat template.")
    unknown = sorted(set(other.get_added_vocab()) - set(tokenizer.get_vocab()))
    missing = [token for token in unknown if token in str(other.chat_template)]
    if missing:
        raise UserError(
            f"--chat_template_path {path}: its template uses the tokens {', '.join(missing)}, which the model does not "
            "have."
        )
    tokenizer.chat_template = other.chat_template
    return f"that of {path}"
