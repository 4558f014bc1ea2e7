"""`lisa-dist completion`: verbs and flags for the shell."""

from lisa_dist.commands import exit_on_error
from lisa_dist.commands.verbs import VERBS, table_of_verb
from lisa_dist.errors import UserError

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
        if table := table_of_verb(verb):
            named = {name for flag in table[1:] for name in flag.get("names", ())[:1]} | {"--help", "--help_all"}
            flags.append(f'            {verb}) words="{" ".join(sorted(named))}" ;;')
    flags.append('            recipes) words="show copy" ;;')
    return _BASH.format(verbs=" ".join(VERBS), flags="\n".join(flags))
