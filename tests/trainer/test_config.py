"""Configuration: presets are whole, changes take effect, and every mistake is reported at once."""

import json
import tomllib

import pytest

from dckt.errors import ConfigError
from dckt_trainer.config import PRESET_FOLDER, Config, ImageConfig, dump_config, load_config, preset_names


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_names_every_key_and_survives_a_round_trip(name, tmp_path):
    config = load_config(name)
    path = tmp_path / "config.toml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config
    given = tomllib.loads((PRESET_FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
    whole = tomllib.loads(dump_config(config))
    assert {k: sorted(v) if isinstance(v, dict) else 0 for k, v in given.items()} == {
        k: sorted(v) if isinstance(v, dict) else 0 for k, v in whole.items()
    }


def test_the_papers_numbers():
    config = load_config("paper")
    assert config == Config()  # a user's own file changes keys of the paper's
    assert config.network.width == 4096
    assert (config.transfer.rounds, config.transfer.alpha, config.transfer.source_epochs) == (10, 0.2, 1)
    assert (config.text.windows, config.text.maps) == ((3, 4, 5), 100)
    assert load_config("small").network.width == 512


def test_changes_take_effect_and_keep_types():
    changes = ["network.width=64", "optimizer.lr=1", "mmd.estimator=linear", "text.windows=[2, 3]", "seed=7"]
    config = load_config("small", changes)
    assert (config.network.width, config.optimizer.lr, config.mmd.estimator) == (64, 1.0, "linear")
    assert (config.text.windows, config.seed) == ((2, 3), 7)


def test_every_mistake_at_once(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'sede = 1\n[network]\nwidth = "wide"\n[transfer]\nalpha = 1.5\nlaw = "papr"\nrounds = true\n'
        "[text]\nwindows = [3, 0]\n[optimizer]\nlr = 0\n[losses]\nmmd_fc10 = 1\n",
        encoding="utf-8",
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    text = str(caught.value)
    assert "8 mistakes" in text
    for part in (
        "sede",
        "network.width",
        "transfer.alpha",
        "papr",
        "transfer.rounds",
        "windows",
        "optimizer.lr",
        "fc10",
    ):
        assert part in text
    assert "at most 1" in text
    assert "more than 0" in text
    assert "paper, released, all, random" in text


@pytest.mark.parametrize(
    ("preset", "changes", "says"),
    [
        ("papr", [], "neither a preset"),
        ("small", ["network.width"], "section.key=value"),
        ("small", ["seed.x=1"], "not a section"),
        ("small", ["network=3"], "expected a section"),
        ("small", ["optimizer.lr=inf"], "expected float"),
    ],
)
def test_what_cannot_be_read(preset, changes, says):
    with pytest.raises(ConfigError, match=says):
        load_config(preset, changes)


def test_strings_survive_the_file(tmp_path):
    odd = 'a "quoted"\nline \\ of 日本 \U0001f600 \x7f'
    config = Config(image=ImageConfig(weights=odd))
    path = tmp_path / "config.toml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


def test_broken_toml(tmp_path):
    path = tmp_path / "broken.toml"
    path.write_text("[network\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(path)


# --- settings that are gone ---------------------------------------------------------------------------------------


def of_an_older_version(tmp_path, preset, **gone):
    text = dump_config(load_config(preset))
    added = "".join(f"{key} = {json.dumps(value)}\n" for key, value in gone.items())
    path = tmp_path / "config.toml"
    path.write_text(text.replace("[transfer]\n", f"[transfer]\n{added}"), encoding="utf-8")
    return path


def test_runs_of_an_older_version_open_where_what_is_gone_did_nothing(tmp_path):
    assert load_config(of_an_older_version(tmp_path, "paper", smoothing=0.0, weighting="draw")) == load_config("paper")
    # The linear models have no rounds, so nothing of this ever touched them.
    assert load_config(of_an_older_version(tmp_path, "modern", smoothing=0.5, weighting="soft")) == load_config(
        "modern"
    )


@pytest.mark.parametrize(("name", "value"), [("smoothing", 0.5), ("weighting", "soft")])
def test_what_is_gone_and_did_something_is_refused(tmp_path, name, value):
    with pytest.raises(ConfigError, match=f"transfer.{name}: a setting that was taken out"):
        load_config(of_an_older_version(tmp_path, "small", **{name: value}))
