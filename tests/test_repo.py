"""The repository itself: what it promises of its own shape."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from mmscale.cli import _parser, main

ROOT = Path(__file__).parent.parent
VERBS = [
    "train",
    "launch",
    "status",
    "stop",
    "logs",
    "doctor",
    "tune",
    "eval",
    "predict",
    "recipes",
    "data demo",
    "data index",
    "data check",
    "data stats",
    "data bench",
    "data order",
    "data tokenizer",
    "data preview",
    "data pack",
    "data repack",
]

# Joined here, so that this file doesn't hold what it looks for.
PLACES = [
    "/".join(("", "work", "")),
    "/".join(("", "root", "")),
    "/".join(("", "tmp", "w", "")),
    ".".join(("pypi", "org")),
    ".".join(("files", "pythonhosted")),
    ".".join(("registry", "npmjs")),
    ".".join(("download", "pytorch")),
]


def test_the_loop_can_be_read_in_one_sitting() -> None:
    lines = (ROOT / "mmscale" / "train.py").read_text().splitlines()
    assert len(lines) <= 300, "features come in through contracts, not through the loop"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*verb.split(), "--help"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: mmscale {verb} ")
    assert len(said.splitlines()) > 5


def test_help_lists_all_verbs_and_is_quick() -> None:
    """It comes without torch, which takes seconds to import."""
    program = (
        "import sys\n"
        "from mmscale.cli import main\n"
        "try:\n    main(['--help'])\n"
        "finally:\n    print('heavy:', sorted({'torch', 'deepspeed', 'ray', 'numpy', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("heavy: []\n")
    for verb in VERBS:
        assert re.search(rf"^    {verb.split()[0]} ", done.stdout, re.MULTILINE), verb
    # A verb that is added must be added to the list above.
    assert set(_parser()._subparsers._group_actions[0].choices) == {verb.split()[0] for verb in VERBS}  # type: ignore[union-attr,arg-type]


def test_no_file_names_a_place_that_only_its_author_has() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    if listed.returncode:
        pytest.skip("not a git checkout: there is no list of files to look through")
    found = []
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.is_file():
            text = path.read_bytes().decode("utf-8", errors="replace")
            found += [f"{name}: {place}" for place in PLACES if place in text]
    assert not found
