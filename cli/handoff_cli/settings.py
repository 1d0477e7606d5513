"""The command's configuration file, cli.toml."""

from pydantic import Field

from handoff_common.config import Settings


class CliSettings(Settings):
    """Everything that the command may be told by a file."""

    controllers: tuple[str, ...] = Field(
        min_length=1, description='controllers, asked in this order: "host:port" or "unix:/path"'
    )
