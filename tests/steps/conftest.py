"""The `sft` command, run in this process."""

from collections.abc import Callable

import pytest
from click.testing import CliRunner, Result

from steps.cli.main import main


@pytest.fixture
def sft() -> Callable[..., Result]:
    def run(*arguments: object, code: int = 0, **environment: str) -> Result:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments], env=environment)
        assert result.exit_code == code, result.output
        assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
        assert "Traceback" not in result.output
        return result

    return run
