"""Print a script that completes commands, options and models in a shell.

musicscope completion bash > ~/.local/share/bash-completion/completions/musicscope
source <(musicscope completion zsh)
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

NAMES = {
    "--model": "data/models/*/",
    "--off": "data/steering*/*/*.json",
    "--on": "data/steering*/*/*.json",
}
"""Options whose values are names of folders or files here."""
SCRIPT = """\
_musicscope() {{
    local cur="${{COMP_WORDS[COMP_CWORD]}}" prev="${{COMP_WORDS[COMP_CWORD-1]}}" path
    COMPREPLY=()
    if [ "$COMP_CWORD" = 1 ]; then
        COMPREPLY=($(compgen -W "{commands}" -- "$cur"))
        return
    fi
    case "${{COMP_WORDS[1]}} $prev" in
{values}
    esac
    [[ "$cur" == -* ]] || return
    case "${{COMP_WORDS[1]}}" in
{options}
    esac
}}
complete -o default -F _musicscope musicscope"""
ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"


def script(shell: str, parsers: Mapping[str, argparse.ArgumentParser]) -> str:
    """Write the script of a shell, from the parsers of all commands."""
    options, values = [], []
    for command, parser in parsers.items():
        actions = [action for action in parser._actions if action.option_strings]
        words = " ".join(word for action in actions for word in action.option_strings)
        options.append(f'        {command}) COMPREPLY=($(compgen -W "{words}" -- "$cur")) ;;')
        for action in parser._actions:
            for option in action.option_strings or [command]:
                if option in NAMES:
                    values.append(_names(command, option))
                elif action.choices:
                    given = " ".join(map(str, action.choices))
                    values.append(
                        f'        "{command} {option}") COMPREPLY=($(compgen -W "{given}" '
                        '-- "$cur")); return ;;'
                    )
    text = SCRIPT.format(
        commands=" ".join([*parsers, "--version", "--help"]),
        values="\n".join(values), options="\n".join(options),
    )  # fmt: skip
    return (ZSH if shell == "zsh" else "") + text


def _names(command: str, option: str) -> str:
    found = f"$(for path in {NAMES[option]}; do path=${{path%/}}; path=${{path##*/}}; "
    found += '[ "$path" = "*" ] || echo "${path%.json}"; done 2>/dev/null)'
    return (
        f'        "{command} {option}") COMPREPLY=($(compgen -W "{found}" -- "$cur")); '
        "[ ${#COMPREPLY[@]} = 0 ] || return ;;"
    )


def run(args: argparse.Namespace) -> None:
    """Print the script."""
    from musicscope.commands.cli import build

    print(script(args.shell, build()[1]))
