"""Calibrations: configurations that were found for one model, as JSON files that travel.

A file holds the configuration, how it was found (data, seed, versions, results), and a digest of the configuration,
which tells whether it was edited. ``--cache file.json`` and ``MixKVQConfig.parse("file.json")`` read it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixkvq.config import ConfigError, MixKVQConfig, split_overrides
from mixkvq.files import write_whole

FORMAT = "mixkvq calibration 1"
#: Calibrations that come with the package, by file name.
SHIPPED = Path(__file__).parent / "shipped"


@dataclass(frozen=True)
class Calibration:
    """A configuration, and where it comes from.

    Attributes:
        config: what was found.
        kind: the search: "budget", "thresholds", and so on.
        about: model, data, seed, versions, command.
        results: what was measured, for people.
    """

    config: MixKVQConfig
    kind: str
    about: dict[str, Any]
    results: dict[str, Any]

    def write(self, path: Path) -> None:
        """As a JSON file."""
        fields = self.config.as_dict()
        whole = {
            "format": FORMAT,
            "kind": self.kind,
            "config": fields,
            "digest": _digest(fields),
            "about": self.about,
            "results": self.results,
        }
        write_whole(path, json.dumps(whole, indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> Calibration:
        """From a file of :meth:`write`.

        Raises:
            ConfigError: there is none, or it is not whole.
        """
        return cls._of(_load(path), path)

    @classmethod
    def _of(cls, raw: dict[str, Any], path: Path) -> Calibration:
        if raw.get("format") != FORMAT:
            raise ConfigError(f"'{path}' is no calibration: its format is {raw.get('format')!r}, not {FORMAT!r}.")
        missing = {"kind", "config", "digest", "about", "results"} - set(raw)
        if missing:
            raise ConfigError(f"The calibration '{path}' is not whole: {', '.join(sorted(missing))} is missing.")
        if _digest(raw["config"]) != raw["digest"]:
            raise ConfigError(
                f"The configuration in '{path}' was changed after it was calibrated. Calibrate again; or, to use it "
                'all the same, keep what is under "config" as a file of its own.'
            )
        return cls(MixKVQConfig.from_dict(raw["config"]), raw["kind"], raw["about"], raw["results"])


def read_config(path: Path) -> MixKVQConfig:
    """The configuration of a calibration, or of a file of :meth:`MixKVQConfig.to_json`.

    A name that is no file here is looked for among the calibrations that come with the package.

    Raises:
        ConfigError: there is no such file, or it is neither.
    """
    raw = _load(path := _found(path))
    return Calibration._of(raw, path).config if "format" in raw else MixKVQConfig.from_dict(raw)


def shipped() -> list[str]:
    """Names of the calibrations that come with the package."""
    return sorted(path.name for path in SHIPPED.glob("*.json"))


def read_about(name: str) -> dict[str, Any]:
    """What a calibration was made of: :attr:`Calibration.about`.

    Args:
        name: as :meth:`MixKVQConfig.parse` reads it.

    Returns:
        Nothing for a preset, and for a file that does not say.
    """
    path = Path(split_overrides(name)[0])
    if path.suffix != ".json":
        return {}
    about = _load(_found(path)).get("about")
    return about if isinstance(about, dict) else {}


def _found(path: Path) -> Path:
    """Itself, or a calibration that comes with the package."""
    packaged = SHIPPED / path
    return packaged if not path.exists() and packaged.exists() and path.name == str(path) else path


def _load(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        known = f" With the package come: {', '.join(shipped())}." if shipped() else ""
        raise ConfigError(f"There is no file '{path}'.{known}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{path}' cannot be read: {error}") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"'{path}' is not JSON; was it cut short? {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"'{path}' holds no configuration: that is a JSON object of fields.")
    return raw


def _digest(fields: Any) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
