"""`lisa-dist completion`: verbs and flags for the shell."""

from lisa_dist.commands import exit_on_error
from lisa_dist.commands.verbs import TABLES, VERBS, table_of_verb
from lisa_dist.errors import UserError

_OF_LAUNCHER = {"train": {"--gpus", "--config"}, "eval": {"--gpus"}}
_WORDS = {"recipes": "show copy", "convert": "--tool", "completion": "bash zsh"}
_BASH = """\
_lisa_dist() {{
    local verb="${{COMP_WORDS[1]}}" word="${{COMP_WORDS[COMP_CWORD]}}" words
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="{verbs}"
    else
        case "$verb" in
{flags}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
    [ ${{#COMPREPLY[@]}} -gt 0 ] || COMPREPLY=($(compgen -f -- "$word"))
}}
complete -F _lisa_dist lisa-dist"""


def main(shell: str) -> None:
    """Print the script that the shell reads. Flags are those of this moment's versions."""
    with exit_on_error("lisa-dist completion"):
        if shell not in ("bash", "zsh"):
            raise UserError(f"{shell}: give bash or zsh.")
        print("\n".join([*(["autoload -U +X bashcompinit && bashcompinit"] if shell == "zsh" else []), _script()]))


def _script() -> str:
    flags = []
    for verb in VERBS:
        tables = [table_of_verb(name) for name in TABLES if name.partition(" ")[0] == verb]  # of train each task's
        if table := [flag for table in tables for flag in table[1:]]:
            named = {name for flag in table for name in flag.get("names", ())[:1]} | {"--help", "--help_all"}
            named |= _OF_LAUNCHER.get(verb, set())
            flags.append(f'            {verb}) words="{" ".join(sorted(named))}" ;;')
    flags += [f'            {verb}) words="{words}" ;;' for verb, words in _WORDS.items()]
    return _BASH.format(verbs=" ".join(VERBS), flags="\n".join(flags))
