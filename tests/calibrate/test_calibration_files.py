"""Calibrations as files: whole ones are used, others refused with a reason."""

import json
from pathlib import Path

import pytest

from mixkvq import ConfigError, MixKVQConfig
from mixkvq.calibrate import file
from mixkvq.calibrate.file import Calibration


@pytest.fixture
def path(tmp_path: Path) -> Path:
    config = MixKVQConfig.preset("default", layers=[{"budget": 3.5}, {}], model="a model")
    Calibration(config, "budget", {"seed": 0}, {"kl": 0.1}).write(tmp_path / "found.json")
    return tmp_path / "found.json"


def test_what_was_written_is_read(path: Path):
    found = Calibration.read(path)
    assert found.config.for_layer(0).budget == 3.5
    assert (found.kind, found.about, found.results) == ("budget", {"seed": 0}, {"kl": 0.1})
    assert MixKVQConfig.parse(str(path)) == found.config
    assert MixKVQConfig.parse(f"{path}:sinks=8") == found.config.replace(sinks=8)


def test_a_plain_configuration_is_read_alike(tmp_path: Path):
    config = MixKVQConfig.preset("quality", sinks=8)
    (tmp_path / "mine.json").write_text(config.to_json())
    assert MixKVQConfig.parse(str(tmp_path / "mine.json")) == config


def test_what_is_not_whole_is_refused(path: Path, tmp_path: Path):
    whole = path.read_text()
    for text, message in (
        (whole[:200], "is not JSON; was it cut short"),
        (whole.replace("3.5", "3.75"), "was changed after it was calibrated"),
        (json.dumps({"format": "mixkvq calibration 1"}), "is not whole: about, config, digest, kind, results"),
        (json.dumps({"format": "mixkvq calibration 9"}), "its format is 'mixkvq calibration 9'"),
        ("[]", "holds no configuration"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            MixKVQConfig.parse(str(path))
    with pytest.raises(ConfigError, match=r"There is no file 'nothing.json'"):
        MixKVQConfig.parse("nothing.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        MixKVQConfig.parse(_folder(tmp_path))


def _folder(tmp_path: Path) -> str:
    (tmp_path / "folder.json").mkdir()
    return str(tmp_path / "folder.json")


def test_calibrations_of_the_package_are_found_by_name(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
):
    monkeypatch.setattr(file, "SHIPPED", path.parent)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert MixKVQConfig.parse("found.json") == Calibration.read(path).config
    with pytest.raises(ConfigError, match=r"With the package come: found.json"):
        MixKVQConfig.parse("lost.json")


def test_every_calibration_of_the_package_is_whole():
    for name in file.shipped():
        assert MixKVQConfig.parse(name).model
