"""Configuration files are TOML, checked by pydantic models; a wrong one stops the daemon with a readable reason."""

import tomllib
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from handoff_common.errors import InvalidArgumentError


class Settings(BaseModel):
    """Base of our settings: unknown keys are errors, so that a misspelt one is not silently ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)


AnySettings = TypeVar("AnySettings", bound=Settings)


def load_settings(path: Path, kind: type[AnySettings]) -> AnySettings:
    """Reads `path` as `kind`. Raises InvalidArgumentError that names the file, the key and what is wrong with it."""
    try:
        with path.open("rb") as file:
            return kind.model_validate(tomllib.load(file))
    except FileNotFoundError:
        raise InvalidArgumentError(f"{path}: no such file; an example lies in /usr/share/doc/handoff") from None
    except tomllib.TOMLDecodeError as error:
        raise InvalidArgumentError(f"{path}: not valid TOML: {error}") from None
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}" for problem in error.errors()
        )
        raise InvalidArgumentError(f"{path}: {problems}") from None
