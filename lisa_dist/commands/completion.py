"""`lisa-dist completion`: verbs and flags for the shell."""

from lisa_dist.commands import exit_on_error
from lisa_dist.commands.verbs import VERBS, WITH_FLAGS, parser_of
from lisa_dist.errors import UserError
from lisa_dist.tasks import SFT, TASKS

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
        words = {}
        for verb in WITH_FLAGS:
            actions = [one for task in (TASKS if verb == "train" else [SFT]) for one in parser_of(verb, task)._actions]
            named = {name for one in actions for name in one.option_strings[:1]} - {"-h"} | {"--help"}
            words[verb] = " ".join(sorted(named | _OF_LAUNCHER.get(verb, set())))
        flags = "\n".join(f'            {verb}) words="{offered}" ;;' for verb, offered in (words | _WORDS).items())
        if shell == "zsh":
            print("autoload -U +X bashcompinit && bashcompinit")
        print(_BASH.format(verbs=" ".join(VERBS), flags=flags))
