"""Command lines of the form `python -m reference_model.X key=value …`: Hydra's configuration, paths taken as they are."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def optional_import(name: str) -> Any:
    """Import a package of the extra `reference`; ImportError says how to install it."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f'{name} is needed here: pip install "spatial-sparse-attention[reference]"') from error


def parse(
    config_name: str, paths: Sequence[str], argv: Sequence[str] | None = None, required: Sequence[str] = ()
) -> tuple[Any, dict[str, str]]:
    """Configuration and paths of one command: argv (default sys.argv[1:]) → (DictConfig of configs/<config_name>.yaml, {name: path}).

    Arguments `name=path` with a name of `paths` are cut off before Hydra sees them: any character, no quoting.
    All others follow Hydra's grammar. Nothing is written and the directory stays. `--help` and mistakes end the process (status 0, 2).
    """
    hydra = optional_import("hydra")
    argv = list(sys.argv[1:] if argv is None else argv)
    folder = Path(__file__).resolve().parent / "configs"
    if "--help" in argv or "-h" in argv:
        print(f"python -m reference_model.{config_name} " + " ".join(f"{name}=…" for name in paths) + " key=value …\n")
        _print_settings(folder, config_name)
        raise SystemExit(0)
    found: dict[str, str] = {}
    overrides = []
    for argument in argv:
        name, equals, value = argument.partition("=")
        if equals and name in paths:
            if name in found:
                _stop(f"{name}= was given twice")
            if not value:
                _stop(f"{name}= needs a path")
            found[name] = value
        else:
            overrides.append(argument)
    missing = [f"{name}=" for name in required if name not in found]
    if missing:
        _stop(f"{' '.join(missing)} must be given; --help lists every setting")
    try:
        with hydra.initialize_config_dir(str(folder), version_base=None):
            return hydra.compose(config_name, overrides), found
    except Exception as error:
        _stop(str(error))
        raise


def _print_settings(folder: Path, config_name: str) -> None:
    """The file of a configuration, then those of the groups that it chooses."""
    path = folder / f"{config_name}.yaml"
    print(path.read_text(encoding="utf-8"), end="")
    for chosen in optional_import("omegaconf").OmegaConf.load(path).get("defaults", []):
        for group, name in chosen.items() if chosen != "_self_" else ():
            print(f"\n# {group}={name}\n" + (folder / group / f"{name}.yaml").read_text(encoding="utf-8"), end="")


def _stop(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
