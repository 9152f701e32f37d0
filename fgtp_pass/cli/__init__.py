"""The command `fgtp`. Each command imports what it needs when it runs, so that help is instant.

May import: plan, cost, calibration, models, page.
May be imported by: no other room.
"""

import sys


def main() -> None:
    """Run the command line; what the user got wrong is one sentence and a status of 1."""
    try:
        from fgtp_pass.cli.app import app
    except ImportError as error:
        if (error.name or "").split(".")[0] not in ("typer", "rich"):
            raise
        from fgtp_pass.hints import install_extra

        sys.exit(f"fgtp: the command line needs the extra 'cli': {install_extra('cli')}")
    try:
        app()
    except Exception as error:
        # loaded by whoever raised one of its errors; importing it here would load torch
        errors = sys.modules.get("fgtp_pass.errors")
        if errors is None or not isinstance(error, errors.FgtpError):
            raise
        sys.exit(f"fgtp: {error}")
