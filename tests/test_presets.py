"""The presets match their documentation."""

import os
import re
from pathlib import Path

import pytest

from baby_xp.config import TrainConfig
from baby_xp.presets import ABOUT, PRESETS, TIMES, VOCABULARIES
from baby_xp.resources import counts
from baby_xp.text import dataset

PAGE = Path(__file__).parents[1] / "docs/presets.md"


@pytest.mark.parametrize("name", PRESETS)
def test_the_page_has_the_size_and_time_of_each_preset(name):
    row = re.search(rf"^\| `{name}` \|(.*)\|$", PAGE.read_text("utf-8"), re.M)
    size = sum(counts.parameters(PRESETS[name].model, VOCABULARIES[name]).values())
    cells = [cell.strip() for cell in row[1].split("|")]
    assert f"{size:,}" in cells
    assert TIMES.get(name, "for a GPU") in cells[-1]


@pytest.mark.parametrize("name", ["baby", "equations", "equations-2", "nanogpt-cpu"])
def test_the_vocabulary_size_matches_the_text(name, tmp_path):
    config = PRESETS[name]
    if config.data.data == "shakespeare" and not os.environ.get("BABY_XP_DATA"):
        pytest.skip("BABY_XP_DATA is not set: it names the folder with these files")
    found = dataset.prepare(config.data, config.model, TrainConfig(num_steps=1), tmp_path)
    assert found.tokenizer.vocab_size == VOCABULARIES[name]


def test_each_preset_has_a_description():
    assert ABOUT.keys() == PRESETS.keys() == VOCABULARIES.keys()
