"""`loraplex completion`: the script with which a shell completes commands and options."""

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print a script with which SHELL completes commands and options.

    For bash, `source <(loraplex completion bash)` in ~/.bashrc; for zsh the same with zsh in ~/.zshrc; for fish,
    `loraplex completion fish > ~/.config/fish/completions/loraplex.fish`.
    """
    kind = get_completion_class(shell)
    assert kind is not None  # click has all of SHELLS
    script = kind(context.find_root().command, {}, "loraplex", "_LORAPLEX_COMPLETE")
    click.echo(script.source_template % script.source_vars())  # source() would ask for a bash on this machine
